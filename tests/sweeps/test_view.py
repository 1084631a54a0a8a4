"""What a person sees of a sweep, on a narrow terminal too."""

import re

import pytest

from scaling_testbed.sweeps import view
from scaling_testbed.sweeps.grid import load_sweep, narrowed
from scaling_testbed.sweeps.plan import PlannedRun, plan
from scaling_testbed.sweeps.sizes import Size, sizes
from scaling_testbed.sweeps.slurm import SlurmConfig
from scaling_testbed.sweeps.speed import priced, stated
from scaling_testbed.sweeps.status import RunState
from scaling_testbed.sweeps.view import detectable_effects, plan_summary, sizes_table, submission_line
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


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (
            [],
            "3 seeds, 3 sizes: a claim of a difference of 0.069 of S, 0.031 of loss, a factor of 1.46 of",
        ),
        (
            ["model=nano_s"],
            "3 seeds, 1 size: a claim of a difference of 0.114 of S, 0.052 of loss, a factor of 1.92 of",
        ),
        (
            ["seed=1,2,3,4,5"],
            "5 seeds, 3 sizes: a claim of a difference of 0.058 of S, 0.024 of loss, a factor of 1.31 of",
        ),
        (["seed=1"], "1 seed, 3 sizes: no claim can be judged; two seeds are the least"),
    ],
)
def test_a_plan_says_which_effects_its_seeds_can_detect(typed, says):
    sweep = narrowed(load_sweep("qknorm_lr", "cpu"), ["optimizer.lr=1e-2", *typed])
    line, *strictest = detectable_effects(sweep, plan(sweep)[0])
    assert line.startswith(says)
    holm = [line for line in strictest if line.startswith("with Holm's correction for 7 claims, the strictest")]
    assert strictest == ([] if "no claim" in says else [*holm, "no spread over seeds is declared of share"])
    assert len(holm) == ("no claim" not in says)


def test_the_strictest_claim_of_several_needs_a_larger_effect():
    sweep = narrowed(load_sweep("qknorm_lr", "cpu"), ["optimizer.lr=1e-2"])
    alone, strictest, _ = detectable_effects(sweep, plan(sweep)[0])
    numbers = [float(re.search(r"([\d.]+) of S", line)[1]) for line in (alone, strictest)]
    assert numbers == [0.069, 0.175]
    axis = narrowed(load_sweep("qknorm_axis", "cpu"), ["optimizer.lr=1e-2"])
    assert len(detectable_effects(axis, plan(axis)[0])) == 1  # one claim needs no correction


def test_a_plan_of_a_sweep_that_declares_nothing_says_nothing_of_effects():
    sweep = narrowed(load_sweep("nano_lr"), ["optimizer.lr=1e-2"])
    assert detectable_effects(sweep, plan(sweep)[0]) == []


@pytest.mark.parametrize("name", ["average_params", "unlearning"])
def test_a_plan_says_in_one_line_that_no_spread_is_declared(name):
    """Where the claims are about a law, or of spreads that are too unlike for one number."""
    sweep = load_sweep(name, "cpu")
    (said,) = detectable_effects(sweep, plan(sweep)[0])
    assert said.endswith(": the sweep declares no spread over seeds, so it is not known which effects they can detect")


def judged_by(tmp_path, name, *typed, text=""):
    """What a plan says of a sweep with the claims of an experiment of the first paper."""
    about = f"paper: small_scale_proxies\nexperiment: {name}\n{text}"
    (tmp_path / "own.yaml").write_text(f"{about}\naxes: {{optimizer.lr: [1e-3, 1e-2]}}\nseeds: [4, 5, 6]\n")
    sweep = narrowed(load_sweep(str(tmp_path / "own.yaml")), ["data=noise", *typed])
    return detectable_effects(sweep, plan(sweep)[0])


def test_a_plan_names_only_measures_that_its_claims_use(tmp_path):
    spread = "seed_sd: {S: 0.03, loss: 0.01, critical_lr: 0.2, recorded: 0.1}"
    said = judged_by(tmp_path, "kappa", text=f"declared: {{margins: {{loss: 0.02}}, {spread}}}")
    assert len(said) == 2 and all(line.count(" of loss") == 1 and " S" not in line for line in said)
    assert "critical" not in "".join(said) and "diagnostic" not in "".join(said)


