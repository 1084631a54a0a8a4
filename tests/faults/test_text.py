"""Text corpora: nothing is guessed, and nothing is left out without a word (A4 to A8)."""

import json
import shutil
import subprocess

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

JAPANESE = "これは日本語の文章です。速い茶色の狐が怠け者の犬を飛び越える。\n"


@pytest.fixture
def prepare(typed, tmp_path):
    """Runs the door in a folder; returns how it ended and what it printed, and the manifest if it succeeded."""

    def run(*words):
        done = subprocess.CompletedProcess(
            words, *typed("prepare", "data=text_files", "tokenizer=bytes", "data_dir=out", *words)
        )
        if done.returncode:
            return done, None
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("folder ")]
        return done, json.loads((tmp_path / line.split()[1] / "manifest.json").read_text())

    return run


def lines(n, what="line"):
    return "".join(f"{what} {i}\n" for i in range(n))


@pytest.mark.fault("A4", "Of repeated text one document becomes validation, not its copies, and copies are counted.")
def test_one_document_of_repeated_text_moves(prepare, tmp_path, record_property):
    (tmp_path / "a.txt").write_text(JAPANESE * 600)
    done, manifest = prepare("data.files=a.txt")
    counts = {split: manifest["splits"][split]["n_documents"] for split in ("train", "validation")}
    assert counts["validation"] == 1 and counts["train"] > 10
    assert manifest["documents"]["validation_in_train"] == 0 and manifest["documents"]["distinct"]["train"] == 1
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert f"{counts['train'] - 1} of {counts['train']} documents in train are copies" in said
    record_property("seen", f"1 validation document; {said}")


@pytest.mark.fault("A5", "Validation text that is the training text is refused, and a shared part is said.")
@pytest.mark.parametrize("kind", ["symlink", "copy", "gzip", "order", "part", "tail", "blanks"])
def test_validation_text_that_is_training_text_is_refused(kind, prepare, tmp_path, record_property):
    (tmp_path / "a.txt").write_text(lines(900))
    (tmp_path / "b.txt").write_text(lines(900, "row"))
    train, validation = "data.files=a.txt", "data.validation_files=c.txt"
    if kind == "symlink":
        (tmp_path / "c.txt").symlink_to("a.txt")
    elif kind == "copy":
        shutil.copy(tmp_path / "a.txt", tmp_path / "c.txt")
    elif kind == "gzip":
        subprocess.run(["gzip", "-k", "a.txt"], check=True, cwd=tmp_path)
        validation = "data.validation_files=a.txt.gz"
    elif kind == "order":
        shutil.copy(tmp_path / "a.txt", tmp_path / "z.txt")
        shutil.copy(tmp_path / "b.txt", tmp_path / "c.txt")
        train, validation = "data.files=[a.txt,b.txt]", "data.validation_files=[c.txt,z.txt]"
    elif kind == "part":
        (tmp_path / "c.txt").write_text(lines(900) + lines(3000, "new"))
    elif kind == "blanks":  # the same lines in another order, with other blanks and capitals
        text = lines(3000, "A longer line of a book").splitlines()
        (tmp_path / "a.txt").write_text("\n".join(text))
        (tmp_path / "c.txt").write_bytes(" \r\n".join(reversed(text)).lower().replace("longer", " longer").encode())
    else:  # it is cut at other places than the whole
        (tmp_path / "a.txt").write_text(lines(3000, "a longer line of a book"))
        (tmp_path / "c.txt").write_text(
            "".join(lines(3000, "a longer line of a book").splitlines(keepends=True)[1001:])
        )
    done, manifest = prepare(train, validation)
    if kind == "part":
        said = next(line for line in done.stdout.splitlines() if "training documents too" in line)
        assert 0 < manifest["documents"]["validation_in_train"] < manifest["splits"]["validation"]["n_documents"]
    elif kind == "tail":
        said = next(line for line in done.stdout.splitlines() if "training lines too" in line)
        assert "100.0% of the validation lines" in said
    else:
        assert manifest is None and len(done.stderr.strip().splitlines()) == 1
        said = done.stderr.strip()
        assert "data.validation_files must not be in data.files too" in said or "would be a training loss" in said
    record_property("seen", said)


