"""The files that others need agree with one another: version, licence, citation, targets, the public CI, the image."""

import hashlib
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # apache.org/licenses/LICENSE-2.0.txt
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


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


def test_the_public_ci_runs_targets_that_exist_on_the_versions_that_are_declared():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = [step.get("run", "") for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    made = {word for step in steps for word in re.findall(r"^make (\w+)", step, re.MULTILINE)}
    assert made == {"test", "check", "docs"} and made <= targets
    declared = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert WORKFLOW["jobs"]["tests"]["strategy"]["matrix"]["python"] == declared
    assert WORKFLOW["jobs"]["wheel"]["strategy"]["matrix"]["python"] == declared


@pytest.mark.parametrize("extra", ["test", "docs", "check", "submitit"])
def test_the_image_has_what_a_user_needs(extra):
    (installed,) = re.findall(r"'\.\[([\w,]+)\]'", (ROOT / "Dockerfile").read_text())
    assert installed == "analysis,export,wandb" and extra not in installed
