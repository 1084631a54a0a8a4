"""What tables of other tools call a column and the state of a run, and their numbers written as text."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from decimal import Decimal
from difflib import SequenceMatcher
from typing import Any

from scaling_testbed.errors import UserError
from scaling_testbed.runs import row as own

Row = dict[str, Any]
OWN_MAPPINGS = tuple(f.name for f in fields(own.Row) if "dict" in str(f.type) and f.name in own.ROW_FIELDS)

# This testbed's column -> the headers that mean it, in the form of `plain_name`.
SPELLINGS: Mapping[str, Sequence[str]] = {
    "n_params": (
        *("n_params", "params", "parameters", "num_params", "num_parameters", "n_parameters", "param_count"),
        *("parameter_count", "total_params", "total_parameters", "model_params", "model_parameters", "nparams"),
        *("number_of_parameters", "num_model_params", "n_total_params", "params_total"),
    ),
    "n_params_non_embedding": (
        *("n_params_non_embedding", "non_embedding_params", "params_non_embedding", "non_embedding_parameters"),
        *("nonembedding_params", "num_non_embedding_params", "n_non_embedding_params", "non_emb_params"),
    ),
    "n_tokens": (
        *("n_tokens", "tokens", "num_tokens", "train_tokens", "training_tokens", "n_train_tokens", "total_tokens"),
        *("tokens_seen", "num_train_tokens", "token_count", "number_of_tokens", "ntokens", "n_training_tokens"),
    ),
    "unique_tokens": ("unique_tokens", "n_unique_tokens", "num_unique_tokens"),
    "tokens_per_param": ("tokens_per_param", "tokens_per_parameter"),
    "flops": ("flops", "flop", "total_flops", "train_flops", "training_flops", "training_flop", "compute", "n_flops"),
    "val_loss": (
        *("val_loss", "validation_loss", "valid_loss", "eval_loss", "dev_loss", "loss_val", "final_val_loss"),
        *("final_validation_loss", "final_eval_loss", "val_cross_entropy", "validation_cross_entropy", "val_ce"),
    ),
    "val_loss_initial": ("val_loss_initial", "initial_val_loss", "initial_loss", "loss_initial", "val_loss_init"),
    "loss": ("loss", "final_loss", "test_loss", "cross_entropy", "ce_loss", "nll"),
    "lr": ("lr", "learning_rate", "peak_lr", "max_lr", "peak_learning_rate", "max_learning_rate"),
    "seed": ("seed", "random_seed"),
    "steps": ("steps", "n_steps", "num_steps", "train_steps", "training_steps"),
    "epochs": ("epochs", "n_epochs", "num_epochs"),
    "batch_tokens": ("batch_tokens", "tokens_per_batch", "tokens_per_step", "batch_size_tokens"),
    "accuracy": ("accuracy", "acc"),
    "error": ("error", "error_rate"),
}
LETTERS = {"N": "n_params", "D": "n_tokens", "U": "unique_tokens", "C": "flops", "L": "loss"}  # as in the papers
# Groups of columns in exports of Weights & Biases, MLflow, Optuna, Neptune and Comet: `config.lr`, `metrics.val_loss`.
GROUPS = re.compile(
    r"^(data_)?(config|params|parameters|hparams|hyperparameters|metrics|summary|user_attrs|attributes|args|sys|info)_"
    r"(?=.)"
)
NUMBERS = (*SPELLINGS, "optimizer.lr", "value", "batch.sequences", "batch.sequence_length")
SMALL = ("val_loss", "val_loss_initial", "loss", "lr", "optimizer.lr", "accuracy", "error")  # never in thousands
STATES = ("status", "state", "run_state", "run_status", "job_state", "job_status", "trial_state")
FINISHED = (
    *("finished", "finish", "completed", "complete", "success", "succeeded", "successful", "done", "ok", "published"),
)
DIVERGED = ("diverged", "nan", "exploded")
UNFINISHED = (
    *("crashed", "killed", "failed", "fail", "failure", "error", "errored", "running", "pending", "queued", "waiting"),
    *("scheduled", "preempting", "preempted", "cancelled", "canceled", "aborted", "interrupted", "stopped", "timeout"),
    *("timed_out", "out_of_memory", "oom", "node_fail", "boot_fail", "deadline", "pruned", "suspended", "hopeless"),
    *("starting", "submitted", "created", "incomplete", "unfinished", "terminated", "revoked", "missing", "planned"),
    "requeued",
)
# Columns of true and false, also with is_, has_ or was_ before the word, and of the status with which a process ends.
ENDED = ("finished", "completed", "complete", "success", "succeeded", "successful", "done")
FAILED = (
    *("failed", "crashed", "killed", "aborted", "cancelled", "canceled", "interrupted", "errored", "running"),
    *("preempted", "timed_out", "oom", "out_of_memory"),
)
EXIT_STATUS = ("exit_code", "exitcode", "exit_status", "return_code", "returncode")
TRUE, FALSE = ("true", "yes", "y", "1", "1.0"), ("false", "no", "n", "0", "0.0")
TEXTS = re.compile(r"(^|_)(id|name|label|hash|sha|sha256|commit|fingerprint)$")


def plain_name(column: str) -> str:
    """A header in small letters with `_` between its words: `Val Loss`, `val/loss` and `valLoss` are val_loss."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column)
    return re.sub(r"[\W_]+", "_", words).strip("_").lower()


