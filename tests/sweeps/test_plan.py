"""A plan is what the runs then are: the same ids, counts and steps; and the published testbed is planned as it was."""

import errno
import fcntl
import json
import math
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest

from scaling_testbed.analysis.rows.study import load
from scaling_testbed.config.compose import compose, compose_many
from scaling_testbed.config.run import run_id
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.model.counting import count_params
from scaling_testbed.runs.row import Row
from scaling_testbed.sweeps import cpu_precision
from scaling_testbed.sweeps.grid import load_sweep, narrowed
from scaling_testbed.sweeps.plan import alone_in, plan, remember, remembered, sweep_folder

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "mlfoundations-scaling" / "exp_data" / "models"
DATA = {"c4_original": "c4", "rpj": "redpajama", "rw_original": "refinedweb"}


@cache
def planned(name, scale=None):
    """The plan of a shipped sweep, made once."""
    return plan(load_sweep(name, scale))


def test_composing_many_gives_what_composing_each_gives(hydra_composes_all_words):
    lists = [
        ["experiment=over_training", "model=openlm_79m", "optimizer.lr=1e-2", "checkpoint.keep_steps=[1,2]"],
        ["experiment=over_training", "model=openlm_79m", "seed=3", "name=other", "optimizer.lr=3e-2"],
        ["model=nano_s", "+evaluation.sets.a=folder", "loss.z_loss=0", "data=markov", "budget.tokens_per_param=5"],
        ["model=nano_s", "budget.steps=10", "data_dir='a b'"],
    ]
    assert compose_many(lists) == [compose(overrides) for overrides in lists]
    with pytest.raises(ConfigError, match=r"no key optimizer.lrr; did you mean optimizer.lr\?"):
        compose_many([lists[0], ["optimizer.lrr=1"]])


def test_no_two_runs_of_a_sweep_look_alike_where_the_leading_key_has_a_value_twice():
    for name in ("online_mixtures", "unlearning"):
        runs, _ = planned(name)
        assert len({run.label for run in runs}) == len(runs)
        assert all("data.weights" in run.varied for run in runs)


def test_the_testbed_of_104_models_is_planned_as_published():
    if not PUBLISHED.is_dir():
        pytest.skip("the published runs are not at hand")
    runs, same = planned("overtraining")
    assert (len(runs), same) == (104, 0)
    expected = {}
    for run, config in zip(runs, compose_many([run.overrides for run in runs]), strict=True):
        values = dict(text.split("=", 1) for text in run.overrides if "=" in text)
        point = values["data"], run.budget_n_params, float(values["budget.tokens_per_param"])
        expected[point] = (run, values, config)
    for path in PUBLISHED.glob("*.json"):
        record = json.loads(path.read_text())
        was = record["hyperparameters"]
        point = DATA[record["dataset_name"]], was["params"], 20.0 * was["chinchilla_multiplier"]
        run, values, config = expected.pop(point)
        # A whole number of steps is at most half a step from the published tokens.
        assert abs(run.n_tokens - was["tokens"]) <= run.tokens_per_step / 2
        assert run.budget_flops_6nd == float(6 * was["params"] * run.n_tokens)
        assert float(values["optimizer.lr"]) == was["lr"] and float(values["optimizer.weight_decay"]) == was["wd"]
        assert int(values["schedule.warmup"]) == was["warmup"]
        assert config.schedule.min_lr == was["cd"]
        if was["global_bs"] > 1:  # the 6.9B records hold stale fields
            assert int(values["batch.sequences"]) == was["global_bs"]
    assert expected == {}


def test_the_grid_of_qk_layernorm_has_every_size_rate_and_condition():
    runs, same = planned("qknorm_lr")
    assert (len(runs), same) == (7 * 7 * 2, 0)
    assert {run.n_tokens for run in runs} == {100_000 * 256 * 512}
    assert {run.varied["model.qk_norm"] for run in runs} == {"layernorm", "none"}


