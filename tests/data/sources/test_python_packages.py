"""A corpus of pinned wheels is the same on every machine, or it is refused."""

import base64
import hashlib
import shutil
import sys
from importlib import metadata

import pytest

from scaling_testbed.data.preparing.preparation import folder_name
from scaling_testbed.data.sources.python_packages import PythonPackagesConfig
from scaling_testbed.data.tokenizers import BytesConfig
from scaling_testbed.errors import ConfigError, UserError

# Of data=sympy tokenizer=bytes, on every machine. scripts/demo.sh and README show it too.
SYMPY_IN_BYTES = "77e84a2a66e77922"
FILES = {
    "toy/__init__.py": b"",
    "toy/core.py": b"def f(x):\n    return x\n" * 60,
    "toy/b.py": "name = '\u65e5\u672c'\n".encode() * 80,
    "toy/data.txt": b"no source code",
    "toy.py": b"import toy\n" * 70,
}


def digest_of(content, algorithm="sha256"):
    return f"{algorithm}={base64.urlsafe_b64encode(hashlib.new(algorithm, content).digest()).rstrip(b'=').decode()}"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on sys.path with an installed wheel `toy` 1.2.0, as pip leaves it."""
    folder = tmp_path / "site"
    about = folder / "toy-1.2.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: Toy\nVersion: 1.2.0\n")
    (about / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py2-none-any\nTag: py3-none-any\n")
    lines = [f"{name},{digest_of(content)},{len(content)}" for name, content in FILES.items()]
    lines += ["../../bin/toy.py,sha256=of_this_machine,9", "toy/__pycache__/core.cpython-311.pyc,,"]
    (about / "RECORD").write_text("\n".join([*lines, "toy-1.2.0.dist-info/RECORD,,"]) + "\n")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return folder


def toy(**fields):
    return PythonPackagesConfig(**{"packages": ["toy==1.2.0"], "validation_fraction": 0.3, **fields})


def test_the_corpus_of_the_demo_has_one_fingerprint_on_every_machine(prepared):
    data = prepared(PythonPackagesConfig(packages=["sympy==1.14.0"]))
    assert data.fingerprint == SYMPY_IN_BYTES
    assert data.train.n_bytes + data.validation.n_bytes == 26_180_038
    assert (
        data.manifest["splits"]["train"]["n_documents"] + data.manifest["splits"]["validation"]["n_documents"] == 1453
    )


def test_each_py_file_of_the_wheel_is_one_document_and_nothing_else_is(site, prepared):
    data = prepared(toy())
    documents = [data.manifest["splits"][split]["n_documents"] for split in ("train", "validation")]
    assert sum(documents) == 3 and data.train.n_bytes + data.validation.n_bytes == sum(
        len(content) for name, content in FILES.items() if name.endswith(".py")
    )


def test_place_time_spelling_and_order_change_nothing(site, tmp_path, monkeypatch):
    first = folder_name(toy(), BytesConfig())
    assert folder_name(toy(packages="Toy == 1.2"), BytesConfig()) == first
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), *(p for p in sys.path if p != str(site))])
    shutil.move(site, tmp_path / "elsewhere")
    record = tmp_path / "elsewhere" / "toy-1.2.0.dist-info" / "RECORD"
    lines = [line for line in record.read_text().splitlines() if "bin/toy" not in line]
    record.write_text("\n".join(reversed(lines)) + "\n")
    assert folder_name(toy(), BytesConfig()) == first
    two = ["sympy==1.14.0", "toy==1.2.0"]
    assert toy(packages=two).identity() == toy(packages=two[::-1]).identity() != toy().identity()


def test_another_installed_version_is_refused_with_the_line_that_mends_it(site):
    with pytest.raises(UserError, match="toy 1.2.0 is installed, not 1.3; type: pip install toy==1.3"):
        toy(packages=["toy==1.3"]).identity()
    with pytest.raises(UserError, match="absent-toy is not installed; type: pip install absent-toy==1"):
        toy(packages=["Absent_Toy==1"]).identity()


def write(name, content):
    return lambda site: (site / name).write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        write("toy/core.py", FILES["toy/core.py"] + b"#"),
        write("toy/core.py", FILES["toy/core.py"].replace(b"x", b"y")),
        write("toy/core.py", b"\xff" * len(FILES["toy/core.py"])),  # which would be left out as not UTF-8
        write("toy/core.py", b""),  # which would be left out as empty
        lambda site: (site / "toy/core.py").unlink(),
    ],
)
def test_a_changed_file_is_named_with_the_line_that_mends_it(site, prepared, damage):
    damage(site)
    again = "type: pip install --force-reinstall --no-deps toy==1.2.0"
    with pytest.raises(UserError, match=f"toy/core.py in .* differ from the RECORD of toy 1.2.0; {again}") as error:
        prepared(toy())
    assert "\n" not in str(error.value)


def test_a_recorded_file_that_is_not_utf8_is_left_out(site, prepared):
    content = "# \xe9\n".encode("latin-1")
    (site / "toy/latin.py").write_bytes(content)
    with open(site / "toy-1.2.0.dist-info" / "RECORD", "a") as file:
        file.write(f"toy/latin.py,{digest_of(content, 'sha512')},{len(content)}\n")
    reading = prepared(toy()).manifest["reading"]
    assert reading["found"] == 5 and {reason: entry["count"] for reason, entry in reading["files"].items()} == {
        "empty": 1,
        "not UTF-8": 1,
    }


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("RECORD", None, "was not installed from a wheel .*; type: pip install --force-reinstall"),
        ("RECORD", "", "was not installed from a wheel"),
        ("RECORD", "toy.py\n", r"the RECORD of toy 1.2.0 is damaged \(not enough values"),
        ("RECORD", "toy.py,,9\n", r"the RECORD of toy 1.2.0 is damaged \(no sha256 of toy.py"),
        ("RECORD", "toy.py,sha256=x,many\n", "the RECORD of toy 1.2.0 is damaged"),
        ("RECORD", "toy.txt,,9\n", "data.packages must have .py files; toy 1.2.0 has none"),
        ("WHEEL", None, "was not installed from a wheel"),
        ("WHEEL", "Root-Is-Purelib: false\nTag: cp311-cp311-linux_x86_64\n", "is built for each platform"),
        ("WHEEL", "Root-Is-Purelib: true\nTag: py3-none-linux_x86_64\n", "is built for each platform"),
        ("direct_url.json", '{"url": "file:///x", "dir_info": {"editable": true}}', "is installed as editable"),
        ("METADATA", None, "toy None is installed, not 1.2.0|toy is not installed"),
    ],
)
def test_what_is_no_pure_wheel_is_one_line(site, file, content, message):
    path = site / "toy-1.2.0.dist-info" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        toy().identity()
    assert "\n" not in str(error.value)


def test_a_zipped_wheel_is_one_line(site, tmp_path, monkeypatch):
    archive = shutil.make_archive(str(tmp_path / "toy"), "zip", site)
    monkeypatch.setattr(sys, "path", [archive, *(p for p in sys.path if p != str(site))])
    with pytest.raises(UserError, match="was not installed from a wheel"):
        toy().identity()


@pytest.mark.parametrize(
    "packages, message",
    [
        (["sympy"], f"must be a list of NAME==VERSION, as sympy=={metadata.version('sympy')}; got 'sympy'"),
        (["sympy>=1.2"], "must be a list of NAME==VERSION"),
        (["../x==1"], "must be a list of NAME==VERSION"),
        (["a==1 --index-url x"], "must be a list of NAME==VERSION"),
        ([], "must name at least one package"),
        (["sympy==1.14", "SymPy==1.14.0"], "none of them twice"),
        (3, "must be a list of NAME==VERSION or null, got 3"),
        ([None], "must be a list of NAME==VERSION"),
    ],
)
def test_a_wrong_list_of_packages_is_refused_at_once(packages, message):
    with pytest.raises(ConfigError, match=message):
        toy(packages=packages)


def test_without_packages_the_identity_is_the_one_it_was():
    fields = {"validation_fraction": 0.02, "max_documents": None, "max_tokens": None}
    source = PythonPackagesConfig()
    assert source.identity() == {"kind": "python_packages", **fields, **source.content()}
