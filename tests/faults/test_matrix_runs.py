"""One run at a time: killed, signalled, doubled and cut off, each as a real process. The end is compared to the bit."""

# ruff: noqa: F811  (fixtures of tests.training are imported by name)

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from scaling_testbed.data.tokenizers import BpeConfig
from tests.training.conftest import TINY, data_dir, metrics, start, tiny, trained, whole  # noqa: F401
from tests.training.test_run import assert_same_bits, assert_same_weights, wait_for


def before(module, name, when, then):
    """Python that does `then` in a run before a call of a function for which `when` is true. Both know `call`, which
    counts from 1, and `arguments`."""
    owner, _, attribute = f"module.{name}".rpartition(".")
    return f"""
def install():
    import importlib, os, signal
    module = importlib.import_module({module!r})
    real, calls = getattr({owner}, {attribute!r}), [0]
    def hooked(*arguments, **options):
        calls[0] += 1
        call = calls[0]
        if {when}:
            {then}
        return real(*arguments, **options)
    setattr({owner}, {attribute!r}, hooked)
install()
"""


def send(name):
    return f"os.kill(os.getpid(), signal.SIG{name})"


def at_update(number, then):
    """Python that does `then` before a run's update `number` of this start."""
    return before("scaling_testbed.training.step", "set_lr", f"call == {number}", then)


def of_text(tmp_path, texts):
    """What `start` needs for a run on these documents."""
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    taken = [word for word in TINY if not word.startswith(("data", "budget", "evaluation"))]
    words = [
        "data=text_files",
        f"data.files={tmp_path / 'corpus.jsonl'}",
        "data_workers=1",
        f"data_dir={tmp_path / 'data'}",
    ]
    return [*taken, *words, f"runs_dir={tmp_path / 'runs'}", "budget.steps=3", "evaluation.tokens=64"]


