"""The prepared data that a run is trained and evaluated on."""

from pathlib import Path

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.batches import TrainingBatches, ValidationBatches
from scaling_testbed.data.shards import PreparedData, open_prepared
from scaling_testbed.errors import ConfigError

MAIN_SET = "validation"


def open_training_batches(run: RunConfig, data: PreparedData) -> TrainingBatches:
    """The training split of the run's `data`, in the run's own order."""
    batch = run.batch
    return TrainingBatches(data.train, sequence_length=batch.sequence_length, sequences=batch.sequences, seed=run.seed)


def open_sets(run: RunConfig, data: PreparedData) -> dict[str, PreparedData]:
    """The run's own `data`, as MAIN_SET, and every corpus in evaluation.sets, by name.

    Raises ConfigError for a set with the name MAIN_SET or with another tokenizer.
    """
    found = {MAIN_SET: data}
    for name, path in run.evaluation.sets.items():
        other = open_prepared(Path(path))
        if name == MAIN_SET:
            raise ConfigError(f"evaluation.sets.{name}: this is the name of the run's own set; choose another")
        if _vocabulary(other) != _vocabulary(data):
            raise ConfigError(f"evaluation.sets.{name}: {path} has another tokenizer than {data.folder}")
        found[name] = other
    return found


def open_validation_sets(run: RunConfig, sets: dict[str, PreparedData], rows: int) -> dict[str, ValidationBatches]:
    """The validation split of each of the sets, in batches.

    rows: sequences in a pass of training, and in one of an evaluation unless evaluation.rows is set.
    """
    rows = run.evaluation.rows or rows
    length, tokens = run.batch.sequence_length, int(run.evaluation.tokens)
    return {
        name: ValidationBatches(prepared.validation, sequence_length=length, max_tokens=tokens, rows=rows)
        for name, prepared in sets.items()
    }


def _vocabulary(data: PreparedData) -> tuple[str | None, int]:
    """The values that two corpora must share so that one model can be evaluated on both."""
    return data.tokenizer_fingerprint, data.vocab_size
