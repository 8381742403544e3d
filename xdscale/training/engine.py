"""The DeepSpeed engine and its optimizer."""

import io
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from xdscale.errors import XdscaleError
from xdscale.recipe import Optim
from xdscale.systems.contract import pass_numbers
from xdscale.training.integrity import read_pickle
from xdscale.training.optimizer import build_optimizer


def build_engine(
    module: nn.Module,
    optim: Optim,
    ds_config: dict[str, Any],
    *,
    load_universal: bool,
    parts: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Any:
    """Wraps a module and its optimizer in a DeepSpeed engine.

    Args:
        module: the trained module; its forward returns sums, not means.
        optim: the recipe's optimizer section.
        ds_config: a resolved DeepSpeed configuration.
        load_universal: whether a converted checkpoint will be loaded.
        parts: the module's parts by name, which the recipe's rate factors are for.

    Returns:
        The engine.

    Raises:
        XdscaleError: a rate factor is for no part of the module.
    """
    import deepspeed

    optimizer = build_optimizer(module, optim, parts)
    # DeepSpeed's timer waits for the GPU twice per micro-batch, to say what our progress line says.
    config = ds_config | {"timers": {"throughput": {"enabled": False}}, "zero_allow_untested_optimizer": True}
    # Offloading, too, is done with our optimizer: DeepSpeed's own is compiled at the first run, for minutes.
    config["zero_force_ds_cpu_optimizer"] = False
    config |= {"checkpoint": {"load_universal": True}} if load_universal else {}
    # To DeepSpeed each pass is a micro-batch: it exchanges gradients behind the last one, and takes their mean.
    config["gradient_accumulation_steps"] = config.get("gradient_accumulation_steps", 1) * len(pass_numbers(module))
    with redirect_stdout(io.StringIO()):  # its optimizer for bf16 prints 18 lines about memory
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    # Under stage 0 in bf16 and fp16 DeepSpeed makes an update of zeros here, which would count for bias correction.
    optimizer.state.clear()
    return engine


def forget_gradients(engine: Any) -> None:
    """Drops the gradients of the step before, which DeepSpeed would use again in two cases.

    ZeRO-3 does for parameters that get none. ZeRO-1 and 2 with an offloaded optimizer and sums in fp32 keep what was
    not finite and add to it, so that no later step is finite either.
    """
    optimizer = engine.optimizer
    buffer = getattr(optimizer, "grad_partitions_flat_buffer", None)
    if buffer is not None:
        buffer.zero_()
    elif getattr(optimizer, "cpu_offload", False):
        optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))


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


def put_weights(engine: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Has the module compute with other weights, under any ZeRO stage; the optimizer keeps its own.

    Args:
        engine: the DeepSpeed engine, done with training.
        state: every parameter by its name, whole.
    """
    for name, parameter in engine.module.named_parameters():
        _put(parameter, state[name])


def put_fixed(engine: Any, conversion: Path) -> None:
    """Gives a module what no optimizer holds, frozen parameters and buffers: of a conversion DeepSpeed leaves it out.

    Without it that would come from the files that the run began with, whatever they hold by now.

    Args:
        engine: the DeepSpeed engine.
        conversion: of a checkpoint, with the model states of the ranks that wrote it.
    """
    files = sorted(conversion.glob("*_model_states.pt"), key=lambda path: [*map(int, re.findall(r"\d+", path.name))])
    saved = [read_pickle(path) for path in files]
    whole = saved[0]["module"]
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        value = whole[name]
        if hasattr(parameter, "ds_id"):  # ZeRO stage 3: each rank wrote its part, the last ones padded
            value = torch.cat([part["frozen_param_fragments"][name] for part in saved])
            value = value[: parameter.ds_numel].view(parameter.ds_shape)
        _put(parameter, value)
    for name, buffer in buffers_of(engine.module).items():
        buffer.copy_(whole[name])


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the buffers that a checkpoint holds, by name; they share their storage with the module."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    saved = module.state_dict().items()
    return {name: value for name, value in saved if name not in parameters and isinstance(value, torch.Tensor)}


def _put(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Writes a whole value into a parameter, under any ZeRO stage."""
    import deepspeed

    sharded = hasattr(parameter, "ds_id")
    with torch.no_grad(), deepspeed.zero.GatheredParameters(parameter, modifier_rank=0, enabled=sharded):
        parameter.data.copy_(value)


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
