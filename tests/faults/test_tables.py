"""Tables of other tools, rows of later versions and damaged files give the right number or one line."""

import csv
import gzip
import json
import math
import random
import shutil
import subprocess
from decimal import Decimal

import pandas
import pytest

from scaling_testbed import analyze
from scaling_testbed import api as st
from scaling_testbed.analysis.rows.study import load
from scaling_testbed.errors import UserError
from tests.analysis.conftest import make_row
from tests.analysis.rows.test_published import DATA

LAW = {
    "E": 1.82,
    "A": 482.0,
    "B": 2085.0,
    "alpha": 0.3478,
    "beta": 0.3658,
}  # Besiroglu et al. 2024
RUNS = [
    {"n_params": n, "n_tokens": d, "loss": 1.82 + 482 / n**0.3478 + 2085 / d**0.3658}
    for n in (5e7, 1e8, 2e8, 4e8)
    for d in (1e9, 4e9, 1.6e10)
]
FRAME = pandas.DataFrame(RUNS)


@pytest.fixture
def fit(capsys):
    """Returns a function from a table and options to the law that was fitted, or to the line that refuses."""

    def call(path, *typed, law="chinchilla"):
        status = analyze.main(
            ["fit", str(path), "--law", law, "--bootstrap", "0", "--starts", "4", "--json", *map(str, typed)]
        )
        said = capsys.readouterr()
        if status == 0:
            return json.loads(said.out)
        assert said.err.startswith("error: ") and said.err.count("\n") == 1 and "Traceback" not in said.err
        return said.err

    return call


def is_right(found):
    """Whether a fit found the planted law from its runs; the tolerance is that of four decimals in the losses."""
    assert isinstance(found, dict), found
    return all(math.isclose(found["params"][name], value, rel_tol=0.03) for name, value in LAW.items())


def table(path, header, line, rows=RUNS, delimiter=","):
    """A table as text. line: from the number and the three values of a run to its cells."""
    cells = [header, *(line(i, *row.values()) for i, row in enumerate(rows))]
    path.write_text("".join(delimiter.join(map(str, one)) + "\n" for one in cells))
    return path


# A9: units, states and losses


COLUMNS = [
    ("params_m", lambda n: n / 1e6, "params_m*1e6", "tokens_b", lambda d: d / 1e9, "tokens_b*1e9"),
    ("log10_N", math.log10, "10**log10_N", "log10_D", math.log10, "10**log10_D"),
    ("size", lambda n: n / 1e9, "size*1e9", "seen", lambda d: d / 1e9, "seen*1e9"),
    ("Params (M)", lambda n: n / 1e6, "Params (M)*1e6", "n_tokens", lambda d: d, None),
    ("n_params", lambda n: n, None, "D/1e9", lambda d: d / 1e9, "D/1e9*1e9"),
    ("lnN", math.log, "exp(lnN)", "n_tokens", lambda d: d, None),
    ("log_params", math.log, "exp(log_params)", "n_tokens", lambda d: d, None),  # it does not say to which base
    ("log_params", math.log10, "10**log_params", "n_tokens", lambda d: d, None),
]


@pytest.mark.fault("A9", "A column that does not count ones is refused with the --map that mends it.")
@pytest.mark.parametrize(("n_name", "n_of", "n_map", "d_name", "d_of", "d_map"), COLUMNS)
def test_a_column_in_another_unit(fit, tmp_path, record_property, n_name, n_of, n_map, d_name, d_of, d_map):
    path = table(tmp_path / "runs.csv", [n_name, d_name, "loss"], lambda i, n, d, loss: [n_of(n), d_of(d), loss])
    said = fit(path, "--map", f"n_params={n_name}", "--map", f"n_tokens={d_name}")
    record_property("seen", said)
    maps = {"n_params": n_map, "n_tokens": d_map}
    for key, typed in maps.items():
        assert (f'--map {key}="{typed}"' in said) == (typed is not None)
    typed = [f"{key}={typed or name}" for (key, typed), name in zip(maps.items(), (n_name, d_name), strict=True)]
    assert is_right(fit(path, "--map", typed[0], "--map", typed[1]))  # what the line says works


