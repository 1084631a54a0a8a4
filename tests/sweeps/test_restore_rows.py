"""The rows of an unfinished study, put back, are finished runs of the same sweep."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "restore_rows.py"


@pytest.fixture
def restore_rows():
    spec = importlib.util.spec_from_file_location("restore_rows", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_a_sweep_goes_on_from_the_rows_that_are_put_back(door, untrained, states, restore_rows, tmp_path, capfd):
    planned = json.loads(door("plan", "--json")[1])
    rows = [
        {"run_id": run["run_id"], "name": "tiny", "status": "finished", "steps": 4, "val_loss": 2.5}
        for run in planned[:3]
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.sweep.json").write_text('{"sweep": "tiny"}')
    assert restore_rows([str(file), str(tmp_path / "runs")]) == 0 and "3 runs put into" in capfd.readouterr().out
    about = tmp_path / "runs" / "tiny" / "sweep.json"
    assert json.loads(about.read_text()) == {"sweep": "tiny"}
    about.write_text("{}")
    assert sorted(state["state"] for state in states().values()) == ["finished"] * 3 + ["pending"]
    assert restore_rows([str(file), str(tmp_path / "runs")]) == 0
    assert "0 runs put into" in capfd.readouterr().out and about.read_text() == "{}"
    file.write_text('{"run_id": "a"}\n')
    assert restore_rows([str(file)]) == 2 and "rows.jsonl:1 is no row of a run" in capfd.readouterr().err
    assert restore_rows([]) == 2 and "usage:" in capfd.readouterr().err
