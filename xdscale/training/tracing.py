"""FLOPs and activation memory of a module, by running it on the meta device, where tensors have shapes but no values.

The meta device stands for a GPU (`xdscale.kernels.gpu`): every operation takes the path and keeps the tensors that it
takes and keeps there. Where samples are of different lengths, attention is counted as if they were all of the mean.
"""

import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from xdscale.files import one_line
from xdscale.systems.contract import pass_numbers

_TOLERANCE = 0.02
"""Of a term, relative to the first micro-batch's. Most terms weigh little: FLOPs are off by half a percent at most."""


class Trace(NamedTuple):
    """Forward and backward of one micro-batch.

    Attributes:
        flops: of matrix products, a multiply-add as two. What kernels compute again in the backward pass is no useful
            work and not counted; what activation checkpointing computes again is.
        kept_bytes: held at the end of the forward pass for the backward pass.
        peak_bytes: held at the fullest moment, with gradients until they have arrived at their parameters.
    """

    flops: int
    kept_bytes: int
    peak_bytes: int


def trace(module: nn.Module, arrays: Mapping[str, np.ndarray], objectives: Iterable[str]) -> Trace:
    """Runs forward and backward without values, as often as the module does for a micro-batch.

    Args:
        module: on the meta device; maps a batch to `{objective: (loss sum, …)}`.
        arrays: of a micro-batch. Only their shapes and dtypes count, and arrays without dimensions as numbers.
        objectives: whose losses are trained.
    """
    batch = {name: torch.from_numpy(array).to("meta") if array.ndim else array.item() for name, array in arrays.items()}
    given = [*module.parameters(), *module.buffers(), *(value for value in batch.values() if torch.is_tensor(value))]
    arrived = [
        parameter.register_post_accumulate_grad_hook(_forget_gradient)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    kept = 0
    with _GpuDropout(), _Watch(given) as watch:
        for which in pass_numbers(module):
            outputs = module(batch, *which)
            loss = torch.stack([outputs[name][0] for name in objectives if name in outputs]).sum()
            del outputs
            kept = max(kept, watch.live)
            loss.backward()
            del loss
    for hook in arrived:
        hook.remove()
    return Trace(watch.flops, kept, watch.peak)


def on_meta(module: nn.Module) -> nn.Module:
    """Returns a copy of a module without values; what is tied stays tied."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


class TracedFlops:
    """FLOPs of forward and backward of any micro-batch of a run.

    They are a polynomial of second degree in the mean sizes per sample: linear in tokens, quadratic where tokens attend
    to tokens. A micro-batch whose terms are a combination of those traced before has the same combination of their
    FLOPs; any other one is traced. Few are, as few sizes vary in a run: arrays whose names differ in a last number
    alone, `picture_0` and `picture_1`, count together.
    """

    def __init__(self, module: nn.Module | Exception, objectives: Iterable[str], say: Callable[[str], None]) -> None:
        """Begins without a trace.

        Args:
            module: on the meta device, without activation checkpointing; or why there is none.
            objectives: whose losses are trained.
            say: told once, if the module cannot be traced.
        """
        self._module = module
        self._objectives = list(objectives)
        self._say = say
        self._traceable = True
        # By the names of the arrays, of which some micro-batches lack a few: the sizes of the first one, and the terms
        # and FLOPs of those that were traced.
        self._known: dict[tuple[str, ...], tuple[np.ndarray, list[np.ndarray], list[float]]] = {}

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> float:
        """Returns the FLOPs of a micro-batch; nan where the module does what needs values, which a trace has not.

        The first dimension of the first array counts the samples.
        """
        if not self._traceable:
            return math.nan
        try:
            return self._count(arrays)
        except Exception as error:  # of a system's or a task's own code: training goes on without this figure
            self._traceable = False
            self._say(f"throughput/mfu is left out: the module cannot run without values: {one_line(error)}")
            return math.nan

    def _count(self, arrays: Mapping[str, np.ndarray]) -> float:
        if isinstance(self._module, Exception):
            raise self._module
        samples = len(next(iter(arrays.values())))
        totals: Counter[str] = Counter()
        for name, array in arrays.items():  # pictures of single samples, each of its own size, count by their sum
            totals[name.rstrip("0123456789")] += array.size
        sizes = np.array([1.0, *(size / samples for size in totals.values())])
        units, terms, flops = self._known.setdefault(tuple(totals), (np.maximum(sizes, 1), [], []))
        mine = np.outer(sizes / units, sizes / units)[np.triu_indices(len(sizes))]
        if terms:
            traced = np.stack(terms, 1)
            shares = np.linalg.lstsq(traced, mine)[0]
            if np.abs(traced @ shares - mine).max() < _TOLERANCE:
                return samples * float(shares @ flops)
        found = trace(self._module.train(), arrays, self._objectives).flops
        terms.append(mine)
        flops.append(found / samples)
        return found


class _Watch(TorchDispatchMode):
    """Sums the FLOPs of all operations and the bytes of all storages that live."""

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        """Leaves the tensors out that are given."""
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._memory = _Memory()
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs, flops = self._memory.run(func, args, kwargs or {})
        self.flops += flops
        for tensor in (outputs,) if torch.is_tensor(outputs) else tree_leaves(outputs):
            if torch.is_tensor(tensor):
                self._hold(tensor.untyped_storage())
        return outputs

    def _hold(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


class _Memory:
    """What operations give on the meta device and how many FLOPs they take, by what they are given.

    PyTorch works most of it out in Python, anew for each layer of each picture: that took nearly all of a trace's time.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
        """Returns what an operation gives, and its FLOPs: tensors as the last time, where it only makes new ones."""
        key = func, _described(args), _described(tuple(kwargs.items()))
        try:
            known = self._known.get(key)
        except TypeError:  # something that cannot be looked up
            known = False
        if known:
            outputs, flops = known
            return _made(outputs), flops
        outputs = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else count(*args, **kwargs, out_val=outputs)
        if known is None:
            kept = _remembered(func, [args, kwargs], outputs)
            self._known[key] = kept and (kept, flops)
        return outputs, flops


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_described, value))
    return type(value), value


