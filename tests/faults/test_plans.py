"""A plan names what will not run."""

import re
from pathlib import Path

import pytest

from scaling_testbed.sweep import main as sweep
from scaling_testbed.train import main as train

ROOT = Path(__file__).resolve().parent.parent.parent
SWEEP = """
overrides: [experiment=small_scale_proxies, budget.steps=10]
axes:
  model: [proxy_9m, proxy_1b]
  optimizer.lr: [1e-3, 1e-2]
"""


@pytest.fixture
def command(tmp_path, capfd, monkeypatch):
    """Returns a function from the words of a command to (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "large.yaml").write_text(SWEEP)

    def call(door, *words):
        capfd.readouterr()
        status = door([*words, f"runs_dir={tmp_path / 'runs'}", f"data_dir={tmp_path / 'data'}"])
        return (status, *capfd.readouterr())

    return call


@pytest.mark.fault(
    "C: plan beyond a GPU's memory", "A plan names the runs that do not fit a GPU, and what makes them fit."
)
def test_a_plan_and_a_dry_submission_name_runs_that_do_not_fit(command, record_property):
    status, out, _ = command(sweep, "plan", "sweep=large.yaml", "batch.micro_batch_sequences=null")
    named = [line for line in out.splitlines() if "model=proxy_1b: 2 runs need" in line]
    assert status == 0 and "2 of 4 runs need more than 64 GiB" in out and len(named) == 1
    record_property("seen", named[0].strip())
    words = named[0].partition("fits with ")[2].split()
    assert "runs need" not in command(sweep, "plan", "sweep=large.yaml", *words)[1]
    roomy = ["batch.micro_batch_sequences=null", "compute.gpu_memory_gib=400"]
    assert "runs need" not in command(sweep, "plan", "sweep=large.yaml", *roomy)[1]
    cpus = ["batch.micro_batch_sequences=null", "launcher.gpus_per_node=0"]
    assert "runs need" not in command(sweep, "plan", "sweep=large.yaml", *cpus)[1]
    words = ["submit", "--dry-run", "sweep=large.yaml", "batch.micro_batch_sequences=null"]
    status, out, err = command(sweep, *words)
    assert status == 0 and "#SBATCH" in out and "model=proxy_1b: 2 runs need" in err


@pytest.mark.fault("C: submission beyond a GPU's memory", "Runs that do not fit a GPU are not submitted.")
def test_runs_that_do_not_fit_are_not_submitted(command, record_property, tmp_path):
    words = ["submit", "sweep=large.yaml", "batch.micro_batch_sequences=null"]
    status, _, err = command(sweep, *words)
    record_property("seen", err.splitlines()[-1])
    assert status == 2 and err.splitlines()[-1].startswith("error: nothing was submitted")
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault("C: dry run of an unusual setting", "A dry run names settings that nobody uses at that size.")
def test_a_dry_run_warns_of_unusual_settings(command, record_property):
    _, out, _ = command(train, "--dry-run", "model=proxy_5b")
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    record_property("seen", "; ".join(warnings)[:200])
    for part in ("a vocabulary of 257", "a batch of 4,096 tokens", "batch.sequence_length=128", "steps are many"):
        assert sum(part in line for line in warnings) == 1
    usual = ["experiment=small_scale_proxies", "model=proxy_1b"]
    _, out, _ = command(train, "--dry-run", *usual, "batch.sequences=65536", "model.vocab_size=1000000")
    assert "a batch of 33,554,432 tokens, for " in out and "a vocabulary of 1,000,000 is larger than any" in out
    assert "warning" not in command(train, "--dry-run", *usual)[1]


@pytest.mark.fault("C: cluster commands of the documents", "The cluster commands of the documents fit GPUs of 80 GiB.")
def test_the_cluster_commands_of_the_documents_fit(command, record_property):
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    found = re.findall(r"^python -m scaling_testbed\.sweep submit (.*)$", text, re.MULTILINE)
    words = {tuple(word for word in line.partition("#")[0].split() if word != "--dry-run") for line in found}
    own = [line for line in sorted(words) if not any(word.endswith(".yaml") for word in line)]
    assert ("sweep=qknorm_lr", "launcher.partition=gpu", "launcher.time=8:00:00") in own
    for line in own:
        status, out, err = command(sweep, "submit", "--dry-run", *line)
        assert status == 0 and "#SBATCH" in out and err == ""
    record_property("seen", f"{len(own)} commands, each fits")
