"""How many of our frames a reader crosses from the command to the model."""

import sys
from pathlib import Path

import scaling_testbed
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.train import main as train_main
from tests.training.conftest import TINY

PACKAGE = str(Path(scaling_testbed.__file__).parent)


def our_frames(frame):
    """Names of the package's functions that are under way, the outermost first."""
    found = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            found.insert(0, f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
        frame = frame.f_back
    return found


def test_five_frames_lie_from_the_door_to_the_model_in_training_and_in_evaluation(tmp_path, data_dir, monkeypatch):
    real, seen = Transformer.forward, set()

    def forward(self, *arguments):
        seen.add((*our_frames(sys._getframe()), "transformer.forward"))
        return real(self, *arguments)

    monkeypatch.setattr(Transformer, "forward", forward)
    places = [f"runs_dir={tmp_path / 'runs'}", f"data_dir={data_dir}"]
    assert train_main([*TINY, *places, "batch.micro_batch_sequences=4", "budget.steps=2"]) == 0
    assert seen == {
        ("train.main", "run.train", "step.make_update", "loss_model.forward", "transformer.forward"),
        ("train.main", "run.train", "validation.evaluate", "loss_model.forward", "transformer.forward"),
    }
