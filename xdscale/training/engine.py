"""The DeepSpeed engine and its optimizer."""

from typing import Any

import numpy as np
import torch
from torch import nn

from xdscale.errors import XdscaleError
from xdscale.recipe import Optim


def build_engine(module: nn.Module, optim: Optim, ds_config: dict[str, Any], *, load_universal: bool) -> Any:
    """Wraps a module and AdamW in a DeepSpeed engine.

    The optimizer is PyTorch's fused AdamW on every device, so that the same recipe gives the same update
    everywhere and no first run waits for a compiler. Parameters that take no gradient stay out of it: AdamW would
    decay them.

    Args:
        module: the trained module; its forward returns sums, not means.
        optim: the recipe's optimizer section.
        ds_config: a resolved DeepSpeed configuration.
        load_universal: whether a converted checkpoint will be loaded.

    Returns:
        The engine.
    """
    import deepspeed

    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    # DeepSpeed's timer waits for the GPU twice per micro-batch, to say what our progress line says.
    config = ds_config | {"timers": {"throughput": {"enabled": False}}}
    config |= {"checkpoint": {"load_universal": True}} if load_universal else {}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def set_learning_rate(engine: Any, rate: float, optim: Optim, update: int) -> None:
    """Sets the learning rate of the next optimiser step.

    Without bias correction AdamW's step is `rate * (m / (sqrt(v) + eps) + decay * p)` of the bare moments, as in the
    BertAdam of BERT's release. PyTorch's AdamW divides m by c1 = 1 - beta1^t and v by c2 = 1 - beta2^t. A rate times
    c1 / sqrt(c2), an eps divided by sqrt(c2) and a decay divided by that factor cancel the division.

    Args:
        engine: the DeepSpeed engine.
        rate: of the schedule.
        optim: the recipe's optimizer section.
        update: how many updates AdamW has made so far, without skipped ones.
    """
    root, factor = 1.0, 1.0
    if not optim.bias_correction:
        c1, c2 = (1 - beta ** (update + 1) for beta in optim.betas)
        root, factor = c2**0.5, c1 / c2**0.5
    for group in engine.optimizer.param_groups:
        group.update(lr=rate * factor, eps=optim.eps / root, weight_decay=optim.weight_decay / factor)


def make_step(engine: Any, *, skip: bool) -> bool:
    """Makes the engine's step at the end of a micro-batch; at the end of a global batch this updates the parameters.

    A skipped step goes the engine's usual way, so that gradients are dropped and counters advance under every ZeRO
    stage; only AdamW's own step is left out: parameters and moments stay as they are, bit for bit. DeepSpeed leaves
    the step out by itself when the gradient norm is not finite.

    Args:
        engine: the DeepSpeed engine.
        skip: leave the update out.

    Returns:
        Whether parameters were updated.

    Raises:
        XdscaleError: in fp16, gradients overflow at the smallest loss scale.
    """
    optimizer = engine.basic_optimizer
    if skip:
        optimizer.step = lambda *arguments, **options: None  # shadows the method of the class
    try:
        engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error):
            raise
        raise XdscaleError(
            "fp16: the gradients overflow even at the smallest loss scale; lower optim.learning_rate or use bf16"
        ) from None
    finally:
        if skip:
            del optimizer.step
    return not skip and engine.was_step_applied()


def plain_gradient_norm(engine: Any) -> float | None:
    """Returns the global gradient norm between backward and step where DeepSpeed keeps none: stage 0 in fp32."""
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled() or engine.fp16_enabled():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def to_device(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor | int | float]:
    """Returns the arrays of a batch as tensors on the training device; the host waits for nothing.

    An array without dimensions becomes a plain number: shapes and launches are made of it, which happens on the host.
    """
    return {name: _to_device(array, device) if array.ndim else array.item() for name, array in arrays.items()}


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        # Pageable memory would be copied piece by piece, each waiting for the device to reach the copy.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
