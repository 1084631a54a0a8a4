"""What the benchmarks say of what they measured: aims judged, interruptions survived, the table whole."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmarks.report
from benchmarks import (
    attention,
    beside,
    data,
    grid,
    harness,
    head,
    laws,
    peers,
    precision,
    runs,
    scaling,
    steps,
    traffic,
)
from benchmarks.report import Budget, DeviceLost, Report, table

MACHINE = {"machine": "a machine", "device": "cpu", "ceilings": {"product_flops_per_s": 1e12, "copy_bytes_per_s": 1e9}}
COLUMNS = [("median_s", "ms", "ms")]
GOOD, BAD = ": met", ": NOT met"


def rows(ours: float, recompute: float, peer: float, peak: int = 150) -> list[dict]:
    """Of a head that took `ours` seconds, beside our other and a peer that held 100 bytes."""
    found = [
        {"variant": "ours, recompute", "ours": True, "median_s": recompute, "peak_bytes": 10},
        {"variant": "ours, chunked", "ours": True, "median_s": ours, "peak_bytes": peak},
        {"variant": "a peer", "ours": False, "median_s": peer, "peak_bytes": 100},
    ]
    head.compare_with_peers(found, floor=1.0)
    return found


@pytest.mark.parametrize(
    ("measured", "width", "verdicts"),
    [
        (rows(1.3, 1.0, 1.7), 256, [GOOD, GOOD, GOOD]),
        (rows(1.3, 1.0, 1.6), 256, [BAD, GOOD, GOOD]),
        (rows(1.3, 1.0, 1.6), 768, [GOOD, GOOD, GOOD]),
        (rows(1.5, 1.0, 1.4), 768, [BAD, BAD, GOOD]),  # what is not trained with does not count
        (rows(1.3, 1.0, 1.7, peak=151), 256, [GOOD, GOOD, BAD]),
    ],
)
def test_the_head_s_aims_are_judged_by_what_training_uses(measured, width, verdicts):
    found = head.gpu_aims(measured, (32768, width, 50304), budget_bytes=50)
    assert len(found) == 3 and all(text.endswith(end) for text, end in zip(found, verdicts, strict=True))


def test_an_aim_that_was_not_measured_is_not_met_in_silence():
    alone = [row for row in rows(1.3, 1.0, 1.7) if row["variant"] != "ours, chunked"]
    assert "cannot be checked" in head.gpu_aims(alone, (32768, 256, 50304), 50)[0]


def test_the_cpu_claim_needs_both_sides():
    assert "cannot be checked" in head.cpu_claim(rows(1.3, 1.0, 1.7))


def test_the_head_that_is_judged_is_the_one_that_training_takes():
    cross_entropy = pytest.importorskip("scaling_testbed.kernels.cross_entropy.triton")
    assert f"ours, {cross_entropy.AUTO_VARIANT}" == head.TRAINED


def statistics_row(ratio: float) -> list[dict]:
    return [
        {"variant": name, "ours": True, "capped": False, "median_s": seconds}
        for name, seconds in (("ours", 1.0), ("ours with statistics", ratio))
    ]


@pytest.mark.parametrize(("ratio", "end"), [(1.1, GOOD), (1.11, BAD)])
def test_the_statistics_aim_is_judged(ratio, end):
    measured = statistics_row(ratio)
    attention.compare_with_peers(measured)
    assert attention._statistics_note(measured)[0].endswith(end)
    assert "cannot be checked" in attention._statistics_note(measured[:1])[0]


@pytest.mark.parametrize(("rate", "end"), [(0.85, GOOD), (0.84, BAD), (None, "cannot be checked")])
def test_the_bandwidth_aim_is_judged(rate, end):
    reached = {} if rate is None else {"over_copy_rate": rate}
    measured = [
        {"variant": "eager", "ours": False, "over_copy_rate": 0.9},
        {"variant": "ours", "ours": True, **reached},
    ]
    assert attention._bandwidth_note(measured)[0].endswith(end)


@pytest.fixture
def report(tmp_path):
    return Report("head", MACHINE, COLUMNS, out=tmp_path, smoke=True)


def adds(report, label):
    return lambda seconds: report.add({"label": label, "rows": [{"variant": "v", "status": "ok", "median_s": seconds}]})


def fails(error):
    def piece(_seconds):
        raise error

    return piece


def written(report) -> dict:
    (path,) = report.path.parent.iterdir()  # and nothing half written beside it
    return json.loads(path.read_text())


def test_a_piece_that_fails_costs_itself(report, capsys):
    work = {"first": adds(report, "first"), "second": fails(ValueError("no")), "third": adds(report, "third")}
    assert report.run(work, Budget(60)) == 1
    assert [case["label"] for case in written(report)["cases"]] == ["first", "third"]
    assert written(report)["not_reached"] == ["second (no)"]
    assert "not measured: second (no)" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DeviceLost("gone")], ids=repr)
def test_an_interruption_keeps_what_was_measured_and_names_the_rest(report, error):
    work = {"first": adds(report, "first"), "second": fails(error), "third": adds(report, "third")}
    assert report.run(work, Budget(60)) == 1
    assert [case["label"] for case in written(report)["cases"]] == ["first"]
    assert [name.split(" ")[0] for name in written(report)["not_reached"]] == ["second", "third"]


@pytest.mark.parametrize("status", ["failed: no", "wrong, not timed: out off by 1"])
def test_what_fails_of_ours_is_a_failure(report, status):
    def piece(_seconds, ours):
        report.add({"label": "first", "rows": [{"variant": "v", "ours": ours, "status": status}]})

    assert report.run({"first": partial(piece, ours=False)}, Budget(60)) == 0
    assert report.run({"first": partial(piece, ours=True)}, Budget(60)) == 1


def test_a_gpu_that_answers_no_more_ends_a_comparison(monkeypatch):
    def gone():
        raise RuntimeError("an illegal memory access was encountered")

    def fails(*_inputs):
        raise RuntimeError("an illegal memory access was encountered")

    peers = [harness.Variant("a peer", fails)]
    compare = partial(
        harness.compare,
        peers,
        lambda seed: (),
        {"plain": dict},
        device=torch.device("cpu"),
        tolerance={},
        rounds=1,
        seconds=0,
    )
    assert compare()[0]["status"].startswith("failed: an illegal memory access")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", gone)
    with pytest.raises(DeviceLost, match="the GPU was lost in a peer"):
        compare()


def test_what_there_is_no_time_for_is_named(report):
    assert report.run({"first": adds(report, "first")}, Budget(0)) == 0
    assert written(report)["not_reached"] == ["first"] and "not measured: first" in table(written(report))


def test_peers_can_be_done_without():
    variants = [harness.Variant(name, print) for name in ("ours, chunked", "Liger", "Liger, sums in fp32", "SDPA")]
    assert [variant.name for variant in harness.kept(variants, ["liger", "sdpa"])] == ["ours, chunked"]


def test_attention_is_timed_on_what_the_projections_leave():
    shape = attention.Shape(2, 5, 3, 32)
    inputs = attention.attention_inputs(0, shape=shape, device=torch.device("cpu"))
    for x in inputs:
        assert x.shape == (2, 3, 5, 32) and x.transpose(1, 2).is_contiguous() and x.is_leaf
    found = attention.run_attention(*inputs, function=attention.sdpa, backward=True)
    assert set(found) == {"out", "q gradient", "k gradient", "v gradient"}
    assert all(x.grad is None for x in inputs)  # a copy into it would be charged to whoever lays it out otherwise


@pytest.mark.parametrize(
    ("seconds", "commit", "typed", "end"),
    [
        (19.9, "8bd9ca3", False, GOOD),
        (20.6, "8bd9ca30", False, BAD),
        (20.1, "ee5a80d", True, "wall time 0.20 of that of ee5a80d"),  # the aims are about another commit
    ],
)
def test_a_grid_is_timed_beside_an_earlier_commit_in_its_own_spelling(
    tmp_path, monkeypatch, capsys, seconds, commit, typed, end
):
    earlier = tmp_path / "earlier"
    (earlier / "scaling_testbed" / ("commands" if typed else "running")).mkdir(parents=True)
    (earlier / "scaling_testbed" / "sweep.py").touch()
    commands = []

    def measure(variant, folder, overrides):
        commands.append(variant.command(folder, overrides))
        variant.times.append((seconds if variant.name == grid.WARM else 100.0, 50.0))
        row = {"val_loss": 2.0, "train_loss_last": 2.0, "data_fingerprint": "same"}
        variant.rows = {("nano_s", "none", rate): row for rate in range(grid.N_RUNS)}

    monkeypatch.setattr(grid, "measure", measure)
    monkeypatch.setattr(grid, "prepare", lambda variant: None)
    monkeypatch.setattr(grid, "commit_of", lambda place: commit)
    monkeypatch.setattr(harness, "describe_machine", lambda device: MACHINE)
    assert grid.main(["--earlier", str(earlier), "--quick", "--rounds", "2", "--out", str(tmp_path / "out")]) == 0
    assert len(commands) == 6 and [words[-1] for words in commands[:3]] == [
        "2",
        "--fresh",
        "2" if typed else "workers=2",
    ]
    (case,) = json.loads(next((tmp_path / "out").iterdir()).read_text())["cases"]
    assert case["notes"][0].startswith("2 rounds") and case["notes"][-1].endswith(end)
    assert f"| {grid.STARTS} | {grid.WARM} | {seconds:.2f} | 50.00 |" in capsys.readouterr().out
    assert all("compute.device=cpu" in words for words in commands)  # as the result says


NANOGPT = """
import nothing_that_exists
def get_batch(split):
    data = np.memmap(os.path.join(data_dir, split + '.bin'), dtype=np.uint16, mode='r')
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x, y = (torch.stack([torch.from_numpy(data[i+k:i+k+block_size].astype(np.int64)) for i in ix]) for k in (0, 1))
    return x.to(device), y.to(device)