@pytest.mark.fault("A9", "A column that does not count ones is refused with the --map that mends it.")
def test_tables_in_true_units_are_not_refused(fit, tmp_path):
    nano = [{"n_params": n, "n_tokens": d, "loss": 1 + 9 / n**0.3 + 9 / d**0.3}
            for n in (5e3, 1e4, 2e4) for d in (1e5, 2e5, 4e5)]  # fmt: skip
    path = table(tmp_path / "nano.csv", ["n_params", "n_tokens", "loss"], lambda i, *cells: cells, nano)
    assert not any("look like" in text or "are these" in text for text in fit(path)["warnings"])
    both = table(tmp_path / "c.csv", ["N", "C", "loss"], lambda i, n, d, loss: [n, 6 * n * d * 1.1, loss])
    assert fit(both)["params"]["alpha"] == pytest.approx(LAW["alpha"], rel=0.05)


@pytest.mark.fault("A9", "A column that does not count ones is refused with the --map that mends it.")
@pytest.mark.parametrize(("unit", "typed"), [(1e18, "C*1e18"), (8.64e19, "C*8.64e19")])
def test_compute_in_another_unit(fit, tmp_path, unit, typed):
    path = table(tmp_path / "runs.csv", ["N", "C", "loss"], lambda i, n, d, loss: [n, 6 * n * d / unit, loss])
    assert f'--map flops="{typed}"' in fit(path, "--map", "flops=C")
    assert is_right(fit(path, "--map", f"flops={typed}"))


@pytest.mark.fault("A9", "A column that does not count ones is refused with the --map that mends it.")
def test_sizes_in_another_unit_are_seen_where_only_compute_is_fitted(tmp_path, capsys):
    table(tmp_path / "r.csv", ["N", "D", "C", "loss"], lambda i, n, d, loss: [n / 1e6, d / 1e9, 6 * n * d, loss])
    assert analyze.main(["frontier", str(tmp_path / "r.csv"), "--method", "isoflop"]) == 2
    assert '--map n_params="n_params*1e6" --map n_tokens="n_tokens*1e9"' in capsys.readouterr().err


@pytest.mark.fault("A9", "A table that holds more than one loss of each run is said to.")
def test_several_rows_of_a_run_and_several_columns_of_a_meaning(fit, tmp_path, record_property):
    steps = [{**run, "run_id": f"r{i}", "_step": step, "loss": run["loss"] + (1000 - step) / 5000}
             for i, run in enumerate(RUNS) for step in (500, 1000)]  # fmt: skip
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    (said,) = [text for text in fit(tmp_path / "history.jsonl")["warnings"] if "mid-run" in text]
    record_property("seen", said)
    assert said.startswith("24 rows are of 12 runs, e.g. run_id r0")
    path = table(tmp_path / "sizes.csv", ["name", *RUNS[0]], lambda i, n, d, loss: [f"{n / 1e6:g}M", n, d, loss])
    assert fit(path)["warnings"] == []  # a name may say the size
    copies = table(tmp_path / "copies.csv", ["name", *RUNS[0]], lambda i, *cells: [i, *cells], RUNS + RUNS[:2])
    assert "2 of 14 rows repeat another one in every column but its name" in fit(copies)["warnings"]
    both = table(tmp_path / "b.csv", [*RUNS[0], "total_params"], lambda i, n, *cells: [n, *cells, 1.2 * n])
    assert "n_params is the column n_params, and total_params has other values" in fit(both)["warnings"][0]


@pytest.mark.fault("A9", "A column that does not count ones is refused with the --map that mends it.")
def test_a_unit_in_the_header_and_in_the_cells_counts_once(fit, tmp_path):
    header = ["Params (M)", "Tokens (B)", "loss"]
    path = table(tmp_path / "r.csv", header, lambda i, n, d, loss: [f"{n / 1e6:g}M", f"{d / 1e9:g} B", loss])
    typed = ["--map", "n_params=Params (M)", "--map", "n_tokens=Tokens (B)"]
    assert '--map n_params="Params (M)" --map n_tokens="Tokens (B)";' in fit(path)
    assert is_right(fit(path, *typed))


@pytest.mark.fault("A9", "A decimal comma is refused, also where it could part thousands.")
@pytest.mark.parametrize("name", ["loss", "quality"])
def test_a_decimal_comma_with_three_decimals(fit, tmp_path, name):
    path = table(tmp_path / "r.tsv", ["n_params", "n_tokens", name],
                 lambda i, n, d, loss: [n, d, f"{loss:.3f}".replace(".", ",")], delimiter="\t")  # fmt: skip
    assert "write the decimal comma as a point" in fit(path, "--map", f"loss={name}")


