"""Estimate the memory of a run on each device before it is run. Does not import torch.

With N parameters over s shards (1 unless parallelism=fsdp), in bytes:

    parameters      4 N / s, fp32
    gradients       4 N / s, fp32; 4 N for fsdp with several micro-batches, which adds them up before it shards them
    averages        4 N / s for each copy of the weights that averaging keeps
    optimizer       the bytes that the optimizer keeps for a weight of each role, over s shards: 8 N / s for AdamW
    objective       what it keeps in each process: the weights of a teacher of objective=distill
    interventions   the tensors that they keep between steps, over s shards: one byte for each weight that
                    magnitude_pruning may prune
    checkpoint      with checkpoint.asynchronous on a CPU, one copy of all of these but the gradients; the copy of a
                    run on a GPU is in host memory
    working copies  single and ddp: in bf16 2 N for the matrices that autocast holds until their backward pass; in fp32
                    4 bytes for each weight of which the linear layer makes another matrix. fsdp: the tensors that are
                    whole for some time, which are embedding, head and gains with their gradients (8 bytes each), two
                    blocks (one computes, one is being gathered) in the type of the products, and the gradients of one
                    block in this type and in fp32. With model.qkv_impl=together the weights of queries, keys and values
                    once more, in the type of the products
    activations     the tensors that autograd keeps for one micro-batch, counted one by one, with qk-norm on the
                    reference path. A block that is recomputed keeps only its input, and one such block at a time is
                    kept as a whole. With batch.document_masking the tables of rotation of each sequence, and for
                    PyTorch's attention one mask of T^2 numbers for each sequence, which all layers share
    logits          the buffer of the loss head

The first four are exact except for the rounding of shards (within 0.1%, as a test checks). Activations are within 5%
of what autograd keeps on a CPU (as another test checks). Working copies and logits are computed and not compared with
measurements. The overhead of an allocator and of NCCL is not included.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from scaling_testbed.config.run import RunConfig, interventions_of
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.counting import block_matrices, weights_by_role
from scaling_testbed.model.parts import (
    ATTENTION_IMPLS,
    LINEARS,
    MLPS,
    NORMALISERS,
    NORMS,
    QKV_IMPLS,
    RESIDUALS,
    AttentionImpl,
    choose_impl,
)

# Bytes per parameter: fp32 weights, fp32 gradients; a copy in bf16.
WEIGHTS, GRADIENTS, BF16_COPY = 4, 4, 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by purpose; see the docstring of this module."""

    parameters: int
    gradients: int
    optimizer: int
    averages: int
    objective: int
    interventions: int
    checkpoint: int
    working_copies: int
    activations: int
    logits: int

    @property
    def states(self) -> int:
        """The memory that is kept between two steps, including gradients."""
        kept = self.averages + self.objective + self.interventions
        return self.parameters + self.gradients + self.optimizer + kept

    @property
    def total(self) -> int:
        return self.states + self.checkpoint + self.working_copies + self.activations + self.logits


