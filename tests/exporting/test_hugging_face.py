"""An exported model is the same function in transformers, and what it cannot be is refused by name."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch

from scaling_testbed import export as door
from scaling_testbed.config.compose import compose_many
from scaling_testbed.config.run import run_folder_path
from scaling_testbed.data.preparing.preparation import prepare
from scaling_testbed.data.shards import read_manifest
from scaling_testbed.data.tokenizers import load_tokenizer
from scaling_testbed.errors import UserError
from scaling_testbed.evaluation.loading import load_model
from scaling_testbed.exporting import card, families
from scaling_testbed.exporting.families import OWN, family_of, why_own_code
from scaling_testbed.exporting.hugging_face import REMOTE, export
from scaling_testbed.exporting.tokenizer import tokenizer_files
from scaling_testbed.model.config import ModelConfig
from scaling_testbed.model.parts import MLPS, NORMALISERS, NORMS, QK_NORMS, RESIDUALS
from scaling_testbed.training.run import train
from tests.training.conftest import metrics

LLAMA_LIKE = ["model.norm=rmsnorm", "model.mlp=swiglu", "model.qk_norm=none"]
QWEN3_LIKE = ["model.norm=rmsnorm", "model.mlp=swiglu", "model.qk_norm=rmsnorm"]
OLMO2_LIKE = [*QWEN3_LIKE, "model.qk_norm_axis=full", "model.residual=reordered"]
GROUPED = ["model.n_heads=4", "model.n_kv_heads=2"]
KAPPA = [*LLAMA_LIKE, "model.kappa=6.5"]
# A rate that moves gains away from one and logits away from zero within a few steps.
FAST = ["optimizer.lr=3e-2", "schedule.warmup=0"]


@pytest.fixture
def exported(tiny, tmp_path):
    """Returns a function from overrides to (model, OUT_DIR) of a run that was trained and exported."""
    pytest.importorskip("safetensors")

    def make(*overrides):
        run, folder = tiny(*FAST, *overrides)
        train(run, quiet=True)
        export(run, folder, tmp_path / "out")
        return load_model(run, folder, step=None, device=torch.device("cpu"))[1], tmp_path / "out"

    return make


def read_back(out, **options):
    transformers = pytest.importorskip("transformers")
    options = {"output_loading_info": True, "trust_remote_code": True} | options
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize(
    ("overrides", "architecture"),
    [
        (LLAMA_LIKE, "LlamaForCausalLM"),
        ([*LLAMA_LIKE, *GROUPED, "model.tied_head=true"], "LlamaForCausalLM"),
        ([*LLAMA_LIKE, "model.rope_base=77", "model.norm_eps=0.03", "model.d_head=10"], "LlamaForCausalLM"),
        ([*LLAMA_LIKE, "model.attention_scale=inverse"], "LlamaForCausalLM"),
        ([*LLAMA_LIKE, "model.linear=sigma_reparam", "model.embedding_gradient_scale=0.1"], "LlamaForCausalLM"),
        ([*LLAMA_LIKE, "model.vocab_size=40", "parametrization=mup_simple"], "LlamaForCausalLM"),
        (QWEN3_LIKE, "Qwen3ForCausalLM"),
        ([*QWEN3_LIKE, *GROUPED, "model.norm_eps=0.03", "model.d_head=6", "model.tied_head=true"], "Qwen3ForCausalLM"),
        ([*QWEN3_LIKE, "parametrization=mup_full", "model.rope_base=77"], "Qwen3ForCausalLM"),
        ([*QWEN3_LIKE, "model.attention_window=3"], "Qwen3ForCausalLM"),
        ([*KAPPA, *GROUPED, "model.attention_scale=inverse"], "Qwen3ForCausalLM"),
        (OLMO2_LIKE, "Olmo2ForCausalLM"),
        ([*OLMO2_LIKE, *GROUPED, "model.norm_eps=0.03", "model.d_head=6", "model.tied_head=true"], "Olmo2ForCausalLM"),
        ([*OLMO2_LIKE, "model.attention_scale=inverse", "model.rope_base=77"], "Olmo2ForCausalLM"),
        ([], OWN.architecture),
        ([*GROUPED, "model.mlp=relu2", "model.qk_norm_axis=full", "model.rope_base=77"], OWN.architecture),
        (["model.residual=post", "model.qk_norm=rmsnorm", "model.norm_eps=0.03", "model.d_head=6"], OWN.architecture),
        (["model.residual=peri", "model.mlp=swiglu", "parametrization=mup_full"], OWN.architecture),
        (["model.residual=deepnorm", "model.qk_norm=none", "model.kappa=6.5", *GROUPED], OWN.architecture),
        (["model.residual=reordered", "model.linear=sigma_reparam", "model.qk_norm=none"], OWN.architecture),
        (["model.attention_softcap=3", "model.final_softcap=2", "model.attention_window=5"], OWN.architecture),
        (["model.attention_normaliser=relu2", "model.attention_scale=inverse"], OWN.architecture),
        (["model.tied_head=true", "model.vocab_size=40", "model.embedding_gradient_scale=0.1"], OWN.architecture),
        ([*LLAMA_LIKE, "model.attention_window=5"], OWN.architecture),
        ([*LLAMA_LIKE, "model.n_heads=3", "model.d_head=8"], OWN.architecture),
        ([*QWEN3_LIKE, "model.qk_norm_axis=full"], OWN.architecture),
    ],
    ids=lambda value: "-".join(x.partition("=")[2] for x in value) or "default" if isinstance(value, list) else "",
)
def test_logits_in_transformers_are_the_models(exported, overrides, architecture):
    model, out = exported(*overrides)
    theirs = read_back(out)
    assert type(theirs).__name__ == architecture
    assert all(parameter.dtype == torch.float32 for parameter in theirs.parameters())
    # Longer than the 16 tokens of training: rotary positions have no end.
    tokens_BT = torch.randint(16, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours_BTV, theirs_BTV = model.logits(tokens_BT), theirs(tokens_BT).logits
    assert ours_BTV.std() > 0.2  # there is something to compare
    torch.testing.assert_close(theirs_BTV, ours_BTV, rtol=1e-5, atol=1e-5)
    assert written(theirs, tokens_BT[:, :5]).tolist() == greedy(model, tokens_BT[:, :5]).tolist()


def greedy(model, tokens_BT, n=12):
    """The definition of a greedy text: the likeliest token after all before it, n times."""
    with torch.no_grad():
        for _ in range(n):
            likeliest_B = model.logits(tokens_BT)[:, -1].argmax(-1)
            tokens_BT = torch.cat([tokens_BT, likeliest_B[:, None]], dim=1)
    return tokens_BT


def written(theirs, tokens_BT, n=12, **options):
    """What transformers writes greedily, with a cache of keys and values where the model allows one."""
    return theirs.generate(tokens_BT, do_sample=False, max_new_tokens=n, min_new_tokens=n, **options)


OWN_CODE = ["model.residual=peri", "model.attention_window=5"]


@pytest.mark.parametrize("overrides", [OWN_CODE, ["model.attention_normaliser=relu2"]], ids=["window", "relu2"])
def test_padding_on_the_left_changes_no_text_and_a_loss_is_ours(exported, overrides):
    model, out = exported(*overrides)
    theirs, generator = read_back(out), torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(16, (3, 9), generator=generator)
    padded_BT = torch.cat([torch.randint(16, (3, 4), generator=generator), tokens_BT], dim=1)
    mask_BT = torch.ones_like(padded_BT)
    mask_BT[:, :4] = 0
    found_BT = written(theirs, padded_BT, attention_mask=mask_BT, pad_token_id=0)
    assert found_BT[:, 4:].tolist() == greedy(model, tokens_BT).tolist()
    with torch.no_grad():
        ours_BTV, targets_BT = model.logits(tokens_BT)[:, :-1], tokens_BT[:, 1:]
        ours = torch.nn.functional.cross_entropy(ours_BTV.flatten(0, 1), targets_BT.flatten())
        embedded = theirs.get_input_embeddings()(tokens_BT)
        for given in ({"input_ids": tokens_BT}, {"inputs_embeds": embedded}):
            torch.testing.assert_close(theirs(**given, labels=tokens_BT).loss, ours, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="attention_mask must be"):
        theirs(tokens_BT, attention_mask=mask_BT)
    with pytest.raises(ValueError, match="static cache is not supported|attention_normaliser=relu2 depends"):
        written(theirs, tokens_BT, cache_implementation="static", use_cache=True)


def test_a_model_whose_weights_depend_on_the_length_refuses_a_cache(exported):
    theirs = read_back(exported("model.attention_normaliser=relu2")[1])
    assert theirs.generation_config.use_cache is False
    for given in ({"use_cache": True}, {"past_key_values": object()}):
        with pytest.raises(ValueError, match="attention_normaliser=relu2 depends on the length .* use_cache=False"):
            theirs(torch.arange(5)[None], **given)


def test_an_export_that_is_saved_again_and_trained_stays_the_model(exported, tmp_path):
    """Also in bf16, where norms and attention stay in fp32."""
    model, out = exported()
    theirs = read_back(out)
    theirs.save_pretrained(tmp_path / "again")
    tokens_BT = torch.arange(16)[None]
    with torch.no_grad():
        again = read_back(tmp_path / "again")(tokens_BT).logits
        narrow = read_back(out, dtype=torch.bfloat16)(tokens_BT).logits
        torch.testing.assert_close(again, model.logits(tokens_BT), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(narrow, again, rtol=0.1, atol=0.1)
    theirs.train()(tokens_BT, labels=tokens_BT).loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())


def test_the_code_beside_the_weights_knows_what_it_is_said_to_know():
    """And each shipped part has a counterpart in it."""
    tree = ast.parse((REMOTE / "modeling_scaling_testbed.py").read_text())
    tables = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    names = {"norm": "NORMS", "mlp": "ACTIVATIONS", "attention_normaliser": "NORMALISERS", "residual": "RESIDUALS"}
    for key, table in names.items():
        assert {one.value for one in tables[table].keys} == OWN.parts[key]
    assert OWN.parts["qk_norm"] == OWN.parts["norm"] | {"none"}
    for kind in (NORMS, QK_NORMS, MLPS, RESIDUALS, NORMALISERS):
        assert all(part.counterpart for part in kind.values())
    length = {kind.counterpart for kind in NORMALISERS.values() if kind.depends_on_length}
    assert length == set(ast.literal_eval(tables["WITHOUT_CACHE"]))


def test_pruned_weights_are_zeros_and_named_in_a_file_of_masks(exported):
    pruning = "+interventions.magnitude_pruning"
    model, out = exported(*KAPPA, *GROUPED, f"{pruning}.sparsity=0.5", f"{pruning}.every_steps=2")
    from safetensors.torch import load_file

    masks, weights = load_file(out / "masks.safetensors"), load_file(out / "model.safetensors")
    matrices = {name for name in weights if name.endswith("_proj.weight") or name == "lm_head.weight"}
    assert set(masks) == matrices and all(((weights[name] == 0) == mask).all() for name, mask in masks.items())
    n_pruned = sum(int(mask.sum()) for mask in masks.values())
    assert n_pruned == sum(mask.numel() for mask in masks.values()) - int(0.5 * sum(m.numel() for m in masks.values()))
    assert f"{n_pruned:,} weights are pruned" in (out / "README.md").read_text()


def test_a_model_without_layers_is_exported_too(exported):
    model, out = exported(*LLAMA_LIKE, "model.n_layers=0")
    tokens_BT = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(read_back(out)(tokens_BT, use_cache=False).logits, model.logits(tokens_BT))


def good(**changes) -> ModelConfig:
    given = {"norm": "rmsnorm", "mlp": "swiglu", "qk_norm": "none"} | changes
    return ModelConfig(**given).resolved(16)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm": "layernorm"}, "model.norm=layernorm:"),
        ({"mlp": "gelu"}, "model.mlp=gelu:"),
        ({"attention_softcap": 30.0}, "model.attention_softcap=30.0:"),
        ({"final_softcap": 20.0, "qk_norm": "rmsnorm"}, "model.final_softcap=20.0:"),
        ({"attention_normaliser": "relu2"}, "model.attention_normaliser=relu2:"),
        ({"residual": "peri"}, "model.residual=peri:"),
        ({"residual": "reordered"}, "model.residual=reordered:"),
        ({"residual": "reordered", "qk_norm": "rmsnorm"}, "model.residual=reordered:"),
        ({"residual": "peri", "kappa": 2.0}, "model.residual=peri:"),
        ({"qk_norm": "rmsnorm", "qk_norm_axis": "full"}, "model.qk_norm_axis=full:"),
        ({"attention_window": 8}, "model.attention_window=8:"),
        ({"n_heads": 3, "d_head": 8}, "model.n_heads=3 (it does not divide d_model):"),
        ({"norm": "layernorm", "mlp": "gelu"}, "model.norm=layernorm, model.mlp=gelu:"),
    ],
)
def test_code_is_beside_the_weights_where_transformers_has_no_class_and_a_line_says_why(changes, said):
    config = good(**changes)
    assert family_of(config) is OWN
    line = why_own_code(config)
    assert line.startswith(f"no class of transformers computes {said}") and "trust_remote_code=True" in line


def test_every_choice_of_a_model_is_mapped_or_refused():
    """A field that is new in ModelConfig must be looked at here before an export may ignore it."""
    shape = {"name", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff", "d_ff_rule", "vocab_size"}
    mapped = {"norm_eps", "rope_base", "tied_head", "qk_norm", "qk_norm_axis", "residual", "attention_window"}
    in_the_weights = {"kappa", "attention_scale", "linear"}
    not_in_the_function = {"attention_impl", "qk_norm_impl", "qkv_impl", "embedding_gradient_scale"}
    known = shape | mapped | in_the_weights | not_in_the_function | set(families.PARTS) | set(families.SOFTCAPS)
    assert set(ModelConfig.__dataclass_fields__) == known


def test_the_door_says_what_it_wrote_and_refuses_in_one_line(tiny, tmp_path, capsys, monkeypatch):
    pytest.importorskip("safetensors")
    run, folder = tiny(*LLAMA_LIKE, "model.attention_scale=inverse", "checkpoint.keep_steps=[4]")
    train(run, quiet=True)
    capsys.readouterr()
    assert door.main(["--help"]) == 0 and "RUN_DIR" in capsys.readouterr().out
    assert door.main([str(folder), str(tmp_path / "a"), "--step", "4"]) == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM" in said and f"step 4 of run {folder.name}" in said
    assert "folded into its weights: attention scale 1/d_head" in said and "no tokenizer" in said
    files = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == files
    assert "attention scale 1/d_head" in (tmp_path / "a" / "README.md").read_text()
    assert len({path.stat().st_mode for path in (tmp_path / "a").iterdir()}) == 1  # whoever reads one reads all
    (tmp_path / "empty").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    for out in (".", "n" * 300, "nul\0"):
        assert door.main([str(folder), out]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "OUT_DIR" in error and len(error.splitlines()) == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".empty.partial").mkdir()  # of an export that was killed
    (tmp_path / ".empty.partial" / "model.safetensors").write_text("half of it")
    assert door.main([str(folder), str(tmp_path / "c"), "--step", "4"]) == 0 and capsys.readouterr()
    assert (tmp_path / "empty" / "model.safetensors").stat().st_size > 1000
    (tmp_path / "c").unlink()
    shutil.rmtree(tmp_path / "empty")
    for arguments, status, message in [
        ([str(folder), str(tmp_path / "a")], 2, "exists and is not empty"),
        ([str(folder), str(tmp_path / "b"), "--step", "5"], 1, "holds no step 5"),
        ([str(tmp_path / "none"), str(tmp_path / "b")], 1, "is no run folder"),
        ([str(folder), str(tmp_path / "a" / "README.md" / "b")], 1, "cannot write"),
        ([str(folder)], 2, "OUT_DIR"),
    ]:
        assert door.main(arguments) == status
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "runs"]
    run, folder = tiny()
    train(run, quiet=True)
    assert door.main([str(folder), str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert "no class of transformers computes model.norm=layernorm, model.mlp=gelu, model.qk_norm=layernorm" in said
    code = {"configuration_scaling_testbed.py", "modeling_scaling_testbed.py"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == files | code


def test_the_card_has_the_numbers_of_the_run_and_no_place_on_this_machine(tiny, tmp_path):
    run, folder = tiny("checkpoint.keep_steps=[4]", "evaluation.every_steps=4", "seed=3", "averaging=ema")
    row = train(run, quiet=True)
    for name, how in (("last", {}), ("first", {"step": 4}), ("average", {"average": True})):
        export(run, folder, tmp_path / name, **how)
    last, first, average = ((tmp_path / name / "README.md").read_text() for name in ("last", "first", "average"))
    losses = {line["step"]: line.get("val_loss") for line in metrics(folder)}
    assert f"val_loss: {losses[4]:.5f} nats per token" in first.partition("## The run at its end")[0]
    assert f"val_loss: {row['val_loss']:.5f}" in last.partition("## The run at its end")[0]
    assert f"val_loss_average: {row['val_loss_average']:.5f}" in average and "the average of the weights" in average
    for text in (last, first, average):
        assert text.startswith("---\nlibrary_name: transformers\n") and str(tmp_path) not in text
        for part in (row["run_id"], "seed: `3`", f"{row['n_tokens']:,} training tokens", row["data_fingerprint"]):
            assert part in text
        assert f"flops: {row['flops']:.4g}" in text and f"torch {row['versions']['torch']}" in text


def test_the_card_says_how_sequences_were_cut_where_it_changes_the_loss(tiny):
    run, folder = tiny()
    train(run, quiet=True)
    _, masked = compose_many([[], ["batch.document_masking=true"]])
    data = load_model(run, folder, step=None, device=torch.device("cpu"))[2]
    facts = [card._of_run(one, {}, data) for one in (run, masked)]
    assert any(line.endswith(" tokens, batch.packing=windows, batch.document_masking=true`") for line in facts[1])
    assert not any("masking" in line for line in facts[0])


def test_a_disk_that_refuses_leaves_nothing(tiny, tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")

    def full(*arguments, **options):
        raise __import__("safetensors").SafetensorError("No space left on device")

    run, folder = tiny(*LLAMA_LIKE)
    train(run, quiet=True)
    monkeypatch.setattr(safetensors, "save_file", full)
    with pytest.raises(UserError, match="cannot write .*/out: No space left on device"):
        export(run, folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_without_safetensors_the_door_says_what_to_install(monkeypatch, tiny, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    run, folder = tiny(*LLAMA_LIKE)
    with pytest.raises(UserError, match=r"pip install -e '.\[export\]'"):
        export(run, folder, tmp_path / "out")


def test_a_checkpoint_of_several_processes_is_exported_like_one_of_one(tiny, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    for kind in ("single", "fsdp"):
        run, folder = tiny(*QWEN3_LIKE, f"parallelism={kind}", runs=kind)
        train(run, quiet=True)
        export(run, folder, tmp_path / f"{kind}_out")
    one, other = (safetensors.load_file(tmp_path / f"{kind}_out" / "model.safetensors") for kind in ("single", "fsdp"))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


# ------------------------------------------------------------------------------------------------ tokenizers

TEXTS = [
    "the cat sat on the mat, and the cat sat on the hat",
    "  two  spaces\n\n\tand a tab\r\n",
    "Zürich, naïve — 北京 🙂 \u0000\u00ad\u00a0",
    "an end that is spelled out: <|endoftext|> and more <s>",
    " ",
]


def published(folder: Path) -> str:
    """A tokenizer.json that puts BOS in front of a text, as many published ones do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "published.json"))
    return str(folder / "published.json")


