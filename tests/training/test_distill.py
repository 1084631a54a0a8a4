"""Distillation in a run: what it minimises, what it costs, that it resumes in the same bits, and what is refused."""

import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from scaling_testbed.config.compose import compose_many, recorded_run
from scaling_testbed.config.compute import training_flops
from scaling_testbed.config.memory import estimate_memory
from scaling_testbed.config.run import run_folder_path, run_id
from scaling_testbed.errors import UserError
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.teacher import prepare_targets
from scaling_testbed.model.counting import count_params, forward_flops
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.training import run as trainer
from scaling_testbed.training.data import open_training_batches
from scaling_testbed.training.run import train
from tests.training.conftest import TINY, StopAt, load_latest, metrics
from tests.training.test_distributed import EVALUATED, Launch
from tests.training.test_documents import text  # noqa: F401
from tests.training.test_run import assert_same_bits, assert_same_weights

TEACHER = ("seed=7", "model.d_model=48", "model.n_heads=3")


@pytest.fixture
def teacher(whole):
    return whole(*TEACHER)[1]


@pytest.fixture
def stored(teacher, tmp_path):
    """The folder of top-3 targets of the teacher."""
    found, _ = prepare_targets(recorded_run(teacher), teacher, top_k=3, max_bytes=2**30, out=tmp_path / "targets")
    return found.folder


def online(folder, *more):
    return ("objective=distill", f"objective.teacher={folder}", *more)


def from_stored(folder, *more):
    return ("objective=distill", f"objective.targets={folder}", *more)


def logits(folder, tokens_BS, **how):
    _, model, data = load_model(recorded_run(folder), folder, device=torch.device("cpu"), **{"step": None} | how)
    with torch.no_grad():
        return model.logits(tokens_BS[:, :-1]), data


def test_alpha_zero_is_the_cross_entropy_bit_for_bit(trained, teacher):
    row, plain = trained()
    taught, folder = trained(*online(teacher, "objective.alpha=0"), runs="taught")
    assert_same_weights(plain, folder)
    assert taught["run_id"] != row["run_id"] and taught["flops"] == row["flops"] and taught["teacher"] is None


@pytest.mark.parametrize("kind", ["online", "stored"])
def test_the_first_record_is_the_definition_on_the_first_batch(trained, tiny, teacher, stored, kind):
    how = online(teacher) if kind == "online" else from_stored(stored)
    row, folder = trained(*how, "objective.alpha=0.3", "evaluation.every_steps=0")
    first = next(line for line in metrics(folder) if line["step"] == 1)
    run = recorded_run(folder)
    _, data = logits(teacher, torch.zeros(1, 17, dtype=torch.int64))
    tokens = torch.from_numpy(open_training_batches(run, data).batch(0).tokens_BS)
    model = Transformer(run.model.with_auto_paths().resolved(data.vocab_size), run.parametrization)
    model.init_weights(run.seed)
    with torch.no_grad():
        log_r = model.logits(tokens[:, :-1]).log_softmax(-1).flatten(0, 1)
    q = logits(teacher, tokens)[0].softmax(-1).flatten(0, 1)
    ce = F.nll_loss(log_r, tokens[:, 1:].flatten())
    if kind == "online":
        soft = -(q * log_r).sum(-1)
    else:
        top, ids = q.topk(3)
        r = log_r.gather(1, ids)
        soft = -(top * r).sum(-1) - (1 - top.sum(-1)) * (1 - r.exp().sum(-1)).log()
    assert first["train_loss"] == pytest.approx(ce.item(), rel=1e-5)
    assert first["train_objective"] == pytest.approx((0.7 * ce + 0.3 * soft.mean()).item(), rel=1e-4)  # fp16
    assert row["teacher"]["run_id"] == teacher.name and row["teacher"]["step"] == 12
    assert row["ce_scaled"] > 0


