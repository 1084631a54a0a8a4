"""Plug-ins: modules outside this package that register components, which can then be chosen by name.

A plug-in is named by the dotted name of a module or by the path of a .py file. Each process loads it once, before it
chooses any component. The origin of the plug-in is recorded with a hash of its source.

The hash is of the plug-in's own source. Modules that it imports and that are neither installed nor part of Python, such
as a helper beside it, have hashes of their own.

A name that the user typed is always loaded. A name that a file (a sweep, a run folder) contains is loaded only if the
user typed the same name or if it is an installed module, because such a file may come from someone else.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlparse

from scaling_testbed.errors import ConfigError, UserError, first_line
from scaling_testbed.files import sha256_of

OURS = Path(__file__).parent


@dataclass(frozen=True)
class Plugin:
    """A loaded plug-in.

    name: a dotted name, or the absolute path of a file. typed: the name as the user typed it. module: its name in
    sys.modules. origin: the file; for a module inside a package, the folder of the package. sha256: the hash of the
    file, or of all .py files in the folder. imports: path -> sha256 of the files outside of `origin` that it imports,
    directly or not, without those of Python, of installed packages and of this package.
    """

    name: str
    typed: str
    module: str
    origin: str
    sha256: str
    imports: Mapping[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The plug-in as plain data for environment.json."""
        return asdict(self) | {"imports": dict(self.imports)}


_loaded: dict[str, Plugin] = {}


def plugin_name(typed: str, base: Path | None = None) -> str:
    """A dotted name unchanged, or the absolute path of a .py file. A relative path starts at `base`.

    base: None means the current folder.
    """
    if not (typed.endswith(".py") or os.sep in typed):
        return typed
    return os.path.abspath(os.path.join(base or "", os.path.expanduser(typed)))


def load_plugins(typed: Sequence[str]) -> list[Plugin]:
    """Load the plug-ins that the user named, in this order, each once. A file may then name the same plug-ins.

    Raises ConfigError with one line if a plug-in is missing, its code raises, it registers a name that is taken, or
    its file has changed since this process loaded it.
    """
    return [_load(plugin_name(one), one) for one in typed]


def load_named_in(file: Path, names: Sequence[str], option: str) -> list[Plugin]:
    """Load the plug-ins that `file` names, if that is allowed.

    option: what the user types to allow a plug-in: "plugins=" or "--plugins ". Raises UserError that names the file and
    the plug-in if it was neither typed nor installed, and the errors of `load_plugins`.
    """
    for name in names:
        if plugin_name(name) not in _loaded and not is_installed(name):
            raise UserError(
                f"{file} names the plug-in {name}, which is not installed and not named on this command line, so it "
                f"was not run. To allow it, type {option}{name}"
            )
    return load_plugins(names)


def loaded_plugins() -> list[Plugin]:
    """The plug-ins that this process has loaded, in the order of loading."""
    return list(_loaded.values())


def plugins_of(names: Sequence[str]) -> list[Plugin]:
    """The loaded plug-ins with these names. A process may have loaded the plug-ins of other runs too."""
    return [_loaded[plugin_name(name)] for name in names]


def hashes(names: Sequence[str]) -> dict[str, str]:
    """Name -> sha256 of the loaded plug-ins `names`, and path -> sha256 of the files that they import."""
    return hashes_in(plugin.record() for plugin in plugins_of(names))


