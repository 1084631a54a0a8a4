"""Several runs one after the other in the processes of one torchrun, each through the door, so that their tests share
one launch: `torchrun ... -m tests.training.many_runs SPEC.json`.

A run is {"name", "overrides"} and may have: "alone": only rank 0, as one process; "held": the folder is owned by
another; "fault": [rank, step, what] with what one of signal, kill, error, or "evaluation": the signal comes while the
step-th validation batch of that rank is read; "slow": seconds that preparing takes.
Every rank writes NAME.RANK.json beside the spec: exit status, stdout, stderr.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

from scaling_testbed.config.compose import compose, compose_many
from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.errors import UserError
from scaling_testbed.runs import folder as records
from scaling_testbed.train import main as train_main
from scaling_testbed.training import parts as building
from scaling_testbed.training import run as trainer
from scaling_testbed.training import step as updates

WORLD_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PEAK_FLOPS = 1e12


def fault(rank, step, what):
    """Something happens on `rank` before the update of `step` (from 1) is made. Returns what ends it."""
    where, name = (ValidationBatches, "batch") if what == "evaluation" else (updates, "set_lr")
    real, calls = getattr(where, name), [0]

    def failing(*arguments):
        calls[0] += 1
        if calls[0] == step and rank == int(os.environ.get("RANK", 0)):
            if what == "error":
                raise UserError("the disk of rank 1 is full")
            os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGTERM)
        return real(*arguments)

    setattr(where, name, failing)
    return lambda: setattr(where, name, real)


def slow(seconds):
    real = building.prepare

    def prepare(*arguments, **options):
        time.sleep(seconds)
        return real(*arguments, **options)

    building.prepare = prepare
    return lambda: setattr(building, "prepare", real)


@contextlib.contextmanager
def circumstances(spec, rank):
    with contextlib.ExitStack() as stack:
        if spec.get("alone"):
            saved = {key: os.environ.pop(key) for key in WORLD_KEYS}
            stack.callback(os.environ.update, saved)
        if spec.get("held") and rank == 0:
            stack.enter_context(records.RunFolder(trainer.run_folder_path(compose(spec["overrides"]))))
        if "fault" in spec:
            stack.callback(fault(*spec["fault"]))
        if "slow" in spec:
            stack.callback(slow(spec["slow"]))
        yield


def compose_together(all_overrides):
    """Let the door find the runs composed. Runs with the same choices share the work of Hydra, which takes 0.15 s."""
    door = sys.modules["scaling_testbed.train"]
    found = dict(zip(map(tuple, all_overrides), compose_many(all_overrides), strict=True))
    door.compose = lambda overrides: found[tuple(overrides)]


def main():
    rank, path = int(os.environ["RANK"]), Path(sys.argv[1])
    trainer.peak_memory_bytes = lambda device: 1000 * (rank + 1)
    building.peak_flops = lambda *_: PEAK_FLOPS
    specs = json.loads(path.read_text())
    compose_together([spec["overrides"] for spec in specs])
    for spec in specs:
        if spec.get("alone") and rank:
            continue
        out, err = io.StringIO(), io.StringIO()
        with circumstances(spec, rank), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = train_main(spec["overrides"])
        found = {"status": status, "out": out.getvalue(), "err": err.getvalue()}
        path.with_name(f"{spec['name']}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
