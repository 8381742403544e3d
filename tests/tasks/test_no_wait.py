"""Nothing in a training step's forward and backward pass waits for the device.

The meta device stands for a GPU: its tensors have shapes and no values, so whatever would have to look at a value
raises. The kernels are replaced where they would be launched; their own checks run as on a GPU.
"""

import importlib
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xdscale import recipe
from xdscale.data.task_table import TASKS
from xdscale.kernels import attention
from xdscale.kernels.masked_token_loss import ChunkGradients, RowStatistics
from xdscale.tasks.finetuning import Finetuning, build_clip_classifier, build_language_classifier
from xdscale.tasks.subjects import CrossModalClassifier
from xdscale.tasks.xdbert import build_adaptation, build_model
from xdscale.training.engine import to_device

masked_token_loss = importlib.import_module("xdscale.kernels.masked_token_loss")  # not the function of that name

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
    """What would run on a GPU gives results of the right shapes; the list says what was launched."""
    names = []

    def attend(query, key, value, packing):
        assert isinstance(packing.max_query, int)
        assert isinstance(packing.max_key, int)
        names.append("attention")
        return (torch.empty_like(query),)

    def attend_backward(grad, query, key, value, packing):
        names.append("attention backward")
        return tuple(map(torch.empty_like, (query, key, value)))

    def row_statistics(hidden, weight, bias, labels, dtype):
        names.append("loss")
        return RowStatistics(*(hidden.new_empty(len(hidden)) for _ in range(3)), labels.new_empty(len(labels)).bool())

    def logit_gradients(hidden, weight, bias, labels, maximum, total, grad_loss, grad_bias, dtype):
        names.append("loss backward")
        yield ChunkGradients(slice(0, len(weight)), weight, hidden.new_empty(len(hidden), len(weight)))

    kernels = SimpleNamespace(forward=attend, backward=attend_backward)
    # The meta device has no autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type=None: False)
    monkeypatch.setattr(torch, "autocast", lambda device_type, enabled: nullcontext())
    monkeypatch.setattr(attention, "_backend", lambda query: kernels)
    monkeypatch.setattr(masked_token_loss, "_row_statistics", row_statistics)
    monkeypatch.setattr(masked_token_loss, "_logit_gradients", logit_gradients)
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
        module.enable_activation_checkpointing()
    terms = step(module, arrays)
    assert terms.keys() == {"mlm", "match", "clip_tokens"}
    encoder = module.model.language.config.num_hidden_layers
    assert launched.count("attention") == (1 + checkpointing) * (encoder + 2 * 4)
    assert launched.count("attention backward") == encoder + 2 * 4
    assert launched.count("loss") == launched.count("loss backward") == 2


def test_masked_lm(cassette_model, arrays, launched):
    spec = recipe.load_recipe("quickstart-mlm", [f"model.language.name={cassette_model}"])
    assert step(build_adaptation(spec), arrays).keys() == {"mlm"}
    assert launched == ["attention", "attention", "loss", "loss backward", "attention backward", "attention backward"]


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
    spec, outputs = adaptation_spec(dropout=0.1).model, TASKS[task].outputs
    if kind == "language":
        subject = build_language_classifier(spec.language, TASKS[task], dropout=0.1)
    elif kind == "cross-modal":
        subject = CrossModalClassifier(build_model(spec), outputs, dropout=0.1)
    else:
        subject = build_clip_classifier(spec.clip, TASKS[task], dropout=0.1)
    module = Finetuning(subject, regression=TASKS[task].regression)
    if checkpointing:
        module.enable_activation_checkpointing()
    assert step(module, task_arrays(task, labels))["logits"].device == META
    assert kind == "clip" or {"attention", "attention backward"} == set(launched)
