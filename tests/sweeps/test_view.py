"""What a person sees of a sweep, on a narrow terminal too."""

import pytest

from scaling_testbed.sweeps import view
from scaling_testbed.sweeps.plan import PlannedRun
from scaling_testbed.sweeps.status import RunState
from tests.test_tables import printed

RUN = PlannedRun(
    run_id="abcdef123456", folder="runs/x", varied={"model": "nano_s", "optimizer.lr": "1e-3", "model.qk_norm": "none"},
    overrides=[], params="n_params", budget_n_params=1000, n_params=1000, vocab_size=257, n_tokens=20_000,
    tokens_per_step=100, steps=200, flops_6nd=1e8, flops=1e8, memory_bytes=2**20,
)  # fmt: skip


@pytest.fixture
def state():
    """A run whose every cell is filled."""
    return RunState(run=RUN, state="running", step=150, loss=2.5, eta_seconds=3723.0, owner="host:1234", error="e" * 99)


@pytest.mark.parametrize("width", [40, 60])
def test_state_and_time_left_are_whole_on_a_narrow_terminal(state, width):
    lines = printed(view.live_table([state], 7200.0, rows=20), width)
    assert lines[0].split()[:3] == ["run_id", "state", "left"]
    assert lines[1].split()[:3] == ["abcdef123456", "running", "1:02:03"]
    assert "about 2:00:00 left" in lines[2]