def begin(python, words, before="", env=None):
    """The door of training in a process of its own, after `before` (Python) has run in it."""
    code = f"import sys\n{before}\nfrom scaling_testbed.train import main\nsys.exit(main({words!r}))"
    return subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def ended(process, status):
    """What a process printed on stdout and stderr, when it has ended with `status`."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, out + err
    assert "Traceback" not in err
    return out, err


def row_in(folder):
    return json.loads((folder / "result.json").read_text())


PREPARING = before("scaling_testbed.data.preparing.tasks", "run_task", "call == 1", send("TERM"))
COMPILING = before("torch._inductor.compile_fx", "compile_fx", "call == 1", send("TERM"))


@pytest.mark.fault(
    "6", "A signal while a run composes, prepares or builds ends it with 75, and it can be started again."
)
@pytest.mark.parametrize(
    ("hook", "words"),
    [
        pytest.param(PREPARING, (), id="data"),
        pytest.param(COMPILING, ("compute.compile=true",), id="compile", marks=pytest.mark.slow),
    ],
)
def test_sigterm_before_the_first_update_is_made(python, tmp_path, record_property, hook, words):
    words = [*of_text(tmp_path, [f"line {number} " * 40 for number in range(99)]), *words]
    ended(begin(python, words, hook), 75)
    (folder,) = tmp_path.glob("runs/*/*")
    record_property("seen", f"exit 75, {row_in(folder)['error']}; then finished")
    assert row_in(folder)["status"] == "preempted" and "SIGTERM" in row_in(folder)["error"]
    ended(begin(python, words), 0)
    assert row_in(folder)["status"] == "finished"


@pytest.mark.fault("12", "After three restarts in a row the batches are those of an unbroken run.")
def test_three_restarts_in_a_row(python, whole, trained, tmp_path, data_dir, record_property):
    """Killed at step 5, killed again three steps after the checkpoint of step 4, and stopped by a signal at step 9."""
    _, unstopped = whole()
    for update, name, status in ((6, "KILL", -signal.SIGKILL), (3, "KILL", -signal.SIGKILL), (6, "TERM", 75)):
        ended(start(python, tmp_path, data_dir, before=at_update(update, send(name))), status)
    row, folder = trained()
    record_property("seen", f"restarts {row['restarts']}; metrics and weights equal to the bit")
    assert row["restarts"] == 3
    assert_same_bits(unstopped, folder)


@pytest.mark.fault("25", "A half-written line is left out by number, and a resumed run writes no step twice.")
def test_a_half_written_line_after_a_kill(python, whole, trained, tmp_path, data_dir, capsys, record_property):
    _, unstopped = whole()
    ended(start(python, tmp_path, data_dir, before=at_update(8, send("KILL"))), -signal.SIGKILL)
    (folder,) = tmp_path.glob("runs/*/*")
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + lines[-1][: len(lines[-1]) // 2])
    trained()
    said = capsys.readouterr().err
    record_property("seen", said.strip())
    assert f"{path}:{len(lines) + 1} is not a complete record" in said and said.count("\n") == 1
    assert [line["step"] for line in metrics(folder)] == list(range(13))
    assert_same_bits(unstopped, folder)


@pytest.mark.fault(
    "26", "A loss that is not finite stops the run before the update; it is a result, and not run again."
)
def test_a_rate_at_which_the_loss_is_not_finite(python, tmp_path, data_dir, record_property):
    words = ("optimizer.lr=1e30", "schedule.warmup=1")
    ended(start(python, tmp_path, data_dir, *words), 0)
    (folder,) = tmp_path.glob("runs/*/*")
    row, files = row_in(folder), {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    out, _ = ended(start(python, tmp_path, data_dir, *words), 0)
    record_property(
        "seen", f"{row['status']} at step {row['diverged_at_step']}; typed again: {out.splitlines()[0][-80:]}"
    )
    assert row["status"] == "diverged" and row["diverged_at_step"] == row["steps"] + 1 <= 12
    assert "has diverged before" in out and files == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.fault("28", "A second process in the same folder is refused with its owner's name and the exit status 75.")
def test_four_processes_start_the_same_run_at_once(python, whole, tmp_path, data_dir, record_property):
    """The one that trains waits in its first update until the others have ended."""
    _, alone = whole()
    waits = f"while not os.path.exists({str(tmp_path / 'go')!r}): __import__('time').sleep(0.01)"
    processes = [start(python, tmp_path, data_dir, before=at_update(1, waits)) for _ in range(4)]
    wait_for(lambda: sum(process.poll() is not None for process in processes) == 3)
    (tmp_path / "go").touch()
    said = [process.communicate(timeout=60)[1] for process in processes]
    statuses = sorted(process.returncode for process in processes)
    record_property("seen", f"exit statuses {statuses}; {max(said, key=len).strip()[-90:]}")
    assert statuses == [0, 75, 75, 75]
    assert sum("is being run by" in text for text in said) == 3 and not any("Traceback" in text for text in said)
    (folder,) = tmp_path.glob("runs/*/*")
    assert row_in(folder)["restarts"] == 0
    assert_same_bits(alone, folder)


@pytest.mark.fault("37", "Without the hub, local data and a local tokenizer work.")
def test_local_text_and_tokenizer_need_no_hub(python, tmp_path, record_property):
    """Every proxy that a request would take is a closed port."""
    texts = [f"document {number} of some words " * 9 for number in range(60)]
    (tmp_path / "mine").mkdir()
    BpeConfig(vocab_size=300).prepare([text.encode() for text in texts], tmp_path / "mine")
    words = [*of_text(tmp_path, texts), "tokenizer=pretrained", f"tokenizer.path={tmp_path / 'mine'}"]
    closed = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"
    )
    environment = os.environ | closed | {"HF_HUB_OFFLINE": "1"}
    _, err = ended(begin(python, words, env=environment), 0)
    (folder,) = tmp_path.glob("runs/*/*")
    record_property("seen", f"{row_in(folder)['status']}, tokenizer {row_in(folder)['tokenizer_fingerprint']}")
    assert row_in(folder)["status"] == "finished"
    assert len(err.splitlines()) <= 3, err  # what prepare says of the corpus


STILL = "import time\ntime.time = lambda: 1e9\n"


@pytest.mark.fault("39", "Run folders do not depend on the clock.")
def test_two_runs_in_the_same_second_and_a_clock_that_jumps_back(
    python, whole, trained, tmp_path, data_dir, record_property
):
    """A clock that stands still for two runs at once, and one that is twenty years ahead at the first of two starts."""
    _, unstopped = whole()
    later = f"import time\ntime.time = lambda: 1.6e9\n{at_update(7, send('KILL'))}"
    ended(start(python, tmp_path, data_dir, before=later), -signal.SIGKILL)
    (folder,) = tmp_path.glob("runs/*/*")
    processes = [start(python, tmp_path, data_dir, *words, before=STILL) for words in ((), ("seed=1",))]
    for process in processes:
        ended(process, 0)
    folders = list(tmp_path.glob("runs/*/*"))
    record_property(
        "seen", f"{len(folders)} folders, both finished; the one that went on has the bits of an unbroken run"
    )
    assert len(folders) == 2 and all(row_in(each)["status"] == "finished" for each in folders)
    assert row_in(folder)["wall_seconds"] > 0 and row_in(folder)["restarts"] == 1
    assert_same_bits(unstopped, folder)


@pytest.mark.fault("20", "The order in the folder changes nothing, and stray files are ignored.")
def test_a_corpus_that_was_copied_in_another_order_trains_the_same(whole, trained, tmp_path, record_property):
    """The shards are written anew in reverse order, beside strangers."""
    _, unbroken = whole()
    prepared = yaml.safe_load((unbroken / "config.yaml").read_text())["data_dir"]
    (corpus,) = Path(prepared).glob("markov*")
    copied = tmp_path / "data" / corpus.name
    copied.mkdir(parents=True)
    for path in sorted(corpus.iterdir(), reverse=True):
        shutil.copy(path, copied)
    for name in ("0.bin", "train-99999.bin", "notes.txt", ".hidden"):
        (copied / name).write_bytes(b"stray")
    _, folder = trained(f"data_dir={tmp_path / 'data'}")
    record_property("seen", "the bits of a run on the first copy")
    assert_same_weights(unbroken, folder)
