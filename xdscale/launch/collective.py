"""All-reduces between all ranks, with a limit on how long they may take."""

import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from xdscale.devices import uses_gpus
from xdscale.files import one_line

LARGE_BYTES = 64 * 2**20


@dataclass
class Outcome:
    """What one rank saw.

    Attributes:
        backend: nccl or gloo.
        milliseconds: of an all-reduce of one number.
        large_milliseconds: of an all-reduce of `large_bytes`.
        large_bytes: its size.
        problem: what went wrong, or empty.
    """

    backend: str
    milliseconds: float = 0.0
    large_milliseconds: float = 0.0
    large_bytes: int = LARGE_BYTES
    problem: str = ""


def all_reduce_twice(store: Any, rank: int, world_size: int, local_rank: int, timeout_seconds: int) -> Outcome:
    """Sums one number and 64 MiB over all ranks, as training does: NCCL on GPUs, gloo without.

    Args:
        store: where the ranks met.
        rank: of this process.
        world_size: number of ranks.
        local_rank: number of this rank on its machine, and of its GPU.
        timeout_seconds: after which a rank stops waiting; the thread that waits is left behind.
    """
    outcome = Outcome("nccl" if uses_gpus() else "gloo")
    limit = timedelta(seconds=timeout_seconds)

    def work() -> None:
        try:
            _all_reduce(store, rank, world_size, local_rank, limit, outcome)
        except Exception as error:  # whatever the network library raises is the finding
            outcome.problem = one_line(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    if thread.is_alive():
        outcome.problem = f"no result of an all-reduce over {outcome.backend} within {timeout_seconds} s"
    return outcome


def _all_reduce(store: Any, rank: int, world_size: int, local_rank: int, limit: timedelta, outcome: Outcome) -> None:
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", local_rank) if outcome.backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        outcome.backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world_size, timeout=limit
    )
    expected = world_size * (world_size + 1) / 2
    for elements, name in ((1, "milliseconds"), (outcome.large_bytes // 4, "large_milliseconds")):
        for _ in range(2):  # the first one connects
            values = torch.full((elements,), rank + 1.0, device=device)
            started = time.perf_counter()
            dist.all_reduce(values)
            low, high = values.min().item(), values.max().item()
            setattr(outcome, name, 1000 * (time.perf_counter() - started))
        if low != expected or high != expected:
            raise ValueError(f"a sum over ranks is {low} to {high}, expected {expected}: the network corrupts data")
    dist.destroy_process_group()
