"""Export the tokenizer of a run as files for `transformers.AutoTokenizer`. The same text has the same ids."""

import json
from pathlib import Path

from scaling_testbed.data.tokenizers import BPE_EOS, TOKENIZER_FILE, ByteTokenizer, load_tokenizer


def tokenizer_files(folder: Path, description: dict | None, max_length: int) -> dict[str, dict]:
    """Name -> JSON content of each file, for the tokenizer of a prepared `folder`.

    description: of the tokenizer in the manifest; None if the data was given as token ids, which needs no file.
    Documents were prepared without the special tokens that a published tokenizer may add around a text, and a special
    token written in a text was ordinary text. The exported tokenizer does the same. EOS also pads. Raises UserError if
    the tokenizer.json of the folder is missing or has changed.
    """
    if description is None:
        return {}
    if isinstance(load_tokenizer(folder, description), ByteTokenizer):
        tokenizer, eos = _bytes_as_json(), BPE_EOS
    else:
        tokenizer = json.loads((Path(folder) / TOKENIZER_FILE).read_bytes())
        tokenizer |= {"post_processor": None, "truncation": None, "padding": None}
        eos = _token(tokenizer, description["eos_id"])
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": eos,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    return {TOKENIZER_FILE: tokenizer, "tokenizer_config.json": about}


def _token(tokenizer: dict, number: int) -> str:
    """The text of a token id in a tokenizer.json."""
    added = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"]["vocab"]  # {token: id}, or [[token, score], ...] for a unigram model
    if number in added or not isinstance(vocabulary, dict):
        return added[number] if number in added else vocabulary[number][0]
    return next(token for token, id_ in vocabulary.items() if id_ == number)


def _bytes_as_json() -> dict:
    """ByteTokenizer as a byte-level BPE without merges, in which each byte is a token."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    eos = {"id": ByteTokenizer.eos_id, "content": BPE_EOS, "special": True}
    eos |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [eos],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _byte_characters() -> list[str]:
    """The character for each byte in a byte-level vocabulary: its Latin-1 character if this is printable, else one from
    U+0100 on (GPT-2's encoder.py, bytes_to_unicode)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
