"""Planned activations against the bytes that autograd really keeps."""

import numpy as np
import pytest
import torch

from xdscale.padding import clip_layout
from xdscale.plan.activations import LOGIT_SCRATCH_BYTES, activations
from xdscale.plan.load import Load
from xdscale.plan.settings import Settings
from xdscale.plan.shapes import model_shape
from xdscale.recipe import load_recipe
from xdscale.systems.xdbert import build_adaptation
from xdscale.training.engine import to_device

BATCH, LENGTH, BLOCKS = 3, 128, 2


def kept_bytes(module, batch):
    """Unique storages that autograd keeps in one forward pass, parameters and batch left out."""
    own = [*module.parameters(), *module.buffers(), *filter(torch.is_tensor, batch.values())]
    excluded = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its address would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(batch)
    return sum(kept.values())


def crafted(blocks):
    masked = np.arange(1, BATCH * LENGTH, 7)
    masked, targets = masked[masked % LENGTH > 0], np.arange(0, BATCH * blocks * 77, 7)
    arrays = {
        "language_ids": np.full((BATCH, LENGTH), 2000),
        "clip_ids": np.full((BATCH, blocks, 77), 300),
        "clip_lengths": np.full((BATCH, blocks), 77),
        **clip_layout(np.full((BATCH, blocks), 77), 77),
        "masked_lm_positions": masked,
        "masked_lm_labels": np.full_like(masked, 2000),
        "clip_positions": targets,
        "clip_labels": np.full_like(targets, 300),
        "match_labels": np.ones(BATCH, np.int64),
    }
    load = Load(LENGTH, blocks, 77 * blocks, len(masked) / BATCH, 1, len(targets) / BATCH)
    return to_device(arrays, torch.device("cpu")), load


@pytest.mark.parametrize(
    ("precision", "checkpointing", "layers", "dropout"),
    [("bf16", False, 2, 0.0), ("fp32", False, 3, 0.0), ("bf16", True, 2, 0.0), ("fp32", False, 2, 0.1)],
)
def test_kept_bytes_within_a_tenth(precision, checkpointing, layers, dropout):
    overrides = ["model.language.weights=random", "model.language.sha256=null", f"model.dropout={dropout}"]
    spec = load_recipe("quickstart", [*overrides, f"model.cross_layers={layers}"])
    module = build_adaptation(spec).to(torch.bfloat16 if precision == "bf16" else torch.float32).train()
    if checkpointing:
        module.enable_activation_checkpointing()
    batch, load = crafted(BLOCKS)
    settings = Settings(stage=0, precision=precision, micro_batch=BATCH, checkpointing=checkpointing)
    # PyTorch's dropout on a CPU keeps a mask of the elements' own dtype.
    planned = activations(model_shape(spec), load, settings, dropout, mask=settings.parameter_bytes)
    assert planned.kept == pytest.approx(kept_bytes(module, batch), rel=0.1)


def test_frozen_clip_keeps_nothing_in_its_tower():
    overrides = ["model.language.weights=random", "model.language.sha256=null", "model.dropout=0"]
    spec = load_recipe("quickstart", overrides)
    module = build_adaptation(spec).train()
    module.model.clip.requires_grad_(False)
    batch, load = crafted(BLOCKS)
    settings = Settings(stage=0, precision="fp32", micro_batch=BATCH)
    planned = activations(model_shape(spec), load, settings, 0.0, frozen=("clip",))
    assert planned.kept == pytest.approx(kept_bytes(module, batch), rel=0.1)


def test_dropout_keeps_the_mask_of_the_embeddings_alone():
    """One byte for each of 512 x 768; the sublayers draw theirs again."""
    spec = load_recipe("xdbert-base-wikitext103", ["model.cross_layers=1"])
    load = Load(512, 1, 77, 0, 0, 0)
    settings = Settings(stage=0, precision="bf16", micro_batch=1)
    with_mask, without = (activations(model_shape(spec), load, settings, rate).kept for rate in (0.1, 0.0))
    assert with_mask - without == 512 * 768


def test_logits_never_exist_as_a_whole():
    """64 sequences of 512: dense fp32 logits of the masked positions alone are 0.6 GB."""
    spec = load_recipe("xdelectra-large-wikipedia")
    load = Load(512, 9, 693, 77, 1, 104)
    settings = Settings(stage=0, precision="bf16", micro_batch=64)
    planned = activations(model_shape(spec), load, settings, 0.1).logits
    assert LOGIT_SCRATCH_BYTES < planned < 64 * 77 * 30522 * 4 / 10


def test_scratch_is_that_of_the_kernels():
    from xdscale.kernels.masked_token_loss_triton import SCRATCH_BYTES

    assert LOGIT_SCRATCH_BYTES == SCRATCH_BYTES