@pytest.mark.parametrize(
    ("name", "scale"),
    [("nano_lr", None), ("overtraining", None), ("overtraining", "cpu"), ("known_entropy", None)]
    + [("isoflop", scale) for scale in ("paper", "gpu_hour", "cpu")],
)  # the others: test_proxies.py
def test_every_shipped_sweep_can_be_planned(name, scale):
    runs, same = planned(name, scale)
    assert runs and same == 0


@pytest.mark.parametrize("scale", ["paper", "gpu_hour", "cpu"])
def test_each_budget_of_isoflop_has_its_best_size_inside_and_follows_its_rule(scale):
    """About 20 tokens per parameter are best (Hoffmann et al. 2022): sizes lie on both sides of sqrt(C / 120)."""
    budgets = {}
    for run in planned("isoflop", scale)[0]:
        budgets.setdefault(round(run.flops_6nd, -int(math.log10(run.flops_6nd)) + 1), []).append(run)
        flops = float(run.varied["budget.flops"])
        assert run.flops_6nd == pytest.approx(flops, rel=0.01)  # a whole number of steps
        if scale != "cpu":
            values = dict(text.split("=", 1) for text in run.overrides if "=" in text)
            assert float(values["optimizer.lr"]) == pytest.approx(0.3118 * flops**-0.125, rel=0.005)
            assert run.tokens_per_step == pytest.approx(0.292 * flops**0.3271, rel=0.03)
    for runs in budgets.values():
        ratios = sorted(run.n_params / math.sqrt(float(run.varied["budget.flops"]) / 120) for run in runs)
        assert len(ratios) >= 4 and ratios[0] < 0.8 and ratios[-1] > 1.25, ratios


def test_the_grid_of_over_training_for_a_cpu_fits_cheap_runs_and_predicts_dear_ones():
    runs, _ = planned("overtraining", "cpu")
    points = {}
    for run in runs:
        points.setdefault((run.varied["model"], run.varied["budget.tokens_per_param"]), []).append(run)
    assert all(len(found) == 3 for found in points.values())
    sizes = sorted({run.n_params for run in runs})
    fitted = [
        found
        for (_, multiplier), found in points.items()
        if found[0].n_params in sizes[:4] and int(multiplier) <= 80 or found[0].n_params == sizes[0]
    ]
    dearest = max(run.flops_6nd for run in runs)
    assert len(sizes) == 6 and len(fitted) >= 9
    assert sum(run.flops_6nd for found in fitted for run in found) < dearest / 10
    assert {len({run.config["optimizer.lr"] for run in runs if run.n_params == size}) for size in sizes} == {1}
    assert max(run.n_tokens for run in runs) < 2 * 25_600_000  # of the corpus


def test_a_plan_spends_nothing_and_prints_objects_alone(door, tmp_path):
    status, out, err = door("plan", "--json", "--flops-per-second", "1e12")
    runs = json.loads(out)
    assert (status, err, len(runs)) == (0, "", 4)
    assert not (tmp_path / "runs").exists()
    for run, config in zip(runs, compose_many([run["overrides"] for run in runs]), strict=True):
        assert run["run_id"] == run_id(config)
        assert run["cpu_hours"] == pytest.approx(run["flops"] / 1e12 / 3600) and run["gpu_hours"] is None
        assert run["n_tokens"] == 4 * 8 * 16 and run["flops_6nd"] == 6 * run["n_params"] * run["n_tokens"]
    assert "4 runs" in door("plan")[1]


