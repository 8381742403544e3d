"""The DeepSpeed configurations of `ds_configs/`: five ways to share the model states, in bf16 and in fp16.

`xdscale plan … --write-configs FOLDER` writes them with the micro-batch that fits a GPU; the files that ship were
written so, for A100-40G (bf16) and V100-32G (fp16), and a test writes them again and compares.
"""

import json
from typing import Any

from xdscale.recipe import Recipe

WAYS = ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")
"""ZeRO stage, and whether optimizer (and parameters, in stage 3) live in the host's memory; simplest first."""

_BUCKET = 50_000_000
"""Elements: 100 MB in 16 bits, enough to fill a link, small beside activations."""

_KEEP = 2_000_000_000
"""Elements, more than twice those of any model here: what stage 3 has gathered it keeps until the backward pass."""


def ds_config(way: str, precision: str, micro_batch: int, *, checkpointing: bool = False) -> dict[str, Any]:
    """Returns a DeepSpeed configuration.

    Args:
        way: one of `WAYS`, or `zero0` for whole model states on every rank.
        precision: `bf16`, `fp16` or `fp32`.
        micro_batch: sequences per rank and forward pass.
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
    values["zero_optimization"] = _zero(stage, offload)
    if offload:
        # DeepSpeed's own CPU Adam is compiled at the first run, for minutes; PyTorch's fused AdamW is there already.
        values |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    if checkpointing:
        values["activation_checkpointing"] = {"enabled": True}
    return values


def model_name(recipe: Recipe) -> str:
    """Returns the name of a recipe's encoder in file names, such as `electra-large`."""
    name = recipe.model.language.name.rstrip("/").split("/")[-1]
    return name.removesuffix("-uncased").removesuffix("-discriminator")


def file_name(model: str, way: str, precision: str) -> str:
    """Returns the name of a configuration file; bf16 is not named."""
    return f"{model}-{way}{'' if precision == 'bf16' else f'-{precision}'}.json"


def config_text(values: dict[str, Any]) -> str:
    """Returns a configuration as people read it."""
    return json.dumps(values, indent=2) + "\n"


def _zero(stage: int, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    zero["reduce_bucket_size"] = _BUCKET
    if stage in (1, 2):
        zero["allgather_bucket_size"] = _BUCKET
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 20_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": _KEEP,
            "stage3_max_reuse_distance": _KEEP,
        }
    host = {"device": "cpu", "pin_memory": True}
    if offload:
        zero["offload_optimizer"] = host
    if offload and stage == 3:
        zero["offload_param"] = dict(host)
    return zero
