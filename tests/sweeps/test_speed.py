"""How long a plan says its runs take: by a rate, by finished runs of the same kind of device, or by a probe."""

import json
from dataclasses import replace

import pytest

from scaling_testbed.commands import sweep as commands
from scaling_testbed.sweeps import probe, speed
from scaling_testbed.sweeps.grid import load_sweep, narrowed
from scaling_testbed.sweeps.plan import plan, sweep_folder
from scaling_testbed.sweeps.speed import is_for_cpu, measured, of_finished, priced, stated
from tests.sweeps.test_view import RUN

GPU, CPU = "NVIDIA H100 80GB HBM3", "Intel(R) Xeon(R) Platinum 8480+"


def row(flops=8e12, n_tokens=1000, wall_seconds=2.0, device=GPU, **more):
    found = {"status": "finished", "flops": flops, "n_tokens": n_tokens, "wall_seconds": wall_seconds}
    return found | {"device": device, "compute.device": "auto"} | more


def run(flops_per_token, **more):
    return replace(RUN, n_tokens=20_000, flops=flops_per_token * 20_000, **more)


def test_hours_are_reckoned_by_what_each_gpu_reached():
    """A run of the size that was measured takes as long for a token, whatever its number of tokens."""
    one = measured([row()], True, "of this sweep")
    assert one.seconds(run(8e9)) == pytest.approx(40)
    assert measured([row(world_size=4)], True, "").seconds(run(8e9)) == pytest.approx(160)
    assert measured([row(status="failed"), row(wall_seconds=None)], True, "") is None
    begun = replace(run(8e9), first_step=100, flops=8e9 * 10_000)  # of 200 steps it makes 100
    assert one.seconds(begun) == pytest.approx(20)
    assert one.seconds(run(8e9, config={"budget.hours": 0.5}, processes=2)) == 3600
    (known,) = priced([run(8e9)], one)
    assert known.gpu_hours == pytest.approx(40 / 3600) and known.cpu_hours is None


def test_another_size_is_reckoned_by_the_nearest_and_never_too_short():
    """A larger model at the same FLOP/s, a smaller one as long for a token."""
    found = measured([row(), row(flops=8e14, wall_seconds=100.0)], True, "")
    assert found.seconds(run(1.6e10)) == pytest.approx(80) and found.seconds(run(4e9)) == pytest.approx(40)
    assert found.seconds(run(4e11)) == pytest.approx(2000) and found.seconds(run(8e11)) == pytest.approx(2000)


def test_a_trial_of_few_tokens_does_not_tell_the_speed_of_long_runs_where_others_do():
    """Most of its time was its start."""
    trial, long = row(flops=4e10, n_tokens=5, wall_seconds=10.0), row()
    assert measured([trial, long], True, "").seconds(run(8e9)) == pytest.approx(40)
    assert measured([trial], True, "").seconds(run(8e9)) == pytest.approx(40_000)
    other = row(device="NVIDIA A100-SXM4-40GB", n_tokens=5, flops=4e10, wall_seconds=60.0)
    assert measured([long, other], True, "").seconds(run(8e9)) == pytest.approx(40)
    larger = row(flops=1.6e13)
    assert measured([trial, larger], True, "").seconds(run(8e9)) == pytest.approx(40)


def test_a_gpu_is_not_reckoned_by_a_processor_and_the_slowest_of_several_gpus_counts():
    rows = [row(device=CPU, wall_seconds=50.0), row(), row(device="NVIDIA A100-SXM4-40GB", wall_seconds=6.0)]
    assert measured(rows, True, "").seconds(run(8e9)) == pytest.approx(120)
    assert measured(rows, False, "").seconds(run(8e9)) == pytest.approx(1000)
    assert measured([rows[0]], True, "") is None
    assert measured([row(device="a new card", **{"compute.device": "cuda"})], True, "") is not None
    assert measured([row(**{"compute.device": "cpu"})], True, "") is None
    many = measured([row(wall_seconds=seconds) for seconds in (1.0, 2.0, 9.0)], True, "of this sweep")
    assert many.seconds(run(8e9)) == pytest.approx(40) and "3 finished runs of 1 size of this sweep" in many.words


