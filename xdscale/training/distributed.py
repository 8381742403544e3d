"""Processes of a run: who this rank is, and how ranks agree. DeepSpeed starts here and in `engine`."""

import functools
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from xdscale.devices import keep_freed_memory, rank_device, uses_gpus
from xdscale.errors import XdscaleError
from xdscale.files import one_line

_EXCHANGES = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_reduce",
    "all_reduce_coalesced", "all_to_all_single", "barrier", "broadcast", "reduce", "reduce_scatter",
    "reduce_scatter_tensor",
)  # fmt: skip
"""What DeepSpeed may call of its communication backend."""


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        """Whether this rank writes logs and records."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier(device_ids=[self.local_rank] if uses_gpus() else None)  # else torch warns of GPUs

    def gather(self, value: Any) -> list[Any]:
        """Returns the small picklable values of all ranks, in rank order, on every rank."""
        if not torch.distributed.is_initialized():
            return [value]
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the sum over ranks of a tensor on the training device."""
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
        return values

    def raise_first(self, problem: str | None, what: str) -> None:
        """Raises the same error on every rank when any rank has a problem, so that none is left waiting.

        Raises:
            XdscaleError: `what`, the rank and its problem.
        """
        for rank, text in enumerate(self.gather(problem)):
            if text is not None:
                raise XdscaleError(f"{what}: rank {rank}: {text}")

    def on_first(self, action: Callable[[], object]) -> None:
        """Runs an action on the first rank alone; every rank waits for it, and raises what it raises.

        Raises:
            XdscaleError: the action's, on every rank.
        """
        problem = None
        if self.is_first:
            try:
                action()
            except XdscaleError as error:
                problem = str(error)
        problem = self.gather(problem)[0]
        if problem is not None:
            raise XdscaleError(problem)


def start_distributed() -> Ranks:
    """Joins the process group that the launcher prepared, or starts a group of one.

    Works under `deepspeed`, `torchrun` and plain `python -m`. On CPU no collective extension is compiled: DeepSpeed
    would spend one to two minutes on a shared-memory operation that training never calls.

    Returns:
        This process among the others.

    Raises:
        XdscaleError: the machine has GPUs, but fewer than ranks; or the ranks cannot meet: their port is in use, or
            the first one is not found.
    """
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")
    device = rank_device(int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon_uncompiled()
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    except torch.distributed.DistError as error:
        raise XdscaleError(_why_apart(ranks, one_line(error))) from None
    return ranks


def _import_muon_uncompiled() -> None:
    """Has every engine find DeepSpeed's Muon imported, an optimizer that no recipe has.

    It decorates functions with `torch.compile`, which imports all of PyTorch's compiler: four seconds of a core in each
    rank at each start, for nothing.
    """
    from deepspeed.runtime import compiler

    compiling, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiling


def before_exchanges(tell: Callable[[], None]) -> None:
    """Has `tell` called before every exchange between ranks that DeepSpeed begins; replaces what was set before."""
    from deepspeed.comm import comm

    def told(exchange: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        tell()
        return exchange(*arguments, **options)

    for name in _EXCHANGES:
        setattr(comm.cdb, name, functools.partial(told, getattr(type(comm.cdb), name).__get__(comm.cdb)))


def _why_apart(ranks: Ranks, problem: str) -> str:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if "EADDRINUSE" in problem or "already in use" in problem:
        return (
            f"port {port} of {address}, where the ranks meet, is in use, perhaps by another run; choose a free one: "
            f"deepspeed --master_port {int(port) + 1} … (torchrun: --master-port; by hand: MASTER_PORT for every rank)"
        )
    return (
        f"rank {ranks.rank} of {ranks.world_size} does not meet the others at {address}:{port} ({problem[:200]}); "
        "start all ranks, with the same MASTER_ADDR and MASTER_PORT (deepspeed --master_addr, --master_port), and let "
        "them reach that port"
    )


def in_collective(thread: int) -> bool:
    """Returns whether a thread of this process is in an exchange with other ranks."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if "torch/distributed/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


def is_collective(error: Exception) -> bool:
    """Returns whether an error came out of an exchange between ranks, so that another rank is the likely cause."""
    if isinstance(error, torch.distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return any("torch/distributed/" in frame.filename for frame in frames)
