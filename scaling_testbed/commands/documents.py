"""The commands about the documents of a prepared corpus: score_documents, select_documents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from scaling_testbed.commands import output
from scaling_testbed.commands.options import Average, Json, OutTable, Where
from scaling_testbed.errors import ConfigError, UserError, check_choice
from scaling_testbed.row_files import ENDINGS

NamedRuns = Annotated[
    Sequence[str],
    typer.Argument(metavar="[NAME=]RUN_DIR", help="finished runs; NAME is that of their columns (default: the run_id)"),
]
CORPUS = typer.Option("--data", metavar="DATA_DIR", help="a prepared corpus, data/NAME")
Corpus = Annotated[Path, CORPUS]
Split = Annotated[str, typer.Option("--split", metavar="NAME", show_default=True, help="train or validation")]
Gradient = Annotated[
    bool, typer.Option("--gradient", help="also the norm of the gradient of each document, which takes much longer")
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="only the first N documents (default: all)")]
ScoreTable = Annotated[Path, typer.Argument(metavar="TABLE", help="a file of `score_documents --out`")]
Column = Annotated[
    Sequence[str],
    typer.Option(
        "--column", metavar="NAME=EXPRESSION",
        help='a further column, such as "gap=loss_small-loss_large" or "late=rank(gap)"; repeatable',
    ),
]  # fmt: skip
Kept = Annotated[
    Path, typer.Option("--out", metavar="FILE.json", help="the file of the kept documents, for data=filtered")
]


def score_documents(
    runs: NamedRuns,
    data: Corpus,
    split: Split = "train",
    gradient: Gradient = False,
    limit: Limit = None,
    average: Average = False,
    as_json: Json = False,
    out: OutTable = (),
) -> None:
    """Score each document of a prepared corpus by finished runs: loss, EL2N and norm of the gradient.

    --out writes a row for each document: its place, its source, its tokens, and loss_NAME and el2n_NAME of each run.
    `select_documents` chooses documents by this table."""
    from scaling_testbed.data.manifest import SPLITS

    check_choice("--split", split, SPLITS)
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit must be greater than zero; got {limit}")
    from scaling_testbed.config.compose import recorded_run
    from scaling_testbed.evaluation import document_scores as found

    folders = found.named_runs(runs)
    recorded = {name: recorded_run(folder) for name, folder in folders.items()}
    output.check(out, ENDINGS)
    from scaling_testbed.data.shards import open_prepared

    corpus = open_prepared(data)
    scorers = [
        found.open_scorer(name, recorded[name], folder, corpus, average=average) for name, folder in folders.items()
    ]
    rows = found.score_documents(scorers, corpus, split, gradient=gradient, limit=limit)
    summary = found.summaries(rows, scorers)
    written = output.write(out, rows)
    if as_json:
        output.print_json({"split": split, "runs": summary, "documents": rows})
        return
    from scaling_testbed import tables

    print(f"{len(rows):,} documents of the {split} split of {data}")
    tables.show(summary)
    print(found.DEFINITION)
    output.say_written(written)


def select_documents(
    table: ScoreTable, data: Corpus, out: Kept, column: Column = (), where: Where = (), as_json: Json = False
) -> None:
    """Choose training documents of a corpus by a table of their scores, for data=filtered.

    Conditions are on the columns of the table and those that --column adds. Functions: rank(x), the share of documents
    with a smaller x; ordered(a,b,...), the share of pairs of losses that fall in this order, which is PreSelect's
    score; draw(document), a random number for each document; log, exp, sqrt, abs, min, max."""
    from scaling_testbed.analysis.rows.conditions import parse
    from scaling_testbed.analysis.rows.expressions import with_columns
    from scaling_testbed.analysis.rows.tables import read_table
    from scaling_testbed.data.shards import open_prepared
    from scaling_testbed.data.sources.filtered import write_kept
    from scaling_testbed.evaluation.document_scores import check_table

    if not where:
        raise ConfigError('--where is missing: write a condition such as --where "loss_NAME<2.5"')
    output.check([out], (".json",), [table])
    corpus, rows = open_prepared(data), read_table(table)
    check_table(table, rows, corpus)
    rows = with_columns("--column", column, rows)
    conditions = [parse("--where", typed, rows) for typed in where]
    kept = [row for row in rows if all(fits(row) for fits in conditions)]
    if not kept:
        raise UserError(f"{table}: no document fits all conditions; give a wider --where")
    tokens = sum(row["n_tokens"] for row in kept)
    about = {"corpus": corpus.folder.name, "columns": list(column), "where": list(where), "n_tokens": tokens}
    write_kept(out, corpus, [row["document"] for row in kept], about)
    summary = {"documents": len(kept), "of": len(rows), "tokens": tokens, "of_tokens": corpus.train.n_tokens}
    if as_json:
        output.print_json(summary)
        return
    print(f"kept {len(kept):,} of {len(rows):,} documents, {tokens:,} of {corpus.train.n_tokens:,} tokens")
    output.say_written([out])