"""


def test_batches_are_nanogpt_s_own_and_are_looked_up_in_the_tokens(tmp_path):
    tokens = np.random.default_rng(0).integers(257, size=1000).astype(np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    (tmp_path / "train.py").write_text(NANOGPT)
    x, y = data.nanogpt_batches(tmp_path, tmp_path, (3, 8))()
    assert data.check_batch((x, y), tokens, (3, 8)) is None
    assert data.check_batch((x, x), tokens, (3, 8)) == "the targets are not the next tokens"
    assert data.check_batch((x.flip(1), y.flip(1)), tokens, (3, 8)) == "the targets are not the next tokens"
    assert data.check_batch((y.flip(1), x.flip(1)), tokens, (3, 8)) == "a row is not in the tokens"
    assert data.check_batch((x.int(), y.int()), tokens, (3, 8)) == "torch.int32 [3, 8]"


def test_ways_to_get_data_are_timed_in_turns_and_a_wrong_one_is_not():
    called = []
    ways = {name: partial(called.append, name) for name in (data.OURS, "a peer", "wrong")}
    measured = data.timed_in_turns(ways, {**dict.fromkeys(ways), "wrong": "no"}, rounds=2, seconds=9, calls=1)
    assert called == [data.OURS, "a peer", "a peer", data.OURS]
    assert [row["status"] for row in measured] == ["ok", "ok", "wrong, not timed: no"]
    measured[1]["ratio"] = 0.99
    assert data.judged(measured)[0].endswith(BAD)


@pytest.mark.parametrize(("power", "end"), [(1.05, GOOD), (2.0, BAD)])
def test_a_cost_that_grows_faster_than_its_work_shows(power, end):
    measured = [{"variant": f"{n} runs", "median_s": n**power / 9, "work": n} for n in (16, 64, 256)]
    assert f"the power {power:.2f}, counted work with 1.00" in scaling.judged(measured)
    assert scaling.judged(measured).endswith(end)


def test_a_quick_run_measures_and_checks(tmp_path, capsys, monkeypatch):
    once = lambda call, device: harness.timed(call, device)[0]  # noqa: E731  and not 13 times
    monkeypatch.setattr(harness, "_median_seconds", once)
    options = ["--device", "cpu", "--quick", "--rounds", "1", "--out", str(tmp_path), "--without", "torch's"]
    options += ["--widths", "48", "--chunk-mib", "1,2"]
    assert head.main(options) == 0
    (path,) = tmp_path.glob("widths-*.json")  # another file than that of the standard shapes
    (case,) = json.loads(path.read_text())["cases"]
    assert [row["variant"] for row in case["rows"]] == [
        "ours, chunked", "ours, chunks of 1 MiB", "ours, chunks of 2 MiB",
        "F.cross_entropy + z", "F.cross_entropy, without z",
    ]  # fmt: skip
    assert all(
        row["status"] == "ok" and row["median_s"] > 0 and max(row["errors"].values()) < 1e-4 for row in case["rows"]
    )


def test_micro_batches_add_their_gradients_by_autograd_or_straight(tmp_path, capsys, monkeypatch):
    once = lambda call, device: harness.timed(call, device)[0]  # noqa: E731  and not 13 times
    monkeypatch.setattr(harness, "_median_seconds", once)
    options = ["--device", "cpu", "--quick", "--rounds", "1", "--out", str(tmp_path), "--micro-batches", "3"]
    assert head.main(options) == 0
    (path,) = tmp_path.glob("micro_batches-*.json")
    (case,) = json.loads(path.read_text())["cases"]
    assert case["label"].endswith("V 4096, 3 micro-batches")
    assert [row["variant"] for row in case["rows"]] == [
        "ours, chunked, added by autograd", "ours, chunked, straight into .grad", "F.cross_entropy + z",
    ]  # fmt: skip
    assert all(row["status"] == "ok" and max(row["errors"].values()) < 1e-5 for row in case["rows"])
    (note,) = case["notes"]
    assert note.startswith("ours, chunked, straight into .grad: ") and "of its peak memory" in note


def event(name, begin, end, *, parent=None, gpu=False, kernels=()):
    """As torch.profiler lists one; times in microseconds."""
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    lasted = SimpleNamespace(start=begin, end=end, elapsed_us=lambda: end - begin)
    listed = [SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels]
    return SimpleNamespace(name=name, device_type=kind, time_range=lasted, kernels=listed, cpu_parent=parent)


def test_the_time_of_a_step_is_shared_out_by_what_has_launched_each_kernel():
    head = event("scaling_testbed::triton_cross_entropy", 0, 9)
    step = event("Optimizer.step#AdamW.step", 0, 9)
    events = [
        event("nvjet_hsh_256", 0, 10, gpu=True),
        event("nvjet_hsh_256", 5, 25, gpu=True),  # beside the first one for 5 us
        event("vectorized_kernel", 40, 46, gpu=True),
        event("Memcpy DtoD", 50, 52, gpu=True),  # of a graph: no operator has launched it
        event("aten::mm", 0, 1, parent=head, kernels=[("nvjet_hsh_256", 10)]),
        event("aten::mm", 1, 2, kernels=[("nvjet_hsh_256", 20)]),
        event("aten::lerp", 2, 3, parent=step, kernels=[("vectorized_kernel", 6)]),
    ]
    found = steps.of_profile(events, steps=2)
    assert found["launches"] == 2
    assert found["busy_s"] == pytest.approx((25 + 6 + 2) / 1e6 / 2)
    shares = {name: round(found[f"{name}_s"] * 1e6 * 2, 6) for name in traffic.CLASSES}
    nothing = dict.fromkeys(traffic.CLASSES, 0)
    assert shares == nothing | {"head": 10, "matmul": 20, "optimizer": 6, "copies": 2}
    assert steps.of_profile(events[4:], steps=2) == {}  # without a GPU


@pytest.mark.parametrize(("mfu", "end"), [(0.45, GOOD), (0.449, BAD), (None, "not measured (aim: 45%)")])
def test_the_utilisation_aim_is_judged_by_the_fastest_variant(mfu, end):
    measured = [{"variant": "eager", "mfu": mfu and 0.3}, {"variant": "compiled", "mfu": mfu}, {"variant": "graph"}]
    (said,) = steps.aim("124m", measured)
    assert said.endswith(end) and steps.aim("openlm_11m", measured) == []


def test_traffic_is_what_operators_read_and_write():
    a, b, target = torch.zeros(4, 8), torch.zeros(8, 16), torch.zeros(4, 16)
    with traffic.counting(bytes_per_s=1.0, flops_per_s=1e9) as counted:
        target.add_((a @ b).view(4, 16))
    product, added = 4 * (4 * 8 + 8 * 16 + 4 * 16), 4 * 3 * 4 * 16
    assert counted.by_class["matmul"] == traffic.Amount(product, 2 * 4 * 8 * 16, 1, product)
    assert counted.by_class["elementwise"] == traffic.Amount(added, 0, 1, added)
    assert counted.total.calls == 2


@pytest.mark.parametrize(
    ("losses", "same", "bits", "status"),
    [
        ({1: 2.0, 2: 1.0}, True, True, "ok"),
        ({1: 2.0, 2: 1.0}, False, True, "wrong: other bits"),
        ({1: 2.0, 2: 1.001}, False, True, "wrong: other bits"),
        ({1: 2.0, 2: 1.001}, False, False, "ok"),
        ({1: 2.0, 2: 1.1}, False, False, "wrong: losses differ by 0.0e+00 at first, and by at most 1.0e-01"),
        ({1: 2.1, 2: 1.0}, False, False, "wrong: losses differ by 5.0e-02 at first, and by at most 5.0e-02"),
        ({1: 2.0}, False, False, "wrong: losses differ by 0.0e+00 at first, and by at most inf"),
    ],
)
def test_runs_are_compared_by_bits_where_these_are_promised_else_by_losses(monkeypatch, losses, same, bits, status):
    monkeypatch.setattr(runs, "same_weights", lambda *folders: same)
    straight, run = ({"status": "ok", "losses": x, "folder": "", "run_seconds": 1} for x in ({1: 2.0, 2: 1.0}, losses))
    assert runs.compared("again", run, straight, bits=bits)["status"] == status


def test_a_task_goes_on_after_a_killed_process_and_the_time_of_all_is_kept(tmp_path):
    def end():
        os.kill(os.getpid(), signal.SIGKILL)

    def note():
        (tmp_path / "noted").touch()
        return {"status": "ok"}

    def fail():
        raise ValueError("no memory")

    tasks = {"killed first": [end, note], "killed": [end], "too long": [lambda: time.sleep(60)], "failed": [fail, note]}
    found = dict(runs.make_all(tasks, at_once=4, budget=Budget(3)))
    assert found == {
        "killed first": {"status": "ok"},
        "killed": {"status": "failed: the process ended with -9"},
        "failed": {"status": "failed: it was to be killed, and failed: no memory"},
    }


def test_a_failure_of_what_others_are_compared_with_is_a_failure():
    run = {"status": "ok", "losses": {1: 2.0}, "folder": "", "run_seconds": 1}
    row = runs.compared("ddp", run, {"status": "failed: no memory"}, bits=False)
    assert row["status"] == "failed: there is nothing to compare it with (failed: no memory)"


def test_a_step_that_fails_takes_no_other_with_it(monkeypatch):
    """After an illegal access each call of CUDA in the process fails."""

    def work(sender, jobs):
        lost = False
        for _, variant in jobs:
            lost = lost or variant == "bad"
            sender.send({"status": "failed: no access" if lost else "ok"})
        time.sleep(60)

    monkeypatch.setattr(steps, "work", work)
    jobs = [("10m", variant) for variant in ("good", "bad", "other", "last")]
    found = {variant: row["status"] for (_, variant), row in steps.rows_of_jobs(jobs, Budget(60))}
    assert found == {"good": "ok", "bad": "failed: no access", "other": "ok", "last": "ok"}


def test_a_stage_without_time_for_a_step_says_what_was_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "in_child", lambda *_: MACHINE)
    assert steps.main(["--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert result["cases"] == [] and len(result["not_reached"]) == 6
    assert "nano_s 4 x 64, eager" in result["not_reached"]


def test_a_stage_that_is_not_known_is_named(tmp_path):
    script = Path(harness.__file__).parents[1] / "scripts/gpu_check.sh"
    done = subprocess.run([script, tmp_path / "out", "run", "stpes"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("gpu_check: there is no stage stpes; there are versions run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "options", "n_cases"),
    [(steps, [], 2), (runs, [], 2), (runs, ["--processes"], 3), (attention, ["--sdpa", "--rounds", "1"], 2)],
)
def test_a_stage_is_rehearsed_on_a_cpu(tmp_path, benchmark, options, n_cases):
    assert benchmark.main(["--device", "cpu", "--seconds", "600", "--out", str(tmp_path), *options]) == 0
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert len(result["cases"]) == n_cases and result["not_reached"] == []
    assert {row["status"] for case in result["cases"] for row in case["rows"]} == {"ok"}


JOB = peers.Job(
    trainer="nanoGPT",
    shape={"n_layers": 2, "n_heads": 2, "d_model": 32, "d_ff": 128},
    vocabulary=257,
    sequences=4,
    micro=2,
    length=32,
    steps=6,
    skip=2,
    lr=1e-3,
    dtype="fp32",
    device="cpu",
    threads=1,
    compile=False,
    overrides=[],
    folder="/tokens",
    work="/work",
    data_dir="",
    nanogpt="",
)
SIZE = beside.Size("a size", (), 257, (4, 2, 32), 6, aim=1.3)


def trained(name: str, rate: float, last: float = 4.0, peak: float = 100) -> dict:
    """The row of a trainer that was measured."""
    found = {"variant": name, "status": "ok", "tokens_per_second": rate, "cpu_s": 1 / rate, "peak_bytes": peak}
    return found | {"first_loss": 5.5, "last_loss": last}


@pytest.mark.parametrize(
    ("rate", "peak", "verdicts"), [(1.3, 110, [GOOD, GOOD]), (1.29, 110, [BAD, GOOD]), (1.3, 111, [GOOD, BAD])]
)
def test_a_trainer_is_judged_by_the_best_type_of_each(rate, peak, verdicts):
    ours = [trained("this trainer, fp32", 0.1, peak=1), trained("this trainer, bf16", rate, peak=peak)]
    without = trained("this trainer without qk-norm and z-loss, bf16", 9.0)  # not what training uses
    found = [*ours, without, trained("nanoGPT, fp32", 1.0), trained("nanoGPT, bf16", 0.5, peak=1)]
    notes = beside.judge(found, SIZE, start=5.5)
    assert [notes[1].endswith(verdicts[0]), notes[4].endswith(verdicts[1])] == [True, True]
    assert "cannot be checked" in notes[2] and found[3]["over"] == pytest.approx(rate)


@pytest.mark.parametrize("other", [{"last_loss": 4.26}, {"first_loss": 6.3}, {"last_loss": float("nan")}])
def test_a_trainer_with_other_losses_is_not_compared(other):
    found = [trained("this trainer, fp32", 1.0), trained("nanoGPT, fp32", 1.0) | other]
    assert beside.judge(found, SIZE, start=5.5)[1] == "speed beside nanoGPT cannot be checked"
    assert found[1]["status"].startswith("wrong") and "over" not in found[1]


@pytest.fixture
def trainers(monkeypatch, tmp_path):
    """Run a comparison whose trainers are a stub that takes `pause` seconds; returns the names in their turns."""
    turns, pauses = [], []

    def stub(job):
        turns.append(f"{job.trainer}, {job.dtype}")
        time.sleep(pauses[-1])
        found = {"seconds": [0.1], "cpu_seconds": [0.1], "peak_bytes": 1, "n_params": 1}
        return {"status": "ok", "losses": [5.5, 5.0, 4.5, 4.0]} | found

    monkeypatch.setattr(beside, "run_job", stub)
    monkeypatch.setattr(beside, "job_of", lambda *_: JOB)
    monkeypatch.setattr(benchmarks.report, "_commit", lambda: "abc")
    for name in ("train.py", "model.py"):
        (tmp_path / name).touch()
    options = {"nanogpt": str(tmp_path), "threads": "1", "out": tmp_path / "out", "quick": True, "seconds": 60}
    options |= {"without": ["hf", "qk-norm", "bf16"], "rounds": 2}

    def run(pause=0.0, **more):
        turns.clear()
        pauses.append(pause)
        assert beside.main(Namespace(**options | more), MACHINE) == 0
        return list(turns)

    return run


def test_trainers_take_turns_and_a_size_that_is_done_is_kept(trainers, monkeypatch, tmp_path):
    both = ["this trainer, fp32", "nanoGPT, fp32"]
    assert trainers() == [*both, *reversed(both)]
    (path,) = (tmp_path / "out").iterdir()
    (case,) = json.loads(path.read_text())["cases"]
    assert [row["rounds"] for row in case["rows"]] == [2, 2] and case["done"]
    assert trainers() == []
    assert len(json.loads(path.read_text())["cases"]) == 1
    assert len(trainers(threads="2")) == 4
    monkeypatch.setattr(sys, "argv", ["trainer", "--without", "nothing"])
    assert len(trainers(threads="2")) == 4


def test_a_trainer_there_is_no_time_for_is_named_and_measured_later(trainers, tmp_path):
    assert trainers(pause=0.2, seconds=0.1) == ["this trainer, fp32"]
    (path,) = (tmp_path / "out").iterdir()
    assert json.loads(path.read_text())["not_reached"] == ["nano_s, V 257, 4 x 32: nanoGPT, fp32"]
    assert len(trainers()) == 4


TRAIN_PY = """
import sys, torch
weight = torch.nn.Parameter(torch.ones(1))
raw_model = torch.nn.ParameterList([weight])
beta1 = beta2 = 0.9
device_type = 'cpu'
def adamw(betas, kind):
    return torch.optim.AdamW([weight], fused=kind == 'cuda')
