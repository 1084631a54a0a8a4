"""How many processes share a run changes nothing but rounding, and they start, stop and fail together.

fp32 numbers are compared to 1e-6 relative: sums over ranks come in another order, 1e-7 each, and twelve updates of a
model this small were seen to carry that to 3e-7; the HARD one's gradient norm moves by 1e-6 when one process takes its
batch in parts, and is compared to 5e-6. Two launches serve almost all tests, of 2 and of 4 processes.
"""

import enum
import io
import json
import math
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scaling_testbed.config.compose import compose, compose_many
from scaling_testbed.config.sections import ComputeConfig, ParallelismConfig
from scaling_testbed.diagnostics.summary import names_in
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.processes.device import choose_device
from scaling_testbed.processes.group import PeerGone, Processes
from scaling_testbed.processes.world import World, check_world, world_from_environment
from scaling_testbed.runs import checkpoint, sharded
from scaling_testbed.runs.folder import read_metrics
from scaling_testbed.training.run import run_folder_path, train
from tests.training.conftest import TINY, load_latest, metrics
from tests.training.many_runs import PEAK_FLOPS
from tests.training.test_run import assert_same_bits

ROOT = Path(__file__).resolve().parent.parent.parent
EVALUATED = ["evaluation.tokens=560", "evaluation.rows=5"]  # 7 validation batches, for 2 and for 4 ranks
COMMON = [*TINY, *EVALUATED, "diagnostics.every_steps=4"]
COMMON += ["diagnostics.sequences=3"]  # of 8: with 4 ranks one has none
HARD = ["model.mlp=swiglu", "optimizer=stable_adamw", "model.d_ff=41", "model.residual=reordered"]
HARD += ["model.tied_head=true", "model.qk_norm_axis=full"]  # and 41 rows cannot be shared equally
MICRO = ["batch.micro_batch_sequences=1", "parallelism.activation_checkpointing=2"]
COMPILED = ["compute.compile=true", "model.n_layers=3", *MICRO]
# What the options of learning and model do with several processes; every third step or so is skipped.
SKIPPING = ["optimizer.skip_spikes_sigmas=0.5", "optimizer.skip_spikes_window=4"]
OPTIONS = {
    # Under a qk-norm the gammas of q and k would have a gradient of nothing but rounding.
    "ddp_sigma": ["model.linear=sigma_reparam", "model.qk_norm=none", *SKIPPING],
    "ddp_muon": ["optimizer=muon", "optimizer.lr=1e-3"],
    "ddp_clip": ["model.qk_norm=none", "model.n_kv_heads=1", "optimizer.qk_clip=1"],
    "fsdp_sgd": ["optimizer=sgd", "optimizer.lr=0.1"],
    "fsdp_atan2": ["optimizer=adam_atan2", "optimizer.scale_lr_by_param_rms=true", *SKIPPING],
    "ddp_joined": ["model.qkv_impl=together", "model.n_kv_heads=2"],
    "fsdp_joined": ["model.qkv_impl=together", "parallelism.activation_checkpointing=2"],
    "ddp_clipped_inside": ["optimizer.fused=true", "optimizer.clip_impl=fused", "optimizer.clip_norm=0.1"],
    "fsdp_clipped_inside": ["optimizer.fused=true", "optimizer.clip_impl=fused", "optimizer.clip_norm=0.1"],
}
# The time is over at once. One process sees it before the first update and a group after it; both warm up first.
OPTIONS |= {"ddp_hours": ["schedule=wsd", "schedule.warmup=4", "budget.hours=1e-9"]}
PRUNED = [f"+interventions.magnitude_pruning.{option}" for option in ("sparsity=0.5", "every_steps=2")]
OPTIONS |= {"ddp_pruned": [*PRUNED, "+interventions.magnitude_pruning.structure=2:4"]}
OPTIONS |= {"fsdp_pruned": [*PRUNED, "model.d_ff=41", "model.mlp=swiglu"]}
OPTIONS["fsdp_atan2"] += ["model.attention_normaliser=relu2", "model.embedding_gradient_scale=0.1", "model.d_ff=41"]
DOCUMENTS = ["batch.packing=documents", "batch.document_masking=true", "batch.micro_batch_sequences=1"]
TO_FORGET = ["data=mixture", "data.sources={bad: {name: markov, n_tokens: 400, n_validation_tokens: 100}, "
             "text: {name: markov, seed: 1, n_tokens: 20000, n_validation_tokens: 4000}}"]  # fmt: skip
