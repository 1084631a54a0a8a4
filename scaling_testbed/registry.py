"""Registries of components that are chosen by name. Components are built in or come from plug-ins."""

import importlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from scaling_testbed.errors import ConfigError

E = TypeVar("E")  # an entry
F = TypeVar("F")  # a function or class as it was written


class Registry(dict[str, E]):
    """Name -> entry, in the order of registration. kind: what an entry is, for messages, such as "optimizer".

    A module registers an entry with the decorator `@REGISTRY.register("name")` or with `REGISTRY.add("name", entry)`.
    Raises ConfigError if another module has registered the name.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self._modules: dict[str, str] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """A decorator that adds a function or class under `name` and returns it unchanged."""

        def add(entry: Any) -> Any:
            self.add(name, entry, module=entry.__module__)
            return entry

        return add

    def add(self, name: str, entry: E, *, module: str | None = None) -> None:
        """Add an entry. module: the module that adds it; None: the calling module.

        The same module may add an entry again, for example when it is reloaded.
        """
        module = module or sys._getframe(1).f_globals["__name__"]
        taken = self._modules.get(name)
        if name in self and taken != module:
            raise ConfigError(f"the {self.kind} {name!r} is registered already by {_place(taken)}; choose another name")
        self._modules[name] = module
        self[name] = entry

    def name_of(self, entry: E) -> str:
        """The name of the registered object `entry`. Raises LookupError if it is not registered."""
        for name, known in self.items():
            if known is entry:
                return name
        raise LookupError(f"{entry!r} is not a registered {self.kind}")


def _place(module: str | None) -> str:
    """A module's name for messages. A plug-in loaded from a file has a generated name, so its path is shown instead."""
    known = sys.modules.get(module or "")
    return getattr(known, "__file__", None) or module if module and "." not in module else str(module)


def resolve(target: Any) -> Any:
    """Import and return the object that "module:attribute" names. Anything that is not a text is returned unchanged.

    A module that must not import torch can thus name a function that needs torch.
    """
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