def meaning(column: str) -> str | None:
    """This testbed's name of a column of another tool; None if it is unknown."""
    if column in LETTERS:
        return LETTERS[column]
    name = plain_name(column)
    for form in (name, GROUPS.sub("", name)):
        for ours, spellings in SPELLINGS.items():
            if form in spellings:
                return ours
    return None


def is_text(column: str) -> bool:
    """Whether a column names things. Its cells may look like numbers, such as the run_id 12e345678901."""
    return TEXTS.search(plain_name(column)) is not None


def nearest_first(word: str, known: Iterable[Any], most: int = 10) -> str:
    """The known words in one text, the most similar to `word` first: `most` of them, and how many others there are."""
    words = list(dict.fromkeys(map(str, known)))
    asked = plain_name(word)
    words.sort(key=lambda one: -SequenceMatcher(None, asked, plain_name(one)).ratio())
    shown = ", ".join(one if len(one) <= 60 else f"{one[:59]}…" for one in words[:most])
    return shown + (f" and {len(words) - most} more" if len(words) > most else "")


# Numbers as text.

SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s?([kKmMbBgGtT]?)")
GROUPED = re.compile(r"[+-]?[1-9]\d{0,2}(?:([,'’_ \u00a0\u2009\u202f])\d{3})(?:\1\d{3})*(?:\.\d+)?")
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?")
NOTHING = ("", "na", "n/a", "#n/a", "nan", "null", "none", "-", "--", "?", "#div/0!", "#value!", "#ref!", "#num!")


def number_in(value: Any) -> float | int | None:
    """The number of a cell, or None: a number that a float can hold, or a text such as `70M`, `1,000` or `35%`."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return value if isinstance(value, float) or abs(value) < 10**300 else None
    if not isinstance(value, str):
        return None
    text = value.strip()
    if text.endswith("%") and (share := number_in(text[:-1])) is not None:
        return share / 100
    if GROUPED.fullmatch(text):
        text = re.sub(r"[,'’_ \u00a0\u2009\u202f]", "", text)
    if text.lower().lstrip("+-") in ("inf", "infinity"):
        return float(text)
    if (match := NUMBER.fullmatch(text)) is None:
        return None
    digits, suffix = match.groups()
    factor = SUFFIXES[suffix.lower()]
    return int(digits) if factor == 1 and digits.lstrip("+-").isdigit() else float(digits) * factor


def has_decimal_comma(ours: str, value: Any) -> bool:
    """Whether a cell of our column `ours` is a number with a decimal comma. 3,456 is one where no value has thousands,
    as in a loss."""
    text = value.strip() if isinstance(value, str) else ""
    return bool(DECIMAL_COMMA.fullmatch(text)) and (ours in SMALL or not GROUPED.fullmatch(text))


def plain(value: Any) -> Any:
    """A value as Python's own: scalars of NumPy and PyTorch and decimals as numbers, text without lone surrogates."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, Decimal):
        return int(value) if value == value and value.as_tuple().exponent == 0 else float(value)
    if isinstance(value, (dict, list, tuple)):
        return value
    return value.tolist() if hasattr(value, "tolist") else value


# Tables as a whole.


def in_our_columns(rows: Sequence[Row]) -> list[Row]:
    """Rows of other tools with this testbed's columns beside their own.

    Nested objects also become columns, as `config.lr`. A column of ours is added if exactly one of theirs means it, or
    several that agree. Numbers that were written as text become numbers in columns of ours. Raises UserError if one of
    these has a decimal comma.
    """
    rows = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    meanings = {one: meaning(one) for one in columns}
    for ours in (one for one in SPELLINGS if one in meanings.values() and one not in columns):
        theirs = [one for one in columns if meanings[one] == ours]
        theirs = [one for one in theirs if any(number_in(row.get(one)) is not None for row in rows)]
        if theirs and all(row.get(one) == row.get(theirs[0]) for row in rows for one in theirs):
            rows = [{**row, ours: row[theirs[0]]} if theirs[0] in row else row for row in rows]
    name = next((one for one in columns if plain_name(one) in ("name", "run_name")), "name")
    rows = rows if name == "name" else [{**row, "name": row.get(name)} for row in rows]
    return [_with_numbers(row, place) for place, row in enumerate(rows, 1)]


