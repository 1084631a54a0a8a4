"""The limits of the Triton kernels as plain numbers, so that a run can be planned without torch and Triton."""

ATTENTION_D_HEADS = (32, 64, 80, 96, 128)
QK_NORM_ROPE_WIDEST_HEAD = 256
RECOMPUTED_HEAD_WIDEST_MODEL = 128  # at 256 the tiles that fit in registers are too small to be fast
# Features of all heads of a position, where one norm goes over them; heads and widths are padded to powers of two.
QK_NORM_ROPE_WIDEST_ROW = 8192


def padded_row(n_heads: int, d_head: int) -> int:
    """Features of `n_heads` heads of `d_head` in a tile of qk_norm_rope."""
    return (1 << (n_heads - 1).bit_length()) * (1 << (d_head - 1).bit_length())
