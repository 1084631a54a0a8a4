"""How a file is damaged: flipped bits, cut and repeated parts, and values of another type, each chosen by two numbers.

A form (BYTES, LINES, JSON, JSON_LINES, YAML, CSV, or one of them `packed`) names the kinds of damage that fit a file.
`damage(form)` is a Hypothesis strategy of steps, and `apply(data, steps)` makes them.
"""

import copy
import gzip
import json
from collections.abc import Callable

import hypothesis.strategies as st
import yaml

INSERTED = (b"\0", b"\n", b"\r\n", b'"', b"'", b"{", b"}", b"[", b",", b":", b"=", b"\\", b" ", b"\t", b"-", b".", b"e")
INSERTED += (b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", "\u2028".encode(), "\x85".encode(), b"\x1b[31m", b"\x1a")
INSERTED += (
    b"9" * 400,
    b"[" * 20_000,
    b"null",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"true",
    b"!!python/object:x",
    b"&a *a",
)
VALUES = (None, True, False, 0, 1, -1, 1.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30, 10**400)
VALUES += ("", " ", "x", "0", "nan", "../x", "/", ".", "a\nb", "\0", "\ud800", "\u2028", "\x1b[31m", "a" * 5000)
VALUES += ([], {}, [None], [[]], [0], ["x"], {"a": 1}, {"": None}, [1, 2, 3], "${oc.env:HOME}", "!!int x", 1e-320)


def flip(data: bytes, a: int, b: int) -> bytes:
    if not data:
        return b"\0"
    at = a % len(data)
    return data[:at] + bytes([data[at] ^ 1 << b % 8]) + data[at + 1 :]


def cut(data: bytes, a: int, b: int) -> bytes:
    return data[: a % (len(data) + 1)]


def _part(data: bytes, a: int, b: int) -> tuple[int, int]:
    at = a % (len(data) + 1)
    return at, min(len(data), at + 1 + b % 64)


def delete(data: bytes, a: int, b: int) -> bytes:
    start, end = _part(data, a, b)
    return data[:start] + data[end:]


def double(data: bytes, a: int, b: int) -> bytes:
    start, end = _part(data, a, b)
    return data[:end] + data[start:end] + data[end:]


def insert(data: bytes, a: int, b: int) -> bytes:
    at = a % (len(data) + 1)
    return data[:at] + INSERTED[b % len(INSERTED)] + data[at:]


def zeros(data: bytes, a: int, b: int) -> bytes:
    """A part of zeros, as a power cut leaves it."""
    start, end = _part(data, a, b)
    return data[:start] + bytes(end - start) + data[end:]


def append(data: bytes, a: int, b: int) -> bytes:
    return data + INSERTED[b % len(INSERTED)]


BYTES = (flip, flip, cut, delete, double, insert, zeros, append)


def line(data: bytes, a: int, b: int) -> bytes:
    """One line deleted, doubled, emptied, or put in the place of another."""
    lines = data.split(b"\n")
    at, other = a % len(lines), a // 7 % len(lines)
    match b % 4:
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[at])
        case 2:
            lines[at] = b""
        case _:
            lines[at], lines[other] = lines[other], lines[at]
    return b"\n".join(lines)


LINES = (*BYTES, line, line)


def _places(value, found: list, holder=None, key=None) -> list:
    """(container, key) of every value in a JSON value."""
    found.append((holder, key))
    for inner, entry in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        _places(entry, found, value, inner)
    return found


def changed(value, a: int, b: int):
    """`value` with one of its parts replaced, removed, renamed, wrapped or made another number."""
    root = [copy.deepcopy(value)]
    places = _places(root, [])[1:]
    holder, key = places[a % len(places)]
    old = holder[key]
    kind, b = b % 12, b // 12
    if kind == 0 and len(places) > 1:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}x" if b % 2 else ""] = holder.pop(key)
    elif kind == 2:
        holder[key] = {"x": old} if b % 2 else [old]
    elif kind == 3 and isinstance(old, (int, float)) and not isinstance(old, bool):
        holder[key] = (-old, old + 1, old * 1000, str(old), float(min(old, 2**60)), [old])[b % 6]
    elif kind == 4 and isinstance(old, (list, dict)) and old:
        if isinstance(old, list):
            holder[key] = (old[:-1], old * 2, old[::-1], old[0])[b % 4]
        else:
            holder[key] = (list(old), list(old.values()), dict(reversed(old.items())), {**old, "x": 1})[b % 4]
    else:
        holder[key] = VALUES[b % len(VALUES)]
    return root[0] if root else None


def typed_json(data: bytes, a: int, b: int) -> bytes:
    try:
        return json.dumps(changed(json.loads(data), a, b)).encode()
    except (ValueError, RecursionError):  # no JSON any more
        return flip(data, a, b)


def typed_line(data: bytes, a: int, b: int) -> bytes:
    lines = data.split(b"\n")
    at = a % len(lines)
    lines[at] = typed_json(lines[at], a // len(lines), b)
    return b"\n".join(lines)


def typed_yaml(data: bytes, a: int, b: int) -> bytes:
    try:
        value = changed(yaml.load(data, yaml.CSafeLoader), a, b)
        return yaml.dump(value, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=bool(b % 2)).encode()
    except (yaml.YAMLError, ValueError, RecursionError):
        return flip(data, a, b)


def typed_cell(data: bytes, a: int, b: int) -> bytes:
    lines = data.split(b"\n")
    at = a % len(lines)
    cells = lines[at].split(b",")
    place = b % len(cells)
    cells[place] = CELLS[b // len(cells) % len(CELLS)]
    lines[at] = b",".join(cells)
    return b"\n".join(lines)


CELLS = (
    b"",
    b"x",
    b"nan",
    b"inf",
    b"-1",
    b"0",
    b"1e999",
    b"9" * 400,
    b'"',
    b'""',
    b'"a,b"',
    b'"a\nb"',
    b"1,2",
    b"true",
)
CELLS += (b"1_000", b"70M", b" 7 ", b"\0", "\u2028".encode(), b"\xff", b"crashed", b"=1+1", "७".encode(), b"1e-400")

JSON = (*BYTES, *[typed_json] * 10)
JSON_LINES = (*LINES, *[typed_line] * 10)
YAML = (*LINES, *[typed_yaml] * 12)
CSV = (*LINES, *[typed_cell] * 10)


def packed(form: tuple[Callable, ...], unpack: Callable = gzip.decompress, pack: Callable | None = None) -> tuple:
    """Damage to a compressed file, and to what it holds."""
    pack = pack or (lambda data: gzip.compress(data, 1, mtime=0))

    def inner(data: bytes, a: int, b: int) -> bytes:
        try:
            return pack(form[a % len(form)](unpack(data), a // len(form), b))
        except Exception:  # no such file any more
            return flip(data, a, b)

    return (*BYTES, *[inner] * len(BYTES))


def damage(form: tuple[Callable, ...]) -> st.SearchStrategy[list]:
    """One or two kinds of damage, each with the two numbers that choose its place and what stands there."""
    number = st.integers(0, 2**32 - 1)
    return st.lists(st.tuples(st.sampled_from(form), number, number), min_size=1, max_size=2)


def apply(data: bytes, steps: list) -> bytes:
    for kind, a, b in steps:
        data = kind(data, a, b)
    return data
