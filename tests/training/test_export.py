"""Exports: every tensor equals the trained one, and plain transformers loads the folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from xdscale.errors import XdscaleError
from xdscale.export import export_run


@pytest.fixture(scope="module")
def trained(small_run):
    """The module's weights as DeepSpeed saved them whole, beside the sharded fp32 copies that the export reads."""
    path = small_run / "checkpoints" / "step-00000002" / "mp_rank_00_model_states.pt"
    return torch.load(path, weights_only=True, map_location="cpu")["module"]


def test_every_tensor_of_the_language_encoder_equals_the_trained_one(small_export, trained):
    model = AutoModel.from_pretrained(small_export)
    wanted = {
        name.removeprefix("model.language."): value for name, value in trained.items() if "model.language." in name
    }
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_export_has_exactly_the_originals_parameters_and_moved(small_export, cassette_model):
    original, adapted = AutoModel.from_pretrained(cassette_model), AutoModel.from_pretrained(small_export)
    shapes = {name: value.shape for name, value in original.state_dict().items()}
    assert shapes == {name: value.shape for name, value in adapted.state_dict().items()}
    moved = [
        n for n, v in original.state_dict().items() if "pooler" not in n and not torch.equal(v, adapted.state_dict()[n])
    ]
    assert len(moved) > 0.9 * len([name for name in shapes if "pooler" not in name])
    assert (small_export / "config.json").is_file()
    tokens = AutoTokenizer.from_pretrained(small_export)("a red apple")["input_ids"]
    assert tokens == AutoTokenizer.from_pretrained(cassette_model)("a red apple")["input_ids"]
    # Dropout is the published rate again, not what the recipe trained with.
    assert adapted.config.hidden_dropout_prob == original.config.hidden_dropout_prob


def test_the_full_model_holds_every_tensor_once_and_names_the_ties(small_export, trained):
    stored = load_file(small_export / "cross_modal" / "model.safetensors")
    config = json.loads((small_export / "cross_modal" / "config.json").read_text())
    tied = config["tied_weights"]
    assert set(tied) | set(tied.values()) >= {"mlm.decoder_weight", "clip_tokens.decoder_weight"}
    assert stored.keys() | tied.keys() == {name for name in trained if "attn_mask" not in name}
    for name, value in trained.items():
        if "attn_mask" not in name:
            assert torch.equal(stored[tied.get(name, name)], value)
    assert config["recipe"]["training"]["steps"] == 2


def test_an_existing_folder_is_not_touched(small_run, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(XdscaleError, match="exists and is not an empty folder"):
        export_run(small_run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_command_says_what_it_wrote_and_no_more(small_run, tmp_path):
    command = [Path(sys.executable).with_name("xdscale"), "export", small_run, tmp_path / "out"]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (line,) = (done.stdout + done.stderr).splitlines()
    assert line.startswith(f"{tmp_path / 'out'}: step-00000002: language encoder (")


def test_a_missing_step_names_those_that_exist(small_run, tmp_path):
    with pytest.raises(XdscaleError, match="no checkpoint of step 7; there are: 2"):
        export_run(small_run, tmp_path / "out", step=7)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "fp32")])
def test_stages_that_deepspeed_cannot_put_together_export_too(
    adapt, short_shards, narrow_model, tmp_path, stage, precision
):
    """Its own consolidation fails under ZeRO stage 0, and forgets parameters without gradient under stage 1."""
    config = tmp_path / "ds.json"
    values = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": precision == "bf16"}}
    config.write_text(json.dumps(values | {"zero_optimization": {"stage": stage}}))
    settings = ["training.steps=1", "training.global_batch=4", "run.eval_samples=4", f"data.shards={short_shards}"]
    settings += [*narrow_model, f"output.folder={tmp_path / 'run'}"]
    launch = adapt("quickstart", *settings, "--deepspeed_config", str(config))
    assert launch.code == 0, launch.stderr
    export_run(tmp_path / "run", tmp_path / "out")
    path = tmp_path / "run" / "checkpoints" / "step-00000001" / "mp_rank_00_model_states.pt"
    trained = torch.load(path, weights_only=True, map_location="cpu")["module"]
    for name, value in AutoModel.from_pretrained(tmp_path / "out").state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, trained[f"model.language.{name}"].float())
    tied = json.loads((tmp_path / "out" / "cross_modal" / "config.json").read_text())["tied_weights"]
    assert len(tied) == 2
