"""The interventions that the configuration of a run switches on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from scaling_testbed.errors import ConfigError
from scaling_testbed.learning.interventions import (  # noqa: F401 (they register)
    magnitude_pruning,
    qk_clip,
    sigma_reparam,
    spikes,
)
from scaling_testbed.learning.interventions.base import INTERVENTIONS, Intervention

if TYPE_CHECKING:
    from scaling_testbed.learning.optimizers import OptimizerConfig
    from scaling_testbed.model.config import ModelConfig


def choose_interventions(
    optimizer: OptimizerConfig, model: ModelConfig, options: Mapping[str, Mapping[str, object]]
) -> dict[str, Intervention]:
    """Name -> intervention, in the order in which a step runs them.

    First come those of `options`, then those that a key of `optimizer` or `model` switches on. Those that follow the
    weights come last.

    options: name -> arguments of an intervention (RunConfig.interventions). Raises ConfigError that names the key for a
    name that is not registered, for a name that another key switches on, for wrong arguments, and for a model on which
    an intervention cannot act.
    """
    found = {name: _make(name, arguments) for name, arguments in options.items()}
    for name, kind in INTERVENTIONS.items():
        if asked := kind.asked_by(optimizer, model):
            found[name] = asked
    for intervention in found.values():
        intervention.check(model)
    return dict(sorted(found.items(), key=lambda entry: entry[1].follows_weights))


def _make(name: str, arguments: Any) -> Intervention:
    where = f"interventions.{name}"
    kind = INTERVENTIONS.get(name)
    if kind is None:
        choices = [name for name, kind in INTERVENTIONS.items() if kind.key is None]
        known = f"registered are {', '.join(choices)}" if choices else "a plug-in must register it first"
        raise ConfigError(f"{where}: there is no such intervention; {known}")
    if kind.key is not None:
        raise ConfigError(f"{where}: this intervention is switched on by {kind.key}; set that key instead")
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"{where} must be a mapping, +{where}.KEY=VALUE, or +{where}={{}}; got {arguments!r}")
    signature = inspect.signature(kind)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        takes = f"it takes {', '.join(signature.parameters)}" if signature.parameters else "it takes no arguments"
        raise ConfigError(f"{where}: {error}; {takes}") from None
    make: Callable[..., Intervention] = kind  # each kind has its own arguments
    try:
        return make(**arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error