def test_a_plan_says_which_runs_bf16_makes_faster_on_this_cpu(monkeypatch, tmp_path):
    def said(flags="fpu avx512_bf16 sse", gpu=None, flops=1e12, **changes):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
        monkeypatch.setattr(cpu_precision, "PROCESSOR_FILE", tmp_path / "cpuinfo")
        monkeypatch.setattr(cpu_precision, "memory_of_gpu", lambda: gpu)
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        runs = [replace(run, flops=flops, config=run.config | changed) for run in planned("nano_lr")[0]]
        return "".join(cpu_precision.bf16_remark(runs))

    assert "8 of 16 runs would probably take less time on this CPU with compute.precision=bf16" in said()  # nano_m
    assert said(flags="fpu amx_bf16", model__d_model=64).startswith("all 16 runs") and not said(flags="avx512f")
    assert said(compute__device="cpu", gpu=80.0) and not said(gpu=80.0) and not said(compute__device="cuda")
    assert not said(compute__precision="bf16") and not said(model__d_model=48) and not said(flops=1e17)
    assert said(batch__sequences=8) and not said(batch__sequences=4) and not said(batch__micro_batch_sequences=4)
    monkeypatch.setattr(cpu_precision, "PROCESSOR_FILE", tmp_path / "none")  # not on Linux
    assert not cpu_precision.has_fast_bf16()


def test_a_plan_holds_the_configuration_as_the_row_will_have_it(tmp_path):
    """So that who reads what is missing composes nothing."""
    sweep = narrowed(load_sweep("nano_lr"), [f"runs_dir={tmp_path}", "data=markov", "model=nano_s", "seed=0,1"])
    runs, _ = plan(sweep)
    remember(runs, sweep)
    found = load(sweep_folder(runs))
    assert (found.sweep, found.paper, found.experiment) == ("nano_lr", "small_scale_proxies", "qknorm_lr")
    assert [row["run_id"] for row in found.missing] == [run.run_id for run in runs]
    for run, missing in zip(runs, found.missing, strict=True):
        (config,) = compose_many([run.overrides])
        counted = count_params(config.model.resolved(run.vocab_size))
        row = Row.of(config).as_dict() | asdict(counted)
        planned = {key: row[key] for key in row if "." in key or key == "seed" or key in asdict(counted)}
        assert planned == {key: missing[key] for key in planned} and "config" not in run.record()


def test_a_line_of_an_earlier_version_is_remembered_and_written_anew_by_the_next_start(tmp_path):
    sweep = narrowed(load_sweep("nano_lr"), [f"runs_dir={tmp_path}", "data=markov"])
    runs, _ = plan(sweep)
    folder = sweep_folder(runs)
    folder.mkdir()
    (folder / "plan.jsonl").write_text("".join(json.dumps(run.record()) + "\n" for run in runs))
    assert [run.config for run in remembered(folder)] == [{}] * len(runs)
    with pytest.raises(UserError, match="`sweep run`"):
        load(folder)
    remember(runs, sweep)
    assert len(load(folder).missing) == len(runs)


def test_a_narrower_start_forgets_no_line_that_it_cannot_read(tmp_path, capsys):
    """A later version has written the plan with one field more, and a line is damaged."""
    sweep = narrowed(load_sweep("nano_lr"), [f"runs_dir={tmp_path}", "data=markov"])
    runs, _ = plan(sweep)
    remember(runs, sweep)
    path = sweep_folder(runs) / "plan.jsonl"
    later = path.read_text().replace('{"run_id"', '{"field_of_tomorrow": 1, "run_id"')
    path.write_text(later + '{"run_id')
    remember(runs[:1], sweep)
    assert {row["run_id"] for row in load(path.parent).missing} == {run.run_id for run in runs}
    assert path.read_text().count("field_of_tomorrow") == len(runs) - 1
    assert path.with_name("plan.damaged.jsonl").read_text() == later + '{"run_id'
    assert "is kept as plan.damaged.jsonl" in capsys.readouterr().err
    (path.parent / "sweep.json").write_text('{"sweep": "other", "schema_version": 2}')
    with pytest.raises(UserError, match="written by a newer version"):
        remember(runs, sweep)
    (path.parent / "sweep.json").write_text('{"sweep": "other"}')
    remember(runs, sweep)
    assert load(path.parent).sweep == "other"


