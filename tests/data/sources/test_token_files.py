import struct

import numpy as np
import pytest

from scaling_testbed.data.sources.token_files import TokenFilesConfig
from scaling_testbed.errors import ConfigError, UserError

TOKENS = {"train": np.arange(5000) % 997, "validation": np.arange(700) % 991}


def write_nanogpt(path, tokens):
    tokens.astype("<u2").tofile(path)


def write_llmc(path, tokens, magic=20240520, version=1, dtype="<u2"):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(dtype).tobytes())


def write_llama(path, tokens):
    write_llmc(path, tokens, 20240801, 7, "<u4")


def write_megatron(path, tokens, dtype="<i4", code=4, gap=0):
    tokens.astype(dtype).tofile(path)
    lengths = np.array([len(tokens) - 300, 200, 100], dtype="<i4")
    starts = (np.cumsum(lengths) - lengths).astype("<i8") * np.dtype(dtype).itemsize + gap
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4)
    borders = np.arange(4, dtype="<i8")
    path.with_suffix(".idx").write_bytes(head + lengths.tobytes() + starts.tobytes() + borders.tobytes())


def write_megatron_uint16(path, tokens):
    write_megatron(path, tokens, "<u2", 8)


WRITERS = {
    "nanogpt": write_nanogpt,
    "llmc": write_llmc,
    "llmc ": write_llama,
    "megatron": write_megatron,
    "megatron ": write_megatron_uint16,
}


def files(tmp_path, write, **fields):
    for split, tokens in TOKENS.items():
        for part, piece in enumerate(np.split(tokens, [400])):
            write(tmp_path / f"{split}_{part}.bin", piece)
    globs = {split: str(tmp_path / f"{split}_*.bin") for split in TOKENS}
    return TokenFilesConfig(**{**globs, "vocab_size": 1000, **fields})


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", list(WRITERS))
def test_token_files_of_other_programs_are_read_in_place(kind, explicit, tmp_path, prepared, monkeypatch):
    source = files(tmp_path, WRITERS[kind], format=kind.strip() if explicit else "auto")
    data = prepared(source)
    for split, tokens in TOKENS.items():
        stream = getattr(data, split)
        assert np.array_equal(stream.read(0, stream.n_tokens), tokens)
        for shard in data.manifest["splits"][split]["shards"]:
            assert shard["format"] == kind.strip() and shard["file"].startswith(str(tmp_path))
    assert [path.name for path in data.folder.iterdir() if path.suffix == ".bin"] == []
    assert data.vocab_size == 1000 and data.manifest["entropy_rate_nats"] is None
    share = np.bincount(TOKENS["train"]) / 5000
    assert data.manifest["unigram_entropy_nats"] == pytest.approx(-(share * np.log(share)).sum())


def test_megatron_globs_over_idx_files_and_documents_are_counted(tmp_path, prepared):
    source = files(tmp_path, write_megatron)
    globs = {split: str(tmp_path / f"{split}_*") for split in TOKENS}  # .bin and .idx alike
    data = prepared(TokenFilesConfig(**globs, vocab_size=1000))
    assert data.manifest["splits"]["train"]["n_documents"] == 6
    assert source.paths("train") == TokenFilesConfig(**globs, vocab_size=1000).paths("train")


@pytest.mark.parametrize(
    "write, fields, message",
    [
        (write_nanogpt, {"vocab_size": 990}, r"train_\d.bin: token id 996 is outside data.vocab_size=990"),
        (write_nanogpt, {"format": "llmc"}, "train_0.bin: .*(too short|wrong magic)"),
        (lambda p, t: write_llmc(p, t, magic=7), {"format": "llmc"}, "train_0.bin: wrong magic 7 version 1"),
        (lambda p, t: write_llmc(p, t, version=9), {"format": "llmc"}, "train_0.bin: wrong magic 20240520 version 9"),
        (write_nanogpt, {"format": "megatron"}, "train_0.idx: needed beside"),
        (lambda p, t: write_megatron(p, t, gap=8), {}, "train_0.idx: sequences do not lie one after the other"),
        (lambda p, t: write_megatron(p, t, "<f4", 7), {}, "train_0.idx: version 1 with type code 7"),
        (lambda p, t: p.write_bytes(b"abc"), {}, "train_0.bin: 3 bytes is not a list of uint16"),
        (lambda p, t: p.write_bytes(b""), {}, "train_0.bin: empty file"),
        (lambda p, t: t.astype("<u4").tofile(p), {}, "train_0.bin: every second token is 0, so the ids seem"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(write, fields, message, tmp_path, prepared):
    with pytest.raises(UserError, match=message):
        prepared(files(tmp_path, write, **fields))


def test_a_size_that_contradicts_a_header_is_named(tmp_path, prepared):
    source = files(tmp_path, write_llmc)
    with open(tmp_path / "train_1.bin", "ab") as file:
        file.write(b"xx")
    with pytest.raises(UserError, match="train_1.bin: 10226 bytes, but its header announces 4600 tokens"):
        prepared(source)
    source = files(tmp_path, write_megatron)
    with open(tmp_path / "train_1.bin", "ab") as file:
        file.write(b"xxxx")
    with pytest.raises(UserError, match="train_1.bin: 18404 bytes, but train_1.idx announces 4600 tokens"):
        prepared(source)
    index = tmp_path / "train_1.idx"
    index.write_bytes(index.read_bytes()[:40])
    with pytest.raises(UserError, match="train_1.idx: cut short"):
        prepared(source)


@pytest.mark.parametrize("field", ["train", "validation", "vocab_size"])
def test_a_missing_field_is_refused_when_used_and_not_before(field, tmp_path, prepared):
    source = files(tmp_path, write_nanogpt, **{field: None})
    with pytest.raises(ConfigError, match=f"data.{field} must be given"):
        prepared(source)


def test_a_foreign_file_changed_later_is_noticed(tmp_path, prepared):
    from scaling_testbed.data.shards import open_prepared

    data = prepared(files(tmp_path, write_nanogpt))
    write_nanogpt(tmp_path / "train_0.bin", TOKENS["train"][:400][::-1])
    with pytest.raises(UserError, match="train_0.bin: sha256 differs"):
        open_prepared(data.folder)


def test_a_folder_stands_for_its_bin_files_and_other_files_are_refused(tmp_path):
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("not tokens")
        np.arange(50, dtype=np.uint16).tofile(tmp_path / name / "a.bin")
    source = TokenFilesConfig(train=str(tmp_path / "train"), validation=str(tmp_path / "validation"), vocab_size=50)
    assert source.paths("train") == [str(tmp_path / "train" / "a.bin")]
    text = TokenFilesConfig(train=str(tmp_path / "train" / "README.md"), validation="x", vocab_size=50)
    with pytest.raises(UserError, match="README.md is not a .bin file"):
        text.paths("train")


def test_one_file_cannot_be_both_splits(tmp_path):
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "a.bin")
    both = str(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match="data.validation must not be in data.train"):
        TokenFilesConfig(train=both, validation=both, vocab_size=50).identity()
