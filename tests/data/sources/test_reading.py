import csv
import glob
import gzip
import io
import json
import os
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from scaling_testbed.data.sources import reading
from scaling_testbed.data.sources.python_stdlib import PythonStdlibConfig
from scaling_testbed.data.sources.reading import Rows, Tally, cut, expand, plan_file, read_unit
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


# ------------------------------------------------------------------------------------- what is found


@pytest.fixture
def tree(tmp_path):
    """A folder with hidden parts, other endings, and links to folders in cycles."""
    for name in ("a.txt", "b.md", ".h.txt", "sub/c.txt", "sub/.git/d.txt", "sub/deep/e.txt", "x/sub/f.txt", "x/g.pdf"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    return tmp_path / "tree"


@pytest.mark.parametrize(
    "pattern",
    [
        "**/*.txt",
        "**",
        "**/*",
        "*/**/*.txt",
        "**/sub/*.txt",
        "**/sub/**/*",
        "s*/**",
        "**/.git/*",
        "**/**/e.txt",
        "**/.*",
    ],
)
def test_a_recursive_glob_matches_what_glob_does(pattern, tree):
    (tree / "link").symlink_to(tree / "x")
    for hidden in (False, True):
        expected = glob.glob(str(tree / pattern), recursive=True, include_hidden=hidden)
        expected = {path for path in expected if Path(path).is_file()}
        assert {path for path in reading._glob(str(tree / pattern), hidden)} == expected


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_links_in_cycles_end_and_each_file_is_taken_once(pattern, tree, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/o.txt").write_text("text of o.txt")
    for name, target in (("l1", tree), ("l2", tree), ("sub/l3", tree / "x"), ("x/l4", tree / "sub")):
        (tree / name).symlink_to(target)
    (tree / "y.txt").symlink_to(tree / "a.txt")
    (tree / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "outside/back").symlink_to(tree)
    tally = Tally()
    found = [Path(path).name for path in expand("f", str(tree / pattern), tally)]
    hidden = [".h.txt", "d.txt"] if not pattern else []
    assert sorted(found) == sorted(["a.txt", *hidden, *(["b.md"] * (not pattern)), "c.txt", "e.txt", "f.txt", "o.txt"])
    assert tally.files["link to a file that is taken already"]["count"] >= 1


def test_what_a_folder_and_a_glob_leave_out_is_counted(tree):
    (tree / "nowhere.txt").symlink_to("gone")
    tally = Tally()
    expand("f", str(tree), tally)
    assert {reason: entry["count"] for reason, entry in tally.files.items()} == {
        "with ending .pdf": 1,
        "link to nowhere": 1,
    }
    tally = Tally()
    expand("f", str(tree / "*"), tally)
    assert {reason: entry["count"] for reason, entry in tally.files.items()} == {
        "hidden": 1,
        "folder": 2,
        "link to nowhere": 1,
    }
    with pytest.raises(UserError, match=r"no file in .* has a known ending \(.pdf 1\)"):
        (tree / "x/sub/f.txt").unlink()
        expand("f", str(tree / "x"))
    for pattern, what in (("su[b]", "a folder"), ("nowhere.txt", "a link to nowhere")):
        with pytest.raises(UserError, match=f"matches no file, but {what} .{tree}"):
            expand("f", str(tree / pattern))


@pytest.mark.parametrize("value", ["", " ", [], [None], [""], ["a.txt", ""], [3], 3, {}])
def test_a_place_that_names_nothing_is_refused(value):
    for make in (lambda: TextFilesConfig(files=value), lambda: TextFilesConfig(files="a", validation_files=value)):
        with pytest.raises(ConfigError, match="files must (name files|be a glob)"):
            make()
    with pytest.raises(ConfigError, match="data.train must"):
        expand("data.train", value)


def test_a_name_that_is_not_utf8_can_be_taken_and_said(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")
    Path(path).write_bytes(b"\xff")
    tally = Tally()
    assert read(TextFilesConfig(files=str(tmp_path)), tally=tally) == []
    assert tally.files["not UTF-8"]["first"] == [f"{tmp_path}/\\udcff.txt"]


# ------------------------------------------------------------------------------------- formats and rows


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.csv.zst"])
def test_rows_of_csv_are_read_with_quotes_and_line_ends(name, tmp_path):
    texts = ['He said "no",\nand left', "naïve 日本", "a\r\nb", "x\0y", "z" * 200_000]
    stream = io.StringIO()
    csv.writer(stream).writerows([["id", "text"], *enumerate(texts)])
    raw = b"\xef\xbb\xbf" + stream.getvalue().encode()
    if name.endswith("gz"):
        raw = gzip.compress(raw)
    (tmp_path / name).write_bytes(raw) if not name.endswith("zst") else write_zstd(tmp_path / name, raw)
    assert read(TextFilesConfig(files=str(tmp_path / name))) == texts


@pytest.mark.parametrize(
    "raw, said",
    [
        (b"id;text\n1;a\n", r"a.csv: no field 'text' \(fields: id;text\); set data.text_field; commas must part"),
        (b"id,text\n1,a\n1,a,b\n", "a.csv:3: 3 fields, but the first line names 2"),
        (b"id,text\n1,caf\xe9\n", "a.csv:2: a field is not UTF-8"),
        (b'id,text\n1,"a\n2,b\n', "a.csv: a quotation mark is not closed"),
        (b'id,text\n1,"a"b\n', "a.csv:2: not a row of CSV"),
        (b"text,text\na,b\n", "a.csv: 2 columns have the name 'text'"),
    ],
)
def test_csv_that_cannot_be_read_is_named(raw, said, tmp_path):
    (tmp_path / "a.csv").write_bytes(raw)
    with pytest.raises(UserError, match=said) as error:
        read(TextFilesConfig(files=str(tmp_path / "a.csv")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_compressed_text_is_cut_as_plain_text_is(name, tmp_path, documents):
    text = "".join(documents(300)).encode()
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / name).write_bytes(gzip.compress(text)) if name.endswith("gz") else write_zstd(tmp_path / name, text)
    plain, packed = (read(TextFilesConfig(files=str(tmp_path / one))) for one in ("a.txt", name))
    assert packed == plain and len(plain) > 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_field_inside_a_field_and_a_name_with_a_dot(kind, tmp_path):
    rows = [{"a": {"b": "one", "c": 1}, "d.e": "two"}, {"a": None, "d.e": "three"}]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read(TextFilesConfig(files=str(path), text_field="a.b")) == ["one"]
    assert read(TextFilesConfig(files=str(path), text_field="d.e")) == ["two", "three"]
    with pytest.raises(UserError, match=r"no field 'a.x' .*; set data.text_field"):
        read(TextFilesConfig(files=str(path), text_field="a.x"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_list_of_messages_becomes_a_text(kind, tmp_path):
    chat = [{"role": "user", "content": "Hi\nyou"}, {"role": "assistant", "content": "naïve"}]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"messages": []}) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat}]), path)
    tally = Tally()
    found = read(TextFilesConfig(files=str(path), text_field="messages"), tally=tally)
    assert found == ["user: Hi\nyou\n\nassistant: naïve"] and tally.chats >= 1 and not tally.noted
    chat[1]["tool_calls"] = [{"name": "search"}]
    (tmp_path / "more.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    assert read(TextFilesConfig(files=str(tmp_path / "more.jsonl"), text_field="messages"), tally=tally) == found
    assert tally.noted["lists of messages without their other fields"]["first"] == ["tool_calls"]
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": [*chat, {"role": "tool", "content": None}]}) + "\n")
    with pytest.raises(UserError, match="bad.jsonl:1: message 3 of field 'messages' has no text as its content"):
        read(TextFilesConfig(files=str(tmp_path / "bad.jsonl"), text_field="messages"))


def test_a_field_that_is_there_twice_is_a_bad_row(tmp_path):
    path = tmp_path / "a.jsonl"
    nested = '{"a": {"b": "x", "b": "y"}}'
    for row, field, name in (('{"text": "a", "text": "b"}', "text", "text"), (nested, "a.b", "b")):
        path.write_text(row + "\n")
        with pytest.raises(UserError, match=f"a.jsonl:1: not a JSON line .'{name}' is there twice"):
            read(TextFilesConfig(files=str(path), text_field=field))
    path.write_text('{"text": "a \\"text\\" here", "x": {"id": 1, "id": 2, "text": 5}}\n')  # fields that are not read
    assert read(TextFilesConfig(files=str(path))) == ['a "text" here']


BAD = {
    "not JSON": b'{"text": "cut\n',
    "no such field": b'{"body": "x"}\n',
    "not text": b'{"text": 5}\n',
    "not UTF-8": b'{"text": "caf\xe9"}\n',
}


@pytest.mark.parametrize("chunk_bytes", [64, 1 << 20])
def test_bad_rows_are_left_out_and_counted_by_reason_if_asked(chunk_bytes, tmp_path):
    lines = [json_lines([f"text {i}"]) for i in range(40)]
    for at, line in zip((3, 11, 12, 30), BAD.values(), strict=True):
        lines.insert(at, line)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    tally = Tally()
    found = read(TextFilesConfig(files=str(path), on_bad="skip"), chunk_bytes, tally)
    assert found == [f"text {i}" for i in range(40)] and tally.rows == 44 and tally.n_bad_rows == 4
    assert {reason: entry["count"] for reason, entry in tally.bad_rows.items()} == dict.fromkeys(BAD, 1)
    place = f"{path}:4" if chunk_bytes > 64 else f"{path}, line "
    assert f"{place}" in tally.bad_rows["not JSON"]["first"][0]
    for line in BAD.values():
        path.write_bytes(b"".join(lines[:3]) + line)
        with pytest.raises(UserError, match="a.jsonl:4: .*; data.on_bad=skip leaves such rows out"):
            read(TextFilesConfig(files=str(path)))


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "binary", "string_view"])
def test_columns_of_other_text_types_are_read(kind, tmp_path, documents):
    texts = pyarrow.array(documents(60))
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(getattr(pyarrow, kind)())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert read(TextFilesConfig(files=str(tmp_path / "a.parquet"))) == documents(60)


