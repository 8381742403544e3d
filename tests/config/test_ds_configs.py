"""DeepSpeed configurations: DeepSpeed ignores its own misspelt keys, xdscale does not."""

import inspect
import json
import logging
import re
import sys
from pathlib import Path

import pytest

from xdscale.ds_config import (
    activation_checkpointing,
    precision,
    read_ds_config,
    resolve_ds_config,
    split_batch,
    zero_stage,
)
from xdscale.errors import XdscaleError
from xdscale.recipe import Optim, load_recipe
from xdscale.training.environment import _is_of_use

SHIPPED = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


@pytest.fixture
def write(tmp_path):
    def write(values):
        path = tmp_path / "ds.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return str(path)

    return write


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_is_what_its_name_says(path):
    values = read_ds_config(str(path))
    assert zero_stage(values) == int(re.search(r"-zero(\d)", path.stem)[1])
    offload = values["zero_optimization"].get("offload_optimizer", {"device": "none"})
    assert (offload["device"] == "cpu") == ("-offload" in path.stem)
    recipe = load_recipe("xdbert-base-wikitext103")
    for world_size in (1, 8, 7, 16, 64, 288):
        resolved = resolve_ds_config(str(path), values, recipe, world_size)
        micro_batch, accumulation = (
            resolved[key] for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        )
        assert micro_batch <= values["train_micro_batch_size_per_gpu"]
        slots = micro_batch * accumulation * world_size
        assert 0 <= slots - recipe.training.global_batch < world_size * accumulation  # one more per pass at most
        assert "auto" not in json.dumps(resolved)
    with pytest.raises(XdscaleError, match=r"training\.global_batch = 288 feeds at most 288 ranks, not 289"):
        resolve_ds_config(str(path), values, recipe, 289)


@pytest.mark.parametrize("size", ["bert-base", "electra-large"])
@pytest.mark.parametrize("way", ["zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"])
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_every_size_and_way_ships_in_16_bits_with_fp32_accumulation(size, way, kind):
    values = read_ds_config(f"ds_configs/{size}-{way}{'' if kind == 'bf16' else '-fp16'}.json")
    assert precision(values) == kind
    assert values["data_types"] == {"grad_accum_dtype": "fp32"}


def test_misspelt_top_level_key_is_refused(write):
    with pytest.raises(XdscaleError, match="unknown key 'zero_optimisation'; did you mean 'zero_optimization'"):
        read_ds_config(write({"train_micro_batch_size_per_gpu": 1, "zero_optimisation": {"stage": 2}}))


@pytest.mark.parametrize("key", ["scheduler", "tensorboard", "checkpoint"])
def test_what_the_recipe_decides_does_not_belong_here(write, key):
    with pytest.raises(XdscaleError, match=f"'{key}' does not belong here"):
        read_ds_config(write({key: {}}))


def test_duplicate_key_and_bad_json(write):
    with pytest.raises(XdscaleError, match="key given twice: bf16"):
        read_ds_config(write('{"bf16": {}, "bf16": {}}'))
    with pytest.raises(XdscaleError, match="not valid JSON"):
        read_ds_config(write("{"))
    for comment in ("// x", "/* x */", "# x"):
        with pytest.raises(XdscaleError, match="JSON has no comments, take them out"):
            read_ds_config(write(f'{{"bf16": {{}}, {comment}\n"fp16": {{}}}}'))
    assert read_ds_config(write("\ufeff{}")) == {}  # as editors under Windows begin it
    with pytest.raises(XdscaleError, match="not valid JSON: Exceeds the limit"):
        read_ds_config(write('{"train_batch_size": ' + "1" * 5000 + "}"))


def test_a_shipped_config_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (path,) = (path for path in SHIPPED if path.name == "electra-large-zero2.json")
    by_path = read_ds_config(str(path))
    assert read_ds_config("electra-large-zero2") == read_ds_config("electra-large-zero2.json") == by_path
    (tmp_path / "electra-large-zero2.json").write_text('{"train_micro_batch_size_per_gpu": 1}')
    # The user's own file, where the user says so.
    assert read_ds_config("electra-large-zero2.json") == {"train_micro_batch_size_per_gpu": 1}
    assert read_ds_config("electra-large-zero2") == by_path


@pytest.mark.parametrize("name", ["electra-large-zero-2", "electra-large-zero2.jsn", "cfg/electra-large-zero2.json"])
def test_a_config_that_does_not_exist_is_answered_with_the_nearest_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(XdscaleError, match="no such DeepSpeed config.* did you mean 'electra-large-zero2'"):
        read_ds_config(name)