optimizer = adamw((beta1, beta2), device_type)
def nullcontext(): return 'none'
ctx = nullcontext() if device_type == 'cpu' else torch.amp.autocast('cpu', torch.bfloat16)
for number in range(6):
    weight.grad = torch.ones(1)
    optimizer.step()
    print(f"iter {number}: loss {6 - number:.4f}, time 1.00ms, mfu -100.00%")
"""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nanogpt_s_own_loop_is_run(dtype, monkeypatch, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN_PY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    job = dataclasses.replace(JOB, nanogpt=str(tmp_path), dtype=dtype)
    times = peers.Times(job)
    try:
        found = peers.nanogpt(job)
    finally:
        times.hook.remove()
    assert found == {"losses": [6, 5, 4, 3, 2, 1], "n_params": 1}
    assert [len(each) for each in times.steady().values()] == [4, 4]
    assert {"--gradient_accumulation_steps=2", "--max_iters=5", "--dataset=/tokens"} <= set(sys.argv)


def test_a_gpu_is_waited_for_twice(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(len(times.wall) + 1))
    times = peers.Times(dataclasses.replace(JOB, device="cuda"))
    times.hook.remove()
    for _ in range(JOB.steps):
        times.take()
    assert waited == [JOB.skip, JOB.steps] and [len(each) for each in times.steady().values()] == [1, 1]


def test_what_nanogpt_has_no_option_for_is_changed_or_refused():
    for change in peers.NANOGPT_CHANGES.values():
        assert peers.changed(TRAIN_PY, [change]) != TRAIN_PY
        with pytest.raises(ValueError, match="has changed"):
            peers.changed("", [change])


@pytest.mark.slow
def test_a_trainer_is_measured_in_a_process_of_its_own(tmp_path):
    (size,) = beside.sizes_of("cpu", quick=True)
    job = beside.job_of(size, Namespace(nanogpt=None), "cpu", 1, tmp_path)
    found = beside.run_job(job)
    assert found["status"] == "ok" and len(found["losses"]) == size.steps
    assert len(found["seconds"]) == len(found["cpu_seconds"]) == size.steps - beside.SKIP
    assert 0 < found["peak_bytes"] < 2**31


@pytest.mark.slow
def test_precisions_are_compared_on_the_same_tokens_from_the_same_weights():
    cases = []
    precision.compare(SimpleNamespace(add=cases.append), 1, "nano_s", (2, 16), 0.0)
    fp32, bf16, narrow = cases[0]["rows"]
    assert fp32["speed"] == 1 and fp32["loss_difference"] == 0
    assert 0 < bf16["loss_difference"] < 0.1 > narrow["loss_difference"] != bf16["loss_difference"]
    assert len(fp32["seconds"]) == len(bf16["seconds"]) == precision.LOSSES


def test_resamples_of_a_law_reach_the_same_optima_together_as_one_by_one():
    cases = []
    laws.compare(SimpleNamespace(add=cases.append), 1, "chinchilla", 12, 6, 0.0)
    ours, peer = cases[0]["rows"]
    assert ours["ratio"] == 1 and peer["ratio"] > 1
    assert ours["above"] < 1e-6 and peer["above"] < 1e-3