@pytest.mark.parametrize("kind", ["online", "stored"])
def test_a_stopped_student_ends_in_the_same_bits_and_keeps_nothing_of_its_teacher(trained, teacher, stored, kind):
    words = online(teacher) if kind == "online" else from_stored(stored)
    row, whole = trained(*words, runs="whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "Interrupts", lambda: StopAt(30))
        assert trained(*words)[0]["status"] == "preempted"
    again, folder = trained(*words)
    assert again["restarts"] == 1 and again["val_loss"] == row["val_loss"] < row["val_loss_initial"]
    assert_same_bits(whole, folder)
    saved = load_latest(folder / "checkpoints")
    shapes = [value.shape for value in saved.tensors["model"].values()]
    assert sum(shape.numel() for shape in shapes) == row["n_params"]


@pytest.mark.parametrize("kind", ["online", "stored"])
@pytest.mark.parametrize("more", ["parallelism=ddp", "parallelism=fsdp", "batch.micro_batch_sequences=2"])
def test_other_placements_learn_the_same(trained, teacher, stored, kind, more):
    words = online(teacher) if kind == "online" else from_stored(stored)
    row, _ = trained(*words)
    other, _ = trained(*words, more, runs="other")
    assert other["val_loss"] == pytest.approx(row["val_loss"], rel=1e-4)


def test_two_processes_learn_what_one_does(trained, teacher, stored, tmp_path, python):
    kinds = {"online": online(teacher), "stored": from_stored(stored)}
    runs = Launch(tmp_path, python)
    for placement in ("ddp", "fsdp"):
        for kind, words in kinds.items():
            runs.add(f"{placement}_{kind}", f"parallelism={placement}", *words)
    said, status = runs.start(2)
    assert status == 0, said
    for kind, words in kinds.items():
        row, folder = trained(*EVALUATED, *words, runs=kind)
        alone = [line["train_objective"] for line in metrics(folder) if "lr" in line]
        for placement in ("ddp", "fsdp"):
            name = f"{placement}_{kind}"
            assert [rank["status"] for rank in runs.said(name)] == [0, 0], runs.said(name)
            found = [line["train_objective"] for line in metrics(runs.run_folder(name)) if "lr" in line]
            assert found == pytest.approx(alone, rel=1e-4)  # the order of sums differs
            assert runs.row(name)["flops"] == row["flops"] and runs.row(name)["teacher"] == row["teacher"]


def test_an_online_teacher_costs_its_forward_pass_and_its_weights(tiny, trained, teacher, stored):
    row, _ = trained()
    taught, _ = trained(*online(teacher))
    cheap, _ = trained(*from_stored(stored))
    model = recorded_run(teacher).model.resolved(32)
    assert taught["flops"] - row["flops"] == pytest.approx(forward_flops(model, 16) * row["n_tokens"])
    assert cheap["flops"] == row["flops"] and cheap["teacher"]["pass_flops"] > 0
    run = tiny(*online(teacher))[0]
    student = run.model.resolved(model.known_vocab_size)
    there, without = (estimate_memory(one, student, count_params(student).n_params, "fp32") for one in (run, tiny()[0]))
    assert there.total - without.total == there.objective == 4 * count_params(model).n_params
    assert training_flops(run, student, 12, 12) == taught["flops"]


def test_the_identity_has_the_teacher_and_not_its_place(tiny, teacher, stored, tmp_path):
    run, _ = tiny(*online(teacher))
    assert run.objective.teacher_run == teacher.name and run.objective.teacher_step == 12
    moved = tmp_path / "elsewhere" / teacher.name
    moved.parent.mkdir()
    moved.symlink_to(teacher)
    assert run_id(tiny(*online(moved))[0]) == run_id(run)
    assert run_id(tiny(*online(teacher, "objective.teacher_step=8"))[0]) != run_id(run)
    run, _ = tiny(*from_stored(stored))
    assert (run.objective.teacher_run, run.objective.teacher_step) == (teacher.name, 12)
    assert run_id(tiny(*from_stored(f"{stored.parent}/*"))[0]) == run_id(run)
    words = [word for word in run.overrides if not word.startswith("objective.targets")]
    assert any(word.startswith("objective.fingerprint=") for word in words)
    (gone,) = compose_many([[*words, "objective.targets=gone"]])  # all that is looked up is there
    assert run_id(gone) == run_id(run)


def test_a_teacher_under_masked_documents_reads_the_same_documents(tmp_path, data_dir, text):  # noqa: F811
    places = [f"data_dir={data_dir}", f"runs_dir={tmp_path}/runs", *TINY[3:], *text]
    packed = ["batch.packing=documents", "batch.document_masking=true"]
    (run,) = compose_many([[*places, *packed, "seed=7"]])
    train(run, quiet=True)
    folder = run_folder_path(run)
    found, _ = prepare_targets(run, folder, top_k=256, max_bytes=2**30, out=tmp_path / "t")
    pair = compose_many([[*places, *packed, *how] for how in (online(folder), from_stored(found.folder))])
    rows = [train(one, quiet=True) for one in pair]
    # All but one token of 257, in fp16.
    lines = [[line["train_objective"] for line in metrics(run_folder_path(one)) if "lr" in line] for one in pair]
    assert lines[0] == pytest.approx(lines[1], rel=2e-3)
    assert rows[0]["val_loss"] == pytest.approx(rows[1]["val_loss"], rel=2e-3)
    (other,) = compose_many([[*places, *from_stored(found.folder)]])
    with pytest.raises(UserError, match="of other sequences: packing is documents there and windows in this run"):
        train(other, quiet=True)


def test_what_cannot_teach_is_refused_in_one_line(tiny, trained, teacher, stored, tmp_path):
    def said(*words):
        with pytest.raises(UserError) as error:
            train(tiny(*words)[0], quiet=True)
        assert len(str(error.value).splitlines()) == 1
        return str(error.value)

    assert "needs objective.targets=FOLDER" in said("objective=distill")
    assert "and not both" in said(*online(teacher), f"objective.targets={stored}")
    assert "objective.alpha must be from 0 to 1; got 2" in said(*online(teacher, "objective.alpha=2"))
    assert "objective.temperature must be greater" in said(*online(teacher, "objective.temperature=0"))
    assert "is named by its run_id" in said(*online(tmp_path))
    gone = tmp_path / "0123456789ab"
    assert "is no finished run: there is no such folder" in said(*online(gone))
    (gone / "result.json").parent.mkdir()
    (gone / "result.json").write_text("{")
    assert "is no finished run: its result.json is damaged" in said(*online(gone))
    shutil.rmtree(gone)
    missing = said(*from_stored(gone))
    assert missing.startswith(f"objective.targets={gone} has no whole targets") and "prepare_targets" in missing
    assert "probabilities at 1; make targets with --temperature 2" in said(
        *from_stored(stored, "objective.temperature=2")
    )
    assert "sequence_length is 16 there and 8 in this run" in said(*from_stored(stored), "batch.sequence_length=8")
    assert "data_fingerprint is" in said(*from_stored(stored), "data.seed=9")
    assert "holds no step 3" in said(*online(teacher, "objective.teacher_step=3"))
    assert "has the fingerprint" in said(
        *from_stored(stored, "objective.teacher_run=abc", "objective.teacher_step=12", "objective.fingerprint=abc")
    )
    sources = "data.sources={a:{name:markov,n_tokens:9000,n_validation_tokens:2000}}"
    with pytest.raises(UserError, match="data is a mixture; use objective.teacher"):
        compose_many([["data=mixture", sources, "model=nano_s", *from_stored(stored)]])

    row, folder = trained(*online(teacher))
    recorded = json.loads((folder / "result.json").read_text())
    recorded["teacher"]["weights_sha256"] = "0" * 64
    (folder / "result.json").write_text(json.dumps(recorded))
    assert "had another teacher" in said(*online(teacher))
    file = next(stored.glob("ids-*.bin"))
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert "sha256 differs from the manifest" in said(*from_stored(stored))
    assert dataclasses.is_dataclass(tiny()[0])