@pytest.fixture
def text_run(tmp_path):
    """Returns a function from overrides to the RunConfig of a tiny run on text."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} {' '.join(TEXTS[:2])}\n" * 60)

    def make(*overrides):
        files = [f"data.files=['{tmp_path}/a.txt']", f"data.validation_files=['{tmp_path}/b.txt']"]
        places = [f"data_dir={tmp_path / 'data'}", f"runs_dir={tmp_path / 'runs'}"]
        small = ["model=nano_s", "batch.sequences=4", "batch.sequence_length=16", "budget.steps=2"]
        return compose_many([["data=text_files", *files, *places, *small, *overrides]])[0]

    return make


def tokenizer_overrides(kind: str, folder: Path) -> list[str]:
    more = {"bpe": ["tokenizer.vocab_size=300"], "pretrained": [f"tokenizer.path={published(folder)}"], "bytes": []}
    return [f"tokenizer={kind}", *more[kind]]


@pytest.mark.parametrize("family", [LLAMA_LIKE, QWEN3_LIKE, OLMO2_LIKE, []], ids=["llama", "qwen3", "olmo2", "own"])
@pytest.mark.parametrize("kind", ["bytes", "bpe", "pretrained"])
def test_transformers_makes_the_ids_of_training_of_a_text(text_run, tmp_path, kind, family):
    transformers = pytest.importorskip("transformers")
    run = text_run(*family, *tokenizer_overrides(kind, tmp_path))
    train(run, quiet=True)
    export(run, run_folder_path(run), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = load_tokenizer(prepare(run.data, run.tokenizer, data_dir=Path(run.data_dir)))
    for text, ids in zip(TEXTS, ours.encode_batch([text.encode() for text in TEXTS]), strict=True):
        assert theirs(text)["input_ids"] == ids.tolist()
        assert theirs.decode(ids.tolist()) == ours.decode(ids) == text
    model = read_back(tmp_path / "out")
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eos_id == model.config.eos_token_id
    assert model.generation_config.pad_token_id == model.generation_config.bos_token_id == ours.eos_id
    assert model.get_input_embeddings().padding_idx is None  # so that EOS keeps its gradient
    batch = theirs(TEXTS[:2], padding=True, padding_side="left", return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=3, min_new_tokens=3).shape[1] == batch["input_ids"].shape[1] + 3


def test_a_bytes_tokenizer_has_each_byte_once():
    from tokenizers import Tokenizer

    files = tokenizer_files(Path(), {"kind": "bytes"}, 16)
    tokenizer = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    every = "".join(map(chr, range(0x800))) + "\uffff\U0010ffff"
    assert tokenizer.encode(every).ids == list(every.encode())
    assert sorted(tokenizer.get_vocab().values()) == list(range(257))


def test_a_changed_tokenizer_is_refused(text_run, tmp_path):
    run = text_run("tokenizer=bpe", "tokenizer.vocab_size=300")
    folder = prepare(run.data, run.tokenizer, data_dir=Path(run.data_dir))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="missing or changed since"):
        tokenizer_files(folder, read_manifest(folder)["tokenizer"], 16)