STATES = [
    ("wandb", ["Name", "State"], {"finished": True, "crashed": False, "killed": False, "failed": False}),
    ("mlflow", ["run_id", "status"], {"FINISHED": True, "FAILED": False, "KILLED": False, "RUNNING": False}),
    ("optuna", ["number", "state"], {"COMPLETE": True, "PRUNED": False, "FAIL": False, "TrialState.COMPLETE": True}),
    ("slurm", ["JobName", "State"], {"COMPLETED": True, "CANCELLED by 1000": False, "TIMEOUT": False}),
    ("neptune", ["sys/id", "sys/failed"], {"False": True, "True": False}),
    ("clearml", ["Name", "STATUS"], {"published": True, "aborted": False, "in_progress": False}),
    ("a column of another name", ["Name", "Outcome"], {"success": True, "failure": False, "killed": False}),
    ("a prefix", ["Name", "job_status"], {"done": True, "queued": False}),
    ("true and false", ["Name", "is_finished"], {"true": True, "false": False}),
    ("yes and no", ["Name", "hasCrashed"], {"no": True, "Yes": False}),
    ("one and zero", ["Name", "completed"], {"1": True, "0": False}),
    ("exit codes", ["JobID", "ExitCode"], {"0:0": True, "1:0": False, "0:9": False}),
]


@pytest.mark.fault("A9", "Unfinished runs of common exports are left out and counted.")
@pytest.mark.parametrize(("tool", "names", "words"), STATES, ids=[one[0] for one in STATES])
def test_states_of_other_tools(fit, tmp_path, record_property, tool, names, words):
    finished = [word for word, done in words.items() if done]
    bad = [word for word, done in words.items() if not done]
    rows = [(word, run) for i, run in enumerate(RUNS) for word in [finished[i % len(finished)]]]
    rows += [(word, {**RUNS[i], "loss": 11.0}) for i, word in enumerate(bad)]  # where a crashed run stood
    path = tmp_path / f"{tool}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow([*names, "n_params", "n_tokens", "val_loss"])
        writer.writerows([f"r{i}", word, *run.values()] for i, (word, run) in enumerate(rows))
    found = fit(path)
    (said,) = [text for text in found["warnings"] if "left out" in text]
    record_property("seen", said)
    assert is_right(found) and found["n_rows"] == len(RUNS) and said.startswith(f"{len(bad)} runs are not finished")


@pytest.mark.fault("A9", "A status that no tool writes is asked about, and a column that is no status is left alone.")
def test_words_that_are_no_states(fit, tmp_path):
    for column, refused in (("status", True), ("State", False)):
        header = [column, "n_params", "n_tokens", "loss"]
        said = fit(table(tmp_path / "runs.csv", header, lambda i, *cells: ["Ohio", *cells]))
        assert ("none is a known state of a run" in said) if refused else is_right(said)


@pytest.mark.fault("A9", "Unfinished runs of common exports are left out and counted.")
def test_a_run_that_is_marked_as_diverged(fit, tmp_path):
    marks = iter([False] * len(RUNS) + [True])
    rows = [*RUNS, {**RUNS[0], "loss": 9.0}]
    found = fit(table(tmp_path / "runs.csv", [*RUNS[0], "Diverged"], lambda i, *cells: [*cells, next(marks)], rows))
    assert is_right(found) and "1 diverged runs are left out" in found["warnings"]


@pytest.mark.fault("A9", "A perplexity, bits or logarithm in place of nats is said with the --map that mends it.")
@pytest.mark.parametrize(
    ("column", "of", "mend"),
    [
        ("ppl", math.exp, "log(ppl)"),
        ("quality", lambda loss: math.exp(loss) * 2, "log(quality)"),
        ("score", lambda loss: math.exp(loss - 0.8), "log(score)"),  # some of them below a uniform guess
        ("log10_loss", math.log10, "10**log10_loss"),
        ("result", math.log10, "10**result"),
        ("val_bits", lambda loss: loss / math.log(2), "val_bits*0.693147"),
        ("log_likelihood", lambda loss: -loss, "log_likelihood*-1"),
    ],
)
def test_losses_in_another_unit(fit, tmp_path, record_property, column, of, mend):
    path = table(tmp_path / "runs.csv", ["n_params", "n_tokens", column], lambda i, n, d, loss: [n, d, of(loss)])
    said = fit(path, "--map", f"loss={column}")
    said = "; ".join(said["warnings"]) if isinstance(said, dict) else said
    record_property("seen", said)
    assert f'--map loss="{mend}"' in said
    if column not in ("quality", "score"):
        assert is_right(fit(path, "--map", f"loss={mend}"))


