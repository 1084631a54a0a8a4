"""Units of columns: what a header says, and what the values of a column can be.

A language model has some thousand to some trillion parameters, and sees 0.01 to 200,000 tokens for each of them. A
column in millions, billions or logarithms breaks one of these bounds, or disagrees with C = 6 N D.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any

import numpy as np

from scaling_testbed.analysis.rows.names import LETTERS, Row, meaning, number_in, plain_name
from scaling_testbed.errors import ConfigError


@dataclass(frozen=True)
class Unit:
    """A unit of a column. typed: what --map has after `=`, with {} for the column. log10: of the value in ones."""

    name: str
    typed: str
    log10: Callable[[Any], Any]


def _times(name: str, factor: float) -> Unit:
    return Unit(name, "{}*" + f"{factor:.3g}".replace("1000", "1e3").replace("e+", "e").replace("e0", "e"),
                lambda x: np.log10(x) + math.log10(factor))  # fmt: skip


ONES = Unit("ones", "{}", np.log10)
THOUSANDS, MILLIONS, BILLIONS, TRILLIONS = (
    _times(name, factor)
    for name, factor in (("thousands", 1e3), ("millions", 1e6), ("billions", 1e9), ("trillions", 1e12))
)
LOG10 = Unit("decimal logarithms", "10**{}", lambda x: x)
LN = Unit("natural logarithms", "exp({})", lambda x: x / math.log(10))
LOG2 = Unit("binary logarithms", "2**{}", lambda x: x * math.log10(2))
LOG = Unit("logarithms", "10**{}", lambda x: x)  # of a header that does not say to which base
FLOPS = tuple(
    _times(name, factor)
    for name, factor in (
        ("1e12 FLOPs", 1e12),
        ("1e15 FLOPs", 1e15),
        ("1e18 FLOPs", 1e18),
        ("1e21 FLOPs", 1e21),
        ("PF-days", 8.64e19),
    )
)
COUNTS = (THOUSANDS, MILLIONS, BILLIONS, TRILLIONS, LOG10, LN, LOG2)
SIZES = {"model_size": "n_params", "size": "n_params", "data_size": "n_tokens", "dataset_size": "n_tokens"}
UNIT_WORDS = {
    **dict.fromkeys(("k", "thousand", "thousands", "1e3", "10^3", "1000"), THOUSANDS),
    **dict.fromkeys(("m", "mm", "mn", "mio", "mil", "million", "millions", "1e6", "1e+6", "10^6", "1000000"), MILLIONS),
    **dict.fromkeys(("b", "bn", "g", "bil", "billion", "billions", "1e9", "1e+9", "10^9", "1000000000"), BILLIONS),
    **dict.fromkeys(("t", "tn", "trillion", "trillions", "1e12", "10^12"), TRILLIONS),
    **dict.fromkeys(("log10", "log_10", "lg"), LOG10),
    "log": LOG,
    **dict.fromkeys(("ln", "loge", "log_e"), LN),
    **dict.fromkeys(("log2", "log_2"), LOG2),
    **dict.fromkeys(("tflop", "tflops", "teraflop", "teraflops"), FLOPS[0]),
    **dict.fromkeys(("pflop", "pflops", "petaflop", "petaflops", "1e15", "10^15"), FLOPS[1]),
    **dict.fromkeys(("eflop", "eflops", "exaflop", "exaflops", "1e18", "10^18"), FLOPS[2]),
    **dict.fromkeys(("zflop", "zflops", "zettaflop", "zettaflops", "1e21", "10^21"), FLOPS[3]),
    **dict.fromkeys(("pf-days", "pf_days", "pfdays", "pflop_s_days", "petaflop_s_days", "petaflop_days"), FLOPS[4]),
}


def said_unit(column: str) -> tuple[str, Unit] | None:
    """This testbed's column and the unit that a header names: `Params (M)`, `tokens_b`, `log10_N`, `D/1e9`."""
    for base, word in _parts(column):
        words = word.strip().lower().lstrip("x×* ")
        unit = UNIT_WORDS.get(words) or UNIT_WORDS.get(words.split(" ")[0])
        if unit is None:
            continue
        base = base.strip(" _-./()[]:")
        ours = "flops" if unit in FLOPS and plain_name(base) in UNIT_WORDS else meaning(base)
        ours = ours or LETTERS.get(base.upper()) or SIZES.get(plain_name(base))
        if ours is not None:
            return ours, unit
    return None


