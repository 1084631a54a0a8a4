"""The source code of Python's standard library: real text on every machine, and another text on another one."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from scaling_testbed.data.sources.reading import Tally, Unit, file_identity, plan_file, read_unit, walk
from scaling_testbed.data.sources.source import SOURCES, TextSource
from scaling_testbed.errors import UserError


@SOURCES.register("python_stdlib")
@dataclass(frozen=True, kw_only=True)
class PythonStdlibConfig(TextSource):
    """The .py files of the running interpreter's standard library. They differ between machines: Debian's library has
    11 MB, others have 31 MB."""

    name: str = "python_stdlib"
    validation_fraction: float = 0.05  # because there are few files and their sizes differ much

    _folders: ClassVar[tuple[str, ...]] = ("stdlib",)
    _skip = frozenset({"site-packages", "dist-packages", "__pycache__"})

    def _files(self) -> list[tuple[str, list[str]]]:
        roots = sorted({sysconfig.get_path(name) for name in self._folders})
        found = [(root, [path for path in walk(root, self._skip) if path.endswith(".py")]) for root in roots]
        if not any(paths for _, paths in found):
            raise UserError(f"{self.kind}: no .py file under {', '.join(roots)}; use data=text_files instead")
        return found

    def content(self) -> dict:
        return {"files": [file_identity(paths, root) for root, paths in self._files()]}

    def _paths(self) -> list[str]:
        return [path for _, paths in self._files() for path in paths]

    def inputs(self) -> dict[str, list[str]]:
        return {f"folder {number}": paths for number, (_, paths) in enumerate(self._files(), 1)}

    def units(self, chunk_bytes: int) -> list[Unit]:
        return [unit for path in self._paths() for unit in plan_file("files", path, chunk_bytes)]

    def found(self, units: list[Unit]) -> tuple[dict, Tally]:
        tally, with_units, paths = Tally(), {unit.path for unit in units}, self._paths()
        for path in paths:
            if path not in with_units:
                tally.leave_out("empty", path)
        return {"found": len(paths), "bytes": sum(unit.weight for unit in units)}, tally

    def documents(self, unit: Unit, tally: Tally) -> Iterator[bytes]:
        return read_unit(unit, None, None, tally)
