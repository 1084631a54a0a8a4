"""Sources of data, one file for each kind. Importing this package registers every built-in kind."""

from scaling_testbed.data.sources import (  # noqa: F401
    arithmetic,
    canaries,
    copy,
    filtered,
    huggingface,
    in_context_tasks,
    markov,
    mixture,
    noise,
    planted,
    python_packages,
    python_stdlib,
    text_files,
    token_files,
)
from scaling_testbed.data.sources.source import SOURCES

__all__ = ["SOURCES"]