def _remembered(func: Any, given: Any, outputs: Any) -> Any:
    """Returns what `_made` makes such outputs of; False where they are not all new, or not all without values."""
    single = torch.is_tensor(outputs)
    found = (outputs,) if single else outputs if isinstance(outputs, tuple) else (0,)
    if any(argument.alias_info for argument in func._schema.arguments):
        return False
    if not all(one is None or torch.is_tensor(one) for one in found):
        return False
    inputs = [one for one in tree_leaves(given) if torch.is_tensor(one)]
    if any(one is not None and one.device.type != "meta" for one in (*inputs, *found)):
        return False
    known = single, tuple(one if one is None else (one.shape, one.stride(), one.dtype) for one in found)
    theirs, ours = _storages(found), _storages((_made(known),) if single else _made(known))
    shared = len(theirs) < len(ours) or theirs.keys() & _storages(inputs).keys()
    return False if shared or [*theirs.values()] != [*ours.values()] else known


def _made(known: Any) -> Any:
    single, shapes = known
    made = tuple(one and torch.empty_strided(*one[:2], dtype=one[2], device="meta") for one in shapes)
    return made[0] if single else made


def _storages(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    """Returns the bytes of each storage."""
    storages = [one.untyped_storage() for one in tensors if one is not None]
    return {storage._cdata: storage.nbytes() for storage in storages}


class _GpuDropout(TorchFunctionMode):
    """Keeps a byte of PyTorch's own dropout for each element, as GPUs do; other devices keep an element."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.dropout and kwargs["training"] and kwargs["p"]:
            return torch.native_dropout(*args, kwargs["p"], True)[0]
        return func(*args, **(kwargs or {}))


def _forget_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None
