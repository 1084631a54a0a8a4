"""A saved checkpoint tells of its model what the run told when it was there."""

import json

import pytest
import torch

from scaling_testbed import analyze
from scaling_testbed.config.compose import compose, recorded_run
from scaling_testbed.config.run import run_folder_path, run_id
from scaling_testbed.data.batches import ValidationBatches
from scaling_testbed.diagnostics.summary import names_in
from scaling_testbed.errors import UserError
from scaling_testbed.evaluation import inspection
from scaling_testbed.evaluation.inspection import inspect
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.training.run import train
from tests.training.conftest import metrics


@pytest.fixture
def inspected(tiny):
    """Returns a function from overrides to (RunConfig, run folder) of a run that was trained and measured."""

    def make(*overrides):
        run, folder = tiny("diagnostics.every_steps=4", "checkpoint.keep_steps=[4,8]", *overrides)
        train(run, quiet=True)
        return run, folder

    return make


@pytest.mark.parametrize("kind", ["single", "fsdp"])
def test_the_last_update_is_that_of_the_runs_last_step(inspected, kind):
    run, folder = inspected(f"parallelism={kind}")
    step, found = inspect(run, folder)
    last = names_in(metrics(folder)[-1])
    assert step == 12
    for name in ("update_rms/blocks.1.mlp.mlp_in.weight", "below_eps/embedding.weight"):
        assert found[name] == pytest.approx(last[name], rel=1e-6)
    name = "update_ratio/blocks.1.mlp.mlp_in.weight"  # to the weights before the update there, after it here
    assert found[name] == pytest.approx(last[name], rel=0.02) and last[name] > 1e-6
    assert "attention_logit_max/1/0" in found


def test_an_earlier_step_is_another_model_and_an_initial_one_has_the_known_logits(inspected):
    run, folder = inspected("optimizer.lr=1e-9", "optimizer.weight_decay=0", "model.d_model=64")
    step, found = inspect(run, folder, step=8, sequences=8)
    assert step == 8
    # Unit-RMS features and a head of std 1 / sqrt(d): logits of unit RMS, log Z = ln V + 1/2 (arXiv 2309.14322, 2.1).
    assert found["output_logit_rms"] == pytest.approx(1.0, rel=0.1)
    assert found["log_z_mean"] == pytest.approx(torch.tensor(float(run_vocabulary(run))).log().item() + 0.5, abs=0.25)


def run_vocabulary(run):
    return run.data.vocab_size


