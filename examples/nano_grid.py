"""A small grid from Python: two sizes at three learning rates, their sensitivity S, and a law of the loss in compute.

python examples/nano_grid.py [FOLDER]     runs and data go to FOLDER (default: runs/nano_grid); half a minute on a CPU

The corpus is a Markov source, whose entropy rate is known: no model can score below it.
"""

import sys
from pathlib import Path

import scaling_testbed as st


def main(folder: Path) -> None:
    """Plan, train and analyse the grid; print what it found."""
    shared = [
        *(
            "model.qk_norm=none",
            "data=markov",
            "data.order=1",
            "data.vocab_size=16",
            "data.n_tokens=50000",
            "data.n_validation_tokens=5000",
        ),
        *("batch.sequences=8", "batch.sequence_length=32", "evaluation.tokens=2048", "compute.device=cpu"),
        *("name=nano_grid", f"runs_dir={folder}", f"data_dir={folder / 'data'}"),
    ]
    rates = ["model=nano_xs,nano_s", "optimizer.lr=1e-3,1e-2,1e-1", "budget.steps=50"]
    runs = st.plan("nano_lr", [*shared, *rates])
    print(f"{len(runs)} runs, {sum(run.flops for run in runs):.2g} FLOPs")

    # One after the other in this process. st.run_sweep("nano_lr", [*shared, *rates], workers=2) starts one for each.
    rows = [st.train(run.overrides) for run in runs]
    for row in rows:
        print(f"N={row['n_params']:>6,}  lr={row['optimizer.lr']:<6g} loss {row['val_loss']:.4f} nats per token")
    print(f"entropy rate of the source: {rows[0]['entropy_rate_nats']:.4f}")

    # The same rows lie in the folder: st.load_rows(folder / "nano_grid").
    for one in st.lr_sensitivity(rows, lr_range=(1e-3, 1e-1)):
        print(f"N={one.curve.n_params:>6,.0f}  S = {one.s:.4f}, best at lr={one.best_lr:g}")

    budgets = ["model=nano_xs", "optimizer.lr=1e-2", "budget.steps=25,50,100,200"]
    longer = [st.train(run.overrides) for run in st.plan("nano_lr", [*shared, *budgets])]
    # L = E + (C0/C)^alpha, of one size. E is known here: the entropy rate.
    found = st.fit(longer, "compute", fix={"E": rows[0]["entropy_rate_nats"]}, bootstrap=0)
    print(found.law.formula, {name: float(f"{value:.3g}") for name, value in found.fit.params.items()})
    for one in found.fitted:
        print(f"C={one['flops']:.2e}  loss {one['actual']:.4f}, by the law {one['predicted']:.4f}")
    for text in found.warnings:
        print(f"warning: {text}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/nano_grid"))
