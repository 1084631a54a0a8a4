"""Multiple-choice tasks made of a corpus itself, for models that are too small for published ones.

The questions come from the validation split, which no model was trained on. The same corpus, number and seed give the
same questions. Three kinds:

- continuation: which of four pieces of text follows? The others begin lines elsewhere.
- identifier: which of four identifiers follows? The right one occurs in the context, and the others do not.
- bracket: which closing bracket follows, ")", "]" or "}"? Each is right equally often.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np

from scaling_testbed.config.sections import TASKS_OF_CORPUS, EvaluationConfig
from scaling_testbed.data.shards import open_prepared
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.multiple_choice import ChoiceTask, parse_task, read_tasks
from scaling_testbed.files import write_text
from scaling_testbed.tables import prepare

CONTEXT, CONTINUATION = 160, 32  # characters
LEAST_TEXT = CONTEXT + 2 * CONTINUATION  # characters of a document
MISSES = 2000  # attempts in a row that give no new question, after which there are no more
IDENTIFIER = re.compile(r"\b[A-Za-z_]\w{3,}\b")
BRACKETS = (")", "]", "}")

Question = dict[str, object]  # context, choices, gold


def make_tasks(folder: Path, out: Path, number: int = 400, seed: int = 0) -> dict[str, Path]:
    """Write a file of `number` questions of each kind into `out`, from the corpus that is prepared in `folder`.

    Returns the paths by kind. Raises UserError as `files_of_tasks` does.
    """
    files = files_of_tasks(folder, TASKS_OF_CORPUS, number, seed, option="--questions")
    prepare(out)
    paths = {kind: out / f"{kind}.jsonl" for kind in files}
    for kind, text in files.items():
        write_text(paths[kind], text)
    return paths


def files_of_tasks(folder: Path, kinds: Sequence[str], number: int, seed: int, *, option: str) -> dict[str, str]:
    """The text of a file of `number` questions, by kind. option: what sets the number, for messages.

    Raises UserError if the corpus has no tokenizer, or too little text for a kind.
    """
    texts = validation_texts(folder)
    if not texts:
        raise UserError(
            f"{folder}: no validation document has {LEAST_TEXT} characters; use a corpus with longer documents"
        )
    found = {}
    for kind in kinds:
        questions = _distinct(KINDS[kind], texts, number, Random(f"{seed}/{kind}"))
        if len(questions) < number:
            raise UserError(
                f"{folder}: its validation split gives {len(questions)} of {number} questions of kind {kind}; ask for "
                f"fewer with {option}, or use a corpus with more validation text"
            )
        found[kind] = "".join(json.dumps(question) + "\n" for question in questions)
    return found


def read_named(names: Sequence[Path]) -> list[ChoiceTask | str]:
    """The tasks that `names` are: files, and names of TASKS_OF_CORPUS, which `with_made` makes. Raises UserError or
    ConfigError as `read_tasks` does, also for a file with the name of another task."""
    kinds = [str(name) for name in names if str(name) in TASKS_OF_CORPUS]
    files = [name for name in names if str(name) not in TASKS_OF_CORPUS]
    if unknown := [name for name in files if not name.suffix and not name.exists()]:
        raise ConfigError(f"there is no task {unknown[0]}; give a .jsonl file, or {', '.join(TASKS_OF_CORPUS)}")
    known = {task.path: task for task in read_tasks(files)}
    stems = [*kinds, *(task.name for task in known.values())]
    if twice := [name for name in kinds if stems.count(name) > 1]:
        raise ConfigError(f"two tasks are named {twice[0]}; leave one out, or rename the file")
    return [known.get(name, str(name)) for name in names]


def with_made(
    tasks: Sequence[ChoiceTask | str], folder: Path, config: EvaluationConfig, *, option: str
) -> list[ChoiceTask]:
    """`tasks` in their order, with those that are names made of the corpus in `folder`, in memory. config: it has the
    number of questions and their seed. option: as for `files_of_tasks`, which raises UserError."""
    kinds = [task for task in tasks if isinstance(task, str)]
    if not kinds:
        return [task for task in tasks if not isinstance(task, str)]
    made = files_of_tasks(folder, kinds, config.task_questions, config.task_seed, option=option)
    return [parse_task(Path(task), made[task].encode()) if isinstance(task, str) else task for task in tasks]


def validation_texts(folder: Path) -> list[str]:
    """The documents of a corpus's validation split that are long enough, in their order. Raises UserError if a mask
    leaves tokens out, because a question could then ask for what no model was trained to say."""
    prepared, tokenizer = open_prepared(folder), load_tokenizer(folder)
    if prepared.validation.is_masked:
        raise UserError(
            f"{folder}: some of its tokens are no targets of the loss (data.prompt_field or data.answers_only), and "
            "tasks are made of whole texts; name a file of a task"
        )
    tokens = np.asarray(prepared.validation.read(0, prepared.validation.n_tokens))
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    texts = map(tokenizer.decode, np.split(tokens, ends))
    return [text for text in texts if len(text) >= LEAST_TEXT]


def _distinct(make: Callable, texts: Sequence[str], number: int, random: Random) -> list[Question]:
    """Questions with different contexts: `number` of them, or as many as are found before MISSES misses in a row."""
    found: dict[object, Question] = {}
    misses = 0
    while len(found) < number and misses < MISSES:
        question = make(texts, len(found), random)
        is_new = question is not None and question["context"] not in found
        misses = 0 if is_new else misses + 1
        if question is not None and is_new:
            found[question["context"]] = question
    return list(found.values())


def _question(context: str, right: str, others: Sequence[str], random: Random) -> Question | None:
    """A question with its choices in random order; None if two choices are equal."""
    choices = [right, *others]
    if len(set(choices)) < len(choices):
        return None
    random.shuffle(choices)
    return {"context": context, "choices": choices, "gold": choices.index(right)}


def _line_start(texts: Sequence[str], random: Random) -> tuple[str, int] | None:
    """A text, and the place of a line in it that has a context before it and a continuation after it."""
    text = random.choice(texts)
    at = text.find("\n", random.randrange(CONTEXT, len(text))) + 1
    enough = CONTEXT <= at <= len(text) - CONTINUATION
    return (text, at) if enough and text[at : at + CONTINUATION].strip() else None


def _continuation(texts: Sequence[str], number: int, random: Random) -> Question | None:
    places = [_line_start(texts, random) for _ in range(4)]
    known = [place for place in places if place is not None]
    if len(known) < 4:
        return None
    (text, at), *_ = known
    right, *others = (own[place : place + CONTINUATION] for own, place in known)
    return _question(text[at - CONTEXT : at], right, others, random)


def _identifier(texts: Sequence[str], number: int, random: Random) -> Question | None:
    text = random.choice(texts)
    start = random.randrange(CONTEXT, len(text))
    found = IDENTIFIER.search(text, start)
    if found is None:
        return None
    context, right = text[found.start() - CONTEXT : found.start()], found[0]
    there = set(IDENTIFIER.findall(context))
    if right not in there:
        return None
    elsewhere = random.choice(texts)
    begin = random.randrange(len(elsewhere))
    window = IDENTIFIER.findall(elsewhere[begin : begin + 20 * CONTEXT])
    others = sorted({name for name in window if name not in there and abs(len(name) - len(right)) <= 2})
    return _question(context, right, random.sample(others, 3), random) if len(others) >= 3 else None


def _bracket(texts: Sequence[str], number: int, random: Random) -> Question | None:
    text, right = random.choice(texts), BRACKETS[number % len(BRACKETS)]
    at = text.find(right, random.randrange(CONTEXT, len(text)))
    if at < 0:
        return None
    return _question(text[at - CONTEXT : at], right, [one for one in BRACKETS if one != right], random)


KINDS = dict(zip(TASKS_OF_CORPUS, (_continuation, _identifier, _bracket), strict=True))
