"""The plan of the house, kept by reading the source: imports run downwards, and each dependency has one door."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "scaling_testbed"

# Lowest first; a module belongs to the longest prefix that fits. A module imports only from its own room or from below.
LAYERS = [
    ("errors",),
    ("files", "keys", "progress", "registry"),
    ("plugins", "row_files", "tables"),
    ("kernels",),
    ("model",),
    ("learning", "data"),
    ("diagnostics",),
    ("config",),
    ("processes",),
    ("runs",),
    ("evaluation",),
    ("training",),
    ("analysis.rows",),
    ("analysis.curves", "analysis.laws"),
    ("analysis.trajectories",),
    ("analysis.figures",),
    ("papers",),
    ("sweeps", "exporting"),
    ("report",),
    ("api",),
    ("commands",),
    ("train", "prepare", "sweep", "analyze", "evaluate", "lm_eval", "export", "sample"),
    ("__main__",),
]
DOORS = {
    "hydra": {"config/compose.py", "config/words.py"},
    "omegaconf": {"config/compose.py", "config/words.py"},
    "wandb": {"runs/mirrors/wandb.py"},
    "yaml": {"runs/folder.py", "files.py"},
    "matplotlib": {"analysis/figures/drawing.py"},
    "lm_eval": {"evaluation/harness.py"},
    "safetensors": {"exporting/hugging_face.py"},
    # Files that an export has beside its weights. Nothing here imports them.
    "transformers": {f"exporting/remote/{name}_scaling_testbed.py" for name in ("configuration", "modeling")},
}
ROOMS = {
    "typer": "commands",
    "datasets": "data",
    "tokenizers": "data",
    "pyarrow": "data",
    "triton": "kernels",
    "scipy": "analysis",
    "jinja2": "report",
    "markupsafe": "report",
}


@cache
def modules():
    """(path in the package, syntax tree) of every module."""
    found = []
    for folder, prefix in ((ROOT / PACKAGE, ""), (ROOT / "kernels", "kernels/")):
        for path in sorted(folder.rglob("*.py")):
            relative = prefix + path.relative_to(folder).as_posix()
            if "kernels/" not in relative or prefix:
                found.append((relative, ast.parse(path.read_text())))
    return found


def imports(tree):
    """Every imported module name, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module):
    """Index and prefix of the layer that `module`, without the package's name, belongs to."""
    fits = [
        (len(prefix), index, prefix)
        for index, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if module == prefix or module.startswith(prefix + ".")
    ]
    return max(fits)[1:] if fits else None


def upward_imports(relative, tree):
    own = layer(relative.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    for name in imports(tree):
        if name.startswith(PACKAGE + "."):
            target = layer(name.removeprefix(PACKAGE + "."))
            if own is None or target is None or (target[0] >= own[0] and target != own):
                yield name


def test_imports_run_downwards():
    checked = ((relative, tree) for relative, tree in modules() if relative != "__init__.py")
    assert [f"{relative}: {name}" for relative, tree in checked for name in upward_imports(relative, tree)] == []


def test_an_upward_import_would_be_noticed():
    tree = ast.parse("def f():\n    from scaling_testbed.training.run import train")
    assert list(upward_imports("model/layers.py", tree)) == ["scaling_testbed.training.run.train"]
    assert list(upward_imports("kernels/reference.py", ast.parse("import scaling_testbed.model.layers"))) != []


def outside_of_its_door(relative, tree):
    for name in imports(tree):
        top = name.split(".")[0]
        if relative not in DOORS.get(top, {relative}) or not relative.startswith(ROOMS.get(top, "")):
            yield name


def test_each_dependency_has_one_door():
    found = [f"{relative}: {name}" for relative, tree in modules() for name in outside_of_its_door(relative, tree)]
    assert found == []


def test_a_dependency_outside_of_its_door_would_be_noticed():
    tree = ast.parse("import json\nimport wandb.sdk\ndef f():\n    from scipy import optimize")
    assert list(outside_of_its_door("training/run.py", tree)) == ["wandb.sdk", "scipy.optimize"]
    assert list(outside_of_its_door("runs/mirrors/wandb.py", ast.parse("import wandb"))) == []


def test_analysis_composes_nothing():
    """Rows and plans hold the configuration; of config/ it knows the conventions of budgets, and the defaults of keys
    that came after a row was written, alone."""
    asked = [name for relative, tree in modules() if relative.startswith("analysis/") for name in imports(tree)]
    rooms = (f"{PACKAGE}.config", f"{PACKAGE}.model")
    known = (f"{PACKAGE}.config.budget.", f"{PACKAGE}.config.run.with_later_keys")
    assert [name for name in asked if name.startswith(rooms) and not name.startswith(known)] == []


def test_reading_a_sweep_with_its_paper_imports_only_what_planning_needs():
    loaded = modules_loaded_by("from scaling_testbed.sweeps.grid import load_sweep\nload_sweep('overtraining')")
    assert not loaded & {"torch", "pandas", "scipy", "matplotlib", "datasets", "tokenizers", "wandb"}


def modules_loaded_by(code):
    script = f"import sys\n{code}\nprint(*sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(found.stdout.splitlines()[-1].split())


def test_composing_a_config_does_not_import_torch():
    loaded = modules_loaded_by("from scaling_testbed.config.compose import compose\ncompose(['model=nano_s'])")
    assert not loaded & {"torch", "datasets", "tokenizers", "wandb", "matplotlib"}


def test_plain_training_imports_only_what_it_uses(tmp_path):
    overrides = [
        *("data=noise", "data.n_tokens=4096", "data.n_validation_tokens=2048", "model=nano_s", "budget.steps=1"),
        *(f"runs_dir={tmp_path}/runs", f"data_dir={tmp_path}/data", "batch.sequence_length=32"),
    ]
    loaded = modules_loaded_by(f"from scaling_testbed.train import main\nassert main({overrides!r}) == 0")
    assert "torch" in loaded
    assert not loaded & {"wandb", "datasets", "tokenizers", "matplotlib", "scipy", "pandas", "pyarrow"}
    assert not {name for name in loaded if name.startswith("scaling_testbed.kernels.") and name.endswith(".triton")}
    loaded = modules_loaded_by(f"from scaling_testbed.train import main\nassert main({overrides!r}) == 0")
    assert "torch" not in loaded  # it has finished before


def test_the_picture_shows_every_layer_in_this_order():
    shown = re.findall(r'class="room">([^<]*)<', (ROOT / "docs" / "architecture.svg").read_text())
    found = [name for box in reversed(shown) for name in box.split()]
    rooms = dict.fromkeys(name.partition(".")[0] for names in LAYERS for name in names if name != "__main__")
    assert sorted(found) == sorted(rooms)
    heights = {name: index for index, names in enumerate(LAYERS) for name in [n.partition(".")[0] for n in names]}
    below = [heights[name] for name in found if name != "analysis"]  # over three layers
    assert below == sorted(below)
