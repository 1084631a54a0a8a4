"""Triton has no wheels for some systems: there only the definitions and the chunked head are tested."""

import importlib.util

collect_ignore = []
if importlib.util.find_spec("triton") is None:
    collect_ignore = ["test_attention.py", "test_compiled.py", "test_cross_entropy.py", "test_qk_norm_rope.py"]