def test_a_plan_that_was_moved_tells_of_the_runs_where_it_is_now(tmp_path):
    sweep = narrowed(load_sweep("nano_lr"), [f"runs_dir={tmp_path / 'before'}", "data=markov"])
    runs, _ = plan(sweep)
    remember(runs, sweep)
    (tmp_path / "before").rename(tmp_path / "now")
    folder = tmp_path / "now" / sweep_folder(runs).name
    assert [run.folder for run in remembered(folder)] == [str(folder / run.run_id) for run in runs]


def test_memory_is_planned_for_each_of_a_runs_gpus(door):
    def memory(*arguments):
        status, out, err = door("plan", "--json", "model=nano_l", *arguments)
        assert (status, err) == (0, "")
        return json.loads(out)[0]["memory_bytes"]

    one = memory("parallelism=fsdp")
    assert memory("parallelism=fsdp", "launcher.gpus_per_node=4", "launcher.nodes=2") < 0.5 * one
    status, _, err = door("plan", "launcher.gpus_per_node=2")
    assert status == 2 and "the run has 2 processes, but parallelism=single uses one; add parallelism=ddp" in err
    assert "each of 2 GPUs" in door("plan", "launcher.gpus_per_node=2", "parallelism=ddp")[1]


def test_combinations_that_are_one_run_count_once(door):
    status, out, err = door("plan", "--json", "compute.device=cpu,auto")
    assert len(json.loads(out)) == 4 and "4 combinations are the same run" in err


def test_one_process_at_a_time_has_a_sweeps_folder_where_the_file_system_has_flock(tmp_path, monkeypatch):
    folder = tmp_path / "runs"
    with alone_in(folder), open(folder / ".lock") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(folder / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone_in(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*; set runs_dir="), alone_in(tmp_path / "file" / "runs"):
        pass


def test_a_plan_names_each_unusual_setting_once_with_the_number_of_its_runs(door):
    out = door("plan", "model=nano_s", "schedule.warmup=0.1,0.6,5000")[1]
    lines = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert lines == [
        "warning: 2 of 6 runs, first optimizer.lr=1e-3 schedule.warmup=5000: the warm-up of 5,000 steps "
        "is longer than the run of 4 steps, so the rate never reaches optimizer.lr; set schedule.warmup="
    ]
    out = door("plan", "model=nano_s", "schedule.warmup_tokens=384")[1]  # 3 of 4 steps
    assert "warning: 2 of 2 runs, first optimizer.lr=1e-3: the warm-up of 3 steps is more than half" in out
    assert "set schedule.warmup_tokens=" in out
    records = json.loads(door("plan", "--json", "model=nano_s", "schedule.warmup=5000")[1])
    assert [list(one["unusual"]) for one in records] == [["warm-up longer than the run"]] * 2
    assert "warning" not in door("plan", "model=nano_s", "budget.steps=100")[1]


def test_what_is_unusual_is_not_kept_in_the_plan_of_a_folder(door, untrained, tmp_path):
    assert door("run", "schedule.warmup=5000", "model=bigram")[0] == 0
    kept = (tmp_path / "runs/tiny/plan.jsonl").read_text()
    assert '"run_id"' in kept and '"unusual"' not in kept


def test_weights_of_a_mixture_are_an_axis(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_text(
        "overrides: [data=mixture, 'data.sources={a: {name: noise}, b: {name: markov}}', budget.steps=4]\n"
        "axes: {data.weights: [{a: 0.7, b: 0.3}, {a: 0, b: 1}], optimizer.lr: [1e-3, 1e-2]}\n"
    )
    runs, same = plan(load_sweep(str(path)))
    found = {(run.config["data.weights.a"], run.config["data.weights.b"]) for run in runs}
    assert found == {(0.7, 0.3), (0.0, 1.0)} and len({run.run_id for run in runs}) == 4 and same == 0
    path.write_text(path.read_text().replace("{a: 0, b: 1}", "{a: 0, b: 0}"))
    with pytest.raises(ConfigError, match=r"data\.weights must have a positive weight"):
        plan(load_sweep(str(path)))
