"""The source code of the installed packages."""

from dataclasses import dataclass

from scaling_testbed.data.sources.python_stdlib import PythonStdlibConfig
from scaling_testbed.data.sources.source import SOURCES


@SOURCES.register("python_packages")
@dataclass(frozen=True, kw_only=True)
class PythonPackagesConfig(PythonStdlibConfig):
    """The .py files of the installed packages: a larger corpus than `python_stdlib`, of the same kind."""

    name: str = "python_packages"
    validation_fraction: float = 0.02

    _folders = ("purelib", "platlib")
    _skip = frozenset({"__pycache__"})
