"""Runs as models of EleutherAI's lm-evaluation-harness, without an export. Only this module imports lm_eval.

Importing it registers the model `scaling_testbed` with lm_eval. The harness finds only models that are registered, so
its command line starts by `python -m scaling_testbed.lm_eval`, which imports this module first.

What the harness asks for, and what it gets:

- A text and its continuation are tokenised as by `analyze score`, so both give the same log-likelihoods.
- Tasks that ask for the likelihood of a whole text: it follows EOS, as a document in training does. A text that is
  longer than the model reads is split, and each part is scored after as many tokens as fit before it.
- A context that is too long loses its beginning. While a text is written, the model reads its last tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from scaling_testbed.config.compose import recorded_run
from scaling_testbed.data.records import dataset_of
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.errors import ConfigError, UserError, check_positive, first_line
from scaling_testbed.evaluation.corpus_tasks import with_made
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.evaluation.multiple_choice import ChoiceTask, Continuation, pair_continuations
from scaling_testbed.evaluation.sampling import Sampling, Writer
from scaling_testbed.evaluation.scoring import FEWER, greedy_log_likelihoods, place_of
from scaling_testbed.learning.loss_model import LossModel
from scaling_testbed.plugins import load_plugins
from scaling_testbed.processes.device import choose_precision

NAME = "scaling_testbed"
TOKENS = 256  # that are written where a task sets no limit, as by lm_eval's own models
# What a task may ask of a text that is written. Other settings would change the text, so they are refused.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFINITION = (
    "acc is 1 - the error of `analyze score`. acc_norm divides log-likelihoods by the characters of a choice, with\n"
    "its leading space. Other metrics are those of the task"
)
SETTINGS = ("until", "do_sample", "temperature", "top_k", "seed", *LENGTHS)


@register_model(NAME)
class RunLM(LM):
    """A checkpoint of the run in `run_dir`, the newest unless `step` is given.

    average: the average of its weights. max_length: how many tokens the model reads at most, by default as many as in
    training. plugins: modules or .py files that the run needs and that are not installed. device: "cpu", or None for
    the best one; a GPU that is not there is None, because the harness asks for one by default. batch_size and
    max_batch_size change nothing: batches are made by tokens. Raises ConfigError for another word or without
    run_dir, and UserError as `load_model` does.
    """

    def __init__(
        self,
        run_dir: str | None = None,
        step: int | None = None,
        average: bool = False,
        max_length: int | None = None,
        plugins: str | Sequence[str] = (),
        device: str | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **others: Any,
    ):
        super().__init__()
        if others:
            raise ConfigError(
                f"model_args has no {', '.join(others)}; it has run_dir, step, average, max_length and plugins"
            )
        if run_dir is None:
            raise ConfigError("model_args needs the run: run_dir=runs/NAME/RUN_ID")
        load_plugins([plugins] if isinstance(plugins, str) else plugins)
        folder = Path(run_dir)
        self.run = recorded_run(folder)
        check_positive("max_length", max_length)
        self.max_length = max_length or self.run.batch.sequence_length
        self._device, self.precision = place_of(self.run)
        if device is not None and torch.device(device).type == "cpu":
            self._device = torch.device("cpu")
            self.precision = choose_precision(self.run.compute, self._device)
        self.step, model, data = load_model(self.run, folder, step=step, device=self._device, average=average)
        self.tokenizer, self.data = load_tokenizer(data.folder), data
        self.name = f"step {self.step} of {folder}"
        self.model = LossModel(model, self.run.loss)
        self.writer = Writer(model, self.tokenizer, self.max_length, self._device, self.precision, self.name)

    @property
    def tokenizer_name(self) -> str:
        """A name for lm_eval's caches of requests."""
        return f"{NAME}-{self.data.tokenizer_fingerprint}"

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): the log-likelihood in nats, and whether it is what the model would write.

        Raises UserError for a continuation without a token, or with more tokens than the model reads.
        """
        asked = [one.args for one in requests]
        made = pair_continuations([(a, b) for a, b in asked], self.tokenizer, max_length=self.max_length)
        for (_, text), one in zip(asked, made, strict=True):
            if not 1 <= one.n_scored <= self.max_length:
                raise UserError(
                    f"a continuation has {one.n_scored} tokens ({text[:40]!r}); at least one and at most "
                    f"{self.max_length} can be scored (batch.sequence_length of the run, or max_length)"
                )
        return self._answered("loglikelihood", asked, self._scored(made))

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """For each (text,): the log-likelihood of all its tokens in nats, after EOS. 0 for an empty text."""
        asked = [one.args for one in requests]
        ids = self.tokenizer.encode_batch([text.encode() for (text,) in asked])
        windows = [list(rolling(tokens, self.tokenizer.eos_id, self.max_length)) for tokens in ids]
        values = iter(self._scored([one for row in windows for one in row]))
        found = [float(sum(next(values)[0] for _ in row)) for row in windows]
        return self._answered("loglikelihood_rolling", asked, found)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): the text that the model writes after the context, up to the first of `until`,
        the end of a document or the limit of tokens. Raises UserError for a setting that is not in SETTINGS."""
        asked = [one.args for one in requests]
        found = [self._written(context, settings, number) for number, (context, settings) in enumerate(asked)]
        return self._answered("generate_until", asked, found)

    def _scored(self, sequences: list[Continuation]) -> list[tuple[float, bool]]:
        found = greedy_log_likelihoods(self.model, sequences, device=self._device, precision=self.precision)
        if not np.isfinite([value for value, _ in found]).all():
            raise UserError(f"{self.name} gives log-likelihoods that are not finite: has the run diverged?")
        return found

    def _answered(self, kind: str, asked: Sequence[tuple], found: list) -> list:
        for request, answer in zip(asked, found, strict=True):
            self.cache_hook.add_partial(kind, request, answer)
        return found

    def _written(self, context: str, settings: Mapping[str, Any], number: int) -> str:
        until = settings.get("until") or []
        stops = [one for one in ([until] if isinstance(until, str) else until) if one]
        how = _sampling(settings)
        begin = self.tokenizer.encode_batch([context.encode()])[0].tolist() or [self.tokenizer.eos_id]
        before, tokens, text = self.tokenizer.decode(begin), list(begin), ""
        for token in self.writer.tokens_after(begin, how, np.random.default_rng((how.seed, number))):
            tokens.append(token)
            text = _rest(self.tokenizer, tokens, before, len(begin))
            ends = [at for stop in stops if (at := text.find(stop)) >= 0]
            if ends:
                return text[: min(ends)]
        return text


