"""The sweeps of Wortsman et al. 2023: each composes at each scale, keeps the paper's setting where it varies nothing
else, and costs what the table beside the files says."""

import dataclasses
import json
from functools import cache

import pytest

from scaling_testbed import sweep
from scaling_testbed.commands import sweep as commands
from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import flatten, run_id
from scaling_testbed.config.words import override_values
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.model.counting import count_params, flops_per_token
from scaling_testbed.sweeps.grid import SWEEP_DIR, load_sweep, narrowed
from scaling_testbed.sweeps.plan import plan, remember

SCALES = ("paper", "gpu_hour", "cpu")
ROWS = [
    *("qknorm_lr", "qknorm_trace", "zloss_lr", "zloss_trace", "warmup_lr", "indep_wd_lr", "width_depth_lr"),
    *("mup_simple_lr", "predict_logits", "kappa", "gradrms_scaling", "adam_eps", "output_norm", "qk_alignment"),
    *("width_depth_noqk", "shape_scaling", "mup_simple_noqk", "mup_full", "attn_scale", "steps", "qknorm_axis"),
    *("batch", "wd_value", "pointwise_attn", "gradrms_kernel", "update_trace", "param_rms_lr", "zloss_drift"),
]
NAMES = sorted([*ROWS, "mitigations"])
RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
CPU_RATES = [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
# At scale=cpu, the other rates of a sweep: high ones, or close ones about the best.
HIGH, CLOSE = CPU_RATES[2:], [1e-3, 1.8e-3, 3.2e-3, 5.8e-3, 1.05e-2, 1.9e-2, 3.4e-2, 6.1e-2]
OTHER_CPU_RATES = {
    **dict.fromkeys(("warmup_lr", "width_depth_lr", "width_depth_noqk"), HIGH),
    **dict.fromkeys(("mup_simple_lr", "mup_simple_noqk"), CLOSE),
}
VOCABULARY = {"paper": 32101, "gpu_hour": 257, "cpu": 257}

# What a GPU-hour and a core-minute of the table are: assumed FLOP/s, and on a CPU seconds of a step besides, and to
# start and score a run.
FLOPS_PER_SECOND = {"paper": 0.4 * 989e12, "gpu_hour": 0.15 * 989e12, "cpu": 5e10}
CPU_SECONDS_A_STEP, CPU_SECONDS_A_RUN = 0.003, 2
MOST_CORE_MINUTES = 180


def covering(points, keys=None):
    """As few of the points, in order, as show every value of every key (of `keys`, if given)."""
    seen, chosen = set(), []
    for point in points:
        items = {item for item in point.items() if keys is None or item[0] in keys}
        if not seen >= items:
            seen |= items
            chosen.append(point)
    return chosen


def overrides(sweep, point):
    own = [f"{key}={value}" for key, value in point.items()]
    return [f"name={sweep.folder}", *(text for text in sweep.overrides if text.split("=")[0] not in point), *own]


loaded = cache(load_sweep)  # tests only read it


@cache
def composed():
    """(name, scale) -> (point, run) of a covering part of its points. In one go, which is what makes it fast."""
    grids = {(name, scale): loaded(name, scale) for name in NAMES for scale in SCALES}
    parts = [(key, point) for key, sweep in grids.items() for point in covering(sweep.points())]
    runs = compose_many([overrides(grids[key], point) for key, point in parts])
    found = {key: [] for key in grids}
    for (key, point), run in zip(parts, runs, strict=True):
        found[key].append((point, run))
    return found


def cases():
    return [(name, scale) for name in NAMES for scale in SCALES]


def steps_of(run):
    """Of the schedule."""
    return run.schedule.length(run.budget.resolve_steps(count_params(run.model.resolved(256)), run.batch.tokens))


def test_there_is_a_file_for_every_experiment_and_each_has_the_three_scales():
    based = [path.stem for path in SWEEP_DIR.glob("*.yaml") if "base: small_scale_proxies" in path.read_text()]
    assert sorted(based) == NAMES and len(ROWS) == 28
    for name in NAMES:
        with pytest.raises(ConfigError, match=f"it has {', '.join(SCALES)}$"):
            load_sweep(name, "another")


@pytest.mark.parametrize(("name", "scale"), cases())
def test_runs_are_distinct_and_filed_under_sweep_and_scale(name, scale):
    points = loaded(name, scale).points()
    assert len({json.dumps(point, sort_keys=True) for point in points}) == len(points)
    runs = [run for _, run in composed()[name, scale]]
    assert len({run_id(run) for run in runs}) == len(runs)
    assert {run.name for run in runs} == {name if scale == "paper" else f"{name}_{scale}"}


def test_a_name_files_a_sweep_with_the_one_whose_runs_it_shares():
    for scale in SCALES:
        held = {run_id(run) for _, run in composed()["gradrms_scaling", scale]}
        for name in ("gradrms_kernel", "output_norm"):
            assert {run_id(run) for _, run in composed()[name, scale]} == held
    qknorm, gradrms = (load_sweep(name, "cpu") for name in ("qknorm_lr", "gradrms_scaling"))
    held = {run.run_id for run in plan(narrowed(qknorm, ["model=nano_s", "seed=0", "model.qk_norm=layernorm"]))[0]}
    assert held == {run.run_id for run in plan(narrowed(gradrms, ["model=nano_s", "seed=0"]))[0]}
    assert len(held) == 7


@pytest.mark.parametrize(("name", "scale"), cases())
def test_what_a_sweep_does_not_vary_is_the_papers_setting(name, scale):
    expected = {
        "optimizer.weight_decay": 1e-4,
        "optimizer.weight_decay_steps": None,
        "optimizer.decay": "independent",
        "schedule.name": "cosine",
        "schedule.min_lr": 1e-5,
        "loss.z_loss": 1e-4,
        "batch.sequences": {"paper": 256, "gpu_hour": 32, "cpu": 4}[scale],
        "batch.sequence_length": {"paper": 512, "gpu_hour": 512, "cpu": 64}[scale],
        "data.name": {"paper": "c4", "gpu_hour": "python_stdlib", "cpu": "sympy"}[scale],
        "tokenizer.name": "t5" if scale == "paper" else "bytes",
    }
    if (name, scale) == ("zloss_drift", "cpu"):  # output logits drift with a larger vocabulary
        expected |= {"batch.sequences": 2, "tokenizer.name": "bpe"}
    for point, run in composed()[name, scale]:
        flat = flatten(run)
        kept = {key: value for key, value in expected.items() if key not in point}
        assert {key: flat[key] for key in kept} == kept
        steps = steps_of(run)
        if "schedule.warmup" not in point:
            assert run.schedule.warmup_steps(steps, run.batch.tokens) == round(0.05 * steps)
        if scale == "paper" and "budget.steps" not in point:
            assert steps == 100_000


@pytest.mark.parametrize(("name", "scale"), cases())
def test_sensitivity_is_measured_on_the_seven_rates(name, scale):
    sweep = loaded(name, scale)
    more = {"indep_wd_lr": [1e-4], "mup_full": [1.0]}.get(name, [])
    expected = [*RATES, *more]
    if scale == "cpu":
        expected = OTHER_CPU_RATES.get(name, [*CPU_RATES, *([3e-4] if name == "indep_wd_lr" else [])])
    if sweep.analysis == "lr_sensitivity":
        assert sorted({float(point["optimizer.lr"]) for point in sweep.points()}) == sorted(expected)
        assert set(sweep.declared.lr_range) <= set(expected)
    assert sweep.analysis in ("lr_sensitivity", "instability", "report")
    assert sweep.seeds == ["0"] or scale != "paper"


def test_the_figure_of_qk_layernorm_has_the_papers_sizes_and_three_seeds_on_a_cpu():
    runs = [run for _, run in composed()["qknorm_lr", "paper"] if run.model.qk_norm == "layernorm"]
    sizes = {count_params(run.model.resolved(256)).n_params_non_embedding for run in runs}
    assert sorted(sizes) == pytest.approx([2.4e6, 9.4e6, 1.9e7, 4.2e7, 8.5e7, 3.0e8, 1.2e9], rel=0.02)
    assert loaded("qknorm_lr", "cpu").seeds == ["10", "11", "12"]
    assert all(len({point["model"] for point in loaded("qknorm_lr", scale).points()}) >= 3 for scale in SCALES)


@pytest.mark.parametrize("scale", ["paper", "gpu_hour"])
def test_logits_are_predicted_from_the_fiftieth_part_of_a_schedule_that_is_not_shrunk(scale):
    for _, run in composed()["predict_logits", scale]:
        assert run.budget.steps * 50 == run.schedule.steps and run.model.qk_norm == "none"
        # Inside the warm-up, at 0.4 of the peak.
        assert run.schedule.lr(int(run.budget.steps) - 1, int(run.budget.steps), 1.0) == pytest.approx(0.4)


def test_width_and_depth_scans_vary_one_of_the_two():
    for scale in SCALES:
        shapes = {(run.model.d_model, run.model.n_layers) for _, run in composed()["width_depth_lr", scale]}
        (crossing,) = (
            (d, n)
            for d, n in shapes
            if sum(d == other for other, _ in shapes) > 1 and sum(n == other for _, other in shapes) > 1
        )
        assert all(d == crossing[0] or n == crossing[1] for d, n in shapes)
        assert {run.model.d_model // run.model.n_heads for _, run in composed()["width_depth_lr", scale]} in (
            {64},
            {16},
        )


@pytest.mark.parametrize("name", ["mup_simple_lr", "mup_simple_noqk", "mup_full"])
def test_the_base_width_is_the_smallest_model_s(name):
    for scale in SCALES:
        runs = [run for _, run in composed()[name, scale]]
        assert {run.parametrization.base_width for run in runs} == {min(run.model.d_model for run in runs)}


def cost(name, scale):
    """Runs, and their GPU-hours or (cpu) core-minutes."""
    models, tokens, steps = {}, {}, {}
    for point, run in composed()[name, scale]:
        model = run.model.resolved(VOCABULARY[scale])
        models[point.get("model")] = flops_per_token(model, run.batch.sequence_length)
        tokens[point.get("budget.steps")] = run.budget.resolve_steps(count_params(model), run.batch.tokens) * (
            run.batch.tokens
        )
        steps[point.get("budget.steps")] = tokens[point.get("budget.steps")] / run.batch.tokens
    points = loaded(name, scale).points()
    flops = sum(models[point.get("model")] * tokens[point.get("budget.steps")] for point in points)
    seconds = flops / FLOPS_PER_SECOND[scale]
    if scale == "cpu":
        seconds += CPU_SECONDS_A_STEP * sum(steps[point.get("budget.steps")] for point in points)
        return len(points), (seconds + CPU_SECONDS_A_RUN * len(points)) / 60
    return len(points), seconds / 3600


def row(name):
    costs = [cost(name, scale) for scale in SCALES]
    (a, hours), (b, gpu), (c, minutes) = costs
    return f"| `{name}` | {a} | {hours:,.0f} | {b} | {gpu:.2f} | {c} | {minutes:.0f} |"


def test_every_sweep_costs_what_the_table_says_and_fits_its_scale():
    text = (SWEEP_DIR / "README.md").read_text()
    assert [line for line in text.splitlines() if line.startswith(tuple(f"| `{n}`" for n in NAMES))] == [
        *map(row, NAMES)
    ]
    assert all(cost(name, "gpu_hour")[1] <= 1 and cost(name, "cpu")[1] <= MOST_CORE_MINUTES for name in NAMES)


def test_a_plan_agrees_with_the_table():
    runs = plan(narrowed(load_sweep("batch", "cpu"), ["optimizer.lr=1e-2"]))[0]
    of_steps = CPU_SECONDS_A_STEP * sum(run.steps for run in runs) + CPU_SECONDS_A_RUN * len(runs)
    of_flops = sum(run.flops for run in runs) / FLOPS_PER_SECOND["cpu"]
    assert 7 * (of_flops + of_steps) == pytest.approx(60 * cost("batch", "cpu")[1])


def test_the_commands_of_the_readme_compose_and_do_what_was_typed(monkeypatch, capsys):
    lines = [line.partition("#")[0].split() for line in (SWEEP_DIR / "README.md").read_text().splitlines()]
    typed = [words[3:] for words in lines if words[:3] == ["python", "-m", "scaling_testbed.sweep"]]
    assert len(typed) == 14
    asked, made = commands.asked, []

    def and_no_more(*words):
        made.append(asked(*words))
        raise UserError("understood")

    monkeypatch.setattr(commands, "asked", and_no_more)
    assert [sweep.main(words) for words in typed] == [1] * 14
    assert capsys.readouterr().err == 14 * "error: understood\n"  # and nothing of an old spelling
    for command in made:
        typed = dict(map(override_values, command.typed))
        points = covering(command.sweep.points(), typed) or command.sweep.points()[:1]
        runs = [flatten(run) for run in compose_many([overrides(command.sweep, point) for point in points])]
        for key, values in typed.items():
            key = f"{key}.name" if key in ("model", "optimizer") else key
            assert {str(run[key]) for run in runs} == {spelled_back(value) for value in values}


def spelled_back(value):
    """A value of the README as its row has it."""
    return str(float(value)) if value.isdigit() else {"null": "None"}.get(value, value)


def test_a_folder_says_which_sweep_began_it(tmp_path):
    (tmp_path / "grid.yaml").write_text(SCALED)
    small, large = (load_sweep(str(tmp_path / "grid.yaml"), scale) for scale in ("small", "large"))
    runs = plan(narrowed(small, [f"runs_dir={tmp_path}"]))[0]
    remember(runs, small)
    about = {"sweep": "grid", "scale": "small", "paper": "small_scale_proxies", "experiment": "kappa"}
    about |= {"description": "Why. Small.", "analysis": "report"}
    assert json.loads((tmp_path / "grid_small" / "sweep.json").read_text()) == about
    remember(runs, dataclasses.replace(small, description="Better said."))
    assert "Better said." in (tmp_path / "grid_small" / "sweep.json").read_text()
    more = plan(narrowed(large, [f"runs_dir={tmp_path}", "name=grid_small"]))[0]
    remember(more, large)
    assert json.loads((tmp_path / "grid_small" / "sweep.json").read_text())["scale"] == "small"
    assert len((tmp_path / "grid_small" / "plan.jsonl").read_text().splitlines()) == len(runs) + len(more) == 3


def test_the_door_takes_a_scale(tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text("overrides: [data=markov]" + SCALED)

    def door(*words):
        status = sweep.main(["plan", f"sweep={tmp_path / 'grid.yaml'}", f"runs_dir={tmp_path / 'runs'}", *words])
        return (status, *capsys.readouterr())

    assert f"records under {tmp_path}/runs/grid/" in door()[1]
    status, out, _ = door("scale=small")
    assert status == 0 and out.startswith("Why. Small.") and f"records under {tmp_path}/runs/grid_small/" in out
    status, _, error = door("scale=medium")
    assert status == 2 and "there is no scale 'medium'; it has large, small" in error


SCALED = """
description: Why.
paper: small_scale_proxies
experiment: kappa
analysis: report
scales:
  large: {axes: {model: [bigram, nano_s]}}
  small: {description: Small., axes: {model: [nano_m]}}
"""
