import gzip
import io
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from scaling_testbed.data.sources.python_stdlib import PythonStdlibConfig
from scaling_testbed.data.sources.reading import Rows, Tally, cut, plan_file, read_unit
from scaling_testbed.data.sources.text_files import TextFilesConfig
from scaling_testbed.errors import ConfigError, UserError


def json_lines(texts, field="text"):
    return "".join(json.dumps({"n": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_zstd(path, raw):
    """Two frames one after the other, as tools that compress in parallel write them."""
    with open(path, "wb") as file:
        for part in (raw[: len(raw) // 2], raw[len(raw) // 2 :]):
            sink = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(part)
            file.write(sink.getvalue())


def write(folder, name, texts):
    path, raw = folder / name, json_lines(texts)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(raw[:100]) + gzip.compress(raw[100:]))
    elif name.endswith(".zst"):
        write_zstd(path, raw)
    elif name.endswith(".parquet"):
        table = pyarrow.table({"n": range(len(texts)), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    elif name.endswith(".jsonl"):
        path.write_bytes(raw)
    else:
        path.write_bytes("".join(texts).encode())
    return str(path)


def read(source, chunk_bytes=1 << 20, tally=None):
    tally = Tally() if tally is None else tally
    return [text.decode() for unit in source.units(chunk_bytes) for text in source.documents(unit, tally)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("chunk_bytes", [50, 333, 1 << 20])
def test_rows_of_every_format_are_read_in_order_whatever_the_chunks(name, chunk_bytes, tmp_path, documents):
    source = TextFilesConfig(files=write(tmp_path, name, documents(60)))
    assert read(source, chunk_bytes) == documents(60)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py"])
def test_a_text_file_is_one_document_or_pieces_of_it(name, tmp_path, documents):
    path = write(tmp_path, name, documents(300))
    assert read(TextFilesConfig(files=path, cut_bytes=None)) == ["".join(documents(300))]
    pieces = read(TextFilesConfig(files=path, cut_bytes=2000))
    assert "".join(pieces) == "".join(documents(300)) and len(pieces) > 5
    assert all(len(piece.encode()) <= 2000 and piece.endswith("\n") for piece in pieces)


def test_a_long_line_is_cut_between_characters():
    text = "".join(random.Random(0).choices("aé日🙂", k=5000))
    pieces = list(cut(io.BytesIO(text.encode()), 1024))
    assert "".join(piece.decode() for piece in pieces) == text and max(map(len, pieces)) <= 1024


def test_files_come_in_sorted_order_from_globs_lists_and_folders(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.md", "sub/other.bin"):
        (tmp_path / name).write_text(name)
    assert read(TextFilesConfig(files=str(tmp_path))) == ["a.txt", "b.txt", "sub/c.md"]
    assert read(TextFilesConfig(files=str(tmp_path / "*.txt"))) == ["a.txt", "b.txt"]
    same = [TextFilesConfig(files=str(tmp_path / pattern)) for pattern in ("*.txt", "[ab].txt")]
    assert same[0].identity() == same[1].identity(), "the files count, not the glob that found them"
    assert read(TextFilesConfig(files=[str(tmp_path / "sub/*.md"), str(tmp_path / "b.txt")])) == ["b.txt", "sub/c.md"]


def test_files_that_are_not_utf8_and_empty_files_are_passed_over(tmp_path):
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"text")
    tally = Tally()
    assert read(TextFilesConfig(files=str(tmp_path)), tally=tally) == ["text"]
    assert tally.files == {"not UTF-8": {"count": 1, "first": [str(tmp_path / "a.txt")]}}


def test_a_missing_field_is_named_with_its_file_and_line_or_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["x"] * 40) + b'{"body": "x"}\n')
    for chunk_bytes in (64, 1 << 20):
        with pytest.raises(UserError, match=r"a.jsonl:41: no field 'text' \(fields: body\); set data.text_field"):
            read(TextFilesConfig(files=str(path)), chunk_bytes)
    assert read(TextFilesConfig(files=write(tmp_path, "a.parquet", ["x"]))) == ["x"]
    with pytest.raises(UserError, match=r"a.parquet: no field 'body' \(fields: n, text\)"):
        read(TextFilesConfig(files=str(tmp_path / "a.parquet"), text_field="body"))
    with pytest.raises(UserError, match="a.parquet: row 0: field 'n' holds int, not text"):
        read(TextFilesConfig(files=str(tmp_path / "a.parquet"), text_field="n"))


@pytest.mark.parametrize(
    "line", [b'{"text": "cut\n', b"[1, 2]\n", b'{"text": 5}\n', b'"\xff"\n', b"[" * 100_000 + b"\n"]
)
def test_a_broken_line_is_named_with_its_number(line, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["x", "y"]) + b"\n" + line + json_lines(["z"]))
    with pytest.raises(UserError, match="a.jsonl:4: ") as error:
        read(TextFilesConfig(files=str(tmp_path / "a.jsonl")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", [lambda raw: raw[:-30], lambda raw: b"nonsense" * 20])
def test_a_file_that_cannot_be_decompressed_is_named(name, damage, tmp_path, documents):
    path = write(tmp_path, name, documents(60))
    Path(path).write_bytes(damage(Path(path).read_bytes()))
    with pytest.raises(UserError, match=f"{name}: cannot be read as (gzip|zstd|parquet)"):
        read(TextFilesConfig(files=path))


def test_fields_that_name_no_file_are_refused(tmp_path):
    assert TextFilesConfig().files is None  # the pure default can be made, for the config store
    with pytest.raises(ConfigError, match="^data.files must be given"):
        TextFilesConfig().identity()
    with pytest.raises(UserError, match="data.files: no file matches"):
        TextFilesConfig(files=str(tmp_path / "*.txt")).identity()
    with pytest.raises(ConfigError, match="^files must be a glob"):
        TextFilesConfig(files=3)
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ConfigError, match="data.files: .*a.docx ends in none of"):
        read(TextFilesConfig(files=str(tmp_path / "a.docx")))


def test_a_lone_surrogate_in_json_does_not_stop_a_corpus(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n')
    assert read(TextFilesConfig(files=str(tmp_path / "a.jsonl"))) == ["a?b"]


def test_the_standard_library_is_megabytes_of_python_without_packages():
    source = PythonStdlibConfig()
    units = source.units(1 << 30)
    assert sum(unit.weight for unit in units) > 5e6
    assert all(unit.path.endswith(".py") and "site-packages" not in unit.path for unit in units)
    assert [unit.path for unit in units] == [unit.path for unit in source.units(1 << 30)]
    argparse = next(unit for unit in units if unit.path.endswith("/argparse.py"))
    assert "class ArgumentParser" in next(iter(source.documents(argparse, Tally()))).decode()


def test_byte_ranges_of_a_file_without_a_last_newline_miss_no_line(tmp_path):
    texts = [f"t{i}" * (i % 9) + "." for i in range(100)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts).rstrip(b"\n"))
    for chunk_bytes in [*range(15, 120), 5000]:
        units = plan_file("files", str(tmp_path / "a.jsonl"), chunk_bytes)
        assert [text.decode() for unit in units for text in read_unit(unit, Rows("text"), None, Tally())] == texts
