"""The settings in which the runs of a table differ, and the one that a law would have to know."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scaling_testbed.analysis.rows.names import is_text, meaning, number_in, plain_name
from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.config.budget import CONVENTIONS

MOST_VALUES = 20  # a column with more values is a measurement
# What a run has used or reached, and no setting.
MEASURES = {
    *("n_params", "n_tokens", "flops", "flops_6nd", "tokens_per_param", "steps", "epochs", "unique_tokens"),
    *("loss", "val_loss", "loss_other", "error", "task_error", "accuracy", "row", "derived", *CONVENTIONS),
}
OURS = ("dataset", "data_fingerprint", "precision")  # the settings of this testbed's rows that have no dot
SHUFFLES, LEVEL, LEAST_SHARE, SEED = 2000, 0.01, 0.25, 0
LEAST_SHUFFLES, AT_ONCE = 200, 2**24  # of a large table, and numbers in all shuffles


def setting_columns(rows: Sequence[Row], but: Sequence[str] = ()) -> list[str]:
    """The columns that look like settings of the runs, without those in `but` and without seeds.

    They have 2 to 20 values, at most half as many as there are rows. In rows of this testbed they are the keys of the
    configuration.
    """
    ours = any(row.get("schema_version") is not None for row in rows)
    found = []
    for key in dict.fromkeys(key for row in rows for key in row):
        words = plain_name(key).split("_")
        named = key in but or key in MEASURES or meaning(key) in MEASURES or words[-1] == "seed" or is_text(key)
        if (named and key not in OURS) or (ours and "." not in key and key not in OURS):
            continue
        if 2 <= len({repr(row.get(key)) for row in rows}) <= min(MOST_VALUES, len(rows) // 2):
            found.append(key)
    return found


def unseen(
    rows: Sequence[Row], inputs: Mapping[str, Sequence[float]], residuals: Sequence[float], but: Sequence[str] = ()
) -> list[str]:
    """A warning about the setting that explains the largest part of a law's residuals, if it is at least a quarter.

    The part is that of the variance of the residuals' ranks that lies between the values of the setting, less what
    chance gives (epsilon squared). Chance is judged by 2,000 permutations (fewer for
    large tables), at one percent over all settings together.
    A setting that grows with an input, such as a batch for each size, cannot be told from it and is left out.
    """
    ranks = np.argsort(np.argsort(residuals)).astype(float)
    ranks -= ranks.mean()
    total = float(ranks @ ranks)
    columns = [key for key in setting_columns(rows, tuple(inputs)) if key not in but]
    codes = {key: np.unique([repr(row.get(key)) for row in rows], return_inverse=True)[1].ravel() for key in columns}
    codes = {key: code for key, code in codes.items() if not any(in_blocks(code, values) for values in inputs.values())}
    if not codes or total == 0:
        return []
    apart = {key: float(_between(ranks[None], code)[0]) for key, code in codes.items()}
    spare = {key: code.max() / (len(rows) - 1) for key, code in codes.items()}
    shares = {key: (apart[key] / total - spare[key]) / (1 - spare[key]) for key in codes}
    shuffles, reached = min(SHUFFLES, max(LEAST_SHUFFLES, AT_ONCE // len(rows))), dict.fromkeys(codes, 0)
    rng = np.random.default_rng(SEED)
    for begin in range(0, shuffles, 100):
        shuffled = rng.permuted(np.tile(ranks, (min(100, shuffles - begin), 1)), axis=1)
        for key, code in codes.items():
            reached[key] += int(np.sum(_between(shuffled, code) >= apart[key] * (1 - 1e-9)))
    likely = {key for key in codes if (reached[key] + 1) / shuffles * len(codes) > LEVEL + 1 / shuffles}
    shares = {key: share for key, share in shares.items() if share >= LEAST_SHARE and key not in likely}
    if not shares:
        return []
    key = max(shares, key=shares.__getitem__)
    value = next(str(row[key]) for row in rows if row.get(key) is not None)
    more = [one for one in shares if one != key]
    together = "" if number_in(value) is not None else f", or fit the groups together with --by {key}"
    others = f" ({', '.join(more[:3])} too)" if more else ""
    return [
        f"{key} has {codes[key].max() + 1} values, and they explain {shares[key]:.0%} of what the law leaves{others}: "
        f'the law describes all of them; select with --where "{key}={value}"{together}'
    ]


def _between(ranks: np.ndarray, code: np.ndarray) -> np.ndarray:
    """The sum of squares between groups, of each row of `ranks`, whose mean is zero."""
    member = np.eye(code.max() + 1)[code]
    return np.sum((ranks @ member) ** 2 / member.sum(axis=0), axis=1)


def in_blocks(code: np.ndarray, values: Sequence[float]) -> bool:
    """Whether the groups lie one after another in an input, and no value of it is in two of them."""
    at = np.asarray(values, float)
    order = np.lexsort((code, at))
    at, code = at[order], code[order]
    changes = code[1:] != code[:-1]
    return not np.any(changes & (at[1:] == at[:-1])) and int(np.sum(changes)) == int(code.max())


def varied(rows: Sequence[Row], keys: Sequence[str]) -> list[str]:
    """Those of `keys` in which the rows differ."""
    return [key for key in keys if len({repr(row.get(key)) for row in rows}) > 1]


def alike(rows: Sequence[Row], keys: Sequence[str]) -> list[list[Row]]:
    """The rows in groups that are equal in all `keys`."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(repr(row.get(key)) for key in keys), []).append(row)
    return list(groups.values())