@pytest.mark.parametrize(
    ("name", "same"),
    [("bert-large-zero2", "electra-large-zero2"), ("electra-base-zero3-fp16.json", "bert-base-zero3-fp16")],
)
def test_the_name_of_a_model_is_answered_with_the_config_of_its_size(name, same):
    """Not with one that only looks alike, such as bert-base-zero2 for bert-large-zero2."""
    with pytest.raises(XdscaleError, match=f"^{name}: no such .*: did you mean '{same}'"):
        read_ds_config(name)
    with pytest.raises(XdscaleError, match="bert-large-zero7: no such DeepSpeed config"):
        read_ds_config("bert-large-zero7")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gradient_clipping": 0.5}, r"gradient_clipping = 0\.5 contradicts the recipe: optim\.gradient_clipping"),
        ({"train_batch_size": 64}, r"train_batch_size = 64 contradicts the recipe: training\.global_batch gives 288"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps = 3 contradicts"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, r"optimizer\.params\.lr = 0\.001 contradicts.*optim\.learning_rate"),
        ({"optimizer": {"type": "Lamb"}}, r"optimizer\.type = 'Lamb' contradicts"),
        (
            {"optimizer": {"type": "SGD"}},
            r"optimizer\.type = 'SGD' contradicts the recipe: optim\.optimizer gives AdamW",
        ),
        ({"optimizer": {"params": {"momentum": 0.9}}}, r"unknown key 'optimizer\.params\.momentum'"),
        ({"train_micro_batch_size_per_gpu": "auto"}, "expected a whole number"),
        ({"train_micro_batch_size_per_gpu": True}, "expected a whole number"),
    ],
)
def test_contradictions_name_both_places(write, values, message):
    name = write({"train_micro_batch_size_per_gpu": 4} | values)
    with pytest.raises(XdscaleError, match=message):
        resolve_ds_config(name, read_ds_config(name), load_recipe("xdbert-base-wikitext103"), 8)


def test_the_micro_batch_is_resolved_to_the_width_that_all_ranks_need(write):
    """For the engine, the order and the evaluation alike."""
    name = write({"train_micro_batch_size_per_gpu": 36, "gradient_accumulation_steps": 1})
    resolved = resolve_ds_config(name, read_ds_config(name), load_recipe("xdbert-base-wikitext103"), 64)
    assert resolved["train_micro_batch_size_per_gpu"] == 5
    assert str(split_batch(288, 64, 5)) == "a step of 288 samples: 64 ranks × 1 micro-batch of 5, 10.0% of it padding"
    assert str(split_batch(288, 1, 36)) == "a step of 288 samples: 1 rank × 8 micro-batches of 36, no padding"


def test_auto_is_filled_from_the_recipe(write):
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "weight_decay": 0.01}}
    name = write({"train_micro_batch_size_per_gpu": 4, "gradient_clipping": "auto", "optimizer": optimizer})
    resolved = resolve_ds_config(name, read_ds_config(name), load_recipe("xdbert-base-wikitext103"), 8)
    assert resolved["gradient_accumulation_steps"] == 288 / 8 / 4
    assert resolved["gradient_clipping"] == 1.0
    assert "optimizer" not in resolved


def test_deepspeeds_own_timer_never_waits_for_the_gpu(monkeypatch):
    """It is on by default, and from the second step on synchronises twice per micro-batch."""
    import torch
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils.config import get_timers_config
    from deepspeed.utils.timer import ThroughputTimer

    from xdscale.training.engine import build_engine

    engines, waits = [], []
    monkeypatch.setattr("deepspeed.initialize", lambda **options: engines.append(options["config"]) or [None])
    build_engine(torch.nn.Linear(1, 1), Optim(), {}, load_universal=False)
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda: waits.append(1))
    for values in ({}, *engines):
        waits.clear()
        timer = ThroughputTimer(get_timers_config(values), batch_size=1)
        for _ in range(4):
            timer.start()
            timer.stop(global_step=True)
        assert bool(waits) == (values == {})
    assert len(engines) == 1


def test_what_deepspeed_prints_of_memory_is_not_said(monkeypatch, capsys):
    import torch
    from deepspeed.runtime.utils import see_memory_usage

    from xdscale.training.engine import build_engine

    monkeypatch.setattr("deepspeed.initialize", lambda **_: [see_memory_usage("begin bf16_optimizer", force=True)])
    build_engine(torch.nn.Linear(1, 1), Optim(), {}, load_universal=False)
    assert capsys.readouterr().out == ""
    base = inspect.getsource(sys.modules["deepspeed.runtime.base_optimizer"])
    said = re.search(r'logger\.warning\("(MPU is not provided.*)"\)', base)[1]
    lines = [logging.makeLogRecord({"msg": text}) for text in (said, "a parameter was not found")]
    assert [_is_of_use(line) for line in lines] == [False, True]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_a_run_records_may_be_given_to_another(path, write):
    recipe = load_recipe("xdbert-base-wikitext103")
    resolved = resolve_ds_config(path.stem, read_ds_config(str(path)), recipe, 16)
    assert resolve_ds_config("again", read_ds_config(write(resolved)), recipe, 16) == resolved


def test_the_timer_cannot_be_switched_on(write):
    with pytest.raises(XdscaleError, match="'timers' does not belong here: .*waits for the GPU"):
        read_ds_config(write({"timers": {"throughput": {"enabled": True}}}))


def test_a_config_without_sections_is_unsharded_fp32_that_keeps_activations():
    """As DeepSpeed takes it."""
    assert (zero_stage({}), precision({}), activation_checkpointing({})) == (0, "fp32", False)
    assert zero_stage({"zero_optimization": {}}) == 0
    assert precision({"bf16": {"enabled": False}, "fp16": {"enabled": True}}) == "fp16"
