"""The E of laws fitted to runs on sources of known entropy, beside the lowest loss that a model can have.

A source is all rows of one order and vocabulary. Its true E is the entropy of a token after the tokens before it in its
window (`entropy_window_nats`). A law is fitted to the runs that have learned: those whose loss is nearer to the least
loss that was trained than to the entropy of single tokens. Both are known for a text too.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scaling_testbed.analysis.laws import columns
from scaling_testbed.analysis.laws.fitting import fit
from scaling_testbed.analysis.laws.forms import LAWS
from scaling_testbed.analysis.rows.study import Row
from scaling_testbed.errors import UserError
from scaling_testbed.papers.described import by_its_call
from scaling_testbed.papers.predictions import Number, Numbers

if TYPE_CHECKING:
    from scaling_testbed.papers.measures import Evidence

WITH_E = ("chinchilla", "over_training", "compute")  # the laws that have an E
RESAMPLES = 400
SOURCE = ("data.order", "data.vocab_size")


@dataclass(frozen=True)
class Fitted:
    """E by law, with its 95 % interval by law, from `n_rows` rows."""

    E: dict[str, float]
    ends: dict[str, tuple[float, float]]
    n_rows: int

    @property
    def hull(self) -> tuple[float, float]:
        """The hull of the intervals of all laws: which law is right is not known either."""
        return min(low for low, _ in self.ends.values()), max(high for _, high in self.ends.values())


class EntropySource:
    """The finished runs on one source. truth: the lowest possible loss, in nats per token."""

    def __init__(self, name: str, rows: Sequence[Row]):
        self.name, self.rows = name, list(rows)
        lowest = {row.get("entropy_window_nats") for row in rows} | {row.get("unigram_entropy_nats") for row in rows}
        if len(lowest) != 2 or None in lowest:
            raise UserError(f"the rows of {name} do not have one entropy_window_nats and one unigram_entropy_nats")
        self.truth, self._single = sorted(float(value) for value in lowest if value is not None)

    @functools.cached_property
    def learned(self) -> list[Row]:
        """The rows that have learned."""
        least = min(row["loss"] for row in self.rows)
        return [row for row in self.rows if row["loss"] < (least + self._single) / 2]

    def parts(self) -> dict[str, list[Row]]:
        """The rows that have learned; without the largest size; without the largest multiplier of each size."""
        largest = max(row["n_params"] for row in self.learned)
        longest: dict[float, float] = {}
        for row in self.learned:
            longest[row["n_params"]] = max(longest.get(row["n_params"], 0), row["n_tokens"])
        return {
            "all": self.learned,
            "without the largest size": [row for row in self.learned if row["n_params"] < largest],
            "without the longest runs": [row for row in self.learned if row["n_tokens"] < longest[row["n_params"]]],
        }


def fitted(rows: Sequence[Row]) -> Fitted:
    """E of all laws with an E, fitted to these rows. Raises UserError if they are too few."""
    names = sorted({name for law in WITH_E for name in (*LAWS[law].inputs, LAWS[law].output)})
    return _fitted(tuple(names), tuple(tuple(columns.check(rows, name, names)) for name in names))


@functools.cache  # several claims ask for the same fits
def _fitted(names: tuple[str, ...], values: tuple[tuple[float, ...], ...]) -> Fitted:
    table, found, ends = dict(zip(names, values, strict=True)), {}, {}
    for name in WITH_E:
        law = LAWS[name]
        one = fit(law, {key: table[key] for key in law.inputs}, table[law.output], bootstrap=RESAMPLES)
        if one.ci95 is None or "E" not in one.ci95:
            raise UserError(f"{one.n_rows} runs are too few for an interval of the E of {name}")
        found[name], ends[name] = one.params["E"], one.ci95["E"]
    return Fitted(found, ends, len(values[0]))


def sources(rows: Sequence[Row]) -> list[EntropySource]:
    """The sources of the runs that finished, in the order of `SOURCE`."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.get("status") != "diverged":
            groups.setdefault(tuple(row.get(key) for key in SOURCE), []).append(columns.derived(row))
    return [
        EntropySource(f"order {order}, {symbols} symbols", groups[order, symbols])
        for order, symbols in sorted(groups, key=str)
    ]


@by_its_call
def off(law: str, learned: bool = True) -> Numbers:
    """The relative error of the E of a law, for each source: fitted to the runs that have learned, or to all."""

    def number(one: EntropySource) -> Number:
        found = fitted(one.learned if learned else one.rows)
        value, (low, high) = found.E[law], found.ends[law]
        what = f"{found.n_rows} runs that have learned" if learned else f"all {found.n_rows} runs"
        words = f"{one.name}: E {value:.4f} [{low:.4f}, {high:.4f}] from {what}, true {one.truth:.4f}"
        return Number(abs(value / one.truth - 1), words)

    return _of_sources(number)


@by_its_call
def missed() -> Numbers:
    """The share of the hulls of all laws' intervals that do not hold the true E, over sources and `parts`."""

    def measure(evidence: "Evidence") -> list[Number]:
        hulls = [
            (f"{one.name} {part}", *fitted(rows).hull, one.truth)
            for one in sources(evidence.study.rows)
            for part, rows in one.parts().items()
        ]
        out = [
            f"{name} [{low:.4f}, {high:.4f}], true {true:.4f}"
            for name, low, high, true in hulls
            if not low <= true <= high
        ]
        width = statistics.median([(high - low) / true for _, low, high, true in hulls])
        words = f"{len(hulls) - len(out)} of {len(hulls)} intervals hold E; the median width is {width:.1%} of it"
        return [Number(len(out) / len(hulls), "; ".join([words, *out]))]

    return measure


def _of_sources(number: Callable[[EntropySource], Number]) -> Numbers:
    return lambda evidence: [number(one) for one in sources(evidence.study.rows)]
