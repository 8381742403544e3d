"""GPUs and the machines they usually stand in.

Peak rates, memory and links are the vendor's data sheets and white papers: dense fp16/bf16 tensor rates that sum in
fp32 (never "with sparsity"), one direction of a link. Between nodes: what the vendor's own node has, or 100 Gbit/s for
the cards that come alone. Memory is what PyTorch reports, which is less than what the card is sold with. Prices are
assumptions in dollars per hour, of the order of public on-demand offers in 2025; replace them with --price.
"""

import difflib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from xdscale.errors import XdscaleError

if TYPE_CHECKING:
    import torch

GIGA = 1e9
"""Vendors count in powers of ten."""

_GIGABIT_100 = 12.5
"""GB per second of a 100 Gbit/s card."""

RESERVED_GIB = 1.5
"""Of a GPU's memory: the context of driver, cuBLAS and NCCL, which no allocator sees."""

FRAGMENTED = 0.05
"""Share of a GPU's memory that PyTorch's caching allocator holds without use."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: with its memory, as on the command line.
        memory_gib: what programs see.
        peak_flops: dense, per second, in the 16-bit format that it has.
        precision: that format: V100 has no bf16.
        node_gpus: GPUs in one node.
        node_link: bytes per second and direction from one GPU to the others of its node.
        network: bytes per second and direction between a node and the others.
        price: dollars per GPU and hour, an assumption; None where nothing is known.
    """

    name: str
    memory_gib: float
    peak_flops: float
    precision: str = "bf16"
    node_gpus: int = 8
    node_link: float
    network: float
    price: float | None


def usable_gib(memory_gib: float) -> float:
    """Returns what of a GPU's memory a plan may fill: without the context and what fragmentation takes."""
    return max(0.0, memory_gib * (1 - FRAGMENTED) - RESERVED_GIB)


def _gpu(
    name: str, memory_gib: float, tflops: float, link_gb: float, network_gb: float, price: float | None, **other: object
) -> Gpu:
    return Gpu(
        name=name,
        memory_gib=memory_gib,
        peak_flops=tflops * 1e12,
        node_link=link_gb * GIGA,
        network=network_gb * GIGA,
        price=price,
        **other,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        # V100 data sheet: 125 TFLOPS, NVLink 300 GB/s both ways; DGX-2: 16 GPUs, 8 × 100 Gbit/s; DGX-1: 8, 4 × 100.
        _gpu("V100-32G", 31.7, 125, 150, 100, 1.50, precision="fp16", node_gpus=16),
        _gpu("V100-16G", 15.8, 125, 150, 50, 1.20, precision="fp16"),
        # A100 data sheet: 312 TFLOPS, NVLink 600 GB/s both ways; DGX A100: 8 × 200 Gbit/s.
        _gpu("A100-40G", 39.4, 312, 300, 200, 1.75),
        _gpu("A100-80G", 79.1, 312, 300, 200, 2.00),
        # H100 SXM data sheet: 1,979 TFLOPS with sparsity, NVLink 900 GB/s both ways; DGX H100: 8 × 400 Gbit/s.
        _gpu("H100-80G", 79.1, 989.5, 450, 400, 3.00),
        # H200 data sheet: as H100, 141 GB.
        _gpu("H200-141G", 139.7, 989.5, 450, 400, 3.50),
        # DGX B200 data sheet: 72 PFLOPS FP8 with sparsity for 8, so 2.25 dense bf16 each; NVLink 1.8 TB/s both ways.
        _gpu("B200-180G", 178.0, 2250, 900, 400, 5.00),
        # L4 data sheet: 242 TFLOPS with sparsity, PCIe 4.0 × 16: 64 GB/s both ways.
        _gpu("L4-24G", 22.0, 121, 32, 12.5, 0.70),
        # L40S data sheet: 362 TFLOPS dense, PCIe 4.0 × 16.
        _gpu("L40S-48G", 44.5, 362, 32, 12.5, 1.00),
        # T4 data sheet: 65 TFLOPS, PCIe 3.0 × 16: 32 GB/s both ways. Turing has no bf16.
        _gpu("T4-16G", 14.6, 65, 16, 12.5, 0.35, precision="fp16"),
        # A10 data sheet: 250 TFLOPS with sparsity, PCIe 4.0 × 16.
        _gpu("A10-24G", 22.0, 125, 32, 12.5, 0.75),
        # RTX A6000 data sheet: 309.7 TFLOPS with sparsity, PCIe 4.0 × 16 (a pair may have an NVLink bridge).
        _gpu("A6000-48G", 47.4, 154.8, 32, 12.5, 0.60),
        # White papers of GA102, Ada and RTX Blackwell: fp16 and bf16 with fp32 sums; PCIe 4.0 × 16, 5.0 × 16 for 5090.
        _gpu("RTX-3090-24G", 23.6, 71, 32, 12.5, 0.30),
        _gpu("RTX-4090-24G", 23.5, 165.2, 32, 12.5, 0.50),
        _gpu("RTX-5090-32G", 31.3, 209.5, 64, 12.5, 0.75),
        # MI250X data sheet: 383 TFLOPS and 128 GB for the two dies of a card; each die is a GPU to programs. Frontier's
        # node: 8 dies, 50 GB/s a link between cards, the slowest of a ring (OLCF user guide), 4 × 200 Gbit/s.
        _gpu("MI250X-64G", 64.0, 191.5, 50, 100, 1.00),
        # MI300X data sheet: 1,307.4 TFLOPS; platform of 8: 7 links of 64 GB/s each; 8 × 400 Gbit/s.
        _gpu("MI300X-192G", 192.0, 1307.4, 448, 400, 2.50),
    )
}
"""By name."""


