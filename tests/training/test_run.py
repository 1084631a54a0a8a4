"""A run is a function of its configuration: repeated, split or interrupted, it ends in the same bits."""

import importlib.util
import json
import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from scaling_testbed.config.compose import compose
from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.data.preparing.preparation import prepare
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.learning import loss_model
from scaling_testbed.learning.interventions import qk_clip
from scaling_testbed.learning.optimizers import AS_ADAMW
from scaling_testbed.model.layers import SigmaReparamLinear
from scaling_testbed.processes.interrupts import Interrupted, Interrupts
from scaling_testbed.runs import checkpoint
from scaling_testbed.runs import folder as records
from scaling_testbed.runs import row as result
from scaling_testbed.train import main as train_main
from scaling_testbed.training import parts as building
from scaling_testbed.training import run as trainer
from scaling_testbed.training import step as updates
from scaling_testbed.training.run import train
from tests.conftest import KERNEL_DEVICE
from tests.training.conftest import TINY, StopAt, load_latest, metrics, start

SAME_RUN = ("val_loss", "val_loss_initial", "val_loss_best", "train_loss_last", "steps", "n_tokens", "flops")


def final_weights(folder):
    return load_latest(folder / "checkpoints").tensors


def assert_same_bits(one, other):
    """Weights, optimizer state and metrics of two run folders agree in every bit."""
    assert_same_weights(one, other)
    assert metrics(one) == metrics(other)


def assert_same_weights(one, other):
    first, second = final_weights(one), final_weights(other)
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
    for index, state in first["optimizer"]["state"].items():
        assert all(torch.equal(value, second["optimizer"]["state"][index][key]) for key, value in state.items())
    rows = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    assert [rows[0][key] for key in SAME_RUN] == [rows[1][key] for key in SAME_RUN]


def test_a_run_leaves_its_records(whole):
    row, folder = whole()
    assert json.loads((folder / "result.json").read_text()) == row == records.RunFolder(folder).result()
    assert row["status"] == "finished" and row["steps"] == 12 and row["n_tokens"] == 12 * 128
    assert set(result.ROW_FIELDS) <= set(row) and row["model.d_model"] == 32
    assert row["flops_6nd"] == 6 * row["n_params"] * row["n_tokens"]
    assert row["optimizer_state_bytes"] == 8 * row["n_params"]
    assert (
        0 < row["entropy_rate_nats"] < row["entropy_window_nats"] < row["unigram_entropy_nats"] and row["restarts"] == 0
    )
    assert row["rate_means"] == AS_ADAMW
    assert [line["step"] for line in metrics(folder)] == list(range(13))
    evaluated = [line["step"] for line in metrics(folder) if "val_loss" in line]
    assert evaluated == [0, 5, 10, 12]  # at step 0, at every fifth, at the end
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    assert {"config.yaml", "environment.json", "metrics.jsonl", "result.json"} <= {p.name for p in folder.iterdir()}


def test_a_line_has_time_utilisation_and_memory(trained, monkeypatch):
    monkeypatch.setattr(building, "peak_flops", lambda device, precision: 1e12)
    row, folder = trained("logging.every_steps=4", "budget.steps=9", "evaluation.every_steps=0")
    lines = {line["step"]: line for line in records.read_metrics(folder / "metrics.jsonl")}
    assert lines[1]["ms_per_step"] is lines[1]["mfu"] is None and set(lines) == {0, 1, 4, 8, 9}
    utilisation = lines[9]["tokens_per_second"] * row["flops"] / row["n_tokens"] / 1e12
    assert lines[9]["mfu"] == row["mfu"] == pytest.approx(utilisation)  # the order of a product is in its last bit
    total = sum(n * lines[step]["ms_per_step"] for step, n in ((4, 3), (8, 4), (9, 1)))
    assert total == pytest.approx(1000 * 8 * 128 / lines[9]["tokens_per_second"])  # each step counts once
    assert 2**20 < lines[4]["peak_memory_bytes"] <= row["peak_memory_bytes"]


def test_a_run_that_wants_no_checkpoint_leaves_none(trained):
    row, folder = trained("checkpoint.every_steps=0", "checkpoint.at_end=false")
    assert row["status"] == "finished" and not list((folder / "checkpoints").glob("*"))


