"""Write the E of every law, source and part of the runs, and draw the runs: `python studies/known_entropy/entropy.py`"""

import csv
from pathlib import Path

from scaling_testbed.analysis.figures.drawing import save
from scaling_testbed.analysis.figures.panel import Line, Panel
from scaling_testbed.analysis.rows.study import load
from scaling_testbed.papers.entropies import EntropySource, fitted, sources

HERE = Path(__file__).parent
COLUMNS = ("source", "true_E", "least_loss", "rows", "n_rows", "law", "E", "low", "high", "inside")


def table(source: EntropySource) -> list[tuple[object, ...]]:
    """A row for each law, and one for the hull of their intervals, of each part of the runs on a source."""
    least = min(row["loss"] for row in source.rows)
    found: list[tuple[object, ...]] = []
    for part, rows in {"all runs": source.rows, **source.parts()}.items():
        fits = fitted(rows)
        name = "all that have learned" if part == "all" else part
        ends = {**fits.ends, "hull": fits.hull}
        for law, (low, high) in ends.items():
            about = (source.name, round(source.truth, 5), round(least, 5), name, fits.n_rows, law)
            value = round(fits.E[law], 5) if law in fits.E else ""
            found.append((*about, value, round(low, 5), round(high, 5), low <= source.truth <= high))
    return found


def panel(source: EntropySource) -> Panel:
    """The loss of each run above the true E, by tokens per parameter."""
    lines = [
        Line(
            x=[row["tokens_per_param"] for row in rows],
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
