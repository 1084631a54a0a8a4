"""The recipe of LSSA and LSSAR in docs/extending.md, as it stands there: its weights by hand, and a run."""

import json
import math

import pytest
import torch

from scaling_testbed import evaluate, plugins
from scaling_testbed.config.compose import compose
from scaling_testbed.config.memory import estimate_memory
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.model.parts import NORMALISERS, QK_NORMS
from scaling_testbed.model.transformer import Transformer
from scaling_testbed.training.run import train
from tests.plugins.conftest import COMMON
from tests.plugins.strangers import RECIPES


@pytest.fixture(scope="module", autouse=True)
def loaded_here_alone():
    """Other tests of this process find no plug-in, and no part of this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "_loaded", dict(plugins._loaded))
        yield
    for parts, names in ((QK_NORMS, ["unit"]), (NORMALISERS, ["lssa", "lssar"])):
        for name in names:
            parts.pop(name, None)
            parts._modules.pop(name, None)


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    """Returns a function from a normaliser and further words to a run with the recipe."""
    folder = tmp_path_factory.mktemp("lssa")
    (folder / "my_lssa.py").write_text(RECIPES["my_lssa.py"])
    places = [f"plugins=[{folder}/my_lssa.py]", f"data_dir={folder}/data", f"runs_dir={folder}/runs"]
    data = ["data=markov", "data.n_tokens=20000", "data.n_validation_tokens=4000"]

    def compose_it(normaliser, *words):
        parts = ["model.qk_norm=unit", f"model.attention_normaliser={normaliser}"]
        return compose([*places, *COMMON, *data, *parts, *words])

    return compose_it


def by_hand(scores_MN, window, power=None):
    """The weights of the definition, a query at a time, in fp64."""
    found = torch.zeros_like(scores_MN, dtype=torch.float64)
    for query in range(len(scores_MN)):
        first = max(0, query + 1 - (window or query + 1))
        seen = query + 1 - first
        a = torch.nn.functional.softplus(math.log(seen) * scores_MN[query, first : query + 1].double())
        a = a / a.sum()
        if power is not None:
            r = (a * seen - (1 if seen > 3 else 0)).relu()
            r = torch.ones_like(r) if r.max() == 0 else (r / r.max()) ** power
            a = r / r.sum()
        found[query, first : query + 1] = a
    return found


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("name", "power"), [("lssa", None), ("lssar", 15)])
def test_weights_are_those_of_the_definition(composed, name, power, window):
    composed(name)  # loads the plug-in
    weigh = NORMALISERS[name].function
    scores_MN = 3 * torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    distance = torch.arange(9)[:, None] - torch.arange(9)
    allowed_MN = (distance >= 0) & (distance < (window or 9))
    found_MN = weigh(scores_MN[None, None], allowed_MN, 9)[0, 0]
    torch.testing.assert_close(found_MN.double(), by_hand(scores_MN, window, power), rtol=1e-4, atol=1e-6)
    longer_MN = torch.nn.functional.pad(allowed_MN, (0, 3))  # keys that no query sees
    padded = weigh(torch.nn.functional.pad(scores_MN, (0, 3))[None, None], longer_MN, 12)[0, 0]
    torch.testing.assert_close(padded[:, :9], found_MN, rtol=1e-4, atol=1e-7)  # so depends_on_length is false


def test_a_query_whose_scores_are_equal_reads_all_keys(composed):
    composed("lssar")
    allowed_MN = torch.ones(8, 8, dtype=torch.bool).tril()
    scores = torch.zeros(1, 1, 8, 8, requires_grad=True)
    found = NORMALISERS["lssar"].function(scores, allowed_MN, 8)
    torch.testing.assert_close(found[0, 0], allowed_MN / allowed_MN.sum(1, keepdim=True))
    found.square().sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_the_score_is_log_d_times_the_cosine(composed):
    run = composed("lssa", "model.d_head=16")
    model = Transformer(run.model.resolved(16), run.parametrization, device=torch.device("cpu"))
    model.init_weights(0)
    attention = model.typed_blocks[0].attention
    q_BTD, k_BTD = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(1))
    q, k = attention.prepare(q_BTD, k_BTD, *model._tables(5, torch.device("cpu")))
    cosines = torch.nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    torch.testing.assert_close(attention.scale * q @ k.mT, math.log(16) * cosines, rtol=1e-4, atol=1e-5)


def test_a_run_learns_is_planned_and_is_read_at_other_lengths(composed, capsys):
    run = composed("lssar", "budget.steps=30", "optimizer.lr=1e-2")
    row = train(run, quiet=True)
    assert row["val_loss"] < row["val_loss_initial"] - 0.1 and row["attention_impl"] == "reference"
    runs = run, composed("lssa", "budget.steps=30", "optimizer.lr=1e-2")
    more, less = (estimate_memory(one, one.model.resolved(16), 1, device="cpu").activations for one in runs)
    scores_bytes = 4 * 8 * 2 * 16 * 16 * 2  # fp32, sequences, heads, queries, keys, layers
    assert more - less == (6 - 3) * scores_bytes  # by kept_scores
    capsys.readouterr()
    folder = run_folder_path(run)
    assert evaluate.main([str(folder), "--lengths", "16,64", "--window", "train", "--json", "--tokens", "1024"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(one["attention_window"], one["length"]) for one in rows] == [(None, 16), (None, 64), (16, 16), (16, 64)]
    assert rows[2]["loss"] == pytest.approx(rows[0]["loss"], abs=1e-6)  # a window of the whole length
