"""The search path of configurations: the package's own folder, and the folders that configs= names."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from scaling_testbed.errors import ConfigError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
DEPTHS = ("*.yaml", "*/*.yaml", "*/*/*.yaml")  # train.yaml, optimizer/adamw.yaml, sweep/base/small_scale_proxies.yaml


def config_folder(typed: str, base: Path | None = None) -> str:
    """Return the absolute path of a folder in configs=. A relative path starts at `base`, or at the current folder.
    Raises ConfigError if it is no folder."""
    path = os.path.abspath(os.path.join(base or "", os.path.expanduser(typed)))
    if not os.path.isdir(path):
        raise ConfigError(f"configs={typed}: there is no folder {path}")
    return path


def check_no_doubles(configs: Sequence[str]) -> None:
    """Raise ConfigError, which names both files, if two files of the search path have the same group and name."""
    if not configs:
        return  # one folder holds no name twice
    found: dict[str, Path] = {}
    for root in search_path(configs):
        for path in files_of([root]):
            choice = path.relative_to(root).as_posix()
            if found.setdefault(choice, path).resolve() != path.resolve():
                raise ConfigError(f"{path} has the same name as {found[choice]}; rename one of them")


def files_of(folders: Iterable[str | Path]) -> list[Path]:
    """The configurations in these folders."""
    return [path for folder in folders for depth in DEPTHS for path in sorted(Path(folder).glob(depth))]


def search_path(configs: Sequence[str] = ()) -> list[Path]:
    """The folders that are searched, the package's own first."""
    return [CONFIG_DIR, *map(Path, configs)]


def choices(group: str, configs: Sequence[str] = ()) -> dict[str, Path]:
    """Name -> file of each choice of a group, such as "optimizer" or "sweep/base"."""
    return {path.stem: path for root in search_path(configs) for path in sorted((root / group).glob("*.yaml"))}
