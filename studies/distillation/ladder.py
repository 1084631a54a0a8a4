"""Draw the loss of students against that of their teachers: `python studies/distillation/ladder.py`"""

from pathlib import Path

import numpy as np

from scaling_testbed.analysis.figures.drawing import save
from scaling_testbed.analysis.figures.panel import Line, Panel
from scaling_testbed.analysis.rows.study import load

HERE = Path(__file__).parent
LABELS = {"kl": "all probabilities", "half": "half of the loss", "half_top4": "half, 4 stored", "top4": "4 stored"}
LEVELS = {"ce": "cross-entropy", "ce_twice": "cross-entropy, twice the steps"}


def main() -> None:
    """Write ladder.png and ladder.svg beside this file. The band is the range over seeds."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in load(HERE).rows:
        arm = row["logging.group"]
        teacher = row["teacher"]["val_loss"] if row.get("teacher") else 0.0
        name = arm if arm in LEVELS else arm.rpartition("_")[0]
        found.setdefault(name, {}).setdefault(teacher, []).append(row["val_loss"])
    lines = []
    for style, (name, label) in enumerate(LABELS.items()):
        points = sorted(found[name].items())
        y = [float(np.mean(values)) for _, values in points]
        band = [min(values) for _, values in points], [max(values) for _, values in points]
        lines.append(Line(x=[x for x, _ in points], y=y, band=band, label=label, style=style))
    panel = Panel(
        lines=lines,
        x_label="loss of the teacher (nats per token)",
        y_label="loss of the student (nats per token)",
        title="Students of width 16",
        x_log=False,
        levels=[(float(np.mean(found[name][0.0])), label) for name, label in LEVELS.items()],
        caption="Students of width 16 and their teachers of width 64, 32 and 16.",
    )
    save([panel], [HERE / "ladder.png", HERE / "ladder.svg"])


if __name__ == "__main__":
    main()