def estimate_memory(
    run: RunConfig, model: ModelConfig, n_params: int, precision: str = "bf16", n_gpus: int = 1, device: str = "cuda"
) -> Memory:
    """Estimate the memory on each of `n_gpus` in a step of `run` with its parallelism. model: resolved, with `n_params`
    parameters. precision: bf16 or fp32. device: cpu, cuda ... For batch.micro_batch_sequences=auto it is the least that
    the run can do with: one sequence at a time."""
    parallelism = run.parallelism
    sharded = parallelism.is_sharded
    shards = (parallelism.shard_size or n_gpus) if sharded else 1
    here = -(-run.batch.sequences // n_gpus)
    rows = 1 if run.batch.is_auto else min(run.batch.micro_batch or here, here)
    tokens = rows * run.batch.sequence_length
    kept_whole = sharded and rows < here
    saved = {
        "parameters": -(-n_params * WEIGHTS // shards),
        "optimizer": -(-_optimizer_bytes(run, model) // shards),
        "averages": -(-n_params * WEIGHTS * run.averaging.copies // shards),
        "objective": run.objective.bytes_kept(model),
        "interventions": -(-sum(one.bytes_kept(model) for one in interventions_of(run).values()) // shards),
    }
    return Memory(
        **saved,
        gradients=n_params * GRADIENTS if kept_whole else -(-n_params * GRADIENTS // shards),
        checkpoint=sum(saved.values()) - saved["objective"] if run.checkpoint.asynchronous and device == "cpu" else 0,
        working_copies=_working_copies(model, n_params, precision, sharded),
        activations=tokens
        * (_kept_per_token(run, model, precision, device) + _documents(run, model, precision, device)),
        logits=run.loss.logits_bytes(tokens, model.known_vocab_size),
    )


# The part of the free memory that the estimate may fill where a run chooses its micro-batch. Buffers of the backward
# pass, the allocator's fragments and NCCL take the rest. On a CPU a run of nano_l took 1.7 times its estimate; the part
# of a GPU was not measured.
USABLE = {"cpu": 0.5, "cuda": 0.8}


def divisors(sequences: int) -> Iterator[int]:
    """The micro-batches that divide a batch of `sequences` evenly, the largest first."""
    small = [k for k in range(1, math.isqrt(sequences) + 1) if sequences % k == 0]
    return iter(sorted({*small, *(sequences // k for k in small)}, reverse=True))


def largest_micro_batch(
    run: RunConfig, model: ModelConfig, n_params: int, precision: str, n_processes: int, available: int, device: str
) -> int:
    """The most sequences in a pass of each of `n_processes` for which the estimate fits `available` bytes of a `device`
    (cpu, cuda ...); 1 if none does. It divides the part of the batch that a process has."""

    most = USABLE.get(device, USABLE["cpu"]) * available

    def fits(rows: int) -> bool:
        changed = dataclasses.replace(run, batch=dataclasses.replace(run.batch, micro_batch_sequences=rows))
        return estimate_memory(changed, model, n_params, precision, n_processes, device).total <= most

    return next((rows for rows in divisors(run.batch.sequences // n_processes) if fits(rows)), 1)


# Tokens in a pass of an evaluation, at most. On a CPU more than these leave its cache, and take longer.
MOST_EVALUATED_TOKENS = {"cpu": 8192}


def rows_of_evaluation(run: RunConfig, model: ModelConfig, precision: str, device: str, micro_batch: int) -> int:
    """Sequences in a forward pass of an evaluation of `run`, by evaluation.rows. micro_batch: those in a pass of
    training.

    With evaluation.rows=auto it is micro_batch times the greatest power of two for which an evaluation fits the
    activations and logits of a pass of training. An evaluation keeps what one block needs, and the residual stream. On
    a CPU it is halved down to MOST_EVALUATED_TOKENS. The result depends on keys and on micro_batch only, and not on the
    free memory, so a run has the same bits again."""
    if run.evaluation.rows is None:
        return micro_batch
    if isinstance(run.evaluation.rows, int):
        return run.evaluation.rows
    length, vocabulary = run.batch.sequence_length, model.known_vocab_size
    stream = 4 * model.d_model
    kept = activation_bytes_per_token(model, precision, length, device)
    block = (kept - stream) // model.n_layers if model.n_layers else 0
    documents = _documents(run, model, precision, device)
    there = micro_batch * length * (_kept_per_token(run, model, precision, device) + documents)
    there += run.loss.logits_bytes(micro_batch * length, vocabulary)
    most = MOST_EVALUATED_TOKENS.get(device, math.inf)

    def fits(rows: int) -> bool:
        tokens = rows * length
        return tokens * (block + 2 * stream + documents) + run.loss.logits_bytes(tokens, vocabulary) <= there

    rows = micro_batch
    while 2 * rows * length <= most and fits(2 * rows):
        rows *= 2
    while rows > 1 and rows * length > most:
        rows //= 2
    return rows


def _optimizer_bytes(run: RunConfig, model: ModelConfig) -> int:
    return sum(count * run.optimizer.bytes_per_weight(role) for role, count in weights_by_role(model).items())


def _working_copies(model: ModelConfig, n_params: int, precision: str, sharded: bool) -> int:
    product = BF16_COPY if precision == "bf16" else WEIGHTS
    joined = model.n_layers * model.d_model * model.head_width * (model.n_heads + 2 * model.kv_heads)
    return (joined * product if _joins(model) else 0) + _copies_of_weights(model, n_params, precision, sharded)


def _joins(model: ModelConfig) -> bool:
    return QKV_IMPLS[choose_impl("qkv_impl", model)].joins


def _copies_of_weights(model: ModelConfig, n_params: int, precision: str, sharded: bool) -> int:
    if not sharded and precision == "bf16":
        return n_params * BF16_COPY
    if not sharded:
        head = 0 if model.tied_head else model.known_vocab_size * model.d_model
        made_anew = model.n_layers * block_matrices(model) + head if LINEARS[model.linear].makes_weight_anew else 0
        return made_anew * WEIGHTS
    block = block_matrices(model) if model.n_layers else 0
    outside = n_params - model.n_layers * block
    product = BF16_COPY if precision == "bf16" else WEIGHTS
    return outside * (WEIGHTS + GRADIENTS) + block * (2 * product + product + GRADIENTS)


def _kept_per_token(run: RunConfig, model: ModelConfig, precision: str, device: str) -> int:
    """Bytes of activations per token. A recomputed block keeps only its input, in the type of the residual stream."""
    everything = activation_bytes_per_token(model, precision, run.batch.sequence_length, device)
    recompute_every = run.parallelism.activation_checkpointing
    if recompute_every is None or not model.n_layers:
        return everything
    block = (everything - 4 * model.d_model) // model.n_layers
    stream = model.d_model * (BF16_COPY if run.compute.residual_dtype == "bf16" else 4)
    recomputed = -(-model.n_layers // recompute_every)
    return everything - recomputed * (block - stream) + block


def _documents(run: RunConfig, model: ModelConfig, precision: str, device: str) -> int:
    """Bytes per token of what tells documents apart, for all layers together: three tables of rotation over whole heads
    in fp32, and the mask of a path that takes one."""
    if not run.batch.document_masking:
        return 0
    length, path = run.batch.sequence_length, ATTENTION_IMPLS[choose_impl("attention_impl", model)]
    wide = precision == "fp32" or _is_widened(path, device, precision, length * model.head_width)
    mask = length * (4 if wide else BF16_COPY) if path.masks else 0
    return 3 * 4 * model.head_width + mask


def _is_widened(path: AttentionImpl, device: str, precision: str, keys: int) -> bool:
    return device == "cpu" and precision == "bf16" and keys <= path.widened_on_cpu


def activation_bytes_per_token(model: ModelConfig, precision: str, sequence_length: int, device: str = "cuda") -> int:
    """Bytes that autograd keeps per token, from the facts in model.parts. With the model width D, a = heads x d_head
    and the MLP width F, a block keeps, in the type of the products unless another is named:

        D for the input of each branch, and in fp32 the values that the backward pass of each norm needs
        a for queries and a for keys in fp32, if they are normed
        for attention, 5 a with PyTorch's path, of which 4 a in fp32 where it widens bf16 on a CPU; with the reference
        path 4 a, of which 3 a in fp32, and in fp32 the scores that the normaliser and a softcap keep
        2 F, or 4 F for a gated MLP
        with model.qkv_impl=together, which makes one tensor of them: 2 a for queries and keys if only attention keeps
        the tensor, for its values, and a for the values if only the norms of queries and keys keep it

    After the blocks, the input of the final norm is kept in fp32. The path of attention is the named one, or the one
    that `auto` chooses on a GPU."""
    path = ATTENTION_IMPLS[choose_impl("attention_impl", model)]
    norm, layout, mlp = NORMS[model.norm], RESIDUALS[model.residual], MLPS[model.mlp]
    a = model.n_heads * model.head_width
    scores = 0
    if path.keeps_scores:
        n_scores = NORMALISERS[model.attention_normaliser].kept_scores + (model.attention_softcap is not None)
        scores = n_scores * model.n_heads * sequence_length
    normed = 2 * layout.norms_per_branch * norm.kept * model.d_model + 2 * model.query_key_norm.kept * a
    kept, kept_wide = path.kept, path.kept_wide
    if _is_widened(path, device, precision, sequence_length * model.head_width):
        kept, kept_wide = kept - 4, kept_wide + 4
    if _joins(model):
        by_attention, by_norms = kept >= 4, precision == "fp32" and model.query_key_norm.kept > 0
        kept += 2 * (by_attention and not by_norms) + (by_norms and not by_attention)
    wide = normed + kept_wide * a + scores
    products = 2 * model.d_model + kept * a + mlp.kept_widths * model.ff_width
    in_product = BF16_COPY if precision == "bf16" else WEIGHTS
    return model.n_layers * (4 * wide + in_product * products) + 4 * model.d_model
