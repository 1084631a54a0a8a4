"""Tokens of a file are read as they were when it was opened, or not at all."""

import os
import threading
from hashlib import sha256

import numpy as np
import pytest

from scaling_testbed.data import watched
from scaling_testbed.data.watched import WatchedTokens
from scaling_testbed.errors import UserError


@pytest.fixture
def opened(tmp_path):
    """A file of 10,000 tokens after 4 other bytes: (its path, the tokens, the file as it is watched)."""
    path, tokens = tmp_path / "t.bin", np.random.default_rng(0).integers(0, 1 << 16, 10_000).astype("<u2")
    path.write_bytes(b"head" + tokens.tobytes())
    entry = {"sha256": sha256(path.read_bytes()).hexdigest(), "offset": 4, "dtype": "uint16", "n_tokens": 10_000}
    return path, tokens, WatchedTokens(path, entry)


def test_a_slice_is_that_of_the_array(opened):
    _, tokens, file = opened
    for at in (slice(0, 0), slice(0, 10_000), slice(17, 4_000), slice(9_990, 20_000), slice(-5, None)):
        assert np.array_equal(file[at], tokens[at])
    assert len(file) == 10_000


@pytest.mark.parametrize("change", ["touch", "chmod", "link", "rename over", "unlink", "same bytes"])
def test_what_changes_no_byte_stops_no_reader(opened, change, tmp_path):
    path, tokens, file = opened
    file[0:1]
    content = path.read_bytes()
    if change == "touch":
        path.touch()
    elif change == "chmod":
        path.chmod(0o400)
    elif change == "link":
        os.link(path, tmp_path / "link")
    elif change == "rename over":
        (tmp_path / "new").write_bytes(content[::-1])
        os.replace(tmp_path / "new", path)
    elif change == "unlink":
        path.unlink()
    else:
        with open(path, "r+b") as writer:
            writer.write(content)
    for _ in range(3):
        assert np.array_equal(file[5:50], tokens[5:50])
        file.check()


@pytest.mark.parametrize("look", ["read", "check"])
@pytest.mark.parametrize("size, said", [(0, "has 0 bytes"), (100, "has 100 bytes"), (30_000, "has 30,000 bytes")])
def test_another_size_is_told(opened, size, said, look):
    path, _, file = opened
    file[0:1]
    os.truncate(path, size)
    with pytest.raises(UserError, match=f"{path} was changed while it was in use: it {said} now and had 20,004"):
        file[0:10] if look == "read" else file.check()


@pytest.mark.parametrize("look", ["read", "check"])
def test_one_other_bit_is_told_although_the_time_was_set_back(opened, look):
    path, _, file = opened
    file[0:1]
    stat = path.stat()
    with open(path, "r+b") as writer:
        writer.seek(9_000)
        byte = writer.read(1)[0]
        writer.seek(9_000)
        writer.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match="its sha256 is another now"):
        file[0:10] if look == "read" else file.check()


def test_a_file_that_was_replaced_before_it_was_first_read_is_told(opened, tmp_path):
    path, _, file = opened
    (tmp_path / "new").write_bytes(path.read_bytes()[::-1])
    os.replace(tmp_path / "new", path)
    with pytest.raises(UserError, match="its sha256 is another now"):
        file[0:10]


def test_more_files_than_may_be_open_are_read_by_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(watched, "_opened", watched.functools.lru_cache(maxsize=4)(watched._opened.__wrapped__))
    before = len(os.listdir("/proc/self/fd"))
    files = []
    for number in range(16):
        content = np.full(64, number, "<u2").tobytes()
        (tmp_path / str(number)).write_bytes(content)
        entry = {"sha256": sha256(content).hexdigest(), "offset": 0, "dtype": "uint16", "n_tokens": 64}
        files.append(WatchedTokens(tmp_path / str(number), entry))
    wrong = []

    def read(seed):
        for number in np.random.default_rng(seed).integers(0, 16, 200):
            if not (files[number][3:40] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(os.listdir("/proc/self/fd")) <= before + 4