# C: files and headers


def _index(path):
    FRAME.set_index("n_params").to_parquet(path)


def _decimal(path):
    FRAME.assign(loss=[Decimal(f"{loss:.6f}") for loss in FRAME.loss]).to_parquet(path)


def _spark(path):
    path.mkdir()
    FRAME[:6].to_parquet(path / "part-00000.snappy.parquet")
    FRAME[6:].to_parquet(path / "part-00001.snappy.parquet")
    (path / "_SUCCESS").write_text("")


def _lines(path):
    rows = ({**row, "note": "a\u2028b\u0085c"} for row in RUNS)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _r(path):
    FRAME.to_csv(path, sep="\t")
    path.write_text(path.read_text().lstrip("\t"))  # write.table: no header above the names of the rows


def _sheet(path):
    table(path, ['"Params"', '"Training Tokens"', '"Val Loss"'],
          lambda i, n, d, loss: [f'"{n:,.0f}"', f'"{d:,.0f}"', f" {loss:.6f} "])  # fmt: skip


FILES = {
    "pandas with an index.csv": lambda path: FRAME.to_csv(path),
    "tabs.tsv": lambda path: FRAME.to_csv(path, sep="\t", index=False),
    "semicolons.csv": lambda path: FRAME.to_csv(path, sep=";", index=False),
    "bars.txt": lambda path: FRAME.to_csv(path, sep="|", index=False),
    "packed.csv.gz": lambda path: FRAME.to_csv(path, index=False),
    "packed.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(FRAME.to_json(orient="records", lines=True).encode())
    ),
    "mark.csv": lambda path: FRAME.to_csv(path, index=False, encoding="utf-8-sig"),
    "Excel's Unicode text.txt": lambda path: FRAME.to_csv(path, sep="\t", index=False, encoding="utf-16"),
    "Excel's note.csv": lambda path: path.write_text("sep=;\n" + FRAME.to_csv(sep=";", index=False)),
    "R's write.csv.csv": lambda path: path.write_text('""' + FRAME.to_csv()),
    "R's write.table.tsv": _r,
    "Google Sheets.csv": _sheet,
    "suffixes.csv": lambda path: table(
        path, ["params", "tokens", "loss"], lambda i, n, d, loss: [f"{n / 1e6:g}M", f"{d / 1e9:g} B", loss]
    ),
    "texts.parquet": lambda path: FRAME.astype(str).to_parquet(path),
    "index.parquet": _index,
    "decimal.parquet": _decimal,
    "Spark.parquet": _spark,
    "lines of another name.json": lambda path: FRAME.to_json(path, orient="records", lines=True),
    "list of another name.jsonl": lambda path: FRAME.to_json(path, orient="records", indent=1),
    "separators of lines.jsonl": _lines,
    "nested as the API of Weights & Biases.json": lambda path: path.write_text(json.dumps([
        {"state": "finished", "config": {"n_params": str(n), "n_tokens": d}, "summary": {"eval/loss": loss}}
        for n, d, loss in (row.values() for row in RUNS)
    ])),
}  # fmt: skip


@pytest.mark.fault("C: tables of other tools", "Files of common tools are read right without --map.")
@pytest.mark.parametrize("name", FILES)
def test_files_of_other_tools(fit, tmp_path, name):
    FILES[name](tmp_path / name)
    found = fit(tmp_path / name)
    assert is_right(found) and found["n_rows"] == len(RUNS)