@pytest.mark.fault("42", "The same seed gives the same bits, another seed others.")
def test_the_same_seed_twice_is_identical_and_another_differs(trained):
    _, one = trained(runs="one")
    _, two = trained(runs="two")
    assert_same_bits(one, two)
    row, _ = trained("seed=1")
    assert row["val_loss"] != json.loads((one / "result.json").read_text())["val_loss"]


def test_decay_stated_for_twice_the_schedule_is_twice_the_decay(trained):
    """The schedule's length counts and not the run's, which is cut at 12 steps."""
    cut = "schedule.steps=24"
    twice = trained("optimizer.weight_decay=0.02", cut)[1]
    assert_same_bits(trained("optimizer.weight_decay=0.01", "optimizer.weight_decay_steps=48", cut)[1], twice)


def test_accumulation_of_four_micro_batches_equals_one_batch(trained):
    _, whole = trained(runs="one")
    _, split = trained("batch.micro_batch_sequences=2", runs="two")
    for one, other in zip(metrics(whole), metrics(split), strict=True):
        for key, value in one.items():
            if isinstance(value, float):
                assert other[key] == pytest.approx(value, rel=2e-4), key  # fp32 sums in another order
    first, second = final_weights(whole)["model"], final_weights(split)["model"]
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)


def test_a_finished_run_is_not_run_again(trained, monkeypatch):
    row, folder = trained()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(trainer, "build_parts", None)
    again, _ = trained()
    assert again == row
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.fault(
    "6", "A signal while a run composes, prepares or builds ends it with 75, and it can be started again."
)
@pytest.mark.parametrize("phase", ["compose", "prepare", "open_prepared", "parallelize"])
def test_a_signal_while_a_run_starts_is_a_stop_and_the_next_start_goes_on(
    tiny, tmp_path, data_dir, monkeypatch, capsys, phase
):
    _, folder = tiny()
    place = sys.modules["scaling_testbed.train"] if phase == "compose" else building
    real = getattr(place, phase)

    def hit(*arguments, **options):
        signal.raise_signal(signal.SIGUSR1)
        return real(*arguments, **options)

    arguments = [*TINY, f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]
    with monkeypatch.context() as patch:
        patch.setattr(place, phase, hit)
        assert train_main(arguments) == 75
    row = json.loads((folder / "result.json").read_text())
    assert (row["status"], row["error"]) == ("preempted", "stopped by SIGUSR1 before training")
    assert train_main(arguments) == 0
    assert "finished" in capsys.readouterr().out


