"""A stream says which of its tokens are targets, and everything that counts or scores them follows it."""

import json

import numpy as np
import pytest

from scaling_testbed.data import cutting as module
from scaling_testbed.data.batches import TrainingBatches, ValidationBatches
from scaling_testbed.data.cutting import NO_TARGET, Cutting, of_each
from scaling_testbed.data.shards import TokenStream, changed_shard, open_prepared
from scaling_testbed.data.sources.marked import Marked, parts_of
from scaling_testbed.data.sources.mixture import MixtureConfig
from scaling_testbed.data.sources.text_files import TextFilesConfig
from scaling_testbed.data.sources.token_files import TokenFilesConfig
from scaling_testbed.data.summary import describe
from scaling_testbed.data.tokenizers import BpeConfig
from scaling_testbed.errors import ConfigError, UserError

EOS, T = 0, 10


def stream_of(n=400, share=0.2, shards=3, seed=0, label="train split of folder"):
    """Rising tokens with documents of many lengths, and long stretches without a target."""
    draw = np.random.default_rng(seed)
    tokens = np.arange(1, n + 1)
    tokens[np.cumsum(draw.integers(1, 30, size=n // 20)) % n] = EOS
    tokens[-1] = EOS
    counted = (draw.random(n) < share) & (np.arange(n) // 40 % 2 == 0)
    stream = TokenStream(label, np.array_split(tokens, shards), eos_id=EOS, masks=np.array_split(counted, shards))
    return stream, tokens, counted


@pytest.mark.parametrize("packing", ["windows", "documents"])
@pytest.mark.parametrize("shards", [1, 4])
def test_each_counted_token_is_a_target_once_and_no_other_is(packing, shards, monkeypatch):
    monkeypatch.setattr(module, "READ_TOKENS", 64)
    stream, tokens, counted = stream_of(shards=shards)
    cut = Cutting(packing=packing).of(stream, T)
    batch = cut.batch(np.arange(cut.number))
    there = batch.targets_BT != NO_TARGET
    reachable = counted.copy()
    if packing == "windows":  # the first token of a stream is only an input, and the last ones fill no window
        reachable[0] = False
        reachable[1 + (len(tokens) - 1) // T * T :] = False
    assert sorted(batch.targets_BT[there]) == sorted(tokens[reachable])
    assert there.any(1).all() and cut.number < (len(tokens) - 1) // T  # sequences without a target are left out
    if packing == "windows":
        assert (batch.targets_BT[there] == batch.tokens_BS[:, 1:][there]).all()
    assert of_each(cut.each_targets, np.arange(cut.number)).tolist() == there.sum(1).tolist()
    assert "tokens are targets" in cut.remark() and "sequences without a target are left out" in cut.remark()


def test_an_all_counting_mask_gives_the_batches_of_no_mask():
    stream, tokens, _ = stream_of()
    masks = [np.ones(len(tokens), dtype=np.uint8)]
    for packing in ("windows", "documents"):
        plain = Cutting(packing=packing).of(TokenStream("a", [tokens], eos_id=EOS), T)
        full = Cutting(packing=packing).of(TokenStream("a", [tokens], eos_id=EOS, masks=masks), T)
        assert full.number == plain.number
        for one, other in zip(
            full.batch(np.arange(9)).tensors, plain.batch(np.arange(9)).explicit().tensors, strict=True
        ):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_targets_and_tokens_of_steps_are_those_of_their_batches(packing):
    stream, *_ = stream_of(n=3000)
    batches = TrainingBatches(
        stream, sequence_length=T, sequences=8, seed=1, skipped=[3, 5], cutting=Cutting(packing=packing)
    )
    counts = [(batches.batch(step).targets_BT != NO_TARGET).sum() for step in range(50)]
    assert [batches.targets(step) for step in range(50)] == counts and min(counts) > 0
    for first, last in ((0, 1), (0, 50), (2, 9)):
        assert batches.n_targets(first, last) == sum(counts[first:last])
        tokens = batches.tokens_by_source(first, last)[""]
        assert tokens == (last - first) * 8 * T if packing == "windows" else tokens <= (last - first) * 8 * T
    assert batches.why_targets_vary == "the mask of its data"
    ranks = [batches.batch(7, rank, 2).targets_BT for rank in (0, 1)]
    assert np.array_equal(np.concatenate(ranks), batches.batch(7).targets_BT)


def test_a_mixture_has_rows_of_a_masked_and_an_unmasked_source_in_one_batch():
    masked, *_ = stream_of(n=1000)
    plain = TokenStream("b", [np.arange(5000, 6000)])
    mixture = TrainingBatches({"a": masked, "b": plain}, sequence_length=T, sequences=6, seed=0)
    for step in range(20):
        batch = mixture.batch(step)
        of_plain = batch.tokens_BS[:, 0] >= 5000
        assert (batch.targets_BT[of_plain] == batch.tokens_BS[of_plain, 1:]).all()
        there = batch.targets_BT != NO_TARGET
        assert there.sum() == mixture.targets(step) and 0 < there[~of_plain].sum() < there[~of_plain].size
    only_plain = TrainingBatches(
        {"a": masked, "b": plain}, sequence_length=T, sequences=4, seed=0, weights=[(0, {"a": 0, "b": 1})]
    )
    assert only_plain.batch(0).targets_BT is not None  # every batch has the same arrays


def test_validation_counts_its_targets_and_a_stream_without_one_is_refused():
    stream, tokens, _ = stream_of(n=2000)
    batches = ValidationBatches(stream, sequence_length=T, max_tokens=300, rows=7)
    assert batches.n_tokens == sum((batch.targets_BT != NO_TARGET).sum() for batch in batches)
    none = TokenStream("train split of x", [tokens], masks=[np.zeros(len(tokens), dtype=np.uint8)])
    with pytest.raises(UserError, match="give 0 sequences of 10 with a target, too few"):
        TrainingBatches(none, sequence_length=T, sequences=1, seed=0)


def test_one_number_of_targets_in_each_sequence_can_be_captured():
    tokens, counted = np.arange(401), np.arange(401) % T == 3
    alike = TokenStream("a", [tokens], masks=[counted])
    assert TrainingBatches(alike, sequence_length=T, sequences=4, seed=0).why_targets_vary is None
    plain = TokenStream("b", [tokens])
    both = TrainingBatches({"a": alike, "b": plain}, sequence_length=T, sequences=4, seed=0)
    assert both.why_targets_vary == "the mask of its data"
    assert TrainingBatches(plain, sequence_length=T, sequences=4, seed=0).why_targets_vary is None


# ------------------------------------------------------------------------------------------------ from text

CHAT = [
    {"role": "user", "content": "hé?"},
    {"role": "assistant", "content": "yes\n\nit is"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "no"},
]
CHAT_TEXT = "user: hé?\n\nassistant: yes\n\nit is\n\nuser: and?\n\nassistant: no"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def both_splits(tmp_path, rows, held_out="v", **keys):
    files = write(tmp_path / "t.jsonl", rows)
    held_out = write(tmp_path / "v.jsonl", [{**row, "text": held_out} for row in rows])
    return TextFilesConfig(files=files, validation_files=held_out, **keys)


def targets_of(data, split="train"):
    """The text of the tokens of bytes that are targets, with | for EOS and . for the others."""
    stream = getattr(data, split)
    tokens, counted = stream.read(0, stream.n_tokens), stream.counted(0, stream.n_tokens)
    shown = [
        (b"|" if token == 256 else bytes([token])) if yes else b"." for token, yes in zip(tokens, counted, strict=True)
    ]
    return b"".join(shown).decode()


def test_a_prompt_stands_in_front_and_only_the_text_and_its_eos_are_targets(prepared, tmp_path):
    rows = [
        {"q": "2+2=", "text": "4"},
        {"q": None, "text": "no prompt"},
        {"q": "", "text": "x"},
        {"q": "a", "text": ""},
    ]
    data = prepared(both_splits(tmp_path, rows, prompt_field="q"))
    assert targets_of(data) == "....4|no prompt|x|"
    record = data.manifest["splits"]["train"]
    assert (record["n_tokens"], record["n_targets"], record["n_documents"], record["n_bytes"]) == (18, 14, 3, 15)
    assert "18 tokens, 14 of them targets of the loss" in describe(data)
    share = np.unique([*"4|no prompt|x|"], return_counts=True)[1] / 14  # of the targets alone
    assert data.manifest["unigram_entropy_nats"] == pytest.approx(-(share * np.log(share)).sum())


def test_only_what_the_assistant_says_is_a_target_with_what_ends_it(prepared, tmp_path):
    rows = [{"text": CHAT}, {"text": CHAT[:3]}, {"text": CHAT[:1]}]
    data = prepared(both_splits(tmp_path, [*rows, {"text": [*CHAT, CHAT[0]]}], CHAT[2:], answers_only=True))
    said = targets_of(data)
    first, rest = said[: len(CHAT_TEXT.encode()) + 1], said[len(CHAT_TEXT.encode()) + 1 :]
    assert first.replace(".", "") == "yes\n\nit is\n\nno|" and first.endswith(".no|")
    assert rest.startswith(
        "." * len("user: hé?\n\nassistant: ".encode()) + "yes\n\nit is\n\n" + "." * len("user: and?|")
    )
    assert rest.endswith("no\n\n" + "." * (len("user: hé?".encode()) + 1))
    stream = data.train
    assert bytes(stream.read(0, len(CHAT_TEXT.encode())).astype(np.uint8)).decode() == CHAT_TEXT
    noted = data.manifest["reading"]["noted"]
    assert noted["lists of messages without one of the assistant"]["count"] == 1


def test_no_token_holds_both_prompt_and_answer(prepared, tmp_path):
    rows = [{"q": f"abab{n}", "text": f"abab{n}"} for n in range(40)]
    bpe = BpeConfig(vocab_size=300)
    data = prepared(both_splits(tmp_path, rows, prompt_field="q"), bpe)
    stream = data.train
    tokens, counted = stream.read(0, stream.n_tokens), stream.counted(0, stream.n_tokens)
    for document, mask in zip(
        np.split(tokens, np.flatnonzero(tokens == stream.eos_id) + 1)[:-1],
        np.split(counted, np.flatnonzero(tokens == stream.eos_id) + 1)[:-1],
        strict=True,
    ):
        half = len(document) // 2
        assert document[:half].tolist() == document[half:-1].tolist()
        assert not mask[:half].any() and mask[half:].all()


def test_a_mask_is_part_of_the_data_and_a_changed_one_is_noticed(prepared, tmp_path):
    rows = [{"q": "ab", "text": f"c{n}"} for n in range(9)]
    masked = prepared(both_splits(tmp_path, rows, prompt_field="q"))
    joined = [{"text": row["q"] + row["text"]} for row in rows]
    (tmp_path / "plain").mkdir()
    plain = prepared(both_splits(tmp_path / "plain", joined, "abv"))
    streams = [data.train.read(0, data.train.n_tokens) for data in (masked, plain)]
    assert np.array_equal(*streams) and masked.fingerprint != plain.fingerprint
    assert all("mask" not in shard for shard in plain.manifest["splits"]["train"]["shards"])
    assert "n_targets" not in plain.manifest["splits"]["train"] and not list(plain.folder.glob("*.mask"))
    file = masked.folder / masked.manifest["splits"]["train"]["shards"][0]["mask"]["file"]
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="mask was changed while it was in use"):
        masked.check()
    assert "mask: sha256 differs" in changed_shard(masked.folder, masked.manifest)
    with pytest.raises(UserError, match="mask: sha256 differs from the manifest"):
        open_prepared(masked.folder)
    file.write_bytes(content[:-1])
    with pytest.raises(UserError, match="mask: .* bytes, but .* in the manifest"):
        open_prepared(masked.folder)


def test_a_mixture_keeps_the_masks_of_its_sources(prepared, tmp_path):
    masked = both_splits(tmp_path, [{"q": "ab", "text": "c"}], prompt_field="q")
    (tmp_path / "plain").mkdir()
    plain = both_splits(tmp_path / "plain", [{"text": "plain text"}])
    sources = {}
    for name, source in (("a", masked), ("b", plain)):
        keys = ("files", "validation_files", "prompt_field")
        sources[name] = {"kind": "text_files", **{key: getattr(source, key) for key in keys}}
    data = prepared(MixtureConfig(sources=sources))
    assert targets_of(data) == "..c|plain text|"
    assert [targets_of(part) for part in data.sources().values()] == ["..c|", "plain text|"]
    assert data.manifest["splits"]["train"]["n_targets"] == 13
    assert "15 tokens, 13 of them targets" in describe(data)


@pytest.mark.parametrize(
    ("row", "keys", "error", "said"),
    [
        ({"text": "a text"}, {"answers_only": True}, UserError, "holds no list of messages for data.answers_only"),
        ({"text": "a"}, {"prompt_field": "q"}, UserError, "no field 'q' .*set data.prompt_field"),
        ({"text": "a", "q": 3}, {"prompt_field": "q"}, UserError, "field 'q' holds int, not text"),
        ({"text": CHAT[:1]}, {"held_out": CHAT[2:3], "answers_only": True}, UserError, "no token in train is a target"),
        ({"text": "a"}, {"prompt_field": "q", "answers_only": True}, ConfigError, "answers_only is for lists"),
        ({"text": "a"}, {"prompt_field": "q", "ids_field": "i"}, ConfigError, "prompt_field cannot be with ids_field"),
        ({"text": "a"}, {"prompt_field": "text"}, ConfigError, "prompt_field and text_field are both 'text'"),
        ({"text": "a"}, {"prompt_field": " "}, ConfigError, "prompt_field must name a field"),
    ],
)  # fmt: skip
def test_what_cannot_be_masked_is_refused_in_words(prepared, tmp_path, row, keys, error, said):
    with pytest.raises(error, match=said):
        prepared(both_splits(tmp_path, [row], **keys))


def test_a_text_file_has_no_prompt(prepared, tmp_path):
    (tmp_path / "a.txt").write_text("a text\n" * 9)
    write(tmp_path / "b.jsonl", [{"q": "a", "text": "b"}])
    with pytest.raises(UserError, match="a.txt: data.prompt_field needs rows with fields, and this is a text file"):
        prepared(TextFilesConfig(files=str(tmp_path), prompt_field="q"))


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_prompts_are_read_from_csv_and_parquet(prepared, tmp_path, ending):
    import pyarrow
    import pyarrow.parquet

    for split in "tv":
        path = tmp_path / f"{split}.{ending}"
        if ending == "csv":
            path.write_text(f"q,text,more\n2+2=,4{split},x\n")
        else:
            table = pyarrow.table({"q": ["2+2="], "text": [f"4{split}"], "more": ["x"]})
            pyarrow.parquet.write_table(table, path)
    files, held_out = (str(tmp_path / f"{split}.{ending}") for split in "tv")
    source = TextFilesConfig(files=files, validation_files=held_out, prompt_field="q")
    assert targets_of(prepared(source)) == "....4t|"
    with pytest.raises(UserError, match="no field 'p' .*set data.prompt_field"):
        prepared(TextFilesConfig(files=files, validation_files=held_out, prompt_field="p"))


def test_parts_join_to_the_document_they_are_of():
    parts = [(b"a", False), (b"bc", True), (b"", True), (b"d", False), (b"e", True)]
    found = Marked.joined(parts)
    assert found == b"abcde" and found.targets == ((1, 3), (4, 5))
    assert parts_of(found) == [part for part in parts if part[0]] and parts_of(b"abc") == [(b"abc", True)]


# ------------------------------------------------------------------------------------------------ token files


def token_files(tmp_path, mask=None, **keys):
    """A source of two files of 97 symbols with masks beside them; the mask of the train file unless it is given."""
    draw = np.random.default_rng(0)
    for split, n in (("train", 400), ("validation", 200)):
        np.save(tmp_path / f"{split}.npy", draw.integers(97, size=n).astype(np.uint16))
        counted = (draw.random(n) < 0.3).astype(np.uint8) if mask is None or split != "train" else mask
        (tmp_path / f"{split}.npy.mask").write_bytes(counted.tobytes())
    places = {split: str(tmp_path / f"{split}.npy") for split in ("train", "validation")}
    return TokenFilesConfig(**places, vocab_size=97, masks=True, **keys)


def test_token_files_have_masks_beside_them(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("scaling_testbed.data.sources.token_files.BLOCK_BYTES", 64)
    source = token_files(tmp_path, eos_id=int(np.random.default_rng(0).integers(97)))
    data = prepared(source)
    for split in ("train", "validation"):
        stream, counted = getattr(data, split), np.fromfile(tmp_path / f"{split}.npy.mask", np.uint8)
        assert np.array_equal(stream.counted(0, stream.n_tokens), counted == 1)
        assert data.manifest["splits"][split]["n_targets"] == counted.sum()
    tokens = np.load(tmp_path / "train.npy")[np.fromfile(tmp_path / "train.npy.mask", np.uint8) == 1]
    share = np.unique(tokens, return_counts=True)[1] / len(tokens)
    assert data.manifest["unigram_entropy_nats"] == pytest.approx(-(share * np.log(share)).sum())
    assert source.inputs()["train masks"] == [str(tmp_path / "train.npy.mask")]
    before = source.identity()
    (tmp_path / "train.npy.mask").write_bytes(bytes(400))
    assert source.identity() != before
    with pytest.raises(UserError, match=r"train.npy.mask was changed while it was in use"):
        data.check()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.ones(399, np.uint8), "train.npy.mask: 399 bytes, but .*train.npy has 400 tokens; write a byte for each"),
        (np.full(400, 2, np.uint8), "train.npy.mask: a byte is 2; write 1 where a token is a target"),
        (np.zeros(400, np.uint8), "no token in train is a target of the loss"),
    ],
)
def test_a_wrong_mask_of_a_token_file_is_named(prepared, tmp_path, mask, said):
    with pytest.raises(UserError, match=said):
        prepared(token_files(tmp_path, mask))


def test_a_missing_mask_of_a_token_file_is_named(prepared, tmp_path):
    source = token_files(tmp_path)
    (tmp_path / "validation.npy.mask").unlink()
    with pytest.raises(UserError, match="validation.npy.mask: needed beside .* because of data.masks=true"):
        prepared(source)
