"""An exponential moving average of the trained weights, in fp32, cut over ranks as ZeRO cuts the optimizer's weights.

It stands beside DeepSpeed: a checkpoint holds it in files of its own, which can be read under any ZeRO stage and by any
number of ranks.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from xdscale.errors import XdscaleError
from xdscale.files import follow_umask
from xdscale.training.distributed import Ranks
from xdscale.training.engine_state import partitions

PATTERN = "average-*.safetensors"


class Piece(NamedTuple):
    """A rank's part of a parameter.

    Attributes:
        start: position of the first element in the flattened parameter.
        weights: the optimizer's weights of this part, fp32, one dimension; a view.
    """

    start: int
    weights: torch.Tensor


class WeightAverage:
    """The average of a module's weights; none of those that are not trained, and no buffers."""

    def __init__(self, engine: Any, decay: float, ranks: Ranks) -> None:
        """Begins with the weights that the engine has now.

        Args:
            engine: the DeepSpeed engine, of any ZeRO stage.
            decay: share of the average that stays in each update.
            ranks: this process among the others.
        """
        self._engine = engine
        self._ranks = ranks
        self._decay = decay
        self._pieces = _pieces(engine, ranks)
        self._averages = {name: piece.weights.clone() for name, piece in self._pieces.items()}
        self._is_whole = not engine.zero_optimization()

    def update(self) -> None:
        """Takes in the weights of a step that was made: average = decay × average + (1 - decay) × weights."""
        weights = [piece.weights for piece in self._pieces.values()]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - self._decay)

    def save(self, folder: Path) -> None:
        """Writes this rank's part; where all ranks hold the whole, the first one writes.

        Raises:
            RuntimeError: the disk does not take it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if self._is_whole and not self._ranks.is_first:
            return
        parts = {f"{name}@{self._pieces[name].start}": average for name, average in self._averages.items()}
        path = folder / PATTERN.replace("*", f"{self._ranks.rank:05d}")
        try:
            save_file(parts, path)
        except SafetensorError as error:
            raise RuntimeError(str(error)) from None
        follow_umask(path)

    def load(self, folder: Path) -> None:
        """Reads this rank's part from what ranks of any number and stage wrote.

        Raises:
            XdscaleError: elements of a weight are in no file.
        """
        left = {name: len(average) for name, average in self._averages.items()}
        for name, start, values in saved_pieces(folder):
            if name in self._averages:
                average, own = self._averages[name], self._pieces[name].start
                first, last = max(start, own), min(start + values.get_shape()[0], own + len(average))
                if first < last:
                    average[first - own : last - own] = values[first - start : last - start].to(average.device)
                    left[name] -= last - first
        missing = [name for name, count in left.items() if count]
        if missing:
            raise XdscaleError(f"{folder}: holds no whole average of {missing[0]}; expected {PATTERN} of all ranks")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Has the module compute with the averages inside the block; then with its weights again, bit for bit."""
        kept = []
        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad:
                own = getattr(parameter, "ds_tensor", parameter).data
                kept.append((own, own.clone()))
                self._put(name, own, sharded=hasattr(parameter, "ds_tensor"))
        self._gather_again()
        try:
            yield
        finally:
            for own, values in kept:
                own.copy_(values)
            self._gather_again()

    def _put(self, name: str, own: torch.Tensor, *, sharded: bool) -> None:
        """Puts an average in the place of what the module computes with: a rank's part, or the whole parameter."""
        average = self._averages.get(name)
        if sharded:
            if average is not None:
                own.view(-1)[: len(average)] = average.to(own)
            return
        whole = torch.zeros(own.numel(), device=own.device)
        if average is not None:
            start = self._pieces[name].start
            whole[start : start + len(average)] = average.to(own.device)
        own.copy_((whole if self._is_whole else self._ranks.sum(whole)).view_as(own))

    def _gather_again(self) -> None:
        """Under ZeRO stage 3 renews the parameters that every rank keeps whole, and drops those gathered before.

        A forward pass without a backward pass leaves many of them gathered for the next one.
        """
        offload = getattr(self._engine.optimizer, "parameter_offload", None)
        if offload is None:
            return
        offload.partition_all_parameters()
        if offload.persistent_parameters:
            offload.persistent_parameters[0].all_gather(offload.persistent_parameters)


def using(average: WeightAverage | None) -> AbstractContextManager[None]:
    """Returns a block in which the module computes with the average, if there is one."""
    return nullcontext() if average is None else average.in_use()


def saved_pieces(folder: Path) -> Iterator[tuple[str, int, Any]]:
    """Yields (parameter's name, position of the first element, values to be sliced) of a checkpoint's average."""
    from safetensors import safe_open

    for path in sorted(folder.glob(PATTERN)):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                name, _, start = key.rpartition("@")
                yield name, int(start), file.get_slice(key)


def _pieces(engine: Any, ranks: Ranks) -> dict[str, Piece]:
    """Returns this rank's part of each trained parameter, by the parameter's name; only those it has a part of."""
    names = {parameter: name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    wrapper, pieces = engine.optimizer, {}
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # ZeRO stage 3
        for flat, parameter, start, place in partitions(wrapper, ranks):
            pieces[names[parameter]] = Piece(start, flat.detach()[place])
    elif hasattr(wrapper, "fp32_groups"):  # bf16 and fp16 without ZeRO
        for parameters, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups):
            for parameter, master in zip(parameters, masters):
                pieces[names[parameter]] = Piece(0, master.detach().view(-1))
    else:
        for parameter, name in names.items():
            if not hasattr(parameter, "_hp_mapping"):  # fp32 without ZeRO
                pieces[name] = Piece(0, parameter.detach().view(-1))
            elif parameter._hp_mapping is not None:  # ZeRO stages 1 and 2
                mapping = parameter._hp_mapping
                pieces[name] = Piece(mapping.lp_fragment_address.start, mapping.hp_fragment.detach())
    return pieces
