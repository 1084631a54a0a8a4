"""The examples do what they say, in an empty folder."""

import ast
import json
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run_cells(notebook):
    """Run the code cells in order in one namespace; returns the value of each cell's last expression, None without."""
    namespace, values = {"__name__": "__main__"}, []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            tree = ast.parse("".join(cell["source"]), filename=cell["id"])
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, cell["id"], "exec"), namespace)
            values.append(eval(compile(ast.Expression(last.value), cell["id"], "eval"), namespace) if last else None)
    return namespace, values


@pytest.mark.filterwarnings("error")
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "laws.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert all(cell["cell_type"] in ("code", "markdown") for cell in notebook["cells"])
    assert not any(cell.get("outputs") for cell in notebook["cells"])  # what it prints is not committed
    namespace, values = run_cells(notebook)
    assert set(namespace["held_out"]["relative_error"] < 0.2) == {True}
    assert (tmp_path / "report.html").exists() and "agrees" in capsys.readouterr().out
    status, loss, entropy = next(value for value in values if isinstance(value, tuple) and value[0] == "finished")
    assert loss > entropy > 0
    assert namespace["logits"].shape[:2] == (1, 4)


@pytest.mark.parametrize("shorter", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_the_script_trains_its_grid_and_fits_a_law(tmp_path, python, shorter):
    """Its budgets are 25 to 200 steps. In the quick test they are a fifth of that."""
    text = (EXAMPLES / "nano_grid.py").read_text()
    for steps in ("50", "25,50,100,200"):
        assert f'"budget.steps={steps}"' in text
        fewer = ",".join(str(int(number) // shorter) for number in steps.split(","))
        text = text.replace(f'"budget.steps={steps}"', f'"budget.steps={fewer}"')
    script = tmp_path / "nano_grid.py"
    script.write_text(text)
    command = [python, str(script), str(tmp_path / "grid")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("6 runs") and said.count("S = ") == 2 and said.count("by the law") == 4
    assert len(list(tmp_path.glob("grid/nano_grid/*/result.json"))) == 9  # one run is in both