def test_what_cannot_be_inspected_is_named(tiny, inspected):
    run, folder = tiny()
    with pytest.raises(UserError, match="holds no checkpoint; run with checkpoint.at_end"):
        inspect(run, folder)
    run, folder = inspected()
    with pytest.raises(UserError, match="holds no step 5; there are 4, 8, 12"):
        inspect(run, folder, step=5)
    (folder / "checkpoints" / "step-00000008" / "model.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="step-00000008 is damaged: model.pt"):
        inspect(run, folder, step=8)


def test_the_door_shows_a_run_by_its_folder_alone(tiny, tmp_path, capsys):
    run, folder = tiny("data_dir='" + str(tmp_path / "it\\'s {data}") + "'", runs="two words")
    train(run, quiet=True)
    found = recorded_run(folder)
    assert found.data_dir == run.data_dir == str(tmp_path / "it's {data}")
    assert run_id(found) == run_id(run)
    assert analyze.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "step 12" in out and "attention_entropy" in out and "blocks.1.mlp.mlp_out.weight" in out
    assert analyze.main(["inspect", str(folder), "--json", "--step", "12"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 12
    assert analyze.main(["inspect", str(folder), "--sequences", "100000000"]) == 0
    assert "249 validation sequences" in capsys.readouterr().out  # all there are: 4,000 tokens, 16 at a time


def test_the_number_of_sequences_at_a_time_changes_nothing(inspected, monkeypatch):
    run, folder = inspected()
    _, whole = inspect(run, folder, sequences=21)
    monkeypatch.setattr(inspection, "ROWS", 8)  # 8, 8 and 5
    _, parts = inspect(run, folder, sequences=21)
    assert whole == pytest.approx(parts, rel=1e-5, abs=1e-6) and whole["sequences"] == 21


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_the_gradient_is_that_of_the_mean_loss_of_the_same_sequences(inspected, limit):
    run, folder = inspected(f"optimizer.clip_norm={limit}", "loss.z_loss=0.1")
    _, found = inspect(run, folder, sequences=37)
    _, model, data = load_model(run, folder, step=None, device=torch.device("cpu"))
    batches = ValidationBatches(data.validation, sequence_length=16, max_tokens=37 * 16, rows=37)
    tokens_BS = torch.from_numpy(batches.batch(0).tokens_BS)
    logits_NV = (model(tokens_BS[:, :-1]) @ model.head_weight_VD.T).flatten(0, 1)
    z_loss = logits_NV.logsumexp(-1).square().mean()
    (torch.nn.functional.cross_entropy(logits_NV, tokens_BS[:, 1:].flatten()) + 0.1 * z_loss).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert len(batches) == 1 and found["sequences"] == 37
    for name, grad in grads.items():
        assert found[f"grad_norm/{name}"] == pytest.approx(grad.norm().item(), rel=1e-4)
        assert found[f"grad_rms/{name}"] == pytest.approx(grad.square().mean().sqrt().item(), rel=1e-4)
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm().item()
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert found["clip_coefficient"] == pytest.approx(min(1.0, limit / norm), rel=1e-3)


def test_an_optimizer_with_rates_of_its_own_has_no_ratio_that_a_checkpoint_could_tell(inspected):
    _, found = inspect(*inspected("optimizer=stable_adamw"))
    assert "update_rms/head.weight" in found and "update_ratio/head.weight" not in found


def test_other_data_than_the_runs_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a tale of two corpora " * 400)
    overrides = ["model=nano_s", "data=text_files", f"data.files=['{tmp_path}/a.txt']", "data.validation_fraction=0.5"]
    overrides += ["tokenizer=bytes", "batch.sequences=4", "batch.sequence_length=16", "budget.steps=2"]
    run = compose([*overrides, f"data_dir={tmp_path / 'data'}", f"runs_dir={tmp_path / 'runs'}"])
    train(run, quiet=True)
    folder = run_folder_path(run)
    (tmp_path / "a.txt").write_text("another tale altogether " * 400)
    with pytest.raises(UserError, match="was trained on other data: its data_fingerprint is"):
        inspect(run, folder)


@pytest.mark.parametrize(
    "content, said",
    [
        ("a: [", "has no readable config.yaml"),
        ("data_dir: 5\noverrides: []", "has no readable config.yaml"),
        ("data_dir: d\noverrides: [model.no=1]", "config.yaml cannot be composed any more"),
    ],
)
def test_a_broken_config_is_named(tmp_path, content, said):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=said):
        recorded_run(tmp_path)


def test_the_door_refuses_what_is_no_run_or_another_versions(tiny, capsys, tmp_path):
    assert analyze.main(["inspect", str(tmp_path / "none")]) == 1
    assert "is no run folder" in capsys.readouterr().err
    run, folder = tiny()
    train(run, quiet=True)
    folder = folder.rename(folder.with_name("0123456789ab"))
    assert analyze.main(["inspect", str(folder)]) == 1
    assert "was renamed, or made by another version" in capsys.readouterr().err
    assert analyze.main(["inspect", str(folder), "--sequences", "0"]) == 2


def test_a_run_of_a_gpu_can_be_looked_at_without_one(tmp_path):
    overrides = ["compute.device=cuda", "model=nano_s", "data=markov", "budget.steps=3"]
    folder = tmp_path / run_id(compose(overrides))
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({"overrides": overrides, "data_dir": "data"}))
    assert recorded_run(folder).compute.device == "auto"
