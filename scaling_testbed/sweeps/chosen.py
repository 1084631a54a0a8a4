"""A sweep file of the runs that analysis/laws/next_runs.py chose, and the models among which it chooses."""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from scaling_testbed.analysis.laws.next_runs import NextRuns
from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.search import choices
from scaling_testbed.errors import ConfigError
from scaling_testbed.model.counting import count_params
from scaling_testbed.sweeps.plan import planned_vocab_size


def models(typed: Sequence[str], overrides: Sequence[str], size: str) -> list[dict[str, Any]]:
    """The name and the size of each model, as rows with `model` and `n_params`, the smallest first.

    typed: names in configs/model, or patterns such as nano_*. overrides: of every run; the vocabulary and the parts of
    a model are counted with them. size: what N counts. Raises ConfigError for a name or pattern without a model, and as
    `compose` does.
    """
    known = choices("model")
    names: dict[str, None] = {}
    for pattern in typed:
        found = [name for name in known if fnmatchcase(name, pattern)]
        if not found:
            raise ConfigError(f"--models {pattern}: there is no such model; it is one of {', '.join(known)}")
        names.update(dict.fromkeys(found))
    runs = compose_many([[*overrides, f"model={name}", "budget.tokens=1e6"] for name in names])
    counts = [count_params(run.model.resolved(planned_vocab_size(run))) for run in runs]
    rows = [{"model": name, "n_params": float(getattr(one, size))} for name, one in zip(names, counts, strict=True)]
    return sorted(rows, key=lambda one: one["n_params"])


def sweep_text(found: NextRuns, overrides: Sequence[str]) -> str:
    """The chosen runs as a sweep file, for `sweep run FILE`. Raises ConfigError if they are no models."""
    if any("model" not in one for one in found.runs):
        raise ConfigError("a sweep file needs models: give --models, such as --models nano_s,nano_m")
    tokens = ", ".join(f"{one['n_tokens']:.0f}" for one in found.runs)
    at = " and ".join(f"{key} = {value:g}" for key, value in found.target.items())
    lines = [
        "# Written by `analyze next`. Rates, batches and the like are those of the overrides; a key that should move",
        "# with the size, such as optimizer.lr, can be one more list under `together`.",
        f"description: Runs that narrow the predicted loss at {at} most for their cost.",
        "analysis: fit",
        *([f"overrides: {json.dumps(list(overrides))}"] if overrides else []),
        "together:",
        f"  - budget.tokens: [{tokens}]",
        f"    model: [{', '.join(one['model'] for one in found.runs)}]",
    ]
    return "\n".join(lines) + "\n"
