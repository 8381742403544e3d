"""The DeepSpeed configurations of `ds_configs/`: five ways to share the model states, in bf16 and in fp16.

`xdscale plan … --write-configs FOLDER` writes them with the micro-batch that fits a GPU. The files that ship were
written so for the two sizes of encoders, each for one A100-40G (bf16) or V100-32G (fp16): with more GPUs each holds
less. Those with `pixels` in their names are for recipes that train a network on images along. A test writes them again
and compares.
"""

import json
import math
from typing import Any

from xdscale.ds_config import pixels_suffix
from xdscale.recipe import Recipe

WAYS = ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
"""ZeRO stage, and whether optimizer (and parameters, in stage 3) live in the host's memory; simplest first."""


def ds_config(
    way: str, precision: str, micro_batch: int, parameters: int, *, checkpointing: bool = False
) -> dict[str, Any]:
    """Returns a DeepSpeed configuration.

    Args:
        way: one of `WAYS`, or `zero0` for whole model states on every rank.
        precision: `bf16`, `fp16` or `fp32`.
        micro_batch: most sequences per rank and forward pass.
        parameters: of the model; buckets and thresholds follow from it.
        checkpointing: whether to recompute layers in the backward pass.
    """
    stage, offload = int(way[4]), way.endswith("-offload")
    values: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }
    if precision != "fp32":
        values[precision] = {"enabled": True}
    if precision != "fp32" and stage:
        # 16 bits are too few to sum the gradients of many micro-batches in.
        values["data_types"] = {"grad_accum_dtype": "fp32"}
    values["zero_optimization"] = _zero(stage, offload, parameters)
    if offload:
        # DeepSpeed's own CPU Adam is compiled at the first run, for minutes; PyTorch's fused AdamW is there already.
        values |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    if checkpointing:
        values["activation_checkpointing"] = {"enabled": True}
    return values


def model_name(recipe: Recipe) -> str:
    """Returns the name of a recipe's encoder in file names, such as `electra-large`; of its system if it has none.

    `pixels_suffix` follows.
    """
    if not hasattr(recipe.model, "language"):
        return recipe.system
    name = recipe.model.language.name.rstrip("/").split("/")[-1]
    return name.removesuffix("-uncased").removesuffix("-discriminator") + pixels_suffix(recipe)


def file_name(model: str, way: str, precision: str) -> str:
    """Returns the name of a configuration file; bf16 is not named."""
    return f"{model}-{way}{'' if precision == 'bf16' else f'-{precision}'}.json"


def config_text(values: dict[str, Any]) -> str:
    """Returns a configuration as people read it."""
    return json.dumps(values, indent=2) + "\n"


def _zero(stage: int, offload: bool, parameters: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    # An eighth of the gradients at a time: most are sent while the backward pass runs, in pieces that fill a link.
    zero["reduce_bucket_size"] = _round_up(parameters / 8)
    if stage in (1, 2):
        zero["allgather_bucket_size"] = _round_up(parameters / 8)
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": _round_up(parameters / 16),
            # Biases and norms stay whole on every rank, matrices do not.
            "stage3_param_persistence_threshold": _round_up(parameters / 4096),
            # More than twice all elements, tied ones counted twice: what is gathered is kept for the backward pass.
            "stage3_max_live_parameters": _round_up(4 * parameters),
            "stage3_max_reuse_distance": _round_up(4 * parameters),
        }
    host = {"device": "cpu", "pin_memory": True}
    if offload:
        zero["offload_optimizer"] = host
    if offload and stage == 3:
        zero["offload_param"] = dict(host)
    return zero


def _round_up(elements: float) -> int:
    """Returns a number of two digits and zeros."""
    unit = 10 ** max(0, math.ceil(math.log10(elements)) - 2)
    return math.ceil(elements / unit) * unit
