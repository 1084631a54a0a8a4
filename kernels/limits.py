"""The limits of the Triton kernels as plain numbers, so that a run can be planned without torch and Triton."""

ATTENTION_D_HEADS = (32, 64, 80, 96, 128)
QK_NORM_ROPE_WIDEST_HEAD = 256
