"""A testbed for pretraining small decoder-only language models in grids.

    import scaling_testbed as st
    row = st.train(["model=nano_s", "data=markov", "budget.steps=100"])

`st.__all__` lists the functions of api.py. Importing the package does not import their dependencies, such as torch and
Hydra.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scaling_testbed.api import (
        allocate,
        calls,
        compare_laws,
        compose,
        critical_batch,
        decide,
        fit,
        fit_groups,
        instability,
        load_model,
        load_rows,
        lr_sensitivity,
        next_runs,
        plan,
        predict,
        report,
        run_sweep,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "allocate",
    "calls",
    "compare_laws",
    "compose",
    "critical_batch",
    "decide",
    "fit",
    "fit_groups",
    "instability",
    "load_model",
    "load_rows",
    "lr_sensitivity",
    "next_runs",
    "plan",
    "predict",
    "report",
    "run_sweep",
    "train",
]


class _Package(types.ModuleType):
    """This package, with the functions of api.py as properties.

    They are properties because Python's import system sets each submodule as an attribute of its package: after `import
    scaling_testbed.train`, a plain attribute `train` would be the module. A property of the class takes precedence, and
    its setter ignores modules.
    """

    def __dir__(self):
        return sorted({*vars(self), *__all__})


def _forwarded(name: str) -> property:
    def get(package):
        return getattr(importlib.import_module(f"{__name__}.api"), name)

    def set_(package, value):
        if not isinstance(value, types.ModuleType):
            raise AttributeError(f"{__name__}.{name} is the function of api.py and cannot be replaced")

    return property(get, set_)


for _name in __all__:
    setattr(_Package, _name, _forwarded(_name))
sys.modules[__name__].__class__ = _Package