def find_gpu(name: str) -> Gpu:
    """Returns the GPU of that name.

    Case, hyphens and the words that vendors put around a name do not matter, nor does the memory where that leaves one.

    Raises:
        XdscaleError: unknown or ambiguous; the nearest names are given.
    """
    key = _key(name)
    matches = [gpu for gpu in GPUS.values() if key in (_key(gpu.name), _key(gpu.name.rpartition("-")[0]))]
    if len(matches) == 1:
        return matches[0]
    keys = {_key(known): known for known in GPUS}
    near = [gpu.name for gpu in matches] or [keys[key] for key in difflib.get_close_matches(key, keys, cutoff=0.4)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(GPUS)};"
    raise XdscaleError(
        f"--gpu {name}: no such GPU in the table; {hint} any other needs --gpu-memory, --tflops and --bandwidth"
    )


def describe_gpu(
    name: str, *, memory_gib: float | None, tflops: float | None, bandwidth: float | None, network: float | None
) -> Gpu:
    """Returns a GPU of the table with what is given in the place of its own values, or one that is wholly given.

    Args:
        name: of a GPU in the table, or any other with memory, TFLOPS and bandwidth.
        memory_gib: what programs see.
        tflops: dense peak in bf16 or fp16.
        bandwidth: GB per second and direction from one GPU to the others of its node.
        network: GB per second and direction between a node and the others; 100 Gbit/s where nothing is known.

    Raises:
        XdscaleError: as `find_gpu`, when too little is given.
    """
    try:
        known = find_gpu(name)
    except XdscaleError:
        if not (memory_gib and tflops and bandwidth):
            raise
        known = _gpu(name, memory_gib, tflops, bandwidth, _GIGABIT_100, None)
    given = {
        "memory_gib": memory_gib,
        "peak_flops": tflops and tflops * 1e12,
        "node_link": bandwidth and bandwidth * GIGA,
        "network": network and network * GIGA,
    }
    return replace(known, **{key: value for key, value in given.items() if value})


def gpu_of_device(device: "torch.device") -> Gpu | None:
    """Returns the entry of the table for a GPU of this machine, by its name and of equals by its memory; None if none.

    The PCIe and NVL variants of a card, which are slower, count as the one in the table.
    """
    import torch

    words = set(re.split(r"[^A-Z0-9]+", torch.cuda.get_device_name(device).upper()))
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    known = [gpu for gpu in GPUS.values() if set(gpu.name.split("-")[:-1]) <= words]
    return min(known, key=lambda gpu: abs(gpu.memory_gib - gib), default=None)


def _key(name: str) -> str:
    plain = "".join(character for character in name.lower() if character.isalnum())
    return re.sub(r"nvidia|geforce|tesla|rtx|sxm\d?|hbm\w*|amd|instinct|(?<=\dg)b(?=$|hbm)", "", plain)