TO_FORGET += ["data.weights={bad: 1, text: 3}"]
COMPARED = ("train_loss", "train_z_loss", "val_loss", "grad_norm")


class Launch:
    """The runs of one torchrun and what their ranks said. python: the interpreter of the ranks, and of torchrun."""

    def __init__(self, folder, python, torchrun=None):
        self.folder, self.python, self.torchrun, self.specs, self.size = folder, python, torchrun or python, {}, 0

    def add(self, name, *overrides, runs=None, data=COMMON[:3], **circumstances):
        places = [f"runs_dir={self.folder / (runs or name)}", f"data_dir={self.folder / 'data'}"]
        self.specs[name] = {"name": name, "overrides": [*data, *COMMON[3:], *places, *overrides], **circumstances}

    def start(self, size):
        self.size = size
        spec = self.folder / "spec.json"
        spec.write_text(json.dumps(list(self.specs.values())))
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": self.python}
        process = subprocess.Popen(
            [self.torchrun, *command, "-m", "tests.training.many_runs", str(spec)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        try:
            return process.communicate(timeout=600)[0], process.returncode
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its processes; killed, it would leave them
            raise AssertionError("the processes hang:\n" + process.communicate()[0]) from None

    def run_folder(self, name):
        return run_folder_path(compose(self.specs[name]["overrides"]))

    def row(self, name):
        return json.loads((self.run_folder(name) / "result.json").read_text())

    def said(self, name):
        """Per rank, {"status", "out", "err"}."""
        return [json.loads((self.folder / f"{name}.{rank}.json").read_text()) for rank in range(self.size)]


def launch(folder, python, size, add):
    launched = Launch(folder, python)
    add(launched)
    said, status = launched.start(size)
    assert status == 0, said
    return launched


@pytest.fixture(scope="module")
def two(tmp_path_factory, python):
    def add(runs):
        runs.add("slow", "parallelism=ddp", "parallelism.timeout_seconds=3", "budget.steps=1", slow=4)
        runs.add("wrong")
        runs.add("uneven", "parallelism=ddp", "batch.sequences=7")
        runs.add("no_gpu", "parallelism=ddp", "compute.device=cuda")
        for kind in ("ddp", "fsdp"):
            runs.add(kind, f"parallelism={kind}")
            runs.add(f"{kind}_hard", f"parallelism={kind}", *HARD, *MICRO)
            runs.add(f"{kind}_bf16", f"parallelism={kind}", "compute.precision=bf16")
        stopped = {"runs": "fsdp_sgd", "fault": [1, 5, "signal"]}  # gone on with from its shards just below
        runs.add("fsdp_sgd_stopped", "parallelism=fsdp", *OPTIONS["fsdp_sgd"], **stopped)
        for name, options in OPTIONS.items():
            runs.add(name, f"parallelism={name.partition('_')[0]}", *options)
        text = runs.folder / "text.jsonl"  # short documents of unequal length
        text.write_text("".join(json.dumps({"text": f"{n} " + "ab " * (n * n % 11)}) + "\n" for n in range(400)))
        data = ["data=text_files", f"data.files={text}", "data.validation_fraction=0.3"]
        for kind in ("single", "ddp", "fsdp"):
            where = {"data": data, "alone": kind == "single"}
            runs.add(f"{kind}_documents", f"parallelism={kind}", *DOCUMENTS, **where)
        runs.add("again", "parallelism=fsdp", runs="ddp")
        runs.add("held", "parallelism=ddp", held=True)
        # Stopped, gone on with by another number of processes, stopped again, gone on with.
        for kind, other in (("fsdp", "single"), ("ddp", "fsdp"), ("fsdp", "ddp")):
            stages = f"{kind}_{other}"
            first, second = {"fault": [1, 5, "signal"]}, {"fault": [0, 4, "signal"], "alone": other == "single"}
            runs.add(f"{stages}_1", f"parallelism={kind}", runs=stages, **first)
            runs.add(f"{stages}_2", f"parallelism={other}", runs=stages, **second)
            runs.add(f"{stages}_3", f"parallelism={kind}", runs=stages)
        runs.add("evaluating", "parallelism=fsdp", runs="evaluating", fault=[1, 6, "evaluation"])
        runs.add("evaluated", "parallelism=fsdp", runs="evaluating")
        # Runs that begin in the state of runs of another kind, with and without moments.
        for kind, other in (("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp"), ("fsdp", "single")):
            start = [f"start.run={runs.run_folder(kind)}", "start.step=8"]
            runs.add(f"{kind}_then_{other}", f"parallelism={other}", *start, alone=other == "single")
        runs.add("fsdp_weights", "parallelism=fsdp", *start, "start.take=[weights,step]")
        runs.add("single_weights", *start, "start.take=[weights,step]", alone=True)
        grown = [*start, "start.take=[weights]", "+start.grow.width=fpi", "model.d_model=64", "model.n_heads=4"]
        runs.add("fsdp_grown", "parallelism=fsdp", *grown)
        runs.add("single_grown", *grown, alone=True)
        for kind in ("single", "ddp", "fsdp"):
            forget = [f"parallelism={kind}", *start, "start.take=[weights]", "objective=npo", "objective.forget=bad"]
            runs.add(f"{kind}_npo", *forget, data=TO_FORGET, alone=kind == "single")
        runs.add("stopped", "parallelism=fsdp", *HARD, fault=[0, 6, "signal"])
        runs.add("broken", "parallelism=ddp", fault=[1, 3, "error"])  # the last one: it breaks the group

    return launch(tmp_path_factory.mktemp("two"), python, 2, add)


@pytest.fixture(scope="module")
def four(tmp_path_factory, python, two):
    def add(runs):
        shutil.copytree(two.folder / "stopped", runs.folder / "resharded")
        runs.add("resharded", "parallelism=fsdp", "parallelism.shard_size=2", *HARD)
        runs.add("ddp", "parallelism=ddp")
        runs.add("fsdp", "parallelism=fsdp")
        runs.add("hybrid", "parallelism=fsdp", "parallelism.shard_size=2", *HARD, *MICRO)
        runs.add("bad_shard", "parallelism=fsdp", "parallelism.shard_size=3")

    return launch(tmp_path_factory.mktemp("four"), python, 4, add)


@pytest.fixture(scope="module")
def two_compiled(tmp_path_factory, python):
    def add(runs):
        for kind in ("ddp", "fsdp"):
            runs.add(kind, f"parallelism={kind}", *COMPILED)

    return launch(tmp_path_factory.mktemp("two_compiled"), python, 2, add)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same runs by one process: returns a function from overrides to the run's folder."""
    folder, done = tmp_path_factory.mktemp("one"), {}

    def make(*overrides):
        if overrides not in done:
            places = [f"runs_dir={folder / str(len(done))}", f"data_dir={folder / 'data'}"]
            (run,) = compose_many([[*COMMON, *places, *overrides]])
            train(run, quiet=True)
            done[overrides] = run_folder_path(run)
        return done[overrides]

    return make


def assert_same_run(here, there, rel=1e-6, atol=1e-5, later=None):
    """Every recorded number of two runs agrees, and so do the weights that they end in. later: rel after step 1, if it
    is another."""
    first, second = metrics(here), metrics(there)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for line, other in zip(first, second, strict=True):
        assert line.keys() == other.keys()
        near = rel if later is None or line["step"] <= 1 else later
        for key in set(COMPARED) & set(line):
            assert other[key] == pytest.approx(line[key], rel=near), (line["step"], key)
        for key, value in names_in(line).items():
            assert other[key] == pytest.approx(value, rel=100 * near, abs=1e-5), (line["step"], key)
    weights, others = (load_latest(folder / "checkpoints").tensors["model"] for folder in (here, there))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.allclose(tensor, others[name], rtol=1e-3, atol=atol), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(two, one, kind):
    assert_same_run(one(), two.run_folder(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_compiled_processes_train_as_an_eager_one_does(two_compiled, one, kind):
    assert two_compiled.row(kind)["compiled"] is True
    assert_same_run(one(*COMPILED, "compute.compile=false"), two_compiled.run_folder(kind), rel=5e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_four_processes_train_as_one_does(four, one, kind):
    assert_same_run(one(), four.run_folder(kind))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_micro_batches_recomputation_uneven_shards_and_stable_adamw_change_nothing(two, one, kind):
    assert_same_run(one(*HARD), two.run_folder(f"{kind}_hard"), rel=5e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_the_same_with_two_processes(two, one, name):
    """Muon rounds its momentum to bf16, which makes 4e-3 of 1e-7 now and then; SGD divides by no small number."""
    here, there = one(*OPTIONS[name]), two.run_folder(name)
    tolerances = {"ddp_muon": {"rel": 1e-3, "atol": 1e-3}, "fsdp_sgd": {"rel": 1e-6}}
    assert_same_run(here, there, **tolerances.get(name, {"rel": 5e-6}))
    assert two.row(name)["restarts"] == (name == "fsdp_sgd")
    skipped = [[line["step"] for line in metrics(folder) if line.get("skipped")] for folder in (here, there)]
    assert skipped[0] == skipped[1] and bool(skipped[0]) == (SKIPPING[0] in OPTIONS[name])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_packed_documents_are_the_same_ones_with_two_processes(two, kind):
    """Each process has another number of targets, and the loss of a step is over those of both."""
    single, row = two.row("single_documents"), two.row(f"{kind}_documents")
    assert_same_run(two.run_folder("single_documents"), two.run_folder(f"{kind}_documents"), rel=5e-6)
    assert row["n_tokens"] == single["n_tokens"] and row["padding_share"] == single["padding_share"] > 0


def test_a_hybrid_of_two_copies_of_two_shards_trains_as_one_process_does(four, one):
    assert_same_run(one(*HARD), four.run_folder("hybrid"), rel=5e-6)
    assert len(parts_of_a_matrix(four.run_folder("hybrid"))) == 2
    assert len(parts_of_a_matrix(four.run_folder("fsdp"))) == 4


def parts_of_a_matrix(folder):
    (path, *_) = (folder / "checkpoints").iterdir()
    metadata = sharded._reader(path / "shards").read_metadata()
    return metadata.state_dict_metadata["model/blocks.0.attention.q.weight"].chunks


def test_in_bf16_sharded_is_replicated(two, one):
    """Matrices are gathered in bf16, which is what autocast makes of them; the gains and the stream stay fp32.

    The first step is the same. From the first update on, gradients differ in their last fp32 bits, and a weight that
    lies between two bf16 numbers may be rounded the other way. On some CPUs one is, and changes losses by 1e-5."""
    assert_same_run(two.run_folder("ddp_bf16"), two.run_folder("fsdp_bf16"), atol=1e-3, later=1e-3)
    assert two.row("fsdp_bf16")["val_loss"] != two.row("fsdp")["val_loss"]
    tensors = load_latest(two.run_folder("fsdp_bf16") / "checkpoints").tensors
    assert {tensor.dtype for tensor in tensors["model"].values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_may_be_a_world(trained, one, kind):
    row, folder = trained(f"parallelism={kind}", EVALUATED[0], *COMMON[-2:])
    assert row["world_size"] == 1 and row["parallelism"] == kind and not torch.distributed.is_initialized()
    Processes(World(), ParallelismConfig(kind=kind)).check_alike({"pair": (1, 2), "none": math.nan})  # with itself
    assert_same_run(one(), folder)


def test_the_row_counts_all_ranks(two):
    row = two.row("fsdp")
    assert row["world_size"] == 2 and row["parallelism"] == "fsdp"
    assert row["peak_memory_bytes"] == 2000  # rank 1 has the larger
    flops = row["flops"] / row["n_tokens"]
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / (2 * PEAK_FLOPS))
    timed = [line for line in metrics(two.run_folder("fsdp")) if "train_loss" in line]
    assert row["n_tokens"] == 12 * 128 == timed[-1]["tokens"]
    assert read_metrics(two.run_folder("fsdp") / "metrics.jsonl")[-1]["mfu"] == row["mfu"]


def test_only_rank_0_speaks_and_all_end_alike(two):
    first, second = two.said("fsdp")
    assert first["status"] == second["status"] == 0
    assert "2 x cpu (fsdp)" in first["out"] and "finished" in first["out"]
    assert not second["out"] and not second["err"]


def test_a_finished_run_is_found_finished_by_all(two):
    first, second = two.said("again")
    assert first["status"] == second["status"] == 0
    assert "step" not in first["out"].replace("step 0", "") and two.row("again")["parallelism"] == "ddp"


def test_a_run_owned_by_another_ends_all_with_75(two):
    first, second = two.said("held")
    assert first["status"] == second["status"] == 75
    assert "is being run by" in first["err"] and not second["err"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wrong", "add parallelism=ddp or parallelism=fsdp"),
        ("uneven", "multiple of the 2 processes"),
        ("no_gpu", "compute.device=cuda"),
    ],
)
def test_wrong_use_is_one_line_from_rank_0_and_status_2(two, name, says):
    if name == "no_gpu" and torch.cuda.is_available():
        pytest.skip("there is one here")
    first, second = two.said(name)
    assert first["status"] == second["status"] == 2
    assert says in first["err"] and len(first["err"].splitlines()) == 1 and not second["err"]


def test_a_shard_size_that_does_not_divide_is_refused(four):
    assert [said["status"] for said in four.said("bad_shard")] == [2] * 4
    assert "shard_size must divide the 4 processes" in four.said("bad_shard")[0]["err"]


def test_preparing_may_take_longer_than_the_timeout_of_the_group(two):
    assert [said["status"] for said in two.said("slow")] == [0, 0]


@pytest.mark.fault("7", "A signal to one rank stops all at the same step.")
def test_a_signal_to_one_rank_stops_all_at_one_step_with_75(two):
    for said in two.said("fsdp_single_1"):
        assert said["status"] == 75
    assert "stopped by SIGTERM at step 5" in two.said("fsdp_single_1")[0]["out"]


@pytest.mark.fault("5", "A signal during an evaluation stops the run, and the evaluation is made again.")
def test_a_signal_during_an_evaluation_stops_all_and_the_evaluation_is_made_again(two, one):
    """Rank 1's sixth validation batch is the second of four at step 5."""
    assert [said["status"] for said in two.said("evaluating")] == [75, 75]
    assert "stopped by SIGTERM at step 5" in two.said("evaluating")[0]["out"]
    assert "step  5/12" not in two.said("evaluating")[0]["out"] and "step  5/12" in two.said("evaluated")[0]["out"]
    assert two.row("evaluated")["restarts"] == 1
    assert_same_run(one(), two.run_folder("evaluated"))
    assert metrics(two.run_folder("evaluated")) == metrics(two.run_folder("fsdp"))  # in every bit


@pytest.mark.fault("13", "With another accumulation or number of processes a run goes on, within rounding.")
@pytest.mark.fault("14", "A checkpoint of two sharded ranks is loaded by one, and back.")
@pytest.mark.parametrize("stages", ["fsdp_single", "ddp_fsdp", "fsdp_ddp"])
def test_a_run_goes_on_with_another_number_or_kind_of_processes(two, one, stages):
    """5 steps with one, some with the other, the rest with the first; stopped by signals, as a cluster would.

    One process asks for signals before a step, a group at its end."""
    last = two.row(f"{stages}_3")
    assert last["status"] == "finished" and last["restarts"] == 2
    stop = "step 9" if stages == "fsdp_single" else "step 10"
    assert stop in json.loads((two.folder / f"{stages}_2.0.json").read_text())["out"]
    assert_same_run(one(), two.run_folder(f"{stages}_3"))


@pytest.mark.fault("14", "A checkpoint of two sharded ranks is loaded by one, and back.")
def test_four_processes_go_on_from_the_shards_of_two(four, two, one):
    assert two.row("stopped")["steps"] == 7 and four.row("resharded")["restarts"] == 1
    assert_same_run(one(*HARD), four.run_folder("resharded"), rel=5e-6)


@pytest.mark.fault("34", "If one rank fails, all end, and its error is the one that is shown.")
def test_an_error_on_one_rank_fails_the_run_on_all_and_names_it(two):
    first, second = two.said("broken")
    assert first["status"] == second["status"] == 1
    assert two.row("broken")["status"] == "failed"
    assert "rank 1 failed: the disk of rank 1 is full" in two.row("broken")["error"]
    assert "rank 1 failed" in first["err"]


@pytest.fixture
def sharded_checkpoints(two, tmp_path):
    """A copy of a sharded run's checkpoints, and the newest of them."""
    folder = Path(shutil.copytree(two.run_folder("fsdp") / "checkpoints", tmp_path / "checkpoints"))
    return folder, max(folder.iterdir())


@pytest.mark.fault("15", "A flipped bit in any file of a checkpoint is named, and the checkpoint before it is used.")
@pytest.mark.parametrize("file", ["shards/*_1_*.distcp", "shards/.metadata", "groups.pt", "state.json"])
def test_a_flipped_bit_in_any_file_of_a_sharded_checkpoint_is_noticed(sharded_checkpoints, capsys, file):
    folder, newest = sharded_checkpoints
    (path,) = newest.glob(file)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not match"):
        checkpoint.load(newest)
    assert load_latest(folder).step == 8
    assert str(newest) in capsys.readouterr().err


@pytest.mark.fault("16", "A cut, empty or missing file of a checkpoint is named, and the checkpoint before it is used.")
def test_a_missing_shard_is_noticed(sharded_checkpoints):
    _, newest = sharded_checkpoints
    next(newest.glob("shards/*_1_*.distcp")).unlink()
    with pytest.raises(UserError, match="is missing"):
        checkpoint.load(newest)


def test_a_shard_that_another_machine_has_written_to_itself_is_missed_at_once(sharded_checkpoints, tmp_path):
    """And not when the run is continued, when no checkpoint has all shards."""
    shards = tmp_path / "shards"
    shutil.copytree(sharded_checkpoints[1] / "shards", shards)
    sharded.check_whole(shards)
    (shards / "__1_0.distcp").unlink()
    with pytest.raises(UserError, match=r"lacks __1_0.distcp, which another process wrote; .* machines share"):
        sharded.check_whole(shards)


def test_a_full_disk_under_a_shard_is_one_line_and_leaves_the_earlier_checkpoint(trained, tiny, monkeypatch):
    import torch.distributed.checkpoint as dcp

    real, calls = dcp.FileSystemWriter.write_data, [0]

    def full(*arguments):
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    with pytest.raises(UserError, match="step-00000008: the disk is full .*; earlier checkpoints are intact"):
        trained("parallelism=fsdp")
    folder = tiny()[1]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000004"]
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    assert trained("parallelism=fsdp")[0]["status"] == "finished"


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.fault("18", "Code in a checkpoint is refused and never runs.")
def test_metadata_with_a_payload_is_refused_even_with_a_matching_hash(sharded_checkpoints, tmp_path):
    _, newest = sharded_checkpoints
    metadata = newest / "shards" / ".metadata"
    metadata.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["shards/.metadata"] = checkpoint._fingerprint(metadata)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no metadata"):
        checkpoint.load(newest)
    assert not (tmp_path / "ran").exists()


class AnEnum(enum.Enum):
    MEMBER = 1


class Fetched:
    """Pickles as getattr(owner, name), which is how Python 3.11.2 pickles the member of an Enum."""

    def __init__(self, owner, name):
        self.fetch = owner, name

    def __reduce__(self):
        return getattr, self.fetch


def test_metadata_of_another_release_of_python_is_read_and_no_other_attribute_fetched(monkeypatch):
    def load(thing):
        return sharded._MetadataUnpickler(io.BytesIO(pickle.dumps(thing))).load()

    from torch.distributed.checkpoint import metadata

    monkeypatch.setattr(metadata, "AnEnum", AnEnum, raising=False)
    monkeypatch.setattr(AnEnum, "__module__", metadata.__name__)
    assert load(Fetched(AnEnum, "MEMBER")) is AnEnum.MEMBER
    with pytest.raises(pickle.UnpicklingError):
        load(Fetched(metadata.MetadataIndex, "__init__"))


@pytest.mark.fault("34", "If one rank fails, all end, and its error is the one that is shown.")
def test_a_rank_that_dies_ends_the_others_and_the_run_can_go_on(tmp_path, one, python):
    killed = Launch(tmp_path, python, torchrun=sys.executable)
    killed.add("killed", "parallelism=fsdp", "parallelism.timeout_seconds=600", fault=[1, 7, "kill"])
    began = time.monotonic()
    assert killed.start(2)[1] != 0
    assert time.monotonic() - began < 300  # less than the timeout of the group
    assert killed.row("killed")["status"] == "preempted"
    assert "another process of this run is gone" in killed.row("killed")["error"]
    row = train(compose(killed.specs["killed"]["overrides"] + ["parallelism=single"]), quiet=True)
    assert row["status"] == "finished" and row["restarts"] == 1
    assert_same_run(one(), killed.run_folder("killed"))


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_activations_change_no_bit(trained, every):
    _, kept = trained("model.n_layers=3", runs="kept")
    _, recomputed = trained("model.n_layers=3", f"parallelism.activation_checkpointing={every}", runs="recomputed")
    assert_same_bits(kept, recomputed)


def test_recomputed_blocks_keep_only_their_inputs(tiny):
    from scaling_testbed.model.transformer import Transformer
    from tests.config.test_memory import kept_by_autograd

    run, _ = tiny("model.n_layers=4")
    model = Transformer(run.model.resolved(257), run.parametrization)
    found = {}
    for every in (None, 2, 1):
        model.recompute_every = every
        found[every] = kept_by_autograd(model, 4, 64)
    assert found[1] < found[2] < found[None] and found[1] < 0.3 * found[None]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_exchanged_once_a_step(trained, monkeypatch, kind):
    """Four micro-batches: three of them keep their gradients here."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    quiet = []
    if kind == "ddp":
        real = DistributedDataParallel.no_sync
        monkeypatch.setattr(DistributedDataParallel, "no_sync", lambda self: quiet.append(1) or real(self))
    else:
        set_sync = FSDPModule.set_requires_gradient_sync
        monkeypatch.setattr(
            FSDPModule,
            "set_requires_gradient_sync",
            lambda self, on, **options: quiet.append(1 - on) or set_sync(self, on, **options),
        )
    trained(f"parallelism={kind}", "batch.micro_batch_sequences=2", "budget.steps=2")
    assert sum(quiet) == 2 * 3


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
TORCHRUN["TORCHELASTIC_USE_AGENT_STORE"] = "True"
SLURM = {
    **{"SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
    **{"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node7,node9"},
}


def test_the_world_is_torchruns_or_sruns_or_one():
    assert world_from_environment({}) == World()
    assert world_from_environment(TORCHRUN) == World(1, 4, 1)
    assert world_from_environment(TORCHRUN | SLURM) == World(1, 4, 1)  # torchrun within a step
    by_hand = {key: value for key, value in TORCHRUN.items() if key != "TORCHELASTIC_USE_AGENT_STORE"}
    assert world_from_environment(by_hand) == World(1, 4, 1, "a", 1)  # rank 0 keeps the store
    for wrong, says in (
        ({"RANK": "x"}, "RANK must be an integer; got 'x'"),
        ({"RANK": "4"}, "must be from 0 to WORLD"),
        (by_hand | {"TORCHELASTIC_USE_AGENT_STORE": "", "MASTER_PORT": "99999"}, "MASTER_PORT=99999 must be from 1"),
    ):
        with pytest.raises(UserError, match=says):
            world_from_environment(TORCHRUN | wrong)
    with pytest.raises(UserError, match="MASTER_PORT must be an integer; got 'x'"):
        world_from_environment(SLURM | {"MASTER_PORT": "x"})
    assert world_from_environment(SLURM) == World(3, 4, 1, "node7", 10123)
    assert world_from_environment({k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}) == World()  # a batch script
    assert world_from_environment(SLURM | {"SLURM_NTASKS": "1"}) == World()
    assert world_from_environment(SLURM | {"SLURM_STEP_NUM_NODES": "1"}).address == "127.0.0.1"
    assert world_from_environment(SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}).local_rank == 1
    assert world_from_environment(SLURM | {"CUDA_VISIBLE_DEVICES": "1"}).local_rank == 0  # its own alone
    ports = {
        world_from_environment(SLURM | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).port
        for job in range(1000, 1064)  # the tasks of an array have job ids in a row
        for step in range(2)
    }
    assert len(ports) == 128 and min(ports) >= 10000 and max(ports) < 32768


def test_rank_0_stays_until_the_others_have_read_what_it_said():
    """Where it keeps the store itself, as under srun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(number):
        world = World(number, 2, number, "127.0.0.1", port)
        with Processes(world, ParallelismConfig(kind="ddp")) as processes:
            time.sleep(number)
            return processes.on_main(lambda: {"number": 7})

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(rank, (0, 1))) == [{"number": 7}] * 2


class LostStore:
    """The store of a torchrun that was killed."""

    def check(self, _):
        raise dist.DistNetworkError("Connection reset by peer")

    def compare_set(self, *_):
        raise dist.DistNetworkError("Connection reset by peer")


def test_a_run_that_lost_its_store_can_be_resumed():
    """As after a signal: the rank that notices it first, by a talk or by a broken collective, does not fail the run."""
    processes = Processes(World(0, 2), ParallelismConfig(kind="ddp"))
    processes._store, processes.grouped = LostStore(), True
    with pytest.raises(PeerGone, match="store of this run is gone"):
        processes._read("talk/1")
    assert isinstance(processes.first_failure(RuntimeError("gloo: Connection closed by peer")), PeerGone)


MODEL_OUTLIVES_GROUP = """
import sys
import time
import torch
import torch.distributed as dist
import torch.distributed as dist
from scaling_testbed.config.sections import ParallelismConfig
from scaling_testbed.processes.group import PeerGone, Processes
from scaling_testbed.processes.world import World

sys.setswitchinterval(100)  # no thread gets Python's lock unless it is given up
for _ in range(3):  # PyTorch itself keeps the first group
    with Processes(World(), ParallelismConfig(kind="ddp")) as processes:
        processes.connect(torch.device("cpu"))
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        dist.all_gather([torch.ones(30_000_000)], torch.ones(30_000_000), async_op=True)  # takes a while
    del model
print("ended", flush=True)
end = time.monotonic() + 0.5
while time.monotonic() < end:  # until the last gather is done and waits for the lock
    pass
"""


def test_a_model_that_outlives_its_group_holds_nothing_up():
    """The group's thread still has tensors to let go of when the model, the last to know the group, goes, and when
    Python ends."""
    command = [sys.executable, "-c", MODEL_OUTLIVES_GROUP]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "ended\n"), ended.stderr


def test_half_a_world_is_refused():
    with pytest.raises(UserError, match="MASTER_PORT is not set"):
        world_from_environment({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"})
    with pytest.raises(ConfigError, match="shard_size must be null"):
        compose(["parallelism.shard_size=2"])
    check_world(World(0, 4), compose(["parallelism=fsdp", "parallelism.shard_size=2"]).parallelism, 8)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(ComputeConfig(), 1) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="process 3 of this machine has no GPU: PyTorch sees 2"):
        choose_device(ComputeConfig(), 2)


def test_a_run_can_begin_in_the_state_of_a_run_of_any_kind(two):
    for kind, other in (("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp"), ("fsdp", "single")):
        parent, branch = two.row(kind), two.row(f"{kind}_then_{other}")
        assert (branch["status"], branch["steps"]) == ("finished", parent["steps"])
        assert branch["val_loss"] == pytest.approx(parent["val_loss"], rel=1e-6)
        last = [metrics(two.run_folder(name))[-1] for name in (kind, f"{kind}_then_{other}")]
        assert last[1]["grad_norm"] == pytest.approx(last[0]["grad_norm"], rel=1e-6)
        assert branch["lineage"][0]["weights_sha256"] and branch["flops_total"] == pytest.approx(parent["flops"])
    for kind in ("ddp", "fsdp"):  # rows to forget and to retain on each rank
        npo, alone = two.row(f"{kind}_npo"), two.row("single_npo")
        assert npo["val_loss_by_set"] == pytest.approx(alone["val_loss_by_set"], rel=1e-6)
        lines = [line["train_objective"] for line in metrics(two.run_folder(f"{kind}_npo")) if "lr" in line]
        assert lines == pytest.approx(
            [line["train_objective"] for line in metrics(two.run_folder("single_npo")) if "lr" in line], rel=1e-6
        )
    assert two.row("fsdp_weights")["val_loss"] == pytest.approx(two.row("single_weights")["val_loss"], rel=1e-6)
    assert two.row("fsdp_grown")["val_loss"] == pytest.approx(two.row("single_grown")["val_loss"], rel=1e-6)
    assert two.row("fsdp_weights")["val_loss"] != pytest.approx(two.row("fsdp_then_fsdp")["val_loss"], rel=1e-6)