def _rest(tokenizer, tokens: list[int], before: str, n_before: int) -> str:
    """The text of `tokens` after that of the first `n_before`, which alone are the text `before`. A tokenizer that
    joins words reads the space at their start only together with what is before them."""
    whole = tokenizer.decode(tokens)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens[n_before:])


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """How a text is written. Without do_sample it is the likeliest token each time, as lm_eval asks by default."""
    if odd := sorted(set(settings) - set(SETTINGS)):
        raise UserError(f"generation setting {odd[0]} is not supported; there are {', '.join(SETTINGS)}")
    limits = [int(settings[name]) for name in LENGTHS if settings.get(name) is not None]
    temperature = settings.get("temperature")
    drawn = bool(settings.get("do_sample", temperature not in (None, 0, 0.0))) and temperature not in (0, 0.0)
    try:
        return Sampling(
            tokens=limits[0] if limits else TOKENS,
            temperature=(1.0 if temperature is None else float(temperature)) if drawn else 0.0,
            top_k=(settings.get("top_k") or None) if drawn else None,
            seed=int(settings.get("seed") or 0),
        )
    except ConfigError as error:  # in the words of `sample`
        raise UserError(f"generation settings {dict(settings)}: {error}") from None


def rolling(tokens: np.ndarray, eos_id: int, max_length: int) -> Iterator[Continuation]:
    """The parts of a text, each token of which is scored once. The first part follows EOS. Each other one is scored
    after as many of the tokens before it as fit, and the last one is thus read with a full context."""
    ids, end = np.concatenate([[eos_id], np.asarray(tokens, np.int64)]), 1
    while end < len(ids):
        n_scored = min(max_length, len(ids) - end)
        end += n_scored
        yield Continuation(ids[max(0, end - max_length - 1) : end], n_scored, truncated=False, apart=False)


def harness_task(task: ChoiceTask) -> dict[str, Any]:
    """A task of this project as one of lm_eval."""
    rows = [{"context": one.context, "choices": list(one.choices), "gold": one.gold} for one in task.documents]
    metrics = ("acc", "acc_norm")
    return {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": dataset_of(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        "metadata": {"version": task.sha256[:12]},
    }


def evaluate(
    model: RunLM,
    names: Sequence[str],
    own: Sequence[ChoiceTask | str],
    *,
    include: Path | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """What lm_eval finds on its tasks `names` and on the tasks `own` of this project: files, and names of tasks of the
    run's corpus (corpus_tasks.read_named).

    include: a folder with further tasks as YAML files. fewshot: examples in front of each question. limit: questions of
    each task. Raises ConfigError for a task that lm_eval does not have, and UserError if it cannot read one's data.
    """
    # It reads thousands of files to know its own tasks.
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=bool(names))
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ConfigError(
            f"--tasks {unknown[0]}: lm_eval has no such task; give one of its names, a .jsonl file, or continuation, "
            "identifier or bracket (a folder of YAML files goes with --include)"
        )
    made = with_made(own, model.data.folder, model.run.evaluation, option=FEWER)
    tasks = [*names, *map(harness_task, made)]
    try:
        found = simple_evaluate(model, tasks=tasks, task_manager=manager, num_fewshot=fewshot, limit=limit)
    except OSError as error:  # also of a Hub that does not answer
        said = f"lm_eval cannot read the data of {', '.join([*names, *(task.name for task in made)])}"
        raise UserError(f"{said}: {first_line(error)}") from None
    assert found is not None, "only rank 0 of several has results, and this is one process"
    return {**found, "lm_eval_version": lm_eval.__version__}


def command_line(argv: Sequence[str]) -> None:
    """Run lm_eval's own command line. Raises ConfigError for a task that lm_eval does not have."""
    sys.argv = ["lm_eval", *argv]  # it reads its arguments there
    try:
        cli_evaluate()
    except ValueError as error:
        if "Tasks not found" not in str(error):
            raise
        said = "`scaling-testbed evaluate RUN_DIR --tasks` has the tasks of the corpus and .jsonl files"
        raise ConfigError(f"lm_eval: {first_line(error)}; {said}") from None