def test_a_closed_terminal_and_a_limit_of_time_stop_a_run_and_nohup_holds():
    """By the signals that the system sends then. The tests themselves may run under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        for number in (signal.SIGHUP, signal.SIGXCPU):
            with Interrupts() as interrupts, pytest.raises(Interrupted, match=number.name):
                signal.raise_signal(number)
                interrupts.check()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            interrupts.check()
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_run_can_be_trained_in_a_thread(tiny):
    """Python lets only the main thread handle signals."""
    run, _ = tiny("budget.steps=1")
    with ThreadPoolExecutor() as pool:
        assert pool.submit(train, run, quiet=True).result()["status"] == "finished"


def test_interrupts_of_another_process_are_replaced(tiny, monkeypatch):
    """As a launcher of Hydra sends them along with the run."""
    run, _ = tiny()
    with Interrupts() as sent:
        pass
    real = building.parallelize
    monkeypatch.setattr(building, "parallelize", lambda *a: signal.raise_signal(signal.SIGTERM) or real(*a))
    previous = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("nobody took the signal"))
    try:
        assert train(run, sent, quiet=True)["status"] == "preempted"
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_run_that_is_taken_over_writes_nothing_more(tiny, monkeypatch, tmp_path, data_dir, capsys):
    """Every third step a checkpoint, and no metrics in between, so that it is the checkpoint that is refused."""
    options = ["checkpoint.every_steps=3", "logging.every_steps=100", "evaluation.every_steps=0"]
    _, folder = tiny(*options)
    real = trainer.make_update

    def make(parts, given, *arguments):
        if given.step == 4:
            (folder / "lock").write_text('{"host": "elsewhere", "pid": 7, "job": null}')
        return real(parts, given, *arguments)

    monkeypatch.setattr(trainer, "make_update", make)
    arguments = [*TINY, f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}", *options]
    assert train_main(arguments) == 75
    assert "was taken over by elsewhere pid 7" in capsys.readouterr().err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert [line["step"] for line in metrics(folder)] == [0, 1]
    assert not (folder / "result.json").exists()


def test_a_run_that_is_finished_while_its_folder_is_taken_is_not_run_again(trained, monkeypatch):
    row, _ = trained()
    looks = iter([None, row])
    monkeypatch.setattr(trainer, "final_row", lambda *_, quiet: next(looks))
    monkeypatch.setattr(trainer, "build_parts", None)
    assert trained()[0] == row


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_path_trains_to_the_same_losses(trained):
    """fp32 sums in another order, 1e-7 each, after two updates; without a GPU Triton runs interpreted."""
    paths = {
        "plain": ("loss.impl=reference", "model.attention_impl=reference", "model.qk_norm_impl=reference"),
        "cpu": ("loss.impl=chunked", "model.attention_impl=sdpa", "model.qk_norm_impl=reference"),
        "triton": ("loss.impl=triton", "model.attention_impl=triton", "model.qk_norm_impl=triton"),
    }
    paths["one product"] = (*paths["triton"], "model.qkv_impl=together")
    common = ("model.d_head=32", "model.n_heads=2", "model.n_layers=1", "batch.sequences=2", "evaluation.tokens=32")
    common += ("budget.steps=2",)
    losses = {}
    for name, impls in paths.items():
        row, folder = trained(*common, *impls, "compute.precision=fp32", f"compute.device={KERNEL_DEVICE}", runs=name)
        assert [f"loss.impl={row['loss_impl']}", f"model.attention_impl={row['attention_impl']}"] == list(impls[:2])
        assert f"model.qk_norm_impl={row['qk_norm_impl']}" == impls[2]
        assert row["qkv_impl"] == ("together" if name == "one product" else "separate")
        lines = metrics(folder)
        losses[name] = [line[key] for line in lines for key in ("train_loss", "val_loss", "grad_norm") if key in line]
    assert len(losses["plain"]) == 2 + 2 + 2
    assert losses["cpu"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["triton"] == pytest.approx(losses["plain"], rel=1e-5)


@pytest.mark.parametrize("polls", [1, 3, 6, 12, 14, 17, 19, 25])
def test_a_run_stopped_anywhere_resumes_to_the_same_bits(whole, trained, monkeypatch, polls):
    """Evaluations are polled too, so that some of these stops fall between the batches of one."""
    _, unstopped = whole()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(polls))
        row, folder = trained(runs="stopped")
        assert row["status"] == "preempted" and row["steps"] < 12
    row, _ = trained(runs="stopped")
    assert row["status"] == "finished" and row["restarts"] == 1
    assert_same_bits(unstopped, folder)


@pytest.mark.parametrize(
    "kill_at",
    [
        pytest.param(
            "step 7",
            marks=pytest.mark.fault(
                "1", "After a SIGKILL in mid-run the same command goes on, to the bits of an unbroken run."
            ),
        ),
        pytest.param(
            "checkpoint 8",
            marks=pytest.mark.fault(
                "2", "After a SIGKILL while a checkpoint is written the one before is used, to the same bits."
            ),
        ),
    ],
)
def test_a_run_killed_with_sigkill_resumes_to_the_same_bits(whole, trained, python, tmp_path, data_dir, kill_at):
    """In mid-run, three steps after a checkpoint; and in the middle of writing one, before it gets its name."""
    _, unstopped = whole()
    kill = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    if kill_at == "step 7":
        hook = f"""
from scaling_testbed.training import step as updates
real = updates.set_lr
def set_lr(optimizer, lr, count=[0]):
    count[0] += 1
    if count[0] == 8:
        exec({kill!r})
    real(optimizer, lr)
updates.set_lr = set_lr
"""
    else:
        hook = f"""
