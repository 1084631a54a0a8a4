"""A small grid from Python: three sizes at three learning rates, their sensitivity S, and a law of the loss in size.

python examples/nano_grid.py [FOLDER]     runs and data go to FOLDER (default: runs/nano_grid); a minute on two cores

The corpus is a Markov source, whose entropy rate is known: no model can score below it.
"""

import sys
from pathlib import Path

import scaling_testbed as st

SIZES, RATES = "nano_xs,nano_s,nano_m", "1e-3,1e-2,1e-1"


def main(folder: Path) -> None:
    """Plan, train and analyse the grid; print what it found."""
    grid = [
        *(f"model={SIZES}", f"optimizer.lr={RATES}", "model.qk_norm=none"),
        *("data=markov", "data.n_tokens=50000", "data.n_validation_tokens=5000"),
        *("batch.sequences=8", "batch.sequence_length=32", "budget.steps=40", "evaluation.tokens=2048"),
        *("name=nano_grid", f"runs_dir={folder}", f"data_dir={folder / 'data'}", "compute.device=cpu"),
    ]
    runs = st.plan("nano_lr", grid)
    print(f"{len(runs)} runs, {sum(run.flops for run in runs):.2g} FLOPs")

    # One after the other in this process. st.run_sweep("nano_lr", grid, workers=2) starts a process for each.
    rows = [st.train(run.overrides) for run in runs]
    for row in rows:
        print(f"N={row['n_params']:>7,}  lr={row['optimizer.lr']:<6g}  loss {row['val_loss']:.4f} nats per token")
    print(f"entropy rate of the source: {rows[0]['entropy_rate_nats']:.4f}")

    # The same rows lie in the folder: st.load_rows(folder / "nano_grid").
    for one in st.lr_sensitivity(rows, lr_range=(1e-3, 1e-1)):
        print(f"N={one.curve.n_params:>7,}  S = {one.s:.4f}, best at lr={one.best_lr:g}")

    found = st.fit(rows, "kaplan_n", where=["optimizer.lr=1e-2"], bootstrap=0)
    print(found.law.formula, {name: float(f"{value:.3g}") for name, value in found.fit.params.items()})
    for text in found.warnings:
        print(f"warning: {text}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/nano_grid"))
