"""Synthetic rows with planted truths, laid out as a sweep leaves them."""

import json

import pytest

from scaling_testbed.analysis.rows.study import load

INITIAL = 10.88
LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
WIDTHS = (32, 64, 128)


def make_row(lr, loss, *, d_model=32, n_layers=2, seed=0, status="finished", initial=INITIAL, run_id=None, **settings):
    """One row; a double underscore in a setting stands for its dot."""
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    name = run_id or f"{d_model}x{n_layers} lr={lr:g} seed={seed} {sorted(settings.items())}".replace("/", "_")
    row = {"run_id": name, "status": status, "seed": seed, "optimizer.lr": lr, "val_loss": loss}
    shape = {"model.d_model": d_model, "model.n_layers": n_layers, "n_params_non_embedding": 12 * n_layers * d_model**2}
    return {**row, "val_loss_initial": initial, **shape, **settings}


def grid(loss, conditions, widths=WIDTHS, lrs=LRS, seeds=(0,), n_layers=2, **more):
    """Rows over conditions (dicts of settings), widths, rates and seeds; loss(condition, width, lr, seed) -> nats.
    more: settings of all rows, or functions of the same arguments that return them."""
    rows = []
    for condition in conditions:
        for width in widths:
            for lr in lrs:
                for seed in seeds:
                    at = (condition, width, lr, seed)
                    extra = {key: value(*at) if callable(value) else value for key, value in more.items()}
                    value = loss(*at)
                    rows.append(make_row(lr, value, d_model=width, n_layers=n_layers, seed=seed, **condition, **extra))
    return rows


MARGINS = {"S": 0.05, "loss": 0.02, "critical_lr": 1.25, "best_lr": 1.7, "recorded": 1.1, "share": 0.1, "logit": 1}


@pytest.fixture
def study(tmp_path):
    """Returns a function from rows, and traces by run id, to a study folder as committed, loaded. name: of the folder,
    and of its sweep unless another is given. declared: what sweep.json declares beside the sweep, None for nothing, as
    in one of an earlier version."""

    def write(rows, name="qknorm_lr", traces=None, folder=tmp_path, sweep=None, declared=None):
        place = folder / name
        (place / "metrics").mkdir(parents=True, exist_ok=True)
        about = {"sweep": sweep or name} | ({"declared": declared} if declared is not None else {})
        (place / "sweep.json").write_text(json.dumps(about))
        (place / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for run_id, lines in (traces or {}).items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (place / "metrics" / f"{run_id}.jsonl").write_text(text)
        return load(place)

    return write
