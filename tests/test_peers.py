"""docs/peers.md: 63 features in which nothing is empty, and a proof for each that holds.

A proof is a command, or a file, or a test. Commands of about a second are run in this process, with data and runs in a
temporary folder; the others are parsed, as the commands of all documents are.
"""

import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_docs import PLACEHOLDER, problem_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "peers.md").read_text()
PEERS = ("torchtitan", "litgpt", "lingua", "OLMo-core", "nanochat", "nanodo", "open_lm", "levanter")
VARIABLES = dict(re.findall(r'^(T|TEXT)="(.*)"$', PAGE, re.MULTILINE))
RMSNORM = "model.norm=rmsnorm model.mlp=swiglu model.qk_norm=rmsnorm"
# Not run here: what needs the network, files of the reader, other processes, an extra,
# a compiler, or many seconds.
COSTLY = (
    *("data=huggingface", "TRAIN.bin", "torchrun", "compute.compile", "logging=wandb", "analyze fit", "plugins="),
    "evaluate RUN --tasks",
)
SMALL = ("evaluation.tokens=1024", "batch.sequence_length=64", "compute.threads=1", "data_workers=1")


@dataclass(frozen=True)
class Row:
    number: int
    feature: str
    marks: tuple[str, ...]
    here: str
    proof: str

    @property
    def command(self) -> str:
        """The proof with the variables of the page replaced."""
        return re.sub(r"^\$(\w+)", lambda name: VARIABLES[name[1]], self.proof)


def rows() -> list[Row]:
    lines = re.findall(r"^\| *(\d+) \|(.*)\|$", PAGE, re.MULTILINE)
    cells = [(int(number), [cell.strip() for cell in rest.split(" | ")]) for number, rest in lines]
    return [Row(n, feature, tuple(marks), here, proof.strip("`")) for n, (feature, *marks, here, proof) in cells]


ROWS = rows()


def test_the_63_rows_are_whole_and_each_is_a_feature_of_a_peer():
    assert [row.number for row in ROWS] == [*range(1, 64)]
    assert PAGE.count(f"| {' | '.join(PEERS)} | here | proof |") == PAGE.count("\n### ")
    assert len({row.feature for row in ROWS}) == len({row.proof for row in ROWS}) == 63
    for row in ROWS:
        assert len(row.marks) == len(PEERS) and set(row.marks) <= {"Y", "partly", "-"}, row
        assert set(row.marks) != {"-"} and row.here == "Y", row


def test_what_is_missing_here_is_listed_with_peers_that_have_it_and_a_reason():
    table = PAGE.partition("## What the peers have and this project does not")[2]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(lines) > 10
    for feature, peers, reason in lines:
        assert feature and reason and any(peer in peers for peer in PEERS), feature


def test_each_peer_has_the_version_that_was_read():
    for peer in PEERS:
        assert re.search(
            rf"^\| \[{peer}\]\(https://github\.com/\S+\) \| [0-9a-f]{{11,12}} \| 20\d\d-\d\d-\d\d \|$", PAGE, re.M
        )


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Returns a function that types a command in the project's folder, and returns its exit status."""
    runs, data = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("data")
    places = [f"runs_dir={runs}", f"data_dir={data}"]

    def typed(words):
        _, _, door, *rest = words if words[0] == "python" else ["", "", *words[1:]]
        door = door.removeprefix("scaling_testbed.")
        if door == "train":
            rest += [*places, *SMALL]
        if door == "sweep":
            rest += places
        return importlib.import_module(f"scaling_testbed.{door}").main(rest)

    def run(command):
        before = set(runs.glob("*/*"))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            status = typed(shlex.split(command))
        return status, (set(runs.glob("*/*")) - before or {None}).pop()

    run.data = data
    return run


@pytest.fixture(scope="module")
def places(call, tmp_path_factory):
    """What the placeholders of the page stand for."""
    (_, run), (_, rmsnorm) = call(VARIABLES["TEXT"]), call(f"{VARIABLES['TEXT']} {RMSNORM}")
    assert call(VARIABLES["T"])[0] == 0
    (folder,), (text,) = call.data.glob("markov-*"), call.data.glob("text_files-*")
    exported = {name: f"{tmp_path_factory.mktemp('out')}/" for name in ("exported/", "exported_layernorm/")}
    return {"RMSNORM_RUN": rmsnorm, "RUN": run, "data/FOLDER": folder, "data/TEXT_FOLDER": text, **exported}


def parameters():
    for row in ROWS:
        yield pytest.param(row, id=str(row.number))


@pytest.mark.parametrize("row", list(parameters()))
def test_the_proof_of_a_feature_holds(row, call, places, capsys):
    path, _, test = row.proof.partition("::")
    if (ROOT / path).is_file():
        assert not test or f"def {test}(" in (ROOT / path).read_text()
        return
    assert problem_of(shlex.split(row.command)) is None
    if any(word in row.command for word in COSTLY):
        return
    command = re.sub(rf"\b({'|'.join(places)})", lambda found: str(places[found[1]]), row.command)
    assert not any(PLACEHOLDER.fullmatch(word) for word in shlex.split(command))
    if command.startswith("cat "):
        assert all(Path(word).is_file() for word in shlex.split(command)[1:])
    else:
        assert call(command)[0] == 0
        assert "--time=auto" not in capsys.readouterr().out  # no time that Slurm takes


def test_what_is_not_run_or_not_there_is_named_by_words_of_proofs():
    proofs = " ".join(row.command + row.proof for row in ROWS)
    assert [word for word in COSTLY if word not in proofs] == []