def test_runs_of_the_sweep_come_before_those_of_other_folders(tmp_path):
    runs, _ = plan(narrowed(load_sweep("nano_lr"), [f"runs_dir={tmp_path}", "model=nano_s"]))
    other = tmp_path / "other" / "0123"
    other.mkdir(parents=True)
    assert of_finished(runs, [], True) is None
    by_clock = [replace(one, config=one.config | {"budget.hours": 2.0}) for one in runs]
    assert of_finished(by_clock, [], True).seconds(by_clock[0]) == 7200
    (other / "result.json").write_text(json.dumps(row()))
    (tmp_path / "other" / "damaged").mkdir()
    (tmp_path / "other" / "damaged" / "result.json").write_text("{")
    beside = of_finished(runs, [], True)
    assert f"in other folders of {tmp_path}/ on {GPU}" in beside.words
    assert of_finished(runs, [row(device=CPU)], True) == beside and of_finished(runs, [], False) is None
    assert "of this sweep" in of_finished(runs, [row()], True).words
    own = sweep_folder(runs) / "4567"
    own.mkdir(parents=True)
    (own / "result.json").write_text(json.dumps(row(wall_seconds=9.0)))
    assert of_finished(runs, [], True) == beside


@pytest.mark.parametrize(
    ("device", "gpu", "flops", "is_cpu"),
    [("auto", None, 1e12, True), ("auto", 80.0, 1e12, False), ("cpu", 80.0, 1e12, True), ("cuda", None, 1e12, False),
     ("auto", None, 1e19, False), ("cpu", None, 1e19, True)],
)  # fmt: skip
def test_a_plan_is_for_the_processor_if_nothing_speaks_for_a_gpu(monkeypatch, device, gpu, flops, is_cpu):
    monkeypatch.setattr(speed, "memory_of_gpu", lambda: gpu)
    runs = [replace(RUN, flops=flops, config={"compute.device": device})]
    assert is_for_cpu(runs) == is_cpu and is_for_cpu(runs, stated=True) == (device == "cpu")


def test_a_plan_for_this_processor_takes_a_probe_and_says_so(door):
    status, out, _ = door("plan")
    assert status == 0 and "CPU-hours from a one-second probe of this CPU (" in out and "expect a factor of 2" in out
    assert "GPU-hours" not in out
    assert "CPU-hours at 1e+09 FLOP/s (stated)" in door("plan", "--flops-per-second", "1e9")[1]
    assert json.loads(door("plan", "--json")[1])[0]["cpu_hours"] is None


@pytest.mark.parametrize(
    "words", [["launcher.partition=gpu"], ["launcher.gpus_per_node=0"], ["compute.device=cuda"], ["--launcher", "MINE"]]
)
def test_a_plan_for_a_gpu_or_a_cluster_never_takes_a_probe(door, monkeypatch, tmp_path, words):
    (tmp_path / "mine.yaml").write_text("partition: gpu\n")
    monkeypatch.setattr(probe, "probed", lambda _: pytest.fail("it was probed"))
    status, out, _ = door("plan", *(str(tmp_path / "mine.yaml") if word == "MINE" else word for word in words))
    assert status == 0 and "GPU-hours: give --flops-per-second" in out


def test_a_probe_tries_the_smallest_and_the_largest_model_with_as_many_sequences_as_its_time_allows(monkeypatch):
    words = ["model=bigram,nano_s,nano_m,nano_l", "model.qk_norm=none", "seed=0"]
    runs, _ = plan(narrowed(load_sweep("nano_lr"), words))
    tried = []

    def update(config, model, rows, seconds):
        tried.append((model.name, rows, seconds))
        return {"nano_s": 0.01, "nano_m": 0.2, "nano_l": 2.0}[model.name]

    monkeypatch.setattr(probe, "_seconds_of_update", update)
    found = probe.probed(runs)
    assert [name for name, *_ in tried] == ["nano_s", "nano_m", "nano_l"] and tried[0][1] == 32
    assert 1 <= tried[2][1] < 32 and sum(seconds for *_, seconds in tried) < 2.5
    assert [point.flops for point in found.points] == sorted(point.flops for point in found.points)
    assert not found.on_gpu and found.unit == "CPU-hours"


def test_the_speed_that_is_typed_comes_first(monkeypatch):
    runs = [run(8e9)]
    monkeypatch.setattr(speed, "of_finished", lambda *_: pytest.fail("it was looked for"))
    assert commands._speed(runs, 1e9, True, True, True) == stated(1e9, True)
    assert stated(1e9, True).seconds(run(8e9)) == pytest.approx(8e9 * 20_000 / 1e9)
