"""What is chosen is composed; what a person mistypes is refused in one or two lines naming the key.

That every shipped config composes and builds: tests/test_identity.py."""

import dataclasses
import json

import pytest

from scaling_testbed.config.compose import compose
from scaling_testbed.config.run import _identity, flatten, run_id, with_later_keys
from scaling_testbed.errors import ConfigError

pytestmark = pytest.mark.usefixtures("hydra_composes_all_words")


def test_a_file_named_in_a_group_sets_what_it_says():
    assert compose(["model=proxy_2m"]).model.d_model == 256
    assert compose(["optimizer=stable_adamw"]).optimizer.update_clipping is True
    proxies = compose(["experiment=small_scale_proxies", "data=python_stdlib", "tokenizer=bytes"])
    assert (proxies.batch.sequences, proxies.schedule.warmup, proxies.budget.steps) == (256, 5000, 1e5)
    assert proxies.model.name == "proxy_9m"


def test_an_override_after_an_experiment_wins():
    assert compose(["experiment=small_scale_proxies", "model=proxy_2m", "batch.sequences=8"]).batch.sequences == 8


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["optimizer.lrr=1"], "optimizer.lrr; did you mean optimizer.lr?"),
        (["+optimizer.lrr=1"], "optimizer.lrr"),
        (["sead=1"], "sead; did you mean seed?"),
        (["+nonsense=1"], "nonsense"),
        (["data.vocab_size=9"], "data.vocab_size belongs to data=copy or huggingface or markov"),
        (["optimizer.lr=fast"], "optimizer.lr"),
        (["model.n_layers=2.5"], "model.n_layers"),
        (["optimizer.lr=-1"], "optimizer.lr"),
        (["model=no_such_model"], "model has no choice 'no_such_model'"),
        (["model.norm=batchnorm"], "model.norm must be one of layernorm, rmsnorm"),
        (["budget.tokens=10", "budget.steps=10"], "budget.tokens=10 and budget.steps=10"),
        (["batch.micro_batch_sequences=5"], "batch.micro_batch_sequences"),
        (["optimizer=muon", "parallelism=fsdp"], "optimizer=muon cannot be sharded"),
        (["model.linear=sigma_reparam", "parallelism=fsdp"], "model.linear=sigma_reparam cannot be sharded"),
        (["optimizer.qk_clip=100"], "optimizer.qk_clip must be null with model.qk_norm=layernorm"),
        (["optimizer.qk_clip=9", "model.qk_norm=none", "model.kappa=2"], "qk_clip must be null with model.kappa=2.0"),
        (["optimizer.qk_clip=9", "model.qk_norm=none", "parallelism=fsdp"], "optimizer.qk_clip=9.0 cannot be sharded"),
        (["optimizer.qk_clip=0"], "optimizer.qk_clip"),
        (["loss.impl=fused"], "loss.impl"),
        (["loss.impl=recompute", "model=proxy_2m"], "loss.impl=recompute needs model.d_model of at most 128; got 256"),
        (["schedule.min_lr=-1"], "schedule.min_lr"),
        (["schedule.warmup=nan"], "schedule.warmup"),
        (["schedule.min_lr=nan"], "schedule.min_lr must be finite and not negative"),
        (["optimizer.lr=inf"], "optimizer.lr must be greater than zero and finite"),
        (["optimizer.eps=nan"], "optimizer.eps must be greater than zero and finite"),
        (["optimizer.eps=0"], "optimizer.eps must be greater than zero"),
        (["optimizer.weight_decay=nan"], "optimizer.weight_decay must be finite and not negative"),
        (["loss.z_loss=nan"], "loss.z_loss must be finite and not negative"),
        (["model.kappa=inf"], "model.kappa must be greater than zero and finite"),
        (["diagnostics=null"], "diagnostics=null: a group cannot be null"),
        (["name=../elsewhere"], "name must be"),
        (["optimizer.lr"], "cannot read the override 'optimizer.lr'"),
        (
            ["data=python_packages", "data.packages=[sympy==1.14.0,mpmath==1.3.0]"],
            """needs quotes; type 'data.packages=["sympy==1.14.0","mpmath==1.3.0"]'""",
        ),
        (["seed=1=2=["], "cannot read the override 'seed=1=2=['"),
        (["parametrization=mup_full", "model.tied_head=true"], "tied_head"),
        (["compute.residual_dtype=bf16", "compute.precision=fp32"], "compute.residual_dtype must be fp32"),
        (["model={d_model: 8, nope: 1}"], "nope"),
    ],
)
def test_a_mistake_is_refused_in_one_or_two_lines_naming_the_key(overrides, names):
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    message = str(caught.value)
    assert names in message
    assert len(message.splitlines()) <= 2


