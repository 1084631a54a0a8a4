"""One trainer, from its start to its end, in this process: this project's, nanoGPT's or Hugging Face's.

    python -m benchmarks.peers JOB

JOB is a `Job` as JSON. The last line of the output is the result as JSON. benchmarks/beside.py starts this in a fresh
process for each trainer and round. All trainers have the same tokens, batch, rate, betas, clip, fused AdamW and
constant rate. None evaluates or saves between its first and its last update.

Every optimizer of PyTorch calls the hook that takes the times: one time for each update, in each trainer alike. On a
GPU the host runs ahead of the device. There, only the times at which the device has finished count: one after `skip`
updates, and one after the last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

BETAS, CLIP = (0.9, 0.95), 1.0
# What nanoGPT's train.py has no option for, as (its text, the text that is run instead). On a CPU it ignores dtype,
# and its AdamW is not the fused one.
NANOGPT_CHANGES = {
    "bf16": ("nullcontext() if device_type == 'cpu' else torch", "torch"),
    "fused": ("(beta1, beta2), device_type)", "(beta1, beta2), 'cuda')"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """trainer: a key of TRAINERS. shape: n_layers, n_heads, d_model, d_ff. dtype: fp32 or bf16. overrides: for this
    project's trainer. folder: with the tokens (train.bin, uint16) and meta.pkl; work: an empty folder. sequences and
    micro: of a batch and of a pass. skip: updates that are not timed. nanogpt: the checkout."""

    trainer: str
    shape: dict[str, int]
    vocabulary: int
    sequences: int
    micro: int
    length: int
    steps: int
    skip: int
    lr: float
    dtype: str
    device: str
    threads: int
    compile: bool
    overrides: list[str]
    folder: str
    work: str
    data_dir: str
    nanogpt: str | None


class Times:
    """Wall and processor seconds at each update since the hook was set."""

    def __init__(self, job: Job):
        self.job = job
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.hook = register_optimizer_step_post_hook(self.take)

    def take(self, *_) -> None:
        done = len(self.wall) + 1
        if self.job.device == "cuda" and done in (self.job.skip, self.job.steps):
            torch.cuda.synchronize()
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def steady(self) -> dict[str, Any]:
        """Seconds of each update that counts. On a GPU their mean alone."""
        if len(self.wall) != self.job.steps:
            return {}
        found = {}
        for name, times in (("seconds", self.wall), ("cpu_seconds", self.cpu)):
            counted = times[self.job.skip - 1 :]
            each = [after - before for before, after in itertools.pairwise(counted)]
            found[name] = [sum(each) / len(each)] if self.job.device == "cuda" else each
        return found


# ------------------------------------------------------------------------------------------------ trainers


def this_trainer(job: Job) -> dict[str, Any]:
    """scaling_testbed.training.run.train."""
    from scaling_testbed.config.compose import compose
    from scaling_testbed.config.run import run_folder_path
    from scaling_testbed.training.run import train

    run = compose(
        [
            *job.overrides,
            f"runs_dir={job.work}",
            f"data_dir={job.data_dir}",
            f"batch.sequences={job.sequences}",
            f"batch.micro_batch_sequences={job.micro}",
            f"batch.sequence_length={job.length}",
            f"evaluation.tokens={job.length}",
            f"budget.steps={job.steps}",
            f"optimizer.lr={job.lr}",
            f"compute.device={job.device}",
            f"compute.precision={job.dtype}",
            f"compute.threads={job.threads}",
        ]
    )
    row = train(run, quiet=True)
    if row["status"] != "finished":
        raise RuntimeError(f"the run has {row['status']}: {row['error']}")
    lines = map(json.loads, (run_folder_path(run) / "metrics.jsonl").read_text().splitlines())
    found = {"losses": [line["train_loss"] for line in lines if "train_loss" in line], "n_params": row["n_params"]}
    if job.device == "cuda":  # a captured step calls no hook; the row's clock starts after the first step
        found["seconds"] = [job.sequences * job.length / row["tokens_per_second"]]
    return found


def nanogpt(job: Job) -> dict[str, Any]:
    """train.py of a checkout of github.com/karpathy/nanoGPT, with NANOGPT_CHANGES where they are needed."""
    assert job.nanogpt is not None
    changes = [NANOGPT_CHANGES["fused"]]
    if job.dtype == "bf16" and job.device == "cpu":
        changes.append(NANOGPT_CHANGES["bf16"])
    source = changed((Path(job.nanogpt) / "train.py").read_text(), changes)
    options = {
        "dataset": job.folder,  # an absolute path, so train.py reads DATASET/train.bin
        "out_dir": job.work,
        "n_layer": job.shape["n_layers"],
        "n_head": job.shape["n_heads"],
        "n_embd": job.shape["d_model"],
        "block_size": job.length,
        "batch_size": job.micro,
        "gradient_accumulation_steps": job.sequences // job.micro,
        "max_iters": job.steps - 1,
        "learning_rate": job.lr,
        "decay_lr": False,
        "weight_decay": 0.0,
        "beta1": BETAS[0],
        "beta2": BETAS[1],
        "grad_clip": CLIP,
        "eval_interval": 10**9,
        "eval_iters": 0,  # the evaluation before the first step then takes no batch
        "always_save_checkpoint": False,
        "device": job.device,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[job.dtype],
        "compile": job.compile,
    }
    if job.shape["d_ff"] != 4 * job.shape["d_model"]:
        raise ValueError("nanoGPT has only an MLP of 4 d_model")
    sys.path.insert(0, job.nanogpt)
    sys.argv = ["train.py", *(f"--{name}={value}" for name, value in options.items())]
    os.chdir(job.nanogpt)
    printed = io.StringIO()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "train.py", "exec"), namespace)
    losses = re.findall(r"^iter \d+: loss (\S+),", printed.getvalue(), re.MULTILINE)
    n_params = sum(p.numel() for p in namespace["raw_model"].parameters())
    return {"losses": [float(loss) for loss in losses], "n_params": n_params}


def changed(source: str, changes: list[tuple[str, str]]) -> str:
    """`source` with each text replaced. Raises ValueError if a text is not there exactly once."""
    for text, other in changes:
        if source.count(text) != 1:
            raise ValueError(f"nanoGPT's train.py has changed: it has not one {text!r}")
        source = source.replace(text, other)
    return source


def gpt2(job: Job) -> dict[str, Any]:
    """transformers.Trainer with GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=job.vocabulary,
        n_positions=job.length,
        n_embd=job.shape["d_model"],
        n_layer=job.shape["n_layers"],
        n_head=job.shape["n_heads"],
        n_inner=job.shape["d_ff"],
        activation_function="gelu",  # one operation; the default is made of eight
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return huggingface(job, GPT2LMHeadModel(config))