@pytest.mark.fault("A6", "What a folder or glob leaves out is said by reason, in one line and in the manifest.")
def test_a_folder_says_what_it_leaves_out(prepare, tmp_path, record_property):
    (tmp_path / "disk2").mkdir()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "disk2/b.txt").write_text(lines(2000, "line of the other disk"))
    (tmp_path / "corpus/a.txt").write_text(lines(900))
    (tmp_path / "corpus/more").symlink_to(tmp_path / "disk2")
    (tmp_path / "disk2/again").symlink_to(tmp_path / "corpus")  # a cycle
    (tmp_path / "corpus/lost.txt").symlink_to("nowhere")
    (tmp_path / "corpus/page.html").write_text("<p>")
    (tmp_path / "corpus/latin.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "corpus/empty.txt").write_text("")
    done, manifest = prepare("data.files=corpus")
    _, by_glob = prepare("data.files=corpus/**/*.txt")
    totals = [sum(one["splits"][split]["n_bytes"] for split in one["splits"]) for one in (manifest, by_glob)]
    assert totals == [len(lines(900)) + len(lines(2000, "line of the other disk"))] * 2
    reasons = {"with ending .html": 1, "not UTF-8": 1, "empty": 1, "link to nowhere": 1}
    assert {reason: entry["count"] for reason, entry in manifest["reading"]["files"].items()} == reasons
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("files ")]
    assert "6 found, 2 taken" in said and all(f"1 {reason} (" in said for reason in reasons)
    (tmp_path / "corpus/late.json").write_text("[]")
    done, _ = prepare("data.files=corpus")
    assert f"left out too, since then: 1 with ending .json ({tmp_path}/corpus/late.json)" in done.stdout
    record_property("seen", said)


@pytest.mark.fault("A7", "An empty data.files, as an unset variable leaves it, is refused.")
@pytest.mark.parametrize("value", ["", "[null]", "['']", "[]", "' '"])
def test_an_empty_place_is_refused(value, prepare, tmp_path, record_property):
    (tmp_path / "diary.txt").write_text(lines(900, "private note"))
    done, _ = prepare(f"data.files={value}")
    (said,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "files must" in said and not (tmp_path / "out").exists()
    record_property("seen", said)


@pytest.mark.fault("A8", "Where the tokenizer loses text it is said, and bits per byte is withheld.")
def test_a_tokenizer_that_does_not_know_the_text(python, tmp_path, record_property):
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]", "[EOS]"])
    tokenizer.train_from_iterator(["the quick brown fox"], trainer)
    tokenizer.save(str(tmp_path / "tok.json"))
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / f"texts/{i}.txt").write_text(f"文章番号{i}。{JAPANESE}" * 30)
    words = ["model=nano_xs", "budget.steps=2", "batch.sequences=2", "batch.sequence_length=16", "data=text_files"]
    words += ["data.files=texts", "tokenizer=pretrained", "tokenizer.path=tok.json", "runs_dir=r", "data_dir=p"]
    done = subprocess.run([python, "-m", "scaling_testbed.train", *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("r/*/*/result.json")
    row = json.loads(result.read_text())
    assert row["val_loss"] is not None and row["val_bpb"] is None
    assert row["val_bpb_withheld"].startswith(
        "100 % of the train and 100 % of the validation tokens are unknown text ([UNK])"
    )
    said = [line for line in done.stdout.splitlines() if "unknown text ([UNK])" in line]
    assert len(said) == 2 and said[1].split()[:4] == ["bits", "per", "byte", "withheld:"]
    (manifest,) = tmp_path.glob("p/*/manifest.json")
    check = json.loads(manifest.read_text())["text_check"]["splits"]["train"]
    assert check["unknown_share"] > 0.9 and check["sampled_documents"] >= 8 and check["lost_share"] == 1
    record_property("seen", said[1])
