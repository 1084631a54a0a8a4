"""Where there is no GPU, Triton's interpreter runs the kernels. To be said before any of them is imported."""

import os

import torch

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if KERNEL_DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
