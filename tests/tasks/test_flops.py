"""`XDBERTAdaptation.flops` against what torch counts while the model runs."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xdscale.models.cross_modal import SelectedTokens
from xdscale.models.packed_tokens import PackedTokens
from xdscale.padding import clip_layout
from xdscale.systems.xdbert import build_adaptation
from xdscale.training.engine import to_device


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def counted(call):
    """What torch counts; the fused attention of the CPU is not among it, its definition is."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        call()
    return counter.get_total_flops()


def own_pooler(module, samples):
    """What BERT's own pooler costs; transformers runs it, but no loss reads it."""
    config = module.model.language.config
    return samples * 2 * config.hidden_size**2 if config.model_type == "bert" else 0


@pytest.mark.parametrize(
    ("off", "layers", "kernels"),
    [
        ((), 2, "fused"),
        ((), 2, "plain"),
        ((), 1, "fused"),
        (("match",), 2, "fused"),
        (("clip_tokens",), 1, "fused"),
        (("mlm", "match"), 1, "plain"),
    ],
)
def test_forward_pass(adaptation_spec, arrays, batch, off, layers, kernels):
    """Real texts of different lengths; the last layer at targets only."""
    assert len(set(arrays["clip_lengths"].sum(1).tolist())) > 1
    spec = adaptation_spec(objectives=dict.fromkeys(off), kernels=kernels, layers=layers)
    module = build_adaptation(spec).eval()
    with torch.no_grad():
        total = counted(lambda: module(batch)) - own_pooler(module, len(batch["language_ids"]))
    assert module.flops(arrays) == 3 * total


@pytest.mark.parametrize("checkpointing", [False, True])
def test_forward_and_backward_pass(adaptation_spec, arrays, batch, checkpointing):
    """The definitions, as the kernels' backward passes compute scores and logits a second time."""
    module = build_adaptation(adaptation_spec(kernels="plain"))
    if checkpointing:
        module.enable_activation_checkpointing()
    total = counted(lambda: sum(loss for loss, _ in module(batch).values()).backward())
    if checkpointing:
        assert module.flops(arrays) < 0.9 * total  # what is computed again is no useful work
    else:
        assert module.flops(arrays) == total - own_pooler(module, len(batch["language_ids"]))


def test_padding_and_fewer_targets_cost_less(adaptation_spec, arrays):
    module = build_adaptation(adaptation_spec())
    full = dict(arrays, clip_lengths=np.full_like(arrays["clip_lengths"], 77))
    fewer = dict(arrays, clip_positions=arrays["clip_positions"][:1])
    assert module.flops(fewer) < module.flops(arrays) < module.flops(full)


@pytest.fixture
def published_arrays():
    """Two sequences of 512: a CLIP text of 9 full blocks, and one of 5 blocks with 20 tokens in the last."""
    clip_lengths = np.array([[77] * 9, [77] * 4 + [20] + [0] * 4])
    generator = np.random.default_rng(0)
    masked = np.sort(generator.choice(np.arange(1, 511), 76, replace=False))
    tokens = np.sort(generator.choice(np.arange(1, 76), 30, replace=False))
    return {
        "language_ids": np.zeros((2, 512), np.int64),
        "clip_ids": np.zeros((2, 9, 77), np.int64),
        "clip_lengths": clip_lengths,
        "masked_lm_positions": np.concatenate([masked, 512 + masked[:50]]),
        "clip_positions": np.concatenate([tokens + 77 * block for block in (0, 4, 9, 12)]),
    }


def offsets(lengths):
    """On the CPU, where the definition of attention reads them, beside states without memory."""
    return PackedTokens(torch.tensor([0, *lengths]).cumsum(0), max(lengths))


def run_parts(module):
    """One forward pass on the published arrays, part by part, on the meta device."""
    language, size = module.model.language, module.model.language.config.hidden_size
    language.set_attn_implementation("eager")  # ours reads the offsets' values, of which this device has none
    language(torch.zeros(2, 512, dtype=torch.int64, device="meta"))
    module.model.clip(torch.zeros(1, 9 + 5, 77, dtype=torch.int64, device="meta"))
    rows, columns = 76 + 50 + 2, 120
    states = torch.empty(1024, size, device="meta"), torch.empty(693 + 328, 512, device="meta")
    streams = offsets([512, 512]), offsets([693, 328])
    selected = SelectedTokens(
        torch.empty(rows, dtype=torch.int64, device="meta"),
        offsets([77, 51]),
        torch.empty(columns, dtype=torch.int64, device="meta"),
        offsets([60, 60]),
    )
    for layer, limit in zip(module.model.layers, (None, selected), strict=True):
        states = layer(*states, *streams, limit)
    assert [len(side) for side in states] == [rows, columns]
    labels = torch.empty(1024, dtype=torch.int64, device="meta")
    module.mlm(states[0][:126], labels[:126])
    module.match(states[0][126:], labels[:2])
    module.clip_tokens(states[1], labels[:columns])


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/electra-large-discriminator"])
def test_published_sizes(adaptation_spec, published_arrays, name):
    """BERT-base and ELECTRA-large with ViT-B/32's text tower at 512 × 693, without memory."""
    with torch.device("meta"):
        module = build_adaptation(adaptation_spec(name, "ViT-B-32", weights="random", kernels="plain")).eval()
    with torch.no_grad():
        total = counted(lambda: run_parts(module))
    assert module.flops(published_arrays) == 3 * (total - own_pooler(module, 2))


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/electra-large-discriminator"])
@pytest.mark.parametrize("values", [True, False])
def test_traced_on_the_meta_device(adaptation_spec, published_arrays, name, values):
    """What the kernels count: pairs of tokens, or without lengths as many as texts of the mean length have."""
    with torch.device("meta"):
        module = build_adaptation(adaptation_spec(name, "ViT-B-32", weights="random", dropout=0.1)).train()
    arrays = published_arrays | {
        "masked_lm_labels": published_arrays["masked_lm_positions"],
        "clip_labels": published_arrays["clip_positions"],
        "match_labels": np.array([1, 0]),
        **clip_layout(published_arrays["clip_lengths"], 77),
    }
    batch = to_device(arrays, torch.device("cpu"))
    for key, value in batch.items():
        if isinstance(value, torch.Tensor) and (key.endswith("labels") or not values):
            batch[key] = value.to("meta")
    if values:  # PyTorch's backward pass refuses positions on another device
        with torch.no_grad():
            total = 3 * (counted(lambda: module(batch)) - own_pooler(module, 2))
    else:
        total = counted(lambda: sum(loss for loss, _ in module(batch).values()).backward()) - own_pooler(module, 2)
    assert total == (module.flops(arrays) if values else pytest.approx(module.flops(arrays), rel=0.03))
