"""The prepared data that a run is trained and evaluated on."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.batches import ONLY, TrainingBatches, ValidationBatches
from scaling_testbed.data.shards import PreparedData, open_prepared
from scaling_testbed.data.targets import Targets, grid_of, open_targets
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.errors import ConfigError, UserError
from scaling_testbed.evaluation.corpus_tasks import with_made
from scaling_testbed.evaluation.multiple_choice import ChoiceTask, read_tasks
from scaling_testbed.evaluation.scoring import Questions

MAIN_SET = "validation"


def open_training_batches(run: RunConfig, data: PreparedData) -> TrainingBatches:
    """The training split of the run's `data`, in the run's own order."""
    batch, sources, rule = run.batch, data.sources() or {ONLY: data}, run.data.online_rule
    return TrainingBatches(
        {name: source.train for name, source in sources.items()},
        sequence_length=batch.sequence_length,
        sequences=batch.sequences,
        seed=run.seed,
        skipped=run.data.skip_steps,
        weights=run.data.weights_by_step({name: source.train.n_tokens for name, source in sources.items()}),
        largest_share=0.0 if rule is None else rule.largest_share(len(sources)),
        cutting=batch.cutting,
    )


def open_targets_of(run: RunConfig, folder: Path, data: PreparedData) -> Targets:
    """The stored targets in a folder. Raises UserError unless they are of the run's own sequences of its `data`."""
    targets = open_targets(folder)
    targets.check_grid(grid_of(data, run.batch.sequence_length, run.batch.cutting))
    return targets


def open_sets(run: RunConfig, data: PreparedData) -> dict[str, PreparedData]:
    """The run's own `data`, as MAIN_SET, the sources of a mixture, and every corpus in evaluation.sets, by name.

    Raises ConfigError for a set in evaluation.sets that has the name of another set, or another tokenizer.
    """
    own = {MAIN_SET: data, **data.sources()}
    found = dict(own)
    for name, path in run.evaluation.sets.items():
        if name in own:
            raise ConfigError(f"evaluation.sets.{name}: this is the name of the run's own set; choose another")
        other = open_prepared(Path(path))
        if _vocabulary(other) != _vocabulary(data):
            raise ConfigError(f"evaluation.sets.{name}: {path} has another tokenizer than {data.folder}")
        found[name] = other
    return found


def open_validation_sets(run: RunConfig, sets: dict[str, PreparedData], rows: int) -> dict[str, ValidationBatches]:
    """The validation split of each of the sets, in batches of `rows` sequences."""
    length, tokens, cutting = run.batch.sequence_length, int(run.evaluation.tokens), run.batch.cutting
    return {
        name: ValidationBatches(
            prepared.validation, sequence_length=length, max_tokens=tokens, rows=rows, cutting=cutting
        )
        for name, prepared in sets.items()
    }


def read_task_files(run: RunConfig) -> list[ChoiceTask]:
    """The tasks of evaluation.tasks that are files. Raises UserError or ConfigError, which names key and file."""
    with _said_of_tasks():
        return read_tasks(run.evaluation.task_files)


def open_questions(run: RunConfig, files: Sequence[ChoiceTask], data: PreparedData) -> Questions:
    """The questions of evaluation.tasks, in its order. files: its tasks that are files; the others are made of the
    validation split of `data`, in memory, because runs that start together have the same.

    Raises UserError, which names the key, if `data` has no tokenizer, or too little text for a task, or if a choice is
    longer than the sequences in training.
    """
    config = run.evaluation
    if not config.tasks:
        return Questions((), [])
    with _said_of_tasks():
        tokenizer, known = load_tokenizer(data.folder), {task.path: task for task in files}
        named = [known.get(Path(task), task) for task in config.tasks]
        tasks = with_made(named, data.folder, config, option="evaluation.task_questions")
        return Questions.of(tasks, tokenizer, run.batch.sequence_length)


@contextlib.contextmanager
def _said_of_tasks() -> Iterator[None]:
    """Context manager that names the key in an error about tasks, and what else can be done."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"evaluation.tasks: {error}; mend this, or leave evaluation.tasks out") from None


def _vocabulary(data: PreparedData) -> tuple[str | None, int]:
    """The values that two corpora must share so that one model can be evaluated on both."""
    return data.tokenizer_fingerprint, data.vocab_size