def test_a_column_with_text_that_is_not_utf8_is_named_by_its_row(tmp_path):
    raw = pyarrow.array([b"one", b"caf\xe9", b"two"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw.view(pyarrow.string())}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "b.parquet")
    for name in ("a", "b"):
        with pytest.raises(UserError, match=f"{name}.parquet: row 1: .*not UTF-8"):
            read(TextFilesConfig(files=str(tmp_path / f"{name}.parquet")))
        assert read(TextFilesConfig(files=str(tmp_path / f"{name}.parquet"), on_bad="skip")) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst", "a.csv.gz"])
def test_a_compressed_file_cut_anywhere_is_never_read_as_a_whole_one(name, tmp_path, documents):
    raw = b"text\nx\n" + b"y\n" * 300 if ".csv" in name else json_lines(documents(40))
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw)) if name.endswith("gz") else write_zstd(path, raw)
    whole, half = path.read_bytes(), len(path.read_bytes()) // 2
    for length in {1, 5, 20, half, *range(len(whole) - 9, len(whole))} - {0}:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=f"{name}: cannot be read as (gzip|zstd)"):
            read(TextFilesConfig(files=str(path)))


def test_utf16_without_a_mark_is_no_text_and_odd_files_are_noted(tmp_path):
    (tmp_path / "a.txt").write_bytes(("line\n" * 20).encode("utf-16-le"))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftext with a mark")
    (tmp_path / "c.txt").write_bytes(b"a zero \0 byte")
    tally = Tally()
    assert read(TextFilesConfig(files=str(tmp_path)), tally=tally) == ["\ufefftext with a mark", "a zero \0 byte"]
    assert list(tally.files) == ["UTF-16 or binary"]
    (tmp_path / "a.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 12\n")
    read(TextFilesConfig(files=str(tmp_path)), tally=tally)
    assert list(tally.files)[1:] == ["pointer of Git LFS in place of the file"]
    assert list(tally.noted) == ["files with a byte order mark, which is kept", "files with NUL bytes"]


def test_files_without_a_row_are_counted_as_empty(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n")
    (tmp_path / "b.jsonl").write_text("\n\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b""))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "e.parquet")
    source = TextFilesConfig(files=str(tmp_path))
    record, tally = source.found(source.units(1 << 20))
    assert read(source, tally=tally) == []
    assert record["found"] == tally.files["empty"]["count"] == 5