def test_a_diagnostic_has_a_spread_too_and_a_claim_its_own_margin(tmp_path):
    """At this spread the margin decides: a factor of ten in the claim, 1.1 in the declaration."""
    declared = "declared: {margins: {recorded: 1.1}, seed_sd: {recorded: 0.001}}"
    own = judged_by(tmp_path, "pointwise_attn", text=declared)
    assert len(own) == 1 and "a factor of 10.0" in own[0] and "of diagnostic agrees" in own[0]
    other = judged_by(tmp_path, "gradrms_scaling", text=declared)
    assert "a factor of 1.10 of diagnostic agrees" in other[0]


def test_a_plan_without_claims_tells_all_spreads_that_are_declared(tmp_path):
    spread = "declared: {margins: {S: 0.05}, seed_sd: {S: 0.03, loss: 0.01}}"
    (said,) = judged_by(tmp_path, "mitigations", text=spread)
    assert " of S, " in said and " of loss agrees" in said


def test_a_plan_has_one_line_for_each_model():
    typed = ["model=nano_xs,nano_s", "compute.gpu_memory_gib=0.02"]
    runs, _ = plan(narrowed(load_sweep("nano_lr"), typed))
    assert len(runs) == 16 and any(run.fits for run in runs) != all(run.fits for run in runs)
    limits = {run.run_id: "2:00:00" for run in runs}
    shown = plan_summary(priced(runs, stated(1e12, True)), limits=limits)
    lines = [re.split(r"  +", line.strip()) for line in printed(shown, 300)]
    assert lines[0][:1] + lines[0][-3:] == ["model", "GPUs", "GPU-hours", "time limit"]
    for name, line in zip(("nano_xs", "nano_s"), lines[1:3], strict=True):
        own = [run for run in runs if run.config["model.name"] == name]
        least, largest = min(run.n_params for run in own), max(run.n_params for run in own)
        assert line[:3] == [name, f"{least:,} to {largest:,}", "8"]
        assert line[-2:] == [f"{sum(run.flops for run in own) / 3.6e15:.2g}", "2:00:00"]
        assert (" !" in line[-4]) == (not all(run.fits for run in own))
    assert lines[3][:2] == ["all", "16 runs"]
    assert "GPU-hours" not in "".join(printed(plan_summary(runs), 300))
    priced_here = plan_summary(priced(runs, stated(1e9, False)), hours="CPU-hours")
    assert printed(priced_here, 300)[0].split()[-1] == "CPU-hours"


def test_a_submission_says_what_it_costs():
    runs, _ = plan(narrowed(load_sweep("nano_lr"), ["model=nano_s"]))
    speed = stated(1e9, True)
    config = SlurmConfig(partition="gpu", gpus_per_node=8)
    said = submission_line([Size(priced(runs, speed), config)], 1, speed)
    hours = sum(run.flops for run in runs) / 3.6e12
    assert said.startswith("8 tasks, each on 8 GPUs; 0.0 GiB on each GPU; ")
    words = f"{hours:,.2f} GPU-hours, at 1e+09 FLOP/s (stated)"
    assert said.endswith(f"; {words}; partition gpu; time limit of the cluster")
    unpriced = submission_line([Size(runs, SlurmConfig(gpus_per_node=0, time="1:00:00"))], 3, None)
    assert "each on CPUs, in 3 array jobs; 0.0 GiB; CPU-hours not known" in unpriced
    assert unpriced.endswith("partition of the cluster; time limit 1:00:00")


def test_a_submission_of_several_sizes_has_a_line_for_each():
    runs, _ = plan(narrowed(load_sweep("nano_lr"), ["model=nano_s,nano_l", "seed=0", "model.qk_norm=none"]))
    speed = stated(1e8, True)
    found = sizes(priced(runs, speed), SlurmConfig(time="auto"))
    lines = [re.split(r"  +", line.strip()) for line in printed(sizes_table(found, speed), 300)]
    assert lines[0] == ["array job", "tasks", "models", "GPUs", "memory", "time limit", "GPU-hours"]
    assert [line[:4] for line in lines[1:]] == [["1", "4", "nano_s", "1"], ["2", "4", "nano_l", "1"]]
    assert [line[5] for line in lines[1:]] == [size.config.time for size in found]
    assert submission_line(found, 2, speed).endswith("time limit of each size")
    assert "GPU-hours" not in printed(sizes_table(found, None), 300)[0]
