"""Nothing in a training step's forward and backward pass waits for the device.

The meta device stands for a GPU: its tensors have shapes and no values, so whatever would have to look at a value
raises.
"""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xdscale import recipe
from xdscale.data.visualbert import VisualBERTCollator
from xdscale.plan.profile import build_on_meta
from xdscale.shards.table import Table
from xdscale.systems.contract import Slots, recompute_activations
from xdscale.systems.mlm import build_masked_lm
from xdscale.systems.xdbert import build_adaptation, build_model
from xdscale.tasks.contract import find_task
from xdscale.tasks.finetuning import Finetuning, build_clip_classifier, build_language_classifier
from xdscale.tasks.subjects import CrossModalClassifier
from xdscale.training.engine import to_device

META = torch.device("meta")


class NoCopies(TorchDispatchMode):
    """Refuses operations on tensors of the host, from which or to which something would be copied."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, torch.Tensor) or leaf.device == META, func
        return result


class NoNumbers(TorchFunctionMode):
    """Refuses tensors made of Python's numbers, which are copied without an operation that `NoCopies` could see."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor), func
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """Names of the kernels that a GPU would run."""
    names = []

    def launch(kernel, grid, *arguments, **options):
        assert all(isinstance(programs, int) for programs in grid)
        names.append(kernel.__name__)

    for module in ("attention_launch", "masked_token_loss_triton", "quick_gelu_triton", "residual_norm_triton"):
        monkeypatch.setattr(f"xdscale.kernels.{module}.launch", launch)
    return names


def step(module, arrays):
    """Forward and backward pass on the device, in training mode; returns what the module returned."""
    module, batch = module.to(META).train(), to_device(arrays, META)
    with NoCopies(), NoNumbers():
        terms = module(batch)
        torch.stack([value[0] for name, value in terms.items() if name != "logits"]).sum().backward()
    return terms


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: int(x[0]),
        lambda x: bool(x.any()),
        lambda x: torch.equal(x, x + 1),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: x + torch.tensor([1.0], device=META),
        lambda x: x + torch.ones(1).to(META),
    ],
)
def test_the_device_notices_what_would_wait(wait):
    # PyTorch's words for "this tensor has no values" are the first two, by operation; the third is the guards' own.
    with pytest.raises((NotImplementedError, RuntimeError, AssertionError)), NoCopies(), NoNumbers():
        wait(torch.ones(3, device=META))


@pytest.mark.parametrize(
    ("name", "checkpointing"), [("bert-base-uncased", False), ("google/electra-base-discriminator", True)]
)
def test_adaptation(adaptation_spec, arrays, launched, name, checkpointing):
    with META:
        module = build_adaptation(adaptation_spec(name, weights="random", dropout=0.1))
    if checkpointing:
        recompute_activations(module)
    terms = step(module, arrays)
    assert terms.keys() == {"mlm", "match", "clip_tokens"}
    # On a GPU CLIP's own attention is PyTorch's.
    layers = module.model.language.config.num_hidden_layers + 2 * 4 + module.model.clip.tower.transformer.layers
    assert launched.count("attention_forward") == (1 + checkpointing) * layers
    assert launched.count("attention_backward_query") == launched.count("attention_backward_key_value") == layers
    assert launched.count("row_statistics_kernel") == 2
    assert launched.count("logit_gradients_kernel") >= 2


def test_masked_lm(cassette_model, arrays, launched):
    spec = recipe.load_recipe("quickstart-mlm", [f"model.language.name={cassette_model}"])
    assert step(build_masked_lm(spec), arrays).keys() == {"mlm"}
    attention = [name for name in launched if name.startswith("attention")]
    assert attention == ["attention_forward"] * 2 + ["attention_backward_query", "attention_backward_key_value"] * 2
    assert launched.count("row_statistics_kernel") == 1


@pytest.mark.parametrize(
    ("early", "checkpointing", "layers"), [("true", False, 12), ("true", True, 12), ("false", False, 13)]
)
def test_visualbert(captioned_pictures, launched, early, checkpointing, layers):
    """Real captions and regions, of any lengths; without early fusion there is one layer more."""
    spec = recipe.load_recipe("visualbert-vqa-coco", ["model.region_size=12", f"model.early_fusion={early}"])
    module = build_on_meta(spec)
    if checkpointing:
        recompute_activations(module)
    collate = VisualBERTCollator(Table(captioned_pictures, "train", "captions"), spec)
    batch = collate(Slots(np.zeros(5, int), np.arange(5) * 7, np.arange(5) < 4))
    assert step(module, batch.arrays).keys() == {"mlm", "match"}
    assert launched.count("attention_forward") == (1 + checkpointing) * layers
    assert launched.count("attention_backward_query") == launched.count("attention_backward_key_value") == layers
    assert launched.count("row_statistics_kernel") == 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "task", "labels"),
    [
        ("language", "rte", [1, 0, 1]),
        ("language", "swag", [3, 1, 0]),
        ("cross-modal", "stsb", [5.0, 0.25, 3.5]),
        ("cross-modal", "swag", [3, 1, 0]),
        ("clip", "rte", [1, 0, 1]),
    ],
)
def test_finetuning(adaptation_spec, task_arrays, launched, kind, task, labels, checkpointing):
    spec, outputs = adaptation_spec(dropout=0.1).model, find_task(task).outputs
    if kind == "language":
        subject = build_language_classifier(spec.language, find_task(task), dropout=0.1)
    elif kind == "cross-modal":
        subject = CrossModalClassifier(build_model(spec), outputs, dropout=0.1)
    else:
        subject = build_clip_classifier(spec.clip, find_task(task), dropout=0.1)
    module = Finetuning(subject, find_task(task))
    if checkpointing:
        recompute_activations(module)
    assert step(module, task_arrays(task, labels))["logits"].device == META
    kernels = {"attention_forward", "attention_backward_query", "attention_backward_key_value"}
    assert kernels <= set(launched)