@pytest.mark.fault("C: tables that cannot be read", "A file that is no table of runs is refused with what to do.")
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("runs.xlsx", b"PK\x03\x04", "save its sheet as CSV"),
        ("runs.csv", b"PK\x03\x04", "save its sheet as CSV"),
        ("runs.csv", b"n;l\n7e7;3,45\n", "runs.csv:2 has the number '3,45': write the decimal comma as a point"),
        ("runs.csv", b'n_params,loss\n"70000000,0","3,45"\n', "write the decimal comma as a point"),
        ("runs.csv", "n,größe\n".encode("latin-1"), "is not UTF-8; save it as UTF-8"),
        ("runs.csv", "n,l\n1,2\n".encode("utf-16-le"), "save it as UTF-8"),
        ("runs.csv", b"n_params,loss,loss \n1,2,3\n", "more than one column loss"),
        ("runs.csv", b"n_params,n_tokens,loss\n1e6,1e7,3\n2e6,1", "runs.csv:3 has fewer cells than the header"),
        ("runs.csv", b"Wall time,Step,Value\n1.7e9,1,3.2\n", "holds curves over steps"),
        ("runs.csv", b'"Step","a - val_loss","a - val_loss__MIN"\n1,3,3\n', "holds curves over steps"),
        (
            "runs.json",
            b'{"columns": [], "data": []}',
            'rows, as pandas writes with orient="records"',
        ),
        ("runs.jsonl", b'{"n_params": 1e8, "n_params": 2e8}\n', "'n_params' is there twice"),
        ("runs.jsonl", b"[" * 30_000, "runs.jsonl"),
        ("runs.jsonl.gz", gzip.compress(b'{"loss": 3}\n' * 99, mtime=0)[:-9], "cannot read"),
        ("runs.parquet", b"PAR1PAR1", "cannot read"),
    ],
)
def test_what_is_no_table_of_runs(fit, tmp_path, record_property, name, content, said):
    (tmp_path / name).write_bytes(content)
    found = fit(tmp_path / name)
    record_property("seen", found)
    assert said in found and name in found


@pytest.mark.fault("C: no such column", "A column that is not there lists those that are, the nearest first.")
def test_the_columns_that_there_are(fit, tmp_path, record_property):
    header = ["Params (M)", "Tokens (B)", "c4_loss", *(f"x{i}" for i in range(400))]
    path = table(tmp_path / "wide.csv", header, lambda i, n, d, loss: [n / 1e6, d / 1e9, loss, *range(400)])
    said = fit(path)
    record_property("seen", said)
    maps = [f"n_params={header[0]}*1e6", f"n_tokens={header[1]}*1e9", "loss=c4_loss"]
    for typed in maps:
        assert typed in said.replace('"', "")
    assert "and 393 more" in said and len(said) < 500
    assert is_right(fit(path, *(word for typed in maps for word in ("--map", typed))))
    assert "the columns are Params (M), " in fit(path, "--map", "n_params=params m")
    assert "the keys are c4_loss, " in fit(path, *(w for t in maps for w in ("--map", t)), "--where", "c4_lss<3")


@pytest.mark.fault("C: --where", "true and false match in any spelling; a value that no row has lists those there are.")
def test_conditions(fit, tmp_path, record_property):
    header = ["n_params", "n_tokens", "loss", "ok", "data"]
    bad = [{**run, "loss": 9.0} for run in RUNS[:3]]
    lines = [(run, i < len(RUNS)) for i, run in enumerate([*RUNS, *bad])]
    cells = iter(lines)
    path = table(tmp_path / "runs.csv", header, lambda i, *three: [*three, next(cells)[1], "c4"], [*RUNS, *bad])
    for typed in ("ok=True", "ok='TRUE'", "ok!=False"):
        found = fit(path, "--where", typed)
        assert found["n_rows"] == len(RUNS) and is_right(found)
    said = fit(path, "--where", "ok=yes")
    record_property("seen", said)
    assert "no row matches ok=yes; ok is true, false" in said
    assert "no row matches data=C4; data is c4" in fit(path, "--where", "data=C4")
    assert "no row matches data=pile; data is c4" in fit(path, "--where", "data!=pile")
    assert "no row matches n_params>1T; n_params is 5e+07, 1e+08, 2e+08, 4e+08" in fit(path, "--where", "n_params>1T")
    assert "nothing" not in fit(path, "--where", "ok=true", "--hold-out", "n_params=400M")
    both = fit(path, "--where", "n_params=50M", "--where", "loss<2.6")  # each has rows, and both together have none
    assert "no row matches loss<2.6; loss is 2.69" in both.replace("from ", "")
    assert "the columns are n_params, " in fit(path, "--size", "n_params_non_embedding")


