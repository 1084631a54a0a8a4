"""Sources of data, one file a kind. Importing this room registers every kind of ours."""

from scaling_testbed.data.sources import (  # noqa: F401
    copy,
    huggingface,
    markov,
    noise,
    python_packages,
    python_stdlib,
    text_files,
    token_files,
)
from scaling_testbed.data.sources.source import SOURCES

__all__ = ["SOURCES"]
