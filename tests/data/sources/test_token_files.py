import dataclasses
import os
import re
import struct

import numpy as np
import pytest

from scaling_testbed.data.sources import token_files
from scaling_testbed.data.sources.token_files import TokenFilesConfig, probe
from scaling_testbed.data.summary import describe, remarks
from scaling_testbed.errors import ConfigError, UserError

BIG_ENDIAN = struct.unpack("<i", struct.pack(">i", 20240520))[0]
TOKENS = {"train": np.arange(5000) % 997, "validation": np.arange(700)[::-1] % 691}


def write_nanogpt(path, tokens):
    tokens.astype("<u2").tofile(path)


def write_llmc(path, tokens, magic=20240520, version=1, dtype="<u2"):
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(dtype).tobytes())


def write_llama(path, tokens):
    write_llmc(path, tokens, 20240801, 7, "<u4")


def write_npy(path, tokens):
    np.save(path.with_suffix(""), tokens.astype("<u2"))
    path.with_suffix(".npy").rename(path)  # the header counts, not the name


def write_npy_big_endian(path, tokens):
    with open(path, "wb") as file:
        np.save(file, tokens.astype(">i8"))


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
    "npy": write_npy,
    "npy ": write_npy_big_endian,
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
        (write_nanogpt, {"vocab_size": 990}, r"train_\d.bin: token id 99\d is outside data.vocab_size=990"),
        (write_nanogpt, {"format": "llmc"}, "train_0.bin: .*(too short|wrong magic)"),
        (lambda p, t: write_llmc(p, t, magic=7), {"format": "llmc"}, "train_0.bin: wrong magic 7 version 1"),
        (lambda p, t: write_llmc(p, t, version=9), {"format": "llmc"}, "train_0.bin: wrong magic 20240520 version 9"),
        (write_nanogpt, {"format": "megatron"}, "train_0.idx: needed beside"),
        (lambda p, t: write_megatron(p, t, gap=8), {}, "train_0.idx: sequences do not lie one after the other"),
        (lambda p, t: write_megatron(p, t, "<f4", 7), {}, "train_0.idx: version 1 with type code 7"),
        (lambda p, t: p.write_bytes(b"abc"), {}, "train_0.bin: 3 bytes is not a list of uint16"),
        (lambda p, t: p.write_bytes(b""), {}, "train_0.bin: empty file"),
        (
            write_nanogpt,
            {"dtype": "int64"},
            r"train_0.bin: token id \d+ is outside data.vocab_size=1000, read as int64",
        ),
        (write_nanogpt, {"dtype": "uint16_be"}, "train_0.bin: token id .*read as uint16_be; a wrong .*data.dtype"),
        (write_nanogpt, {"format": "npy"}, "train_0.bin: not a .npy file"),
        (write_llmc, {"dtype": "uint32"}, "its header says uint16, not data.dtype=uint32; leave data.dtype out"),
        (write_llmc, {"format": "nanogpt"}, "its header is that of data.format=llmc, not of data.format=nanogpt"),
        (write_npy, {"format": "nanogpt"}, "its header is that of data.format=npy, not of data.format=nanogpt"),
        (write_npy, {"format": "llmc"}, "its header is that of data.format=npy, not of data.format=llmc"),
        (lambda p, t: write_llmc(p, t, version=9), {}, "train_0.bin: wrong magic 20240520 version 9"),
        (lambda p, t: write_llmc(p, t, magic=20240522), {}, "its header is that of another file of llm.c"),
        (lambda p, t: write_llmc(p, t, magic=BIG_ENDIAN), {}, "its header is that of another file of llm.c"),
        (lambda p, t: write_llmc(p, t, magic=7), {}, "starts as a file of llm.c does, but with a wrong magic 7"),
        (
            lambda p, t: p.write_bytes(b"PK\x03\x04" + bytes(100)),
            {},
            "it is a zip file, as .npz files and those of torch",
        ),
        (lambda p, t: p.write_bytes(b"PAR1" + bytes(100)), {}, "it is a parquet file, not a list of token ids"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named(write, fields, message, tmp_path, prepared):
    with pytest.raises(UserError, match=message):
        prepared(files(tmp_path, write, **fields))


def test_a_size_that_contradicts_a_header_is_named(tmp_path, prepared):
    for write in (write_llmc, write_npy):
        source = files(tmp_path, write)
        with open(tmp_path / "train_1.bin", "ab") as file:
            file.write(b"xx")
        with pytest.raises(UserError, match=r"train_1.bin: \d+ bytes, but its header announces 4600 tokens"):
            prepared(source)
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


def test_a_folder_stands_for_the_token_files_below_it_and_what_is_left_out_is_said(tmp_path, prepared, monkeypatch):
    for number, name in enumerate(("train", "validation")):
        (tmp_path / name / "[deep]").mkdir(parents=True)
        (tmp_path / name / "README.md").write_text("not tokens")
        np.arange(number, 50, dtype="<u2").tofile(tmp_path / name / "a.bin")
        np.save(tmp_path / name / "[deep]" / "b.npy", np.arange(number, 50))
        (tmp_path / name / "[deep]" / "loop").symlink_to(tmp_path / name)
    inside = [str(tmp_path / "train" / name) for name in ("[deep]/b.npy", "a.bin")]
    fields = {"validation": str(tmp_path / "validation"), "vocab_size": 50}
    monkeypatch.setenv("HOME", str(tmp_path))
    for train in (str(tmp_path / "train"), "~/train"):
        source = TokenFilesConfig(train=train, **fields)
        assert source.paths("train") == inside
    lines = describe(prepared(source)).splitlines()
    assert lines[1].startswith("files            6 found, 4 taken; left out 2 with ending .md (")
    assert lines[2] == "formats          2 nanogpt of uint16, 2 npy of int64"
    with pytest.raises(UserError, match="README.md is not a .bin or .npy file"):
        TokenFilesConfig(train=str(tmp_path / "train" / "README.md"), **fields).paths("train")


def splits(tmp_path, train, validation, **fields):
    """A source of one file for each split, written as the raw bytes of an array."""
    for name, tokens in (("train", train), ("validation", validation)):
        tokens.tofile(tmp_path / f"{name}.bin")
    paths = {name: str(tmp_path / f"{name}.bin") for name in ("train", "validation")}
    return TokenFilesConfig(**paths, **{"vocab_size": 50_257, **fields})


def ids(seed, size=3000, below=50_257):
    return np.random.default_rng(seed).integers(below, size=size)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_a_file_without_a_header_is_read_as_the_only_type_that_fits(dtype, tmp_path, prepared):
    data = prepared(splits(tmp_path, ids(0).astype(dtype), ids(1).astype(dtype)))
    assert np.array_equal(data.train.gather(np.array([0]), 3000)[0], ids(0))
    entry = data.manifest["splits"]["train"]["shards"][0]
    assert entry["dtype"] == ("uint16" if dtype == "<u2" else "uint16_be")


@pytest.mark.parametrize(
    "dtype, vocab_size, below, possible",
    [
        ("<u4", 100_000, 100_000, "uint16|uint32|uint16_be"),  # ids above 65,535: not every second uint16 is zero
        ("<u4", 50_257, 50_257, "uint16|uint32"),
        (">u4", 50_257, 50_257, "uint32_be|uint16_be"),
        ("<i8", 50_257, 50_257, "uint16|uint32|int64"),
        (">i8", 100_000, 100_000, "uint16|uint16_be|uint32_be|int64_be"),
        ("<u2", 65_536, 65_536, "uint16|uint16_be"),
        ("<u2", 300, 2, "uint16|uint16_be"),
    ],
)
def test_a_file_that_two_types_fit_is_refused_until_one_is_said(dtype, vocab_size, below, possible, tmp_path, prepared):
    train, validation = ids(0, 3000, below).astype(dtype), ids(1, 1000, below).astype(dtype)
    with pytest.raises(UserError, match=r"train.bin: it has no header, .* it can be .*type data.dtype= with") as error:
        prepared(splits(tmp_path, train, validation, vocab_size=vocab_size))
    assert set(re.findall(r"[\d,]+ ids of (\w+)", str(error.value))) == set(possible.split("|"))
    said = np.dtype(dtype).name + "_be" * (dtype[0] == ">")
    data = prepared(splits(tmp_path, train, validation, vocab_size=vocab_size, dtype=said))
    assert np.array_equal(data.train.gather(np.array([0]), 3000)[0], train.astype(int))


def test_a_second_reading_that_ends_late_in_a_long_file_is_no_second_reading(tmp_path, prepared, monkeypatch):
    monkeypatch.setattr(token_files, "BLOCK_BYTES", 4096)
    train = np.full(10_000, 7, dtype="<u2")  # 7 and 1792 are both below 2,000
    train[-1] = 1999
    data = prepared(splits(tmp_path, train, np.full(500, 1999, dtype="<u2"), vocab_size=2000))
    assert data.train.read(0, 10_000)[-1] == 1999


def test_the_byte_order_is_part_of_the_fingerprint(tmp_path, prepared):
    train, validation = np.full(3000, 257, "<u2"), np.full(1000, 514, "<u2")
    train[0] = 258
    little, big = (prepared(splits(tmp_path, train, validation, dtype=dtype)) for dtype in ("uint16", "uint16_be"))
    assert little.train.read(0, 1)[0] == 258 and big.train.read(0, 1)[0] == 513
    assert little.fingerprint != big.fingerprint


@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
def test_ids_in_floating_point_are_not_taken_for_integers(dtype, tmp_path, prepared):
    train, validation = np.arange(1000.0).astype(dtype), np.arange(500.0).astype(dtype)
    with pytest.raises(UserError, match="1,000 ids of float(32|64); type .*, or write them as integers"):
        prepared(splits(tmp_path, train, validation, vocab_size=65_000))


def test_single_bytes_are_ids_only_where_that_is_said(tmp_path, prepared):
    train, validation = ids(0, 3000, 256).astype("u1"), ids(1, 1000, 256).astype("u1")
    with pytest.raises(UserError, match="train.bin: token id .* and no other type fits"):
        prepared(splits(tmp_path, train, validation, vocab_size=257))
    assert prepared(splits(tmp_path, train, validation, vocab_size=257, dtype="uint8")).train.n_tokens == 3000


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<u4", "<i4", ">i4", "<i8", ">i8", "<u8", ">u8"])
def test_an_array_of_numpy_is_read_by_its_header(dtype, tmp_path, prepared):
    tokens = {"train": ids(0, 3000, 256), "validation": ids(1, 1000, 256)}
    for split, values in tokens.items():
        np.save(tmp_path / f"{split}.npy", values.astype(dtype))
    paths = {split: str(tmp_path / f"{split}.npy") for split in tokens}
    data = prepared(TokenFilesConfig(**paths, vocab_size=256))
    for split, values in tokens.items():
        assert np.array_equal(getattr(data, split).gather(np.array([0]), len(values))[0], values)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.arange(60.0), "it holds float64, not integers; write the ids as integers"),
        (np.arange(60) > 7, "it holds bool, not integers"),
        (np.arange(60).reshape(2, 30), r"it has the shape \(2, 30\); write the ids in one dimension, by reshape"),
        (np.array(7), r"it has the shape \(\)"),
        (np.array([1, "a"], dtype=object), "not a .npy file of token ids .*Python objects"),
        (np.zeros(9, dtype=[("a", "<u2")]), "it holds .*, not integers"),
        (np.arange(60) - 1, "token id -1 is outside"),
        (np.array([2**63], dtype="<u8"), "token id 9223372036854775808 is outside"),
        (np.array([], dtype="<u2"), "128 bytes, but its header announces 0 tokens"),
    ],
)
def test_an_array_that_holds_no_ids_is_one_line(array, message, tmp_path, prepared):
    for name in ("train", "validation"):
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    paths = {name: str(tmp_path / f"{name}.npy") for name in ("train", "validation")}
    np.save(tmp_path / "validation.npy", np.arange(5))
    with pytest.raises(UserError, match=f"train.npy: {message}") as error:
        prepared(TokenFilesConfig(**paths, vocab_size=100))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("write, length", [(write_npy, 10), (write_llmc, 1024), (write_megatron, 70)])
