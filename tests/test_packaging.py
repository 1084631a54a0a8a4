"""The files that others need agree with one another: version, licence, citation, targets, the public CI, the image."""

import hashlib
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.test_docs import problem_of

ROOT = Path(__file__).resolve().parent.parent
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # apache.org/licenses/LICENSE-2.0.txt
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
CI = WORKFLOWS["ci"]
PINNED = "pyproject.toml\nconstraints.txt\n"
INSTALLED = '"$GITHUB_WORKSPACE/fresh/bin/scaling-testbed"'


def requirements():
    """The extra, or None, and the text of every requirement."""
    yield from ((None, text) for text in PROJECT["dependencies"])
    for extra, texts in PROJECT["optional-dependencies"].items():
        yield from ((extra, text) for text in texts)


def test_version_and_licence_are_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    latest = re.search(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert citation["version"] == latest == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2
    assert citation["authors"] == PROJECT["authors"]


def test_the_citation_names_both_papers():
    from scaling_testbed.papers.paper import paper_named

    references = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    cited = {one["identifiers"][0]["value"].removeprefix("arXiv:"): one for one in references}
    papers = map(paper_named, ("small_scale_proxies", "over_training"))
    assert {arxiv: one["title"] for arxiv, one in cited.items()} == {paper.arxiv: paper.title for paper in papers}
    assert [len(one["authors"]) for one in references] == [16, 25]


def test_every_requirement_has_a_lower_bound_and_a_pin():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    pinned = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    names = [re.match(r"[\w.-]+", text)[0].lower() for _, text in requirements()]
    own = "scaling-testbed"
    assert [text for _, text in requirements() if ">=" not in text and not text.startswith((own, "types-"))] == []
    # triton: a CUDA build of PyTorch asks for its own
    assert {re.sub(r"[-_.]+", "-", name) for name in names} - pinned == {own, "triton"}


def jobs():
    for workflow in WORKFLOWS.values():
        yield from workflow["jobs"].items()


def test_the_public_ci_runs_targets_that_exist_on_the_versions_that_are_declared():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = [step.get("run", "") for _, job in jobs() for step in job["steps"]]
    made = {word for step in steps for word in re.findall(r"^make (\w+)", step, re.MULTILINE)}
    assert made == {"test", "check", "docs"} and made <= targets
    declared = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert CI["jobs"]["tests"]["strategy"]["matrix"]["python"] == declared
    assert CI["jobs"]["wheel"]["strategy"]["matrix"]["python"] == declared
    assert {job["steps"][1]["with"]["python-version"] for _, job in CI["jobs"].items()} <= {
        "${{ matrix.python }}",
        *declared,
    }


def test_the_public_ci_may_only_read_and_its_actions_are_pinned_by_a_commit():
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {"contents": "read"}
    for name, job in jobs():
        assert job["timeout-minutes"] <= 60 and "permissions" not in job, name
        used = [step for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]) for step in used), name
        assert used[0]["uses"].startswith("actions/checkout@") and used[0]["with"] == {"persist-credentials": False}, (
            name
        )
        pythons = [step["with"] for step in used if step["uses"].startswith("actions/setup-python@")]
        assert all(one["cache"] == "pip" and one["cache-dependency-path"] == PINNED for one in pythons), name


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_commands_of_the_public_ci_can_be_typed(name):
    """Those of a shell are known, paths exist, and what is typed to this project is accepted."""
    for _, job in WORKFLOWS[name]["jobs"].items():
        for step in job["steps"]:
            text = re.sub(r"\\\n\s*", " ", step.get("run", "")).replace(INSTALLED, "scaling-testbed")
            for line in filter(None, text.splitlines()):
                command = re.sub(r"^docker run .*? scaling-testbed(?= |$)", "", line).strip()
                command = re.sub(r"^fresh/bin/pip", "pip", command)
                assert not command or problem_of(shlex.split(command)) is None, line


def test_the_image_is_built_from_files_that_exist_and_steps_that_a_build_knows():
    """What each instruction of Dockerfile names is there, and .dockerignore does not leave it out."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    steps = [line.split(" ", 1) for line in text.splitlines() if line.strip()]
    assert steps[0][0] == "FROM" and {name for name, _ in steps} <= {
        *("FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ARG", "CMD"),
    }
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [word for name, words in steps if name == "COPY" for word in words.split()[:-1]]
    assert copied == ["pyproject.toml", "constraints.txt", "."]
    assert not {*copied, "README.md", "LICENSE", "scaling_testbed", "configs", "kernels"} & set(ignored)
    last = max(place for place, (name, _) in enumerate(steps) if name == "RUN")
    assert steps.index(["USER", "testbed"]) > last  # everything is installed by root, and nothing runs as root
    command = json.loads(next(words for name, words in steps if name == "CMD"))
    assert problem_of(command) is None
    starts = set(WORKFLOWS["image"][True]["push"]["paths"])  # YAML reads the key `on` as true
    assert starts == {"Dockerfile", ".dockerignore", *copied, ".github/workflows/image.yml"} - {"."}


@pytest.mark.parametrize("extra", ["test", "docs", "check", "submitit"])
def test_the_image_has_what_a_user_needs(extra):
    (installed,) = re.findall(r"'\.\[([\w,]+)\]'", (ROOT / "Dockerfile").read_text())
    assert installed == "analysis,export,wandb" and extra not in installed
