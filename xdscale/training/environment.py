"""What a rank's process is given before torch comes in: threads, quiet libraries, a precision that its GPU has."""

import logging
import os
import re
import warnings
from typing import Any

from xdscale.devices import computes_in_bf16, uses_gpus
from xdscale.ds_config import precision
from xdscale.errors import XdscaleError


def calm_environment() -> None:
    """Settings that must stand before torch's and DeepSpeed's first import."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_LOGS", "-all")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # ranks that cannot meet print pages of C++
    # DeepSpeed calls names that torch is about to rename; nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed's barriers name no device; the one "under current context" is the rank's own, which it began with.
    warnings.filterwarnings("ignore", message=re.escape("barrier(): using the device under current context"))
    # Torch would give each rank all cores, torchrun gives one; AdamW on the host, for offloading, needs its share.
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if by_torchrun or "OMP_NUM_THREADS" not in os.environ:
        threads = threads_per_rank()
        os.environ["OMP_NUM_THREADS"] = str(threads)
        import torch

        torch.set_num_threads(threads)
    if not uses_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    """Returns whether a user can do anything about a line of DeepSpeed's: tensor parallelism is not there at all."""
    return not str(record.msg).startswith("MPU is not provided")


def threads_per_rank() -> int:
    """Returns this rank's share of its machine's cores."""
    bound = len(os.sched_getaffinity(0))
    # Slurm may bind each rank to cores of its own, which are then not shared once more.
    cores = int(os.environ.get("SLURM_CPUS_ON_NODE", bound))
    ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(bound, cores // ranks))


def check_precision(name: str, ds_config: dict[str, Any]) -> None:
    """Refuses bf16 on a GPU and fp16 on a CPU that do not compute in it; PyTorch would imitate the former, slowly.

    Args:
        name: the DeepSpeed configuration's file, for the message.
        ds_config: its values.

    Raises:
        XdscaleError: names what the machine lacks and what to choose.
    """
    kind = precision(ds_config)
    if kind == "bf16" and uses_gpus() and not computes_in_bf16():
        import torch

        raise no_bf16(name, torch.cuda.get_device_name())
    if kind == "fp16" and not uses_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says that it found no GPU
        from deepspeed.accelerator import get_accelerator

        if not get_accelerator().is_fp16_supported():
            raise XdscaleError(
                f"{name}: fp16 = enabled, but DeepSpeed does not compute in fp16 on this machine, which has no GPU; "
                'take "fp16" out of a copy of the file, for fp32'
            )


def no_bf16(name: str, gpu: str) -> XdscaleError:
    """Returns what is said of a DeepSpeed configuration in bf16 for a GPU that does not compute in it."""
    return XdscaleError(
        f"{name}: bf16 = enabled, but this machine's {gpu} does not compute in bf16; take a shipped file whose name "
        'ends in -fp16, or write "fp16": {"enabled": true} in place of "bf16"'
    )
