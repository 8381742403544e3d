"""What an engine holds, in five figures that do not depend on how it is sharded.

They are recorded with every checkpoint and compared after every load, because DeepSpeed can load part of a checkpoint,
or none, without a word: sharded parameters that do not take gradients, an optimizer that starts from scratch, a
conversion that shifts a partition.

The checksums are sums modulo 2^64 over the bit patterns of all elements, so shards can be summed in any order: exact
at any world size, for every ZeRO stage, from whatever part of a tensor a rank holds. One altered element always
changes the sum of the parameters (its weight is odd, hence invertible); exchanged or shifted ones do so but for a
chance of about 2^-32.
"""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from xdscale.training.distributed import Ranks
from xdscale.training.engine import buffers_of

_BLOCK = 2**20
_EVEN, _ODD = 0x1E3779B97F4A7C14, 0x3F58476D1CE4E5B9
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """What must be the same before saving and after loading.

    Attributes:
        parameters: checksum of all parameters as the module computes with them, each at its name and position.
        buffers: the same of what is saved beside them, such as BatchNorm's statistics; those of the first rank.
        optimizer: checksum of the optimizer's fp32 weights and both of Adam's moments, wherever they lie.
        optimizer_step: updates that AdamW counts; less than the run's steps where fp16 skipped some.
        learning_rate: rate of the last update.
    """

    parameters: str
    buffers: str
    optimizer: str
    optimizer_step: int
    learning_rate: float

    def differences(self, found: "EngineState") -> list[str]:
        """Returns one phrase per figure in which `found` is not what this state says."""
        wanted, got = asdict(self), asdict(found)
        return [f"{name} expected {wanted[name]}, found {got[name]}" for name in wanted if wanted[name] != got[name]]


def engine_state(engine: Any, ranks: Ranks) -> EngineState:
    """Takes the figures of an engine; every rank calls it and gets those of the whole engine.

    Args:
        engine: the DeepSpeed engine, of any ZeRO stage.
        ranks: this process among the others.
    """
    optimizer = adam_of(engine)
    steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    buffers = sum(weighted_sum(values, name, 0) for name, values in buffers_of(engine.module).items())
    return EngineState(
        parameters=_parameters(engine, ranks),
        buffers=ranks.gather(_hex(buffers))[0],
        optimizer=_moments(engine, optimizer, ranks),
        optimizer_step=max(steps, default=0),
        learning_rate=float(optimizer.param_groups[0]["lr"]),
    )