def _flat(row: Row) -> Row:
    """The row with the entries of nested objects as columns beside them."""
    found: Row = {}

    def walk(prefix: str, entry: Mapping) -> None:
        for key, value in entry.items():
            name = f"{prefix}{key}"
            found.setdefault(name, plain(value))
            if isinstance(value, Mapping) and key not in OWN_MAPPINGS:
                walk(f"{name}.", value)

    walk("", row)
    return found


def _with_numbers(row: Row, place: int) -> Row:
    written = {key: row[key] for key in NUMBERS if isinstance(row.get(key), str)}
    for key, value in written.items():
        if has_decimal_comma(key, value):
            raise UserError(f"row {place}: {key} is {value.strip()!r}: write the decimal comma as a point")
    read = {key: None if value.strip().lower() in NOTHING else number_in(value) for key, value in written.items()}
    known = {key: value for key, value in read.items() if value is not None or written[key].strip().lower() in NOTHING}
    return {**row, **known}


def with_states(rows: Sequence[Row]) -> list[Row]:
    """Rows of other tools with this testbed's `status`: finished, diverged, or the word of an unfinished run.

    The word is read from `status`, from columns such as `State` or `job_status` if one of its words is known, from
    columns that hold nothing but states, from columns of true and false such as `finished`, and from exit codes. Raises
    UserError if `status` has words and none of them is known.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    states = [one for one in columns if _has_states(rows, one)]
    if "status" in columns and "status" not in states:
        words = [row["status"] for row in rows if row.get("status") is not None]
        if words:
            raise UserError(
                f"the column status has {nearest_first('finished', words, 6)}, and none is a known state of a run; "
                "rename the column if it is something else, or write finished"
            )
        states.append("status")
    marks = {one: word for one in columns if one not in states and (word := _mark(rows, one))}
    return [_with_state(row, states, marks) for row in rows] if states or marks else list(rows)


def truth(value: Any) -> bool | None:
    """What a cell of true and false says; None if it is neither."""
    word = str(value).strip().lower()
    return True if word in TRUE else False if word in FALSE else None


def _has_states(rows: Iterable[Row], column: str) -> bool:
    """Whether a column holds states: one in a column of that name, else in each cell that is not empty."""
    words = [_state(row[column]) for row in rows if isinstance(row.get(column), str)]
    others = any(row.get(column) is not None and not isinstance(row[column], str) for row in rows)
    known = [word in (*FINISHED, *DIVERGED, *UNFINISHED) for word in words]
    if re.fullmatch(rf"(?:.*_)?(?:{'|'.join(STATES)})", GROUPS.sub("", plain_name(column))):
        return any(known)
    return bool(words) and not others and all(known) and any(word in UNFINISHED for word in words)


def _mark(rows: Iterable[Row], column: str) -> str | None:
    """The word that a column of true and false, or of exit codes, has as its name; None for any other column."""
    word = re.sub(r"^(is|has|was)_", "", GROUPS.sub("", plain_name(column)))
    values = [row[column] for row in rows if row.get(column) is not None]
    if word in EXIT_STATUS:
        return word
    return word if word in (*ENDED, *FAILED, *DIVERGED) and all(truth(one) is not None for one in values) else None


def _said_by(mark: str, value: Any) -> str | None:
    """The state of a run that the value of a mark says; None if it says nothing bad."""
    if value is None:
        return None
    if mark in EXIT_STATUS:
        return None if re.fullmatch(r"0(\.0|:0)?", str(value)) else f"{mark} {value}"
    if mark in ENDED:
        return None if truth(value) else f"{mark} is {value}"
    return mark if truth(value) else None


def _state(word: Any) -> str:
    """A state in small letters: `TrialState.COMPLETE` is complete, `CANCELLED by 1000` is cancelled."""
    said = re.split(r"[ +]", str(word).strip().lower().rpartition(".")[2])[0]
    return "timed_out" if said == "timed" else said


def _with_state(row: Row, states: Sequence[str], marks: Mapping[str, str]) -> Row:
    """The row with its status. marks: the columns of true and false and of exit codes, and their words."""
    said = [row[one] for one in states if row.get(one) is not None]
    bad = [word for word in said if _state(word) not in (*FINISHED, *DIVERGED)]
    marked = [word for one, mark in marks.items() if (word := _said_by(mark, row.get(one)))]
    bad += [word for word in marked if word not in DIVERGED]
    if bad:
        return {**row, "status": str(bad[0])}
    if any(_state(word) in DIVERGED for word in (*said, *marked)):
        return {**row, "status": "diverged"}
    if said:
        return {**row, "status": "finished"}
    return {key: value for key, value in row.items() if key != "status"}
