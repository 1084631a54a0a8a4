"""Write the E of every law for each source, and draw the runs: `python studies/known_entropy/entropy.py`"""

import csv
from pathlib import Path

import numpy as np

from scaling_testbed.analysis.figures.drawing import save
from scaling_testbed.analysis.figures.panel import Line, Panel
from scaling_testbed.analysis.rows.study import load
from scaling_testbed.data.sources.markov import MarkovConfig
from scaling_testbed.papers.entropies import EntropySource, fitted, sources

HERE = Path(__file__).parent
COLUMNS = (
    "source",
    "true_E",
    "floor",
    "least_loss",
    "rows",
    "n_rows",
    "law",
    "E",
    "low",
    "high",
    "inside",
    "holds_floor",
)


def floor(source: EntropySource) -> float:
    """The loss of the source's own probabilities on the windows of the validation tokens, in nats per token. Its
    expectation is the true E."""
    row = source.rows[0]
    length, fields = row["batch.sequence_length"], ("seed", "vocab_size", "n_tokens", "n_validation_tokens", "order")
    markov = MarkovConfig(concentration=row["data.concentration"], **{key: row[f"data.{key}"] for key in fields})
    table, tokens = markov.table(), markov.tokens("validation")
    joint = (markov.stationary(table)[:, None] * table).reshape([markov.vocab_size] * (markov.order + 1))
    starts, losses = np.arange((len(tokens) - 1) // length) * length, []
    for place in range(1, length + 1):
        known = min(place, markov.order)  # tokens of the window before the target
        p = joint.sum(axis=tuple(range(markov.order - known)))
        p = p / p.sum(axis=-1, keepdims=True)
        losses.append(-np.log(p[tuple(tokens[starts + place - known + i] for i in range(known + 1))]))
    return float(np.mean(losses))


def table(source: EntropySource) -> list[tuple[object, ...]]:
    """A row for each law, and one for the hull of their intervals, of each part of the runs on a source."""
    least, lowest = min(row["loss"] for row in source.rows), floor(source)
    found: list[tuple[object, ...]] = []
    for part, rows in {"all runs": source.rows, **source.parts()}.items():
        fits = fitted(rows)
        name = "all that have learned" if part == "all" else part
        ends = {**fits.ends, "hull": fits.hull}
        for law, (low, high) in ends.items():
            known = (round(value, 5) for value in (source.truth, lowest, least))
            about = (source.name, *known, name, fits.n_rows, law)
            value = round(fits.E[law], 5) if law in fits.E else ""
            inside = low <= source.truth <= high, low <= lowest <= high
            found.append((*about, value, round(low, 5), round(high, 5), *inside))
    return found


def panel(source: EntropySource) -> Panel:
    """The loss of each run above the true E, by tokens per parameter."""
    lines = [
        Line(
            x=[row["budget.tokens_per_param"] for row in rows],
            y=[row["loss"] - source.truth for row in rows],
            n_params=size,
            joined=False,
        )
        for size in sorted({row["n_params"] for row in source.rows})
        if (rows := [row for row in source.rows if row["n_params"] == size])
    ]
    return Panel(
        lines=lines,
        x_label="tokens per parameter",
        y_label="loss - true E (nats per token)",
        title=source.name,
        y_log=True,
        caption=f"All runs on the source of {source.name}; three seeds.",
    )


def main() -> None:
    """Write entropy.csv, entropy.png and entropy.svg beside this file."""
    found = sources(load(HERE).rows)
    with (HERE / "entropy.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(row for source in found for row in table(source))
    save([panel(source) for source in found], [HERE / "entropy.png", HERE / "entropy.svg"])


if __name__ == "__main__":
    main()
