"""What can be chosen by name: built in, or registered by a plug-in."""

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from scaling_testbed.errors import ConfigError

E = TypeVar("E")


class Registry(dict[str, Any]):
    """Name -> entry, in the order of registration. kind: what an entry is, for messages: "optimizer".

    A module registers by the decorator `@REGISTRY.register("name")`, or by `REGISTRY.add("name", entry)`. Raises
    ConfigError for a name that another module has taken.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self._modules: dict[str, str] = {}

    def register(self, name: str) -> Callable[[E], E]:
        """A decorator that adds a function or class under `name` and returns it as it is."""

        def add(entry: E) -> E:
            self.add(name, entry, module=entry.__module__)
            return entry

        return add

    def add(self, name: str, entry: Any, *, module: str = "") -> None:
        """Add an entry. module: who adds it; the same module may add it again, as a reload does."""
        taken = self._modules.get(name)
        if name in self and taken != module:
            where = f" by {taken}" if taken else ""
            raise ConfigError(f"the {self.kind} {name!r} is registered already{where}; choose another name")
        self._modules[name] = module
        self[name] = entry

    def get_or_refuse(self, field: str, name: str) -> Any:
        """The entry of `name`. Raises ConfigError naming `field` and the choices where there is none."""
        if name not in self:
            raise ConfigError(f"{field} must be one of {', '.join(self)}; got {name!r}")
        return self[name]


def resolve(target: Any) -> Any:
    """The object that "module:attribute" names, imported now; anything but a text is returned as it is.

    So a record can stand where torch must not be imported, beside the function that needs it.
    """
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