def _parts(column: str) -> Iterable[tuple[str, str]]:
    """The ways to read a header as a name and a unit."""
    text = column.strip()
    if match := re.fullmatch(r"(.+?)\s*[(\[{]\s*(?:in\s+)?(.+?)\s*[)\]}]", text):
        yield match[1], match[2]
        yield match[2], match[1]  # log10(N)
    if match := re.fullmatch(r"(.+?)\s*/\s*(1e\+?\d+|10\^\d+|10+)", text):
        yield match[1], match[2]
    if match := re.fullmatch(r"(.+?)(?:[_\s./-]in)?[_\s./-]([A-Za-z]+|1e\d+)", text):
        yield match[1], match[2]
    if match := re.fullmatch(r"(log_?10|log_?2|log_?e|ln|lg|log)[_\s./-]?(.+)", text, re.IGNORECASE):
        yield match[2], match[1]
    if match := re.fullmatch(r"(.*[a-z])([KMBGT])", text):
        yield match[1], match[2]
    yield text, plain_name(text)
    if match := re.fullmatch(r"(?:.*_)?((?:[tpez]|tera|peta|exa|zetta)flops?|pf_days)", plain_name(text)):
        yield "flops", match[1]


# What values can be.

SIZE, TOKENS, COMPUTE = "n_params", "n_tokens", "flops"
LOG6 = math.log10(6)
ROUNDED = 1e-6  # of the bounds below, which are decimal logarithms
MOST_NATS = 12.0  # a uniform guess over 162,755 tokens
FEWEST_NATS = 0.6  # per token, of a large model; nats per byte may be fewer


def check_units(
    rows: Sequence[Row], used: Collection[str], typed: Mapping[str, str], told: Collection[str]
) -> list[str]:
    """Check that sizes, tokens and compute are ones, and return warnings.

    rows: with the columns of laws. used: the columns that decide the result. typed: the column of the table behind one
    of ours, where it has another name. told: the columns whose unit --map states. Rows of this testbed are not checked.
    Raises ConfigError, which names the --map to type, if another unit explains the values and ones do not.
    """
    rows = [row for row in rows if row.get("schema_version") is None]
    given = {key: _given(rows, key) for key in (SIZE, TOKENS, COMPUTE)}
    given = {key: values for key, values in given.items() if np.isfinite(values).any()}
    if any(set(row.get("derived", ())) & set(used) for row in rows):
        used = (*used, *given)
    if not set(given) & set(used):
        return []
    said = {key: unit for key in given if key not in told and (unit := _said(typed.get(key, key), key))}
    fits = _plausible(**_logs(given, {}))
    found = _explanations(given, told, said)
    if said:
        found = [units for units in found if all(_is_said(units.get(key), unit) for key, unit in said.items())]
    elif fits.all():
        found = []
    if found:
        _refuse(given, found[0], used, typed)
    if not fits.all() and fits.any() and not said:
        bad = {key: np.where(fits, np.nan, values) for key, values in given.items()}
        if some := [units for units in _explanations(bad, told, {}) if set(units) & set(used)]:
            row = rows[int(np.argmin(fits))]
            values = ", ".join(f"{key} {number_in(row[key]):g}" for key in given if number_in(row.get(key)) is not None)
            meant = " and ".join(f"{key} in {unit.name}" for key, unit in some[0].items())
            raise ConfigError(
                f"{(~fits).sum()} of {len(rows)} rows seem to have {meant}, e.g. row {row.get('row')} ({values}): "
                "write one unit in the whole column, or leave them out with --where"
            )
    return _odd(given, fits)


def _given(rows: Sequence[Row], key: str) -> np.ndarray:
    """The values that the table has; nan where a value is derived, absent or not positive."""
    values = [None if key in row.get("derived", ()) else number_in(row.get(key)) for row in rows]
    return np.array([value if value is not None and 0 < value < 1e300 else math.nan for value in values], float)


def _said(column: str, ours: str) -> Unit | None:
    found = said_unit(column)
    return found[1] if found and found[0] == ours else None


def _is_said(unit: Unit | None, said: Unit) -> bool:
    return unit is said or (said is LOG and unit in (LOG10, LN, LOG2))


