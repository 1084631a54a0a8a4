"""Planted training curves: runs of this testbed with their metrics, as rows and traces."""

import numpy as np

from scaling_testbed.learning.schedules import SCHEDULES
from scaling_testbed.runs.row import SCHEMA_VERSION

BATCH = 128


def run(name, n, steps, loss, *, schedule="constant", lr=1e-2, warmup=20, every=20, done=None, seed=0, **keys):
    """The row of a run and the records of its metrics. loss: from a step and the rates of its updates to nats. done:
    the steps made, if fewer than planned. keys: of the schedule."""
    keys = {"warmup": warmup, "min_lr": 1e-5, **keys}
    made = SCHEDULES[schedule](**keys)
    rates = np.array([made.lr(step, steps, lr) for step in range(steps)])
    done = steps if done is None else done
    records = [{"step": 0, "val_loss": 5.5}, *({"step": s, "lr": rates[s - 1], "train_loss": 3.0} for s in (1, 7))]
    at = sorted({*range(every, done + 1, every), done})
    records += [{"step": s, "val_loss": float(loss(s, rates[:s])), "lr": rates[s - 1]} for s in at]
    row = {
        "schema_version": SCHEMA_VERSION, "run_id": name, "status": "finished", "n_params": n, "seed": seed,
        "n_params_non_embedding": n, "steps": done, "steps_planned": steps, "n_tokens": BATCH * done,
        "flops": 7 * n * BATCH * done, "flops_6nd": 6 * n * BATCH * done, "val_loss": records[-1]["val_loss"],
        "optimizer.lr": lr, "schedule.name": schedule, "batch.sequences": 2, "batch.sequence_length": BATCH // 2,
        **{f"schedule.{key}": value for key, value in keys.items()},
    }  # fmt: skip
    return row, records


def world(runs):
    """Rows, and traces by run id, of several results of `run`: what the fixture `study` takes."""
    return [row for row, _ in runs], {row["run_id"]: records for row, records in runs}