@pytest.mark.fault("C: empty results", "Rows whose loss is empty, nan or infinite are left out and counted.")
def test_rows_without_a_result(fit, tmp_path, record_property):
    rows = [*RUNS, *({**RUNS[0], "loss": word} for word in ("", "NaN", "inf", "#N/A"))]
    found = fit(table(tmp_path / "runs.csv", list(RUNS[0]), lambda i, *cells: cells, rows))
    (said,) = [text for text in found["warnings"] if "left out" in text]
    record_property("seen", said)
    assert is_right(found) and said.startswith("4 rows have no finite loss and are left out")
    words = table(tmp_path / "r.csv", list(RUNS[0]), lambda i, *cells: cells, [*RUNS, {**RUNS[0], "loss": "TBD"}])
    assert '--where "loss!=TBD" to leave such rows out' in fit(words)
    assert is_right(fit(words, "--where", "loss!=TBD"))  # what the line says works


@pytest.mark.fault("A9", "A percentage in place of a share is said with the --map that mends it.")
def test_an_accuracy_in_percent(fit, tmp_path):
    path = table(tmp_path / "r.csv", ["loss", "Accuracy (%)"], lambda i, n, d, loss: [loss, 100 - 20 * loss])
    assert "a percentage: --map accuracy=accuracy/100" in fit(path, law="loss_to_error")
    assert "params" in fit(path, "--map", "accuracy=accuracy/100", law="loss_to_error")


@pytest.mark.fault("A9", "Tables that were published are read right without --map where their headers are plain.")
@pytest.mark.skipif(not DATA.is_dir(), reason="the published tables are not at hand")
def test_published_tables(fit):
    gemstones = fit(DATA / "gemstones_hot220.csv")
    assert gemstones["n_rows"] == 220 and gemstones["params"]["E"] == pytest.approx(2.149, abs=0.02)
    repeated = fit(DATA / "datablations182.csv")
    assert repeated["n_rows"] == 182 and not [text for text in repeated["warnings"] if "are these" in text]
    assert "--map loss=c4_loss" in fit(DATA / "olmo_ladder_c4.csv")
    assert fit(DATA / "olmo_ladder_c4.csv", "--map", "loss=c4_loss", "--where", "mult!=0.5xC")["n_rows"] > 19
    assert '--map n_params="size_M*1e6"' in fit(DATA / "loss_curves_25m_nine_schedules.csv")


# A15: rows of later versions and damaged files