def llama(job: Job) -> dict[str, Any]:
    """transformers.Trainer with Llama. Its MLP has three matrices, so that the width is 2/3 of d_ff."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=job.vocabulary,
        max_position_embeddings=job.length,
        hidden_size=job.shape["d_model"],
        num_hidden_layers=job.shape["n_layers"],
        num_attention_heads=job.shape["n_heads"],
        num_key_value_heads=job.shape["n_heads"],
        intermediate_size=8 * round(job.shape["d_ff"] / 12),
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return huggingface(job, LlamaForCausalLM(config))


def huggingface(job: Job, model) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=job.work,
        per_device_train_batch_size=job.micro,
        gradient_accumulation_steps=job.sequences // job.micro,
        max_steps=job.steps,
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        bf16=job.dtype == "bf16",
        torch_compile=job.compile,
        use_cpu=job.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Windows(job))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"losses": losses, "n_params": sum(p.numel() for p in model.parameters())}


class Windows(torch.utils.data.Dataset):
    """The tokens in sequences, as a data set of transformers: the model itself shifts the labels."""

    def __init__(self, job: Job):
        tokens = np.fromfile(Path(job.folder) / "train.bin", dtype=np.uint16)
        self.windows = tokens[: len(tokens) // job.length * job.length].reshape(-1, job.length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.windows[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


TRAINERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "this trainer": this_trainer,
    "nanoGPT": nanogpt,
    "HF GPT2": gpt2,
    "HF Llama": llama,
}


def peak_bytes(device: str) -> int | None:
    """The largest memory so far: on a CPU the resident memory of this program; None where it is not known.

    getrusage's ru_maxrss would include the memory of the process that started this one.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    return None


def main(argv: list[str]) -> None:
    job = Job(**json.loads(argv[0]))
    torch.set_num_threads(job.threads)
    times = Times(job)
    found = TRAINERS[job.trainer](job)
    print(json.dumps(times.steady() | found | {"peak_bytes": peak_bytes(job.device)}))


def as_json(job: Job) -> str:
    return json.dumps(dataclasses.asdict(job))


if __name__ == "__main__":
    main(sys.argv[1:])
