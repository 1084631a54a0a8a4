"""What the Triton kernels can take, as plain numbers: a run is planned where neither torch nor Triton is."""

ATTENTION_D_HEADS = (32, 64, 80, 96, 128)
QK_NORM_ROPE_WIDEST_HEAD = 256
