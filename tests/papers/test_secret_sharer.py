"""The claims about memorisation on planted rows where they are right, and where they are wrong."""

import math

from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import flatten
from scaling_testbed.papers.effects import AGREES, DISAGREES
from scaling_testbed.papers.measures import Evidence
from scaling_testbed.papers.secret_sharer import MEMORISATION
from scaling_testbed.sweeps.grid import load_sweep
from scaling_testbed.sweeps.plan import plan
from tests.analysis.conftest import make_row


def verdicts(study, known):
    """known: (repeats, width) -> what the repeats gain, in nats."""
    planned, _ = plan(load_sweep("memorisation", "cpu"))
    runs = compose_many([one.overrides for one in planned])
    assert len(runs) == 9
    rows = []
    for run in runs:
        width = run.model.d_model
        settings = {key: value for key, value in flatten(run).items() if key.startswith("data.")}
        noise = 0.004 * math.sin(run.seed + width)
        row = make_row(1e-2, 3.0, d_model=width, seed=run.seed, run_id=f"{width} {run.seed}", **settings)
        gains = {"never": 0, "once": 1, "x4": 4, "x16": 16, "x64": 64, "x256": 256}
        rows.append(row | {"val_loss_by_set": {name: 5 - known(n, width) + noise * n for name, n in gains.items()}})
    declared = {"margins": {"loss": 0.3}, "seeds": [10, 11, 12]}
    found = Evidence(study(rows, name="memorisation", declared=declared), MEMORISATION.group)
    return [claim.verdict(found).word for claim in MEMORISATION.claims]


def test_each_claim_is_judged_by_the_loss_on_its_strings(study):
    assert verdicts(study, lambda n, width: 0.01 * n * math.log2(width)) == [AGREES] * 4
    falls = {0: 0, 1: 1, 256: -2}
    assert (
        verdicts(study, lambda n, width: falls.get(n, n / 64) * math.log2(width) * (-1 if n == 64 else 1))
        == [DISAGREES] * 4
    )
