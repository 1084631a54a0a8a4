"""Runs that do not fit a GPU are named with overrides that make them fit."""

import dataclasses

import pytest

from scaling_testbed.config.compose import compose
from scaling_testbed.config.memory import USABLE, estimate_memory
from scaling_testbed.model.counting import count_params
from scaling_testbed.sweeps.gpu_memory import GIB, fits, fitting_overrides, planned_memory
from scaling_testbed.sweeps.grid import load_sweep, narrowed
from scaling_testbed.sweeps.plan import plan

PAPER = ["experiment=small_scale_proxies", "batch.micro_batch_sequences=null"]


def estimate(run, n_gpus):
    model = run.model.resolved(32101)
    n_params = count_params(model).n_params
    return model, n_params, estimate_memory(run, model, n_params, run.compute.precision_on_gpu, n_gpus).total


@pytest.mark.parametrize(
    "words, gib",
    [
        (["model=proxy_1b"], 80),
        (["model=proxy_300m"], 80),
        (["model=proxy_1b"], 24),
        (["model=proxy_5b"], 80),
        (["model=proxy_5b", "optimizer=muon"], 141),
        (["model=proxy_85m", "parallelism=fsdp"], 8),
    ],
    ids=str,
)
def test_the_overrides_make_the_run_fit_with_the_largest_micro_batch(words, gib):
    run = compose([*PAPER, *words])
    model, n_params, needed = estimate(run, 1)
    assert not fits(needed, gib)
    overrides = fitting_overrides(run, model, n_params, 1, gib)
    launcher = {
        key: int(value) for key, _, value in (o.partition("=") for o in overrides) if key.startswith("launcher")
    }
    gpus = launcher.get("launcher.nodes", 1) * launcher.get("launcher.gpus_per_node", 1)
    changed = compose([*PAPER, *words, *(o for o in overrides if not o.startswith("launcher."))])
    assert estimate(changed, gpus)[2] <= USABLE["cuda"] * gib * GIB
    rows = changed.batch.micro_batch or changed.batch.sequences // gpus
    here = changed.batch.sequences // gpus
    if larger := [n for n in range(rows + 1, here + 1) if here % n == 0]:
        batch = dataclasses.replace(changed.batch, micro_batch_sequences=larger[0])
        assert estimate(dataclasses.replace(changed, batch=batch), gpus)[2] > USABLE["cuda"] * gib * GIB


def test_no_override_is_named_where_none_is_enough():
    run = compose([*PAPER, "model=proxy_5b", "optimizer=muon"])  # cannot be sharded
    model, n_params, _ = estimate(run, 1)
    assert fitting_overrides(run, model, n_params, 1, 16) is None


def test_a_run_that_chooses_its_micro_batch_is_planned_with_the_one_it_would_choose():
    auto = compose([*PAPER, "model=proxy_1b", "batch.micro_batch_sequences=auto"])
    model, n_params, least = estimate(auto, 1)
    chosen = planned_memory(auto, model, n_params, 1, 80).total
    assert least < chosen and fits(chosen, 80)
    (word,) = fitting_overrides(compose([*PAPER, "model=proxy_1b"]), model, n_params, 1, 80)
    typed = compose([*PAPER, "model=proxy_1b", word])
    assert planned_memory(typed, model, n_params, 1, 80).total == chosen


@pytest.mark.fault("C: plan of runs that share a GPU", "A plan gives each of the runs that share a GPU its part.")
def test_runs_that_share_a_gpu_have_a_part_of_its_memory(tmp_path, record_property):
    (tmp_path / "two.yaml").write_text(
        "overrides: [experiment=small_scale_proxies, model=proxy_9m, batch.micro_batch_sequences=null]"
    )
    sweep = load_sweep(str(tmp_path / "two.yaml"))
    for typed, gib in (([], 20), (["compute.gpu_memory_gib=300"], 100)):
        (run,), _ = plan(narrowed(sweep, typed), 1, 60, 3)
        assert run.gpu_memory_gib == gib
    record_property("seen", f"{run.gpu_memory_gib:g} of 300 GiB for each of 3 runs")