def adam_of(engine: Any) -> torch.optim.Optimizer:
    """Returns the AdamW inside DeepSpeed's wrappers."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def give_moments(engine: Any) -> None:
    """Gives AdamW the state that its first update would begin with, where ZeRO stage 3 has made no update yet.

    Under the other stages DeepSpeed does that at the start; a checkpoint without it cannot be converted.
    """
    state = adam_of(engine).state
    for flat in getattr(engine.optimizer, "fp32_partitioned_groups_flat", ()):
        if not state[flat]:
            state[flat] |= {name: torch.zeros_like(flat) for name in ("exp_avg", "exp_avg_sq")}
            state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)


def place_state(optimizer: torch.optim.Optimizer) -> None:
    """Puts every tensor of the optimizer's state on its parameter's device, as a tensor of its own.

    From a universal checkpoint, DeepSpeed leaves Adam's step on the CPU, where CUDA's fused AdamW does not take it; and
    stage 3 gives all its flat partitions the same step, which each update of a partition would count up.
    """
    for weights, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                state[name] = value.to(weights.device, copy=name == "step")


def weighted_sum(values: torch.Tensor, name: str, start: int) -> torch.Tensor:
    """Returns the sum over elements of bit pattern × weight, modulo 2^64.

    The weight of the element at position p of a tensor is a fixed table's odd entry p mod 2^20, times an odd number
    made of the tensor's name and p div 2^20. Zeros add nothing, so padding does not count.

    Args:
        values: elements `start` … of the flattened tensor called `name`.
        name: the tensor's name.
        start: position of the first element.

    Returns:
        An int64 scalar on the tensor's device.
    """
    bits = values.detach().reshape(-1).view(_BITS[values.element_size()])
    table = _table(values.device)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    done = 0
    while done < len(bits):
        block, inside = divmod(start + done, _BLOCK)
        piece = bits[done : done + _BLOCK - inside].to(torch.int64)
        digest = hashlib.sha256(f"{name}/{block}".encode()).digest()
        odd = int.from_bytes(digest[:8], "big", signed=True) | 1
        total += (piece * table[inside : inside + len(piece)]).sum() * odd
        done += len(piece)
    return total


def unordered_sum(values: torch.Tensor) -> torch.Tensor:
    """Returns the sum over elements of a scrambled bit pattern, modulo 2^64, whatever the order; zeros add nothing.

    Scrambled means x (A x + B) with even A and odd B, which is one-to-one modulo 2^64 (Rivest, "Permutation
    polynomials modulo 2^w", 2001): one altered element always changes the sum.
    """
    bits = values.detach().reshape(-1).view(_BITS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    # Pieces that stay in a core's cache, or that fill a GPU.
    for piece in bits.split(2**16 if values.device.type == "cpu" else 2**24):
        wide = piece.to(torch.int64)
        total += (wide * _EVEN).add_(_ODD).mul_(wide).sum()
    return total


def _parameters(engine: Any, ranks: Ranks) -> str:
    total = torch.zeros((), dtype=torch.int64, device=engine.device)
    sharded = False
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_tensor"):  # ZeRO stage 3: this rank's part, the last ones padded
            sharded = True
            start = ranks.rank * parameter.ds_tensor.ds_numel
            mine = parameter.ds_tensor.reshape(-1)[: max(0, parameter.ds_numel - start)]
            total += weighted_sum(mine, name, start).to(engine.device)
        else:
            total += weighted_sum(parameter, name, 0)
    return _hex(ranks.sum(total) if sharded else total)


def _moments(engine: Any, optimizer: torch.optim.Optimizer, ranks: Ranks) -> str:
    total = torch.zeros((), dtype=torch.int64, device=engine.device)
    real: dict[int, list[slice]] = {}
    for flat, _, _, piece in partitions(engine.optimizer, ranks):
        real.setdefault(id(flat), []).append(piece)
    for weights, state in optimizer.state.items():
        for multiplier, values in ((1, weights), (3, state.get("exp_avg")), (5, state.get("exp_avg_sq"))):
            for piece in real.get(id(weights), [slice(None)]) if values is not None else []:
                total += unordered_sum(values.reshape(-1)[piece]).to(engine.device) * multiplier
    mine = sum(weights.numel() for weights in optimizer.state)
    trained = (parameter for parameter in engine.module.parameters() if parameter.requires_grad)
    whole = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)
    return _hex(ranks.sum(total) if max(ranks.gather(mine)) < whole else total)


def partitions(wrapper: Any, ranks: Ranks) -> Iterator[tuple[torch.Tensor, torch.nn.Parameter, int, slice]]:
    """Yields what of parameters this rank's flat partitions hold under ZeRO stage 3; nothing under other stages.

    Yields:
        The flat partition; the parameter; the position in it of the first element that is held; and where the elements
        lie in the partition, without the padding behind them, whose content is arbitrary.
    """
    for flat, group in zip(getattr(wrapper, "fp32_partitioned_groups_flat", ()), getattr(wrapper, "fp16_groups", ())):
        offset = 0
        for parameter in group:
            part = parameter.ds_tensor.ds_numel
            start = ranks.rank * part
            yield flat, parameter, start, slice(offset, offset + min(part, max(0, parameter.ds_numel - start)))
            offset += part


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    # `random_raw` of a named bit generator is one of the few streams that numpy promises never to change.
    table = np.random.PCG64(0).random_raw(_BLOCK) | np.uint64(1)
    return torch.from_numpy(table.view(np.int64)).to(device)


def _hex(total: torch.Tensor | int) -> str:
    return f"{int(total) % 2**64:016x}"
