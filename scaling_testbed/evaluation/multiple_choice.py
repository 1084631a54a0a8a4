"""Multiple-choice tasks in files, and their questions and answers as tokens.

A task is a file of JSON lines, each {"context": str, "choices": [str, ...], "gold": int}, with gold counted from 0;
other keys are ignored. The file's stem is the task's name.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.files import without_repetition

MEAN = "mean"  # in tables, in place of a task


@dataclass(frozen=True)
class Document:
    """One question. `line` counts from 1."""

    line: int
    context: str
    choices: tuple[str, ...]
    gold: int

    @property
    def n_bytes(self) -> list[int]:
        """The length of each choice in bytes of UTF-8, without leading white space."""
        return [len(choice.lstrip().encode()) for choice in self.choices]

    @property
    def chance_error(self) -> float:
        """The expected error of a guess."""
        return 1 - 1 / len(self.choices)


@dataclass(frozen=True)
class ChoiceTask:
    """The documents of one file. sha256: of its bytes."""

    path: Path
    documents: tuple[Document, ...]
    sha256: str

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def chance_error(self) -> float:
        """The mean error of guesses."""
        return sum(one.chance_error for one in self.documents) / len(self.documents)


@dataclass(frozen=True)
class Continuation:
    """The tokens of a choice after its context. The last `n_scored` of `ids` are the choice, the others (one or more)
    are the context.

    truncated   whether tokens of the context were left out
    apart       whether context and choice had to be tokenised separately
    """

    ids: np.ndarray
    n_scored: int
    truncated: bool
    apart: bool


def remarks(tasks: Sequence[ChoiceTask]) -> list[str]:
    """What makes an error doubtful: documents that count twice, and choices between which the model cannot tell."""
    said = []
    for task in tasks:
        n_documents = len(task.documents)
        copies = n_documents - len({(one.context, one.choices, one.gold) for one in task.documents})
        equal = sum(len(set(one.choices)) < len(one.choices) for one in task.documents)
        if copies:
            said.append(f"{copies} of {n_documents} documents of {task.name} repeat another one: the se is too small")
        if equal:
            said.append(f"{equal} of {n_documents} documents of {task.name} have equal choices: the first one is taken")
    return said


def read_tasks(paths: Sequence[Path]) -> list[ChoiceTask]:
    """Read tasks from files. Raises UserError, which names file and line, and ConfigError if two have the same name."""
    tasks = [_read_task(path) for path in paths]
    seen: dict[str, Path] = {}
    for task in tasks:
        if task.name == MEAN:
            raise ConfigError(f"{task.path}: {MEAN} is the name of the mean over tasks; rename the file")
        if task.name in seen:
            raise ConfigError(f"{seen[task.name]} and {task.path} are both named {task.name}; rename one of them")
        seen[task.name] = task.path
    return tasks


def _read_task(path: Path) -> ChoiceTask:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return parse_task(path, content)


def parse_task(path: Path, content: bytes) -> ChoiceTask:
    """The task in the bytes of a file. Raises UserError, which names `path` and the line."""
    try:
        lines = content.decode("utf-8-sig").split("\n")  # not splitlines: U+2028 may stand in a JSON string
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
    documents = tuple(_parse(line, path, number) for number, line in enumerate(lines, 1) if line.strip())
    if not documents:
        raise UserError(f"{path} holds no document; each line is one: {_EXAMPLE}")
    return ChoiceTask(path, documents, hashlib.sha256(content).hexdigest())


_EXAMPLE = '{"context": "...", "choices": ["...", "..."], "gold": 0}'


def _parse(line: str, path: Path, number: int) -> Document:
    try:
        given = json.loads(line, object_pairs_hook=without_repetition)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: not JSON ({error})") from None
    if problem := _problem(given):
        raise UserError(f"{path}:{number}: {problem}")
    return Document(number, given["context"], tuple(given["choices"]), given["gold"])


def _problem(given) -> str | None:
    """What is wrong with a line's content, or None."""
    if not isinstance(given, dict):
        return f"must be an object like {_EXAMPLE}"
    for key in ("context", "choices", "gold"):
        if key not in given:
            return f"has no {key!r}; a line is {_EXAMPLE}"
    context, choices, gold = given["context"], given["choices"], given["gold"]
    if not isinstance(context, str):
        return f"context must be a text, got {json.dumps(context)[:60]}"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        return f"choices must be a list of two texts or more, got {json.dumps(choices)[:60]}"
    for place, choice in enumerate(choices):
        if not choice.strip():
            return f"choices[{place}] is blank"
    if type(gold) is not int or not 0 <= gold < len(choices):
        return f"gold must be a whole number from 0 to {len(choices) - 1}, got {json.dumps(gold)[:60]}"
    if not all(_is_unicode(text) for text in (context, *choices)):
        return "has a text with half a surrogate pair, which is not valid Unicode"
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def continuations(task: ChoiceTask, tokenizer, *, max_length: int) -> list[list[Continuation]]:
    """Each choice of each document as tokens, of which a model reads at most `max_length`.

    White space at the end of the context is moved to the start of the choice, so it does not matter on which side of
    the boundary it is written. Context and choice are then tokenised together. The tokens of the choice are those after
    the tokens of the context alone, as in EleutherAI's lm-evaluation-harness. If the joint tokens do not start with
    those of the context, because a token spans the boundary, the two are tokenised separately. An empty context becomes
    EOS, which precedes a document in training. A context that is too long loses its beginning.

    Raises UserError, which names file and line, if a choice is longer than `max_length` or has no token.
    """
    pairs = [(document.context, choice) for document in task.documents for choice in document.choices]
    made = iter(pair_continuations(pairs, tokenizer, max_length=max_length))
    found = [[next(made) for _ in document.choices] for document in task.documents]
    for document, row in zip(task.documents, found, strict=True):
        for place, one in enumerate(row):
            if not 1 <= one.n_scored <= max_length:
                raise UserError(
                    f"{task.path}:{document.line}: choices[{place}] has {one.n_scored} tokens; at least one and at "
                    f"most {max_length} can be scored (batch.sequence_length, or --max-length of `analyze score`)"
                )
    return found


def pair_continuations(pairs: Sequence[tuple[str, str]], tokenizer, *, max_length: int) -> list[Continuation]:
    """The second text of each pair as tokens after the first one, as `continuations` makes them."""
    split = [_split(context, choice) for context, choice in pairs]
    contexts, choices, wholes = (
        tokenizer.encode_batch([text.encode() for text in texts])
        for texts in ([a for a, _ in split], [b for _, b in split], [a + b for a, b in split])
    )
    return [
        _continuation(*ids, eos_id=tokenizer.eos_id, max_length=max_length)
        for ids in zip(contexts, choices, wholes, strict=True)
    ]


def _split(context: str, choice: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + choice


def _continuation(context, choice, whole, *, eos_id: int, max_length: int) -> Continuation:
    apart = len(whole) <= len(context) or not np.array_equal(whole[: len(context)], context)
    scored = choice if apart else whole[len(context) :]
    before = context if len(context) else [eos_id]
    ids = np.concatenate([np.asarray(before, np.int64), np.asarray(scored, np.int64)])
    kept = ids[-(max_length + 1) :]  # the model does not read the last token
    return Continuation(kept, len(scored), len(kept) < len(ids), apart)