def study(folder):
    """The folder of a sweep of seven rates, with run folders, a plan and sweep.json."""
    rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    rows = [{"schema_version": 1, **make_row(lr, 3.0 + lr, run_id=f"run{i}")} for i, lr in enumerate(rates)]
    folder.mkdir()
    for row in rows:
        (folder / row["run_id"]).mkdir()
        (folder / row["run_id"] / "result.json").write_text(json.dumps(row))
        lines = ({"step": step, "val_loss": 3.0} for step in range(3))
        (folder / row["run_id"] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = ({"run_id": f"run{i}", "config": {"optimizer.lr": lr}, "varied": {}} for i, lr in enumerate((*rates, 1.0)))
    (folder / "plan.jsonl").write_text("".join(json.dumps(line) + "\n" for line in plan))
    (folder / "sweep.json").write_text(json.dumps({"sweep": "qknorm_lr"}))
    return folder


@pytest.mark.fault("A15", "Rows, plans, sweeps and laws of a later version are refused with the file's name.")
@pytest.mark.parametrize("name", ["run3/result.json", "plan.jsonl", "sweep.json", "results.jsonl", "rows.csv"])
def test_a_later_version(tmp_path, capsys, record_property, name):
    place = study(tmp_path / "sweep")
    path = place / name
    if name == "results.jsonl":
        (place / "run0" / "result.json").rename(path)
        path = path.rename(tmp_path / name)
    elif name == "rows.csv":
        (tmp_path / name).write_text("schema_version,optimizer.lr,val_loss,val_loss_initial\n99,1e-3,3,9\n")
        path = tmp_path / name
    if name != "rows.csv":
        lines = path.read_text().splitlines()
        lines[0] = json.dumps({**json.loads(lines[0]), "schema_version": 99})
        path.write_text("\n".join(lines) + "\n")
    given = place if place in path.parents else path
    for command in (["lr_sensitivity", str(given)], ["report", str(given)]):
        assert analyze.main(command) == 1
        said = capsys.readouterr().err
        assert (
            str(path) in said and "a later version of this project (schema_version 99" in said and said.count("\n") == 1
        )
    record_property("seen", said)
    with pytest.raises(UserError, match="schema_version 99"):
        st.load_rows(given)


@pytest.mark.fault("A15", "Rows, plans, sweeps and laws of a later version are refused with the file's name.")
def test_a_later_version_of_a_law(fit, tmp_path, capsys):
    path = tmp_path / "fit.json"
    path.write_text(
        json.dumps({**fit(table(tmp_path / "runs.csv", list(RUNS[0]), lambda i, *c: c)), "schema_version": 2})
    )
    for command in (["predict", str(path), "--n-params", "1e8", "--n-tokens", "1e9"], ["report", str(path)]):
        assert analyze.main(command) == 1
        assert f"{path} was written by a later version" in capsys.readouterr().err
    with pytest.raises(UserError, match="a later version"):
        st.predict(path, n_params=1e8, n_tokens=1e9)


@pytest.mark.fault("C: copies of a run", "A copy of a run does not count twice, and one that differs is refused.")
def test_a_copy_of_a_run_counts_once(tmp_path, capsys, record_property):
    folder = study(tmp_path / "sweep")
    copy, joined = folder / "run3.bak" / "result.json", tmp_path / "joined.jsonl"
    shutil.copytree(folder / "run3", copy.parent)
    assert len(load(folder).rows) == 7 and "1 more rows of the same runs" in capsys.readouterr().err
    joined.write_text(2 * "".join(path.read_text() + "\n" for path in folder.glob("run?/result.json")))
    assert len(load(joined).rows) == 7
    row = json.loads(copy.read_text())
    copy.write_text(json.dumps(row | {"status": "preempted", "val_loss": None}))  # copied before its end
    found = load(folder)
    assert len(found.rows) == 7 and [one["run_id"] for one in found.missing] == ["run7"]
    copy.write_text(json.dumps(row | {"val_loss": 2.0}))
    with pytest.raises(UserError, match="has run run3 twice, with val_loss 3.01 and 2"):
        load(folder)
    record_property("seen", "7 rows of 8 files; refused where they differ")


@pytest.mark.fault("C: damaged records in analysis", "A damaged plan, row, law or sweep.json is one line.")
@pytest.mark.parametrize("name", ["run3/result.json", "plan.jsonl", "sweep.json"])
def test_damaged_records_are_one_line(tmp_path, capsys, name):
    place, rng = study(tmp_path / "sweep"), random.Random(0)
    path, seen = place / name, 0
    whole = path.read_bytes()
    odd = ('{"status": "finished"}', "[]", "null", "{}", '"x"', "[" * 30_000, '{"run_id": ["a"]}', '{"sweep": 3}',
           '{"run_id": "run7", "config": "x"}', '{"run_id": "run7", "config": {"a": 1}, "varied": [1]}',
           '{"run_id": "run3", "status": {"finished": 1}, "val_loss": 3}', '{"paper": ["x"]}')  # fmt: skip
    for content in [b"\xff\xfe\x00", *map(str.encode, odd), *(_mutated(whole, rng) for _ in range(30))]:
        path.write_bytes(content)
        status = analyze.main(["lr_sensitivity", str(place), "--json", "--out", str(tmp_path / "s.json")])
        said = capsys.readouterr().err
        assert status in (0, 1) and "Traceback" not in said and (status == 0 or said.count("\n") == 1)
        seen += status
    assert seen > 9


def _mutated(content, rng):
    """The content with one byte changed, or without a part."""
    place = rng.randrange(len(content))
    if rng.random() < 0.5:
        return content[:place] + bytes([content[place] ^ (1 << rng.randrange(7))]) + content[place + 1 :]
    return content[:place] + content[place + rng.randrange(1, 40) :]


@pytest.mark.fault("C: damaged records in analysis", "A damaged plan, row, law or sweep.json is one line.")
def test_a_damaged_law_is_one_line(fit, tmp_path, capsys):
    rng, path, seen = random.Random(1), tmp_path / "fit.json", 0
    record = fit(table(tmp_path / "runs.csv", list(RUNS[0]), lambda i, *cells: cells))
    whole = json.dumps(record).encode()
    odd = [json.dumps({**record, key: value}).encode() for key in record for value in (None, "x", [[1]])]
    for content in [*odd, b"[]", b"{}", *(_mutated(whole, rng) for _ in range(20))]:
        path.write_bytes(content)
        commands = [["predict", str(path), "--n-params", "1e8", "--n-tokens", "1e9"], ["report", str(path)]]
        for command in commands[: 2 if content in odd[:2] else 1]:
            status = analyze.main(command)
            said = capsys.readouterr().err
            assert status in (0, 1) and "Traceback" not in said and (status == 0 or path.name in said), content
            seen += status
    assert seen > 30


# A16: S


@pytest.mark.fault("A16", "S is withheld unless the rates cover its range, and the line says what to type.")
def test_s_of_rates_that_do_not_cover_the_range(tmp_path, capsys, record_property, python):
    header = ["lr", "n_params", "val_loss", "val_loss_initial"]
    path = tmp_path / "rows.csv"
    with open(path, "w") as file:
        print(",".join(header), *(f"{lr},1e6,{3 + lr},9" for lr in (1e-3, 1e-2)), sep="\n", file=file)
    words = ["-m", "scaling_testbed.analyze", "lr_sensitivity", str(path), "--json", "--out", str(tmp_path / "s.json")]
    done = subprocess.run([python, *words], capture_output=True, text=True, cwd=tmp_path)
    (row,) = json.loads(done.stdout)["rows"]
    record_property("seen", row["withheld"])
    assert done.returncode == 0 and row["S"] is None and "--lr-range 0.001,0.01 gives S" in row["withheld"]
    assert analyze.main([*words[2:], "--lr-range", "0.001,0.01"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["S"] == pytest.approx(0.0045) and (row["lr_low"], row["lr_high"]) == (0.001, 0.01)
    page = tmp_path / "page.html"
    assert analyze.main(["report", str(path), "--lr-range", "0.001,0.01", "--out", str(page)]) == 0
    assert "0.0045" in page.read_text() and "gives S over" not in page.read_text()


# C: what else a person can cause


@pytest.mark.fault("C: envelope of one size", "A law of the best size is not fitted to budgets of one best size.")
def test_an_envelope_with_one_best_size(tmp_path, capsys, record_property):
    """At every budget that three sizes have reached, the middle one is the best."""
    rows = [
        (n, d, 3 + abs(math.log10(n / 1e8)) + 1e9 / d) for n in (1e7, 1e8, 1e9) for d in (1e9 * 1e8 / n, 8e9 * 1e8 / n)
    ]
    rows += [(1e10, d, 2.0 + 9e9 / d) for d in (2e8, 3e8)]  # wins elsewhere, as the largest size
    path = tmp_path / "runs.csv"
    path.write_text("n_params,n_tokens,loss\n" + "".join(f"{n},{d},{loss}\n" for n, d, loss in rows))
    assert analyze.main(["frontier", str(path), "--method", "envelope"]) == 1
    said = capsys.readouterr().err
    record_property("seen", said)
    assert said.count("\n") == 1 and "same size is the best" in said or "is the best size of all" in said


@pytest.mark.fault("C: wrong types in Python", "The API refuses values of a wrong type in one line.")
@pytest.mark.parametrize(
    "call",
    [
        lambda: st.predict("a"),
        lambda: st.predict(FRAME, n_params=1e8),
        lambda: st.predict(None),
        lambda: st.allocate(3, flops=1e20),
        lambda: st.report(FRAME),
        lambda: st.report(RUNS),
        lambda: st.fit(5),
        lambda: st.fit(None),
        lambda: st.fit(RUNS, law=5),
        lambda: st.fit(RUNS, where=5),
        lambda: st.fit(RUNS, columns="n_params=N"),
        lambda: st.fit(RUNS, starts="many"),
        lambda: st.fit(RUNS, fix=[1]),
        lambda: st.fit(RUNS, size=3),
        lambda: st.lr_sensitivity(RUNS, lr_range=5),
        lambda: st.lr_sensitivity(RUNS, lr_range=("a", "b")),
        lambda: st.lr_sensitivity([1, 2]),
        lambda: st.instability(RUNS, threshold="high"),
        lambda: st.load_rows(RUNS, where=[3]),
    ],
)  # fmt: skip
def test_values_of_a_wrong_type(call):
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
