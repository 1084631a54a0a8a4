"""The command that writes text from a checkpoint: sample."""

from typing import Annotated

import typer

from scaling_testbed.commands.options import Average, RunDir, Step

Prompt = Annotated[
    str, typer.Option("--prompt", metavar="TEXT", help="how each text begins (default: the beginning of a document)")
]
Tokens = Annotated[
    int, typer.Option("--tokens", metavar="N", help="write at most N tokens after the prompt", show_default=True)
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", metavar="X", help="divides the logits; 0: the likeliest token", show_default=True),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", metavar="N", help="draw from the N likeliest tokens (default: from all)")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="seed of the draws", show_default=True)]
Count = Annotated[int, typer.Option("--count", metavar="N", help="number of texts", show_default=True)]


def sample(
    run_dir: RunDir,
    prompt: Prompt = "",
    tokens: Tokens = 100,
    temperature: Temperature = 1.0,
    top_k: TopK = None,
    seed: Seed = 0,
    count: Count = 1,
    step: Step = None,
    average: Average = False,
) -> None:
    """Write text from a checkpoint.

    The model reads as many tokens as in training at most, the last ones. A text ends where the model ends a document,
    or after --tokens. Control characters are shown as U+FFFD, as bytes that are no UTF-8 are."""
    from scaling_testbed.config.compose import recorded_run

    run = recorded_run(run_dir)
    from scaling_testbed.evaluation.sampling import Sampling, sample
    from scaling_testbed.evaluation.scoring import place_of

    how = Sampling(tokens=tokens, temperature=temperature, top_k=top_k, seed=seed, count=count)
    step, texts = sample(run, run_dir, prompt, how, step=step, average=average)
    print(f"step {step:,} of {run_dir}, in {place_of(run)[1]}")
    for number, text in enumerate(texts, 1):
        print(f"\ntext {number} of {count}:" if count > 1 else "")
        print("".join(one if one.isprintable() or one in "\n\t" else "\ufffd" for one in text))
