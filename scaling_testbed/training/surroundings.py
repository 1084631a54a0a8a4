"""What an objective can use when it is built: the run's sequences, and the weights in which the run begins."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from scaling_testbed.config.run import RunConfig
from scaling_testbed.data.batches import ONLY, TrainingBatches
from scaling_testbed.data.cutting import Batch, Cut, of_all
from scaling_testbed.data.shards import PreparedData, TokenStream
from scaling_testbed.evaluation.teacher import frozen_model
from scaling_testbed.learning.config import CrossEntropyConfig
from scaling_testbed.learning.objectives import Given, Stream, Surroundings
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.processes.device import autocast, to_device
from scaling_testbed.processes.group import Processes
from scaling_testbed.runs import checkpoint, state
from scaling_testbed.runs.folder import RunFolder
from scaling_testbed.training.data import open_targets_of
from scaling_testbed.training.parent import check_tokenizer, read_parent

Paths = tuple[ModelConfig, CrossEntropyConfig, torch.device, str]  # resolved: model, loss, device and precision


def surroundings(
    run: RunConfig, folder: RunFolder, processes: Processes, data: PreparedData, batches: TrainingBatches, paths: Paths
) -> Surroundings:
    """The surroundings of the objective of `run`, whose own data are `data`."""
    _, _, device, precision = paths
    start = run.start
    return Surroundings(
        folder=folder.path,
        device=device,
        precision=precision,
        on_main=processes.on_main,
        load_model=lambda path, step: processes.together(
            lambda: frozen_model(path, step=step, device=device, data=data)
        ),
        open_targets=lambda path: processes.together(lambda: open_targets_of(run, path, data)),
        streams=_streams(run, data, batches),
        start=None if start.run is None else {"run_id": start.run_id, "step": start.number},
        losses_at_start=lambda: _losses_at_start(run, data, paths),
    )


def _streams(run: RunConfig, data: PreparedData, batches: TrainingBatches) -> dict[str, Stream]:
    prepared = data.sources() or {ONLY: data}
    _, weights = run.data.weights_by_step({name: one.train.n_tokens for name, one in prepared.items()})[0]
    return {
        name: Stream(
            rows=run.batch.sequences * weights.get(name, 0.0) / sum(weights.values()),
            targets=of_all(cut.each_targets, cut.number) / max(1, cut.number),
            data_fingerprint=prepared[name].fingerprint,
            documents=_documents(run, prepared[name].train),
        )
        for name, cut in batches.cuts.items()
    }


def _documents(run: RunConfig, stream: TokenStream) -> Callable[[], Cut]:
    cutting = dataclasses.replace(run.batch.cutting, document_masking=stream.eos_id is not None)
    return lambda: cutting.of(stream, run.batch.sequence_length)


def _losses_at_start(run: RunConfig, data: PreparedData, paths: Paths) -> Callable[[Batch], np.ndarray]:
    config, loss, device, precision = paths
    check_tokenizer(run.start, read_parent(run.start), data)
    model = Transformer(config, run.parametrization, device=device)
    model.narrow_residual = run.compute.residual_dtype == "bf16"
    path = run.start.checkpoint
    state.load_weights(model, checkpoint.read(path).tensors.get("model"), path)
    model.eval()

    @torch.no_grad()
    def losses(batch: Batch) -> np.ndarray:
        seen = batch.explicit().map(lambda x: to_device(x, device))
        begins_BT = seen.begins_BT if run.batch.document_masking else None
        with autocast(device, precision):
            given = Given(
                tokens_BS=seen.tokens_BS,
                targets_BT=seen.targets_BT,
                begins_BT=begins_BT,
                hidden_BTD=model(seen.tokens_BS[:, :-1], begins_BT),
                weight_VD=model.head_weight_VD,
                softcap=config.final_softcap,
                loss=loss,
                beside={},
            )
            return np.asarray(given.ce_BT().double().cpu())

    return losses