def of_values(unit: Unit, key: str, rows: Sequence[Row], column: str) -> Unit:
    """The unit that a header says. Of logarithms to an unsaid base, the one that the values can have. Ones if the cells
    have a unit of their own, as 70M has."""
    if any(re.search(r"\d ?[A-Za-z]$", str(row.get(column)).strip()) for row in rows):
        return ONES
    values = [value for row in rows if (value := number_in(row.get(column))) is not None and math.isfinite(value)]
    if unit is not LOG or not values:
        return unit
    most = {SIZE: 13, TOKENS: 16, COMPUTE: 31}.get(key, math.inf)
    return next((one for one in (LOG10, LN, LOG2) if one.log10(median(values)) <= most), unit)


def _logs(given: Mapping[str, np.ndarray], units: Mapping[str, Unit]) -> dict[str, np.ndarray]:
    count = len(next(iter(given.values())))
    absent = np.full(count, np.nan)
    found = {key: units.get(key, ONES).log10(given[key]) if key in given else absent for key in (SIZE, TOKENS, COMPUTE)}
    return {"n": found[SIZE], "d": found[TOKENS], "c": found[COMPUTE]}


def _plausible(n: np.ndarray, d: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Whether each row can be a run, by the decimal logarithms of N, D and C; nan where one is unknown."""
    tokens = np.where(np.isnan(d), c - LOG6 - n, d)

    def inside(values: np.ndarray, low: float, high: float) -> np.ndarray:
        return np.isnan(values) | ((values >= low - ROUNDED) & (values <= high + ROUNDED))

    small_but_trained = inside(n, 2, 3) & (tokens >= 6)
    sizes = (inside(n, 3, 13) | small_but_trained) & inside(tokens, 3, 16) & inside(tokens - n, -2, 5.3)
    return sizes & inside(c, 6, 31) & inside(c - LOG6 - n - d, -1, 1)


def _explanations(
    given: Mapping[str, np.ndarray], told: Collection[str], said: Mapping[str, Unit]
) -> list[dict[str, Unit]]:
    """The units, other than ones, that make every row plausible; the likeliest first."""
    keys = list(given)
    choices = [[ONES] if key in told else [ONES, *(FLOPS if key == COMPUTE else ()), *COUNTS] for key in keys]
    found: list[tuple[float, int, dict[str, Unit]]] = []
    for chosen in product(*choices):
        units = {key: unit for key, unit in zip(keys, chosen, strict=True) if unit is not ONES}
        if units:
            logs = _logs(given, units)
            if _plausible(**logs).all():
                unsaid = sum(key not in said or not _is_said(unit, said[key]) for key, unit in units.items())
                found.append((unsaid + _distance(**logs), len(found), units))
    return [units for *_, units in sorted(found, key=lambda one: one[:2])]


def _distance(n: np.ndarray, d: np.ndarray, c: np.ndarray) -> float:
    """How far the runs are from usual ones: 20 tokens per parameter, 1e8 parameters, 1e10 tokens, 1e20 FLOPs."""
    tokens = np.where(np.isnan(d), c - LOG6 - n, d)
    usual = ((tokens - n, 1.3, 1.0), (n, 8, 0.1), (tokens, 10, 0.1), (c, 20, 0.1))
    return sum(weight * abs(float(np.nanmedian(values)) - middle) for values, middle, weight in usual
               if np.isfinite(values).any())  # fmt: skip


def _refuse(
    given: Mapping[str, np.ndarray],
    best: Mapping[str, Unit],
    used: Collection[str],
    typed: Mapping[str, str],
) -> None:
    """Raise ConfigError for the likeliest units, if they change a column that is used."""
    if not set(best) & set(used):
        return
    spans = " and ".join(f"{key} {_span(given[key])}{_behind(key, typed)}" for key in best)
    units = " and ".join(dict.fromkeys(unit.name for unit in best.values()))
    kept = " ".join(f'--map {key}="{typed.get(key, key)}*1"' for key in best)
    raise ConfigError(
        f"{spans} look like {units}: add {_maps(best, typed)}; if they are right as they are, write {kept}"
    )


def _maps(units: Mapping[str, Unit], typed: Mapping[str, str]) -> str:
    return " ".join(f'--map {key}="{unit.typed.format(typed.get(key, key))}"' for key, unit in units.items())


def _behind(key: str, typed: Mapping[str, str]) -> str:
    return f" (column {typed[key]})" if typed.get(key, key) != key else ""


def _span(values: np.ndarray) -> str:
    low, high = np.nanmin(values), np.nanmax(values)
    return f"{low:.4g} to {high:.4g}" if low < high else f"{low:.4g}"


def _odd(given: Mapping[str, np.ndarray], fits: np.ndarray) -> list[str]:
    """A warning about values that no unit explains, and yet are unlikely."""
    logs = _logs(given, {})
    meant = 'are these parameters, tokens and FLOPs? A column in millions is --map n_params="COLUMN*1e6"'
    ratios, gaps = logs["d"] - logs["n"], logs["c"] - LOG6 - logs["n"] - logs["d"]
    if np.isfinite(gaps).any() and abs(np.nanmedian(gaps)) > 1:
        return [f"FLOPs are {10 ** float(np.nanmedian(gaps)):.2g} times 6 N D: {meant}"]
    if np.isfinite(ratios).any() and np.nanmax(ratios) < -1:
        return [f"every row has less than a tenth of a token per parameter: {meant}"]
    if not fits.all():
        spans = ", ".join(f"{key} is {_span(values)}" for key, values in given.items())
        return [f"{(~fits).sum()} rows are unlike any language model ({spans}): {meant}"]
    return []


# Losses.

LOSS_UNITS = (  # words of a header, what they mean, the --map to nats, and whether a law has another form in them
    (("ppl", "perplexity"), "a perplexity", "log({})", True),
    (("log10",), "a decimal logarithm", "10**{}", True),
    (("bpb", "bpc", "bits", "bit"), "in bits", "{}*0.693147", False),
)


def check_losses(rows: Sequence[Row], column: str, told: bool) -> list[str]:
    """Check that losses are in nats, and return warnings.

    column: the column of the table behind `loss`. told: whether --map states its unit. Rows of this testbed are not
    checked. Raises ConfigError, which names the --map to type, if the losses are perplexities or logarithms.
    """
    rows = [row for row in rows if row.get("schema_version") is None]
    losses = [
        (row, value) for row in rows if (value := number_in(row.get("loss"))) is not None and math.isfinite(value)
    ]
    if told or not losses:
        return []
    kept = f'if it is in nats, write --map loss="{column}*1"'
    words = plain_name(column).split("_")
    for names, unit, typed, other_form in LOSS_UNITS:
        if set(words) & set(names) and words[0] not in ("log", "ln", "nats"):
            mend = f'--map loss="{typed.format(column)}"'
            if other_form:
                raise ConfigError(f"the column {column} seems to be {unit}, not a loss in nats: add {mend}; {kept}")
            return [f"the column {column} seems to be {unit}, and so are E and the predictions; {mend} gives nats"]
    middle = median(value for _, value in losses)
    if middle < 0:
        raise ConfigError(
            f'losses are negative (median {middle:.4g}); if they are log-likelihoods, add --map loss="{column}*-1"'
        )
    high = [(row, value) for row, value in losses if value > _most_nats(row)]
    trained = [value for row, value in losses
               if (number_in(row.get(SIZE)) or 0) >= 1e8 and (number_in(row.get(TOKENS)) or 0) >= 2e9]  # fmt: skip
    too_high = bool(trained) and median(trained) > 5
    if middle > MOST_NATS or len(high) > len(losses) / 2 or (high and too_high):
        span = _span(np.array([value for _, value in losses]))
        raise ConfigError(
            f"losses of {span} are above that of a uniform guess, and seem to be perplexities: add "
            f'--map loss="log({column})"; {kept}'
        )
    if high:
        places = ", ".join(f"row {row.get('row')} ({value:.4g})" for row, value in high[:3])
        return [f"{len(high)} losses are above that of a uniform guess, e.g. {places}: diverged runs? --where "
                f'"loss<{MOST_NATS:g}" leaves them out']  # fmt: skip
    if trained and (too_high or median(trained) < FEWEST_NATS):
        what, typed = ("perplexity", f"log({column})") if too_high else ("logarithm", f"10**{column}")
        return [f"models of over 1e8 parameters have losses of {median(trained):.4g} after over 2e9 tokens: nats per "
                f'token are 2 to 4; a {what} is --map loss="{typed}"']  # fmt: skip
    return []


def _most_nats(row: Row) -> float:
    """The loss of a uniform guess, with a twentieth for noise."""
    vocabulary = next((number_in(row[key]) for key in ("vocab_size", "model.vocab_size") if row.get(key)), None)
    return 1.05 * math.log(vocabulary) if vocabulary and vocabulary > 1 else MOST_NATS
