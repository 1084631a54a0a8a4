"""The command that writes a checkpoint for other libraries: export."""

from pathlib import Path
from typing import Annotated

import typer

from scaling_testbed.commands.options import Average, RunDir, Step

OutDir = Annotated[Path, typer.Argument(metavar="OUT_DIR", help="a new or empty folder")]


def export(run_dir: RunDir, out_dir: OutDir, step: Step = None, average: Average = False) -> None:
    """Write a checkpoint for other libraries.

    Writes model.safetensors in fp32, config.json, generation_config.json, the tokenizer and a model card for
    transformers. Where transformers has no class for the model, its code is written too, for trust_remote_code=True."""
    from scaling_testbed.config.compose import recorded_run
    from scaling_testbed.exporting.hugging_face import export

    for line in export(recorded_run(run_dir), run_dir, out_dir, step=step, average=average):
        print(line)
    print(f"wrote {out_dir}")