def test_a_flipped_bit_in_a_header_is_one_line_also_where_most_readings_fit(write, length, tmp_path):
    """Bits 10 and on of .npy are text: `<u2` with another bit is `>u2`, and only the range of the ids can show it."""
    path = tmp_path / "a.bin"
    write(path, TOKENS["train"])
    header = path.with_suffix(".idx") if write is write_megatron else path
    raw = header.read_bytes()
    with open(header, "r+b", buffering=0) as file:
        for bit in range(8 * min(length, len(raw))):
            os.pwrite(file.fileno(), bytes([raw[bit // 8] ^ 1 << bit % 8]), bit // 8)
            if write is write_llmc and bit >= 96:  # the rest of the header is not used
                assert probe(str(path), "auto", None, 65_000).n_tokens == 5000
            else:
                with pytest.raises(UserError, match=r"a\.(bin|idx)") as error:
                    probe(str(path), "auto", None, 65_000)
                assert "\n" not in str(error.value)
            os.pwrite(file.fileno(), raw[bit // 8 : bit // 8 + 1], bit // 8)


@pytest.mark.parametrize("write", [write_npy, write_llmc, write_megatron])
def test_a_file_that_is_cut_is_one_line(write, tmp_path):
    path = tmp_path / "a.bin"
    write(path, TOKENS["train"])
    header = path.with_suffix(".idx") if write is write_megatron else path
    for size in [*range(0, 100, 7), len(header.read_bytes()) - 1]:
        write(path, TOKENS["train"])
        os.truncate(header, size)
        with pytest.raises(UserError, match=r"a\.(bin|idx)") as error:
            probe(str(path), "auto", None, 1000)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_text_in_the_header_of_npy_is_one_line_or_an_array(seed, tmp_path):
    path = tmp_path / "a.npy"
    random = np.random.default_rng(seed)
    np.save(path, TOKENS["train"].astype("<u2"))
    raw = np.fromfile(path, "u1")
    for _ in range(200):
        damaged = raw.copy()
        damaged[random.integers(8, 80, size=random.integers(1, 4))] = random.integers(256)
        damaged.tofile(path)
        try:
            assert probe(str(path), "auto", None, 1000).size == len(raw)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)


def test_one_file_cannot_be_both_splits(tmp_path):
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "a.bin")
    both = str(tmp_path / "a.bin")
    (tmp_path / "link.bin").symlink_to(tmp_path / "a.bin")
    for other in (both, str(tmp_path / "link.bin")):
        with pytest.raises(ConfigError, match="data.validation must not be in data.train too"):
            TokenFilesConfig(train=both, validation=other, vocab_size=50).identity()


def test_a_validation_set_of_the_ids_of_the_training_set_is_refused(tmp_path, prepared):
    """Whether it is a copy, a hard link, the same ids in another format, or the same ids cut elsewhere."""
    tokens = ids(0)
    train = splits(tmp_path, tokens.astype("<u2"), ids(1).astype("<u2")).train
    np.save(tmp_path / "copy.npy", tokens)
    (tmp_path / "hard.bin").hardlink_to(tmp_path / "train.bin")
    for name, part in (("part_0", tokens[:1000]), ("part_1", tokens[1000:])):
        part.astype("<u2").tofile(tmp_path / f"{name}.bin")
    for validation in ("copy.npy", "hard.bin", "part_*.bin"):
        with pytest.raises(UserError, match="data.validation and data.train hold the same 3,000 token ids"):
            prepared(TokenFilesConfig(train=train, validation=str(tmp_path / validation), vocab_size=50_257))


@pytest.mark.fault("A5", "Validation text that is the training text is refused, and a shared part is said.")
def test_a_validation_set_that_is_a_part_of_the_training_set_is_said(tmp_path, prepared):
    tokens, other = ids(0, 60_000), ids(1, 60_000)
    parts = {"head": tokens[:20_000], "tail": tokens[-9_001:], "one more": np.append(tokens, 5), "other": other}
    parts["third"] = np.concatenate([tokens[30_000:40_000], other[:20_000]])
    source = splits(tmp_path, tokens.astype("<u2"), other.astype("<u2"), dtype="uint16")
    for name, validation in parts.items():
        np.save(tmp_path / f"{name}.npy", validation.astype(">i4"))
        data = prepared(dataclasses.replace(source, validation=str(tmp_path / f"{name}.npy")))
        counts = data.manifest["documents"]
        share = counts["sampled_validation_windows_in_train"] / counts["sampled_validation_windows"]
        expected = {"other": 0, "third": 1 / 3}.get(name, 1)
        assert share == pytest.approx(expected, abs=0.01 if expected in (0, 1) else 0.1)
        assert any("validation tokens are training tokens too" in text for text in remarks(data.manifest)) == (
            share > 0.5
        )


def test_a_type_that_is_said_is_that_of_the_files_without_a_header(tmp_path, prepared):
    source = splits(tmp_path, ids(0, below=9).astype("<u4"), ids(1).astype("<u2"), dtype="uint32")
    np.save(tmp_path / "v.npy", ids(1).astype("<u2"))
    data = prepared(dataclasses.replace(source, validation=str(tmp_path / "v.npy")))
    assert (data.train.n_tokens, data.validation.n_tokens) == (3000, 3000)


def test_the_type_is_part_of_the_identity_and_corpora_that_an_earlier_version_guessed_are_made_again(tmp_path):
    source = splits(tmp_path, ids(0).astype("<u2"), ids(1).astype("<u2"))
    said = dataclasses.replace(source, dtype="uint16")
    assert said.identity() != source.identity() and source.identity()["type"] == "the only one"
    llmc = dataclasses.replace(source, format="llmc").identity()
    assert set(llmc) == {"kind", "format", "vocab_size", "train", "validation"}  # as it was


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"train": ""}, "train must name files, got ''; is a variable of the shell not set"),
        ({"validation": 3}, "validation must be a glob or a list of globs, got 3"),
        ({"dtype": "float32"}, "dtype must be one of uint8, uint16"),
        ({"vocab_size": 10**12}, "vocab_size must be at most 16777216"),
        ({"format": "raw"}, "format must be one of auto, nanogpt, llmc, megatron, npy"),
    ],
)
def test_a_wrong_field_is_refused_at_once(fields, message):
    with pytest.raises(ConfigError, match=message):
        TokenFilesConfig(**{"train": "a.bin", "validation": "b.bin", **fields})


def test_the_token_between_documents_is_known_where_it_is_given(tmp_path, prepared):
    for split, tokens in TOKENS.items():
        write_nanogpt(tmp_path / f"{split}.bin", tokens)
    files = {split: str(tmp_path / f"{split}.bin") for split in TOKENS}
    config = TokenFilesConfig(**files, vocab_size=1000, dtype="uint16")
    known = dataclasses.replace(config, eos_id=5)
    assert config.identity() | {"eos_id": 5} == known.identity()
    plain, found = (prepared(one) for one in (config, known))
    assert plain.train.eos_id is None and found.train.eos_id == found.validation.eos_id == 5
    assert plain.fingerprint == found.fingerprint  # the tokens are the same
    with pytest.raises(ConfigError, match="eos_id must lie in the vocabulary of 1000, got 1000"):
        dataclasses.replace(config, eos_id=1000)
    with pytest.raises(UserError, match="data.eos_id=998 is in no file of data.train"):
        prepared(dataclasses.replace(config, eos_id=998))