def hashes_in(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The same of the records of plug-ins in environment.json. Those of earlier versions have no imports."""
    found: dict[str, str] = {}
    for record in records:
        found |= {record["name"]: record["sha256"], **record.get("imports", {})}
    return found


def source_hash(cls: type) -> str | None:
    """The sha256 of the plug-in that defines a class, or of the file that a plug-in imports it from, with all that this
    imports; None if no plug-in defines it."""
    module = sys.modules.get(cls.__module__)
    file = Path(getattr(module, "__file__", None) or "")
    if module is None or file.is_relative_to(OURS):
        return None
    for plugin in _loaded.values():
        if file.is_relative_to(plugin.origin):
            return _hash_of_all([plugin.sha256, *plugin.imports.values()])
    if any(str(file) in plugin.imports for plugin in _loaded.values()):
        return _hash_of_all([sha256_of(file), *_imports(file, module.__package__ or "").values()])
    return None


def _hash_of_all(sha256s: Sequence[str]) -> str:
    """The hash of several; a single one is its own."""
    several = sorted(set(sha256s))
    return several[0] if len(several) == 1 else hashlib.sha256(" ".join(several).encode()).hexdigest()


def difference(then: Mapping[str, str] | None, now: Mapping[str, str]) -> str | None:
    """Why a run made with the plug-ins `then` cannot continue with the plug-ins `now`, in one line.

    Both map a name to a sha256. Returns None if each hash of `then` is among those of `now`, under any name.
    """
    for name, sha256 in (then or {}).items():
        if sha256 in now.values():
            continue
        was = f"plug-in {name} (sha256 {str(sha256)[:12]})"
        if same := [other for other in now if os.path.basename(other) == os.path.basename(name)]:
            return f"{was} has changed: it is {now[name if name in now else same[0]][:12]} now"
        return f"{was} is not named now; type plugins={name}"
    return None


def check_unchanged(then: Mapping[str, str] | None, names: Sequence[str], folder: Path) -> None:
    """Raise UserError if the run in `folder`, made with the plug-ins `then`, cannot continue with those in `names`."""
    if problem := difference(then, hashes(names)):
        raise UserError(f"{folder} was made with other code: {problem}; restore it, or give another name=")


def _load(name: str, typed: str) -> Plugin:
    if name not in _loaded:
        module = _import_file(name) if name.endswith(".py") or os.sep in name else _import_module(name)
        origin = _origin(module)
        imports = _imports(origin, module.__package__ or "")
        _loaded[name] = Plugin(name, typed, module.__name__, str(origin), _sha256(origin), imports)
    elif _changed_since(_loaded[name]):
        raise ConfigError(f"plug-in {name} has changed since this process loaded it; start Python (the kernel) again")
    return _loaded[name]


def _changed_since(plugin: Plugin) -> bool:
    """Whether the file of a plug-in, or one that it imports, has changed. A package is not checked: reading it for each
    run would take long."""
    files = {plugin.origin: plugin.sha256} | dict(plugin.imports)
    return any(os.path.isfile(file) and sha256_of(Path(file)) != sha256 for file, sha256 in files.items())


class _FromSource(importlib.machinery.SourceFileLoader):
    """A loader that always compiles the source file and writes no .pyc file.

    A .pyc file records the source's time in whole seconds, so it can miss a later change within the same second.
    """

    def get_code(self, fullname):
        return self.source_to_code(self.get_data(self.path), self.path)


def _import_file(path: str) -> ModuleType:
    """Import a file under a name that is the same in every process, so that its objects can be pickled."""
    if not (path.endswith(".py") and os.path.isfile(path)):
        raise ConfigError(f"plug-in {path}: there is no such .py file; give a .py file or a module's dotted name")
    stem = re.sub(r"\W", "_", Path(path).stem)
    name = f"plugin_{stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    loader = _FromSource(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # a loader was given
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(_failure(path, error)) from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"plug-in {name}: there is no module {missing}; install it (pip install -e FOLDER), or give "
                "the path of a .py file"
            ) from None
        raise ConfigError(_failure(name, error)) from error


def _failure(name: str, error: BaseException) -> str:
    """A message about an error that a plug-in's code raised, with the last line of the plug-in in the traceback."""
    if isinstance(error, SyntaxError):
        file, line = error.filename or name, error.lineno
    else:
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        spec = None if os.sep in name else _find_spec(name.partition(".")[0], None)
        place = os.path.dirname(spec.origin) if spec and spec.submodule_search_locations and spec.origin else name
        own = [one for one in frames if one[0] == getattr(spec, "origin", None) or Path(one[0]).is_relative_to(place)]
        file, line = (own or frames)[-1]
    where = f"{file}, line {line}" if file == name else f"{name} ({file}, line {line})"
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    said = error.msg if isinstance(error, SyntaxError) else first_line(error)
    return f"plug-in {where}: {kind}{said}"


def _origin(module: ModuleType) -> Path:
    """The folder of the package that a module is or is part of; for any other module, its file."""
    if hasattr(module, "__path__"):
        if getattr(module, "__file__", None) is None:
            raise ConfigError(f"plug-in {module.__name__} is a folder without an __init__.py; name a module in it")
        return Path(os.path.abspath(next(iter(module.__path__))))
    source = getattr(module, "__file__", None)
    if source is None:
        raise ConfigError(f"plug-in {module.__name__} is part of the interpreter and has no source file")
    file = Path(os.path.abspath(source))
    return file.parent if "." in module.__name__ else file


def _sha256(origin: Path) -> str:
    if origin.is_file():
        return sha256_of(origin)
    digest = hashlib.sha256()
    for path in sorted(origin.rglob("*.py")):
        digest.update(f"{path.relative_to(origin).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _imports(origin: Path, package: str) -> dict[str, str]:
    """Path -> sha256 of the files that the source at `origin`, a file or a folder, imports from outside of itself. They
    are found in the text, so that neither the order of imports nor an import inside a function makes a difference.

    package: that of the file, or of the modules in the folder, for relative imports.
    """
    found: dict[str, str] = {}
    files = [origin] if origin.is_file() else sorted(origin.rglob("*.py"))
    waiting = [(file, ".".join([package, *file.relative_to(origin).parent.parts])) for file in files]
    while waiting:
        for name in _imported_names(*waiting.pop(0)):
            spec = _outside(name)
            file = Path(os.path.abspath(spec.origin)) if spec and spec.origin else None
            if spec and file and not file.is_relative_to(origin) and str(file) not in found:
                found[str(file)] = sha256_of(file)
                waiting.append((file, name if spec.submodule_search_locations else name.rpartition(".")[0]))
    return found


def _imported_names(file: Path, package: str) -> Iterator[str]:
    """The modules that a file of a package may import, each after the packages that it lies in."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (OSError, SyntaxError, ValueError, RecursionError):  # such as a module in C
        return
    for node in nodes:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _outside(name: str) -> importlib.machinery.ModuleSpec | None:
    """The spec of a module that belongs neither to Python, to an installed distribution nor to this package; None for
    any other, and where there is no such module."""
    top = name.partition(".")[0]
    if not top or top in sys.stdlib_module_names or top == OURS.name:
        return None
    spec = getattr(sys.modules.get(name), "__spec__", None) or _spec_without_import(name)
    if spec is None or not spec.has_location or not spec.origin or not os.path.isfile(spec.origin):
        return None
    return None if any(Path(spec.origin).resolve().is_relative_to(folder) for folder in _site_folders()) else spec


def _spec_without_import(name: str) -> importlib.machinery.ModuleSpec | None:
    path, parts = None, name.split(".")
    for end in range(1, len(parts) + 1):
        spec = None
        with contextlib.suppress(Exception):  # of a finder that another package has installed
            spec = _find_spec(".".join(parts[:end]), path)
        if spec is None:
            return None
        path = list(spec.submodule_search_locations or [])
    return spec


# ------------------------------------------------------------------------------------- what is installed


def is_installed(name: str) -> bool:
    """Whether a dotted name is a module of an installed distribution. The check runs no code of the module.

    Each package in the name must lie in the interpreter's site-packages or belong to an editable install. A module that
    Python finds only through the current folder or PYTHONPATH is not installed.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        return False
    parts = name.split(".")
    path: list[str] | None = None
    loader = None
    for end in range(1, len(parts) + 1):
        try:
            spec = _find_spec(".".join(parts[:end]), path)
        except KeyError:  # a folder without __init__.py, in a package that was not imported
            return False
        if spec is None or spec.loader is not None and not _is_from_distribution(spec.origin, parts[0]):
            return False
        path, loader = list(spec.submodule_search_locations or []), spec.loader
    return loader is not None  # None: a folder without __init__.py, which is no module


def _find_spec(name: str, path: list[str] | None) -> importlib.machinery.ModuleSpec | None:
    """The spec that an import would find, without importing the parent package."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is not None and (spec := find(name, path)) is not None:
            return spec
    return None


def _is_from_distribution(origin: str | None, top: str) -> bool:
    if origin is None or not os.path.isfile(origin):
        return False
    file = Path(origin).resolve()
    if any(file.is_relative_to(folder) for folder in _site_folders()):
        return True
    packages = [
        root / layout / top for root in _editable_roots().get(top, ()) for layout in ("", "src", "lib", "python")
    ]
    return any(file.is_relative_to(package) or file == package.with_suffix(".py") for package in packages)


@functools.cache
def _site_folders() -> tuple[Path, ...]:
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return tuple({Path(folder).resolve() for folder in folders})


@functools.cache
def _editable_roots() -> dict[str, list[Path]]:
    """Top-level module -> the project folders of its editable installs.

    Only metadata in site-packages counts, because any other folder on sys.path may contain arbitrary metadata.
    """
    found: dict[str, list[Path]] = {}
    for distribution in importlib.metadata.distributions(path=[str(folder) for folder in _site_folders()]):
        try:
            record = json.loads(distribution.read_text("direct_url.json") or "{}")
            url = urlparse(record["url"]) if record.get("dir_info", {}).get("editable") else None
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if url is None or url.scheme != "file":
            continue
        tops = (distribution.read_text("top_level.txt") or distribution.name.replace("-", "_")).split()
        for top in tops:
            found.setdefault(top, []).append(Path(unquote(url.path)).resolve())
    return found