def test_run_id_depends_on_what_is_computed_and_on_nothing_else():
    base = run_id(compose([]))
    for same in (
        ["runs_dir=/elsewhere"],
        ["data_dir=/elsewhere"],
        ["name=other"],
        ["logging=wandb"],
        ["checkpoint.every_steps=7"],
        ["batch.micro_batch_sequences=8"],
        ["compute.threads=1"],
        ["parallelism=fsdp", "parallelism.shard_size=2", "parallelism.activation_checkpointing=1"],
        ["optimizer.lr=1e-2"],  # the default, spelled out
    ):
        assert run_id(compose(same)) == base, same
    for other in (["seed=1"], ["optimizer.lr=3e-3"], ["model=nano_s"], ["budget.steps=5"], ["schedule=wsd"]):
        assert run_id(compose(other)) != base, other


def test_the_flat_config_has_every_field_once_under_its_dotted_key():
    run = compose(["optimizer.lr_multipliers={}"])
    flat = flatten(run)
    assert flat["model.d_model"] == run.model.d_model and flat["budget.steps"] is None
    for group in ("model", "optimizer", "schedule", "data", "batch"):
        for field in dataclasses.fields(getattr(run, group)):
            assert any(key.startswith(f"{group}.{field.name}") for key in flat)


def test_the_home_folder_in_a_path_is_no_folder_of_that_name(monkeypatch):
    """A shell leaves ~ alone in quotes, and so does YAML."""
    monkeypatch.setenv("HOME", "/home/somebody")
    run = compose(["runs_dir='~/runs'", 'data_dir="~/data"'])
    assert (run.runs_dir, run.data_dir) == ("/home/somebody/runs", "/home/somebody/data")


def test_overrides_are_kept_for_the_record():
    assert compose(["seed=3", "model=nano_s"]).overrides == ["seed=3", "model=nano_s"]


def test_a_field_that_came_later_is_part_of_the_run_id_only_where_it_is_set():
    """What was run before there was such a field is found again."""
    run = compose([])
    without = _identity(run)
    assert "scale_lr_by_param_rms" not in without["optimizer"] and "beta1" in without["optimizer"]
    assert run_id(compose(["optimizer.scale_lr_by_param_rms=false"])) == run_id(run)
    assert run_id(compose(["optimizer.scale_lr_by_param_rms=true"])) != run_id(run)
    assert run_id(compose(["compute.residual_dtype=fp32"])) == run_id(run)
    assert run_id(compose(["compute.residual_dtype=bf16"])) != run_id(run)


def test_a_row_of_an_earlier_version_has_the_defaults_of_keys_that_came_later():
    now = json.loads(json.dumps(flatten(compose([]))))
    own = {key: now[key] for key in ("data.name", "optimizer.name", "schedule.name", "tokenizer.name")}
    found = with_later_keys(own)
    assert all(now[key] == value for key, value in found.items()) and with_later_keys(now) == now
    later = found["averaging.name"], found["data.skip_steps"], found["start.grow"], found["optimizer.clip_impl"]
    assert later == ("none", [], {}, "separate")
    assert with_later_keys(own | {"data.name": "sympy"})["data.skip_steps"] == []  # of a config, and no kind of source
    set_otherwise = {"averaging.name": "ema", "start.grow.kind": "copies", "optimizer.name": "somebody_s"}
    found = with_later_keys(set_otherwise)
    assert found["averaging.name"] == "ema" and "start.grow" not in found
    assert not [key for key in found if key.startswith("optimizer.") and key != "optimizer.name"]  # not known


@pytest.mark.parametrize("typed", ["compute.compile=1", "compute.cuda_graph=2.5"])
def test_a_value_of_none_of_several_types_is_refused_in_words(typed):
    key, _, value = typed.partition("=")
    with pytest.raises(ConfigError, match=f"{key} must be true or false or text; got {value}"):
        compose([typed])
