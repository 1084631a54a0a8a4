"""What can be chosen by name: built in, or registered by a plug-in."""

import importlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from scaling_testbed.errors import ConfigError

E = TypeVar("E")  # an entry
F = TypeVar("F")  # a function or class as it was written


class Registry(dict[str, E]):
    """Name -> entry, in the order of registration. kind: what an entry is, for messages: "optimizer".

    A module registers by the decorator `@REGISTRY.register("name")`, or by `REGISTRY.add("name", entry)`. Raises
    ConfigError for a name that another module has taken.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self._modules: dict[str, str] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """A decorator that adds a function or class under `name` and returns it as it is."""

        def add(entry: Any) -> Any:
            self.add(name, entry, module=entry.__module__)
            return entry

        return add

    def add(self, name: str, entry: E, *, module: str | None = None) -> None:
        """Add an entry. module: who adds it, the calling module where it is not said; the same module may add it again,
        as a reload does."""
        module = module or sys._getframe(1).f_globals["__name__"]
        taken = self._modules.get(name)
        if name in self and taken != module:
            raise ConfigError(f"the {self.kind} {name!r} is registered already by {_place(taken)}; choose another name")
        self._modules[name] = module
        self[name] = entry

    def name_of(self, entry: E) -> str:
        """The name under which `entry` itself was registered. Raises LookupError where it was not."""
        for name, known in self.items():
            if known is entry:
                return name
        raise LookupError(f"{entry!r} is no {self.kind} that was registered")


def _place(module: str | None) -> str:
    """A module for a person: a plug-in that is a file has a made-up name, and is shown as the file."""
    known = sys.modules.get(module or "")
    return getattr(known, "__file__", None) or module if module and "." not in module else str(module)


def resolve(target: Any) -> Any:
    """The object that "module:attribute" names, imported now; anything but a text is returned as it is.

    So a record can stand where torch must not be imported, beside the function that needs it.
    """
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
