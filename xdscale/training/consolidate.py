"""A checkpoint's fp32 weights, put together from all ranks' files."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from xdscale.devices import uses_gpus
from xdscale.training.checkpoint import read_position
from xdscale.training.integrity import check_pickles, read_pickle
from xdscale.training.weight_average import saved_pieces


def final_state(checkpoint: Path) -> dict[str, Any]:
    """Returns what a run gives others of a checkpoint: the moving average of the weights where it keeps one.

    Args:
        checkpoint: as for `consolidated_state`.

    Raises:
        XdscaleError: as `consolidated_state`.
    """
    state = consolidated_state(checkpoint)
    for name, start, values in saved_pieces(checkpoint):
        piece = values[:]
        state[name].view(-1)[start : start + len(piece)] = piece  # in place: tied weights share storage
    return state


def consolidated_state(checkpoint: Path) -> dict[str, Any]:
    """Returns the fp32 weights of a checkpoint, put together from all ranks' files.

    Tied weights appear under each of their names and share storage.

    Args:
        checkpoint: a published checkpoint of any ZeRO stage, whose checksums have been verified.

    Raises:
        XdscaleError: a file could run code when DeepSpeed reads it.
    """
    if not uses_gpus():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says that it found no GPU
    check_pickles(checkpoint)
    stage = read_position(checkpoint).zero_stage
    if stage == 0:
        # Nothing is sharded, and DeepSpeed's own consolidation does not know this case.
        return _in_fp32(read_pickle(checkpoint / "mp_rank_00_model_states.pt")["module"])
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = _of_bf16_optimizer(checkpoint) if stage == 1 else None
    if state is None:
        # It reports its progress by printing, and with a bar of its own.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if stage == 1:
        # DeepSpeed forgets parameters that take no gradient here.
        saved = read_pickle(checkpoint / "mp_rank_00_model_states.pt")["module"]
        state |= {name: value for name, value in saved.items() if name not in state}
    return _in_fp32(state)


def _in_fp32(state: dict[str, Any]) -> dict[str, Any]:
    """Returns weights of which some, such as frozen ones, are as narrow as the engine had them; ties stay."""
    narrow = [value for value in state.values() if value.is_floating_point() and value.element_size() < 4]
    wide = {value.data_ptr(): value.float() for value in narrow}
    return {name: wide.get(value.data_ptr(), value) for name, value in state.items()}


def _of_bf16_optimizer(checkpoint: Path) -> dict[str, Any] | None:
    """Returns the trained weights that DeepSpeed's optimizer for bf16 with sums in fp32 has sharded under stage 1.

    DeepSpeed's own consolidation does not know its files. Each rank holds an equal part of each group of parameters,
    which lie one behind the other. None where another optimizer wrote the checkpoint.
    """
    import torch
    from deepspeed.utils.zero_to_fp32 import get_optim_files

    shards = [read_pickle(Path(path))["optimizer_state_dict"] for path in get_optim_files(str(checkpoint))]
    if "zero_stage" in shards[0]:
        return None
    saved, state = read_pickle(checkpoint / "mp_rank_00_model_states.pt"), {}
    for shapes, *parts in zip(saved["param_shapes"], *(shard["single_partition_of_fp32_groups"] for shard in shards)):
        flat, start = torch.cat(parts), 0
        for name, shape in shapes.items():
            state[name] = flat[start : start + shape.numel()].view(shape)
            start += shape.numel()
    return state | {name: state[source] for name, source in saved["shared_params"].items() if source in state}