import os
real = os.rename
def rename(source, target):
    if str(target).endswith("step-00000008"):
        exec({kill!r})
    real(source, target)
os.rename = rename
"""
    killed = start(python, tmp_path, data_dir, before=hook)
    assert killed.wait(timeout=120) == -signal.SIGKILL, killed.communicate()
    _, folder = trained()
    assert records.read_metrics(folder / "metrics.jsonl")  # readable
    assert_same_bits(unstopped, folder)


@pytest.mark.fault("4", "SIGTERM in a training step saves at this step; the run is preempted, with the exit status 75.")
def test_sigterm_saves_a_checkpoint_and_exits_75_and_the_same_command_goes_on(trained, python, tmp_path, data_dir):
    many = ("budget.steps=100000", "checkpoint.every_steps=0", "evaluation.every_steps=0")
    process = start(python, tmp_path, data_dir, *many)
    (folder,) = wait_for(
        lambda: [path.parent for path in tmp_path.glob("runs/*/*/metrics.jsonl") if steps_in(path) > 3]
    )
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    row = json.loads((folder / "result.json").read_text())
    assert row["status"] == "preempted" and "SIGTERM" in row["error"]
    assert load_latest(folder / "checkpoints").step == row["steps"] > 3


def steps_in(path):
    return len(path.read_text().splitlines())


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return value


@pytest.mark.fault(
    "26", "A loss that is not finite stops the run before the update; it is a result, and not run again."
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_update(trained, monkeypatch, bad):
    real, calls = loss_model.loss_terms, [0]

    def poisoned(*args, **kwargs):
        terms = real(*args, **kwargs)
        training = torch.is_grad_enabled()  # evaluations are left alone
        calls[0] += training
        return terms._replace(ce=terms.ce * bad) if training and calls[0] == 7 else terms

    monkeypatch.setattr(loss_model, "loss_terms", poisoned)
    row, folder = trained()
    assert row["status"] == "diverged" and row["diverged_at_step"] == 7 and row["steps"] == 6
    assert metrics(folder)[-1]["step"] == 6 and metrics(folder)[-1]["val_loss"] == row["val_loss"]
    again, _ = trained()
    assert again == row  # a diverged run is a result: it is not run again


def test_a_gradient_norm_that_is_not_finite_stops_the_run_before_the_update(trained, monkeypatch):
    norms = iter([1.0, 1.0, 1.0, math.inf])
    monkeypatch.setattr(updates, "clip_gradients", lambda parts: torch.tensor(next(norms)))
    row, _ = trained()
    assert row["status"] == "diverged" and row["steps"] == 3 and "gradient" in row["error"]


def test_a_crash_is_recorded_as_failed_and_raised(trained, tiny, monkeypatch):
    def broken(*_args):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(building, "parallelize", broken)
    with pytest.raises(RuntimeError, match="first line"):
        trained()
    row = json.loads((tiny()[1] / "result.json").read_text())
    assert row["status"] == "failed" and row["error"] == "first line"
    monkeypatch.undo()
    assert trained()[0]["status"] == "finished"


def test_data_that_changed_between_two_starts_is_refused(tiny, trained, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(12))
        trained()
    monkeypatch.setattr(checkpoint, "fingerprints", lambda data: {"data_fingerprint": "another"})
    with pytest.raises(UserError, match="trained on other data"):
        train(tiny()[0], quiet=True)


def test_several_validation_sets_are_scored_and_the_runs_own_leads(tiny, trained, data_dir):
    folder = next(path.parent for path in data_dir.glob("*/manifest.json"))
    row, _ = trained(f"+evaluation.sets.again={folder}")
    assert row["val_loss_by_set"] == {"validation": row["val_loss"], "again": row["val_loss"]}


def test_a_validation_set_with_another_vocabulary_is_refused(trained, tiny, data_dir):
    other, _ = tiny("data=noise")
    folder = prepare(other.data, other.tokenizer, data_dir=data_dir, quiet=True)
    with pytest.raises(ConfigError, match=r"evaluation\.sets\.noise: .* another tokenizer"):
        trained(f"+evaluation.sets.noise={folder}")


def test_several_processes_need_a_parallelism(tiny, monkeypatch):
    for key, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(ConfigError, match="add parallelism=ddp or parallelism=fsdp"):
        train(tiny()[0], quiet=True)


def test_a_missing_gpu_is_refused_by_name(tiny):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(ConfigError, match=r"compute\.device=cuda"):
        train(tiny("compute.device=cuda")[0], quiet=True)


def test_bf16_and_deterministic_mode_train(trained):
    row, _ = trained("compute.precision=bf16", "compute.deterministic=true")
    assert row["status"] == "finished" and row["precision"] == "bf16"
    assert row["val_loss"] < row["val_loss_initial"]


def test_each_update_uses_the_schedules_rate_and_the_clip_that_are_recorded(trained, tiny):
    """A tight clip shrinks nothing but the gradient; the first update has made one step of the warm-up."""
    run, _ = tiny("optimizer.clip_norm=0.01")
    row, folder = trained("optimizer.clip_norm=0.01")
    for line in metrics(folder)[1:]:
        assert line["lr"] == run.schedule.lr(line["step"] - 1, 12, run.optimizer.lr)
        assert line["clip_coefficient"] == pytest.approx(0.01 / line["grad_norm"], rel=1e-3)
    moments = final_weights(folder)["optimizer"]["state"].values()
    clipped = sum(state["exp_avg"].square().sum() for state in moments).sqrt()
    assert clipped <= 0.011


def test_bf16_changes_the_numbers_and_deterministic_mode_is_switched_on(trained, tiny):
    words = ("compute.precision=bf16", "compute.deterministic=true", "compute.residual_dtype=bf16")
    exact, _ = trained(runs="one")
    rounded, _ = trained(*words[:2], runs="two")
    narrow, folder = trained(*words, runs="three")
    assert torch.are_deterministic_algorithms_enabled()
    assert len({row["val_loss"] for row in (exact, rounded, narrow)}) == 3
    assert [row["val_loss"] for row in (rounded, narrow)] == pytest.approx([exact["val_loss"]] * 2, rel=0.05)
    assert narrow["run_id"] != rounded["run_id"] and narrow["compute.residual_dtype"] == "bf16"
    assert load_model(tiny(*words)[0], folder, step=None, device=torch.device("cpu"))[1].narrow_residual


def test_a_bf16_residual_stream_needs_bf16_products(tiny):
    if KERNEL_DEVICE == "cuda":
        pytest.skip("there auto is bf16")
    with pytest.raises(ConfigError, match=r"compute\.residual_dtype=bf16 needs .* auto means fp32 on cpu; type"):
        train(tiny("compute.residual_dtype=bf16")[0], quiet=True)


@pytest.mark.slow
def test_a_compiled_model_has_the_same_losses(trained):
    plain, _ = trained(runs="one")
    compiled, _ = trained("compute.compile=true", runs="two")
    assert compiled["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-3)


SKIPPING = ("optimizer.skip_spikes_sigmas=0.1", "optimizer.skip_spikes_window=4", "batch.sequences=2")


@pytest.mark.fault("27", "A loss spike is skipped if asked: no weight changes, and it is counted.")
def test_a_skipped_step_changes_no_weight_and_no_moment_and_is_marked_and_counted(trained):
    """Every step leaves a checkpoint here; a tenth of a deviation above the mean is nothing rare."""
    row, folder = trained(*SKIPPING, "checkpoint.every_steps=1", "checkpoint.keep_last=100", "logging.every_steps=5")
    saved = [checkpoint.load(path).tensors for path in sorted((folder / "checkpoints").iterdir())]
    skipped = [line["step"] for line in metrics(folder) if line.get("skipped")]
    assert row["skipped_steps"] == len(skipped) > 0 and row["steps"] == 12
    for step in range(2, 13):
        before, after = saved[step - 2], saved[step - 1]
        same = all(torch.equal(after["model"][name], weights) for name, weights in before["model"].items())
        counts = [tensors["optimizer"]["state"][0]["step"].item() for tensors in (before, after)]
        assert same == (step in skipped) and counts[1] - counts[0] == (step not in skipped)
    assert all("grad_norm" in line for line in metrics(folder) if line.get("skipped"))
    assert trained(runs="other")[0]["skipped_steps"] is None


@pytest.mark.parametrize("limit", [0.1, 1e6, "null"])
def test_to_clip_inside_the_step_is_to_clip_before_it(trained, monkeypatch, limit):
    """To divide by 1 / c rounds otherwise than to multiply by c: twelve steps carry 1e-7 each. Where nothing is
    clipped, the bits are the same. After the step the gradients are clipped ones either way."""
    after, real = [], trainer.build_parts

    def build(*args, **kwargs):
        parts = real(*args, **kwargs)
        look = lambda *_: after.append(torch.nn.utils.get_total_norm([x.grad for x in parts.parameters]))  # noqa: E731
        parts.optimizer.register_step_post_hook(look)
        return parts

    monkeypatch.setattr(trainer, "build_parts", build)
    common = ("optimizer.fused=true", f"optimizer.clip_norm={limit}", "diagnostics.every_steps=3")
    rows, lines, tensors = [], [], []
    for impl in ("separate", "fused"):
        row, folder = trained(*common, f"optimizer.clip_impl={impl}", runs=impl)
        rows.append(row)
        lines.append(metrics(folder))
        tensors.append(final_weights(folder))
    assert rows[0]["run_id"] != rows[1]["run_id"]
    if limit != 0.1:
        assert lines[0] == lines[1] and after[:12] == after[12:]
        assert all(torch.equal(x, tensors[1]["model"][name]) for name, x in tensors[0]["model"].items())
        return
    assert max(line.get("clip_coefficient", 0) for line in lines[0]) < 0.9
    torch.testing.assert_close(torch.stack(after), torch.full((24,), 0.1), rtol=1e-4, atol=0)
    for one, other in zip(*lines, strict=True):
        assert one.keys() == other.keys()
        for name in (name for name, value in one.items() if isinstance(value, float)):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), (one["step"], name)
    for number, state in tensors[0]["optimizer"]["state"].items():
        for key, x in state.items():
            torch.testing.assert_close(tensors[1]["optimizer"]["state"][number][key], x, rtol=1e-3, atol=1e-6)


QK_CLIP = ("model.qk_norm=none", "optimizer.lr=0.1", "optimizer.qk_clip=2")
OPTIONS = {
    "skip": SKIPPING,
    "muon": ("optimizer=muon",),
    "atan2": ("optimizer=adam_atan2", "optimizer.scale_lr_by_param_rms=true"),
    "sgd": ("optimizer=sgd", "optimizer.lr=0.1"),
    "sigma": ("model.linear=sigma_reparam", "batch.micro_batch_sequences=4"),
    "qk_clip": (*QK_CLIP, "batch.micro_batch_sequences=4"),
    "pointwise": ("model.attention_normaliser=relu2", "model.embedding_gradient_scale=0.1"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_with_options_resumes_to_the_same_bits(whole, trained, monkeypatch, option):
    overrides = (*OPTIONS[option], "evaluation.rows=64")  # an evaluation is one poll
    row, unstopped = whole(*overrides)
    assert row["val_loss"] < row["val_loss_initial"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(11))
        stopped, _ = trained(*overrides, runs="stopped")
        assert stopped["status"] == "preempted" and 4 <= stopped["steps"] < 12
    again, folder = trained(*overrides, runs="stopped")
    assert again["skipped_steps"] == row["skipped_steps"] and again["restarts"] == 1
    assert option != "skip" or 0 < stopped["skipped_steps"] < row["skipped_steps"]
    assert_same_bits(unstopped, folder)


def test_the_singular_vectors_make_one_iteration_with_the_weights_of_each_update(trained):
    every = ("checkpoint.every_steps=1", "checkpoint.keep_last=100", "checkpoint.keep_steps=[]")
    _, folder = trained("model.linear=sigma_reparam", "batch.micro_batch_sequences=2", *every)
    saved = [checkpoint.load(path).tensors["model"] for path in sorted((folder / "checkpoints").iterdir())]
    layer = SigmaReparamLinear(32, 128, role="mlp_in")
    for before, after in zip(saved, saved[1:], strict=False):
        here = "blocks.0.mlp.mlp_in."
        layer.load_state_dict(
            {name: (after if "weight" in name else before)[here + name] for name in layer.state_dict()}
        )
        layer.follow()
        assert all(torch.equal(value, after[here + name]) for name, value in layer.state_dict().items())


def test_accumulation_and_recomputation_change_no_sigma_and_no_clip(trained):
    for name in ("sigma", "qk_clip"):
        _, whole = trained(*OPTIONS[name], "batch.micro_batch_sequences=8", runs=f"{name}1")
        _, split = trained(*OPTIONS[name], "parallelism.activation_checkpointing=1", runs=f"{name}2")
        for one, other in zip(metrics(whole), metrics(split), strict=True):
            if "train_loss" in one:
                assert other["train_loss"] == pytest.approx(one["train_loss"], rel=2e-4), (name, one["step"])


def test_qk_clip_holds_every_head_to_the_limit_and_one_that_is_never_reached_changes_no_bit(trained, monkeypatch):
    """After a clip the logits of the batch are within the limit, but for what the update itself added."""
    seen = []
    real = qk_clip.clip_queries_and_keys

    def clip(model, limit, largest):
        seen.append(max(largest))
        real(model, limit, largest)

    monkeypatch.setattr(qk_clip, "clip_queries_and_keys", clip)
    _, clipped = trained(*QK_CLIP, runs="clipped")
    held = list(seen)
    seen.clear()
    _, free = trained(*QK_CLIP, "optimizer.qk_clip=1e9", runs="free")
    assert len(held) == len(seen) == 12 and max(seen) > 2 * max(held[3:]) and max(held) > 2
    _, plain = trained(*QK_CLIP, "optimizer.qk_clip=null", runs="plain")
    assert metrics(clipped) != metrics(plain)
    assert_same_bits(free, plain)


def test_an_evaluation_with_too_little_memory_takes_fewer_sequences(whole, trained, monkeypatch):
    real, (unlimited, _) = ValidationBatches.batch, whole()

    def batch(self, number):
        if self.rows > 2:
            raise MemoryError
        return real(self, number)

    monkeypatch.setattr(ValidationBatches, "batch", batch)
    row, _ = trained("batch.micro_batch_sequences=auto")
    assert row["micro_batch_sequences"] == 2 and row["status"] == "finished"
    assert row["val_loss"] == pytest.approx(unlimited["val_loss"], rel=1e-5)  # sums of fp32 in another order
    for key in ("batch.micro_batch_sequences", "evaluation.rows"):
        with pytest.raises(UserError, match=f"too little memory .*; try {key}=4"):
            trained("seed=1", f"{key}=8")


def test_the_sequences_of_an_evaluation_are_chosen_by_the_memory_of_training(trained, monkeypatch):
    real, seen, deep = ValidationBatches.batch, [], "model.n_layers=6"

    def batch(self, number):
        seen.append(self.rows)
        if self.rows > most:
            raise MemoryError
        return real(self, number)

    monkeypatch.setattr(ValidationBatches, "batch", batch)
    most = 1000
    plain, _ = trained(deep, runs="plain")
    assert set(seen) == {8}  # as in a pass of training
    chosen, _ = trained(deep, "evaluation.rows=auto")
    assert seen[-1] == 32 and chosen["run_id"] == plain["run_id"]
    assert chosen["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-5)  # sums of fp32 in another order
    most = 4
    with pytest.raises(UserError, match="too little memory to evaluate 32 sequences at a time; try evaluation.rows=16"):
        trained(deep, "evaluation.rows=auto", runs="fixed")
    row, _ = trained(deep, "evaluation.rows=auto", "batch.micro_batch_sequences=auto", runs="auto")
    assert row["micro_batch_sequences"] == 1 and seen[-1] == 4


def test_a_warm_up_in_tokens_is_that_of_the_run_s_batch():
    run = compose(["model=nano_s", "data=markov", "batch.sequences=4", "batch.sequence_length=64",
                   "schedule.warmup_tokens=2560"])  # fmt: skip
    parts = SimpleNamespace(run=run, steps=100)
    assert [updates.rate(parts, step) / run.optimizer.lr for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
