"""What a DeepSpeed configuration may say: its keys, their values, and which of them go together.

DeepSpeed's own classes take seconds to import, and let through what its engine ends at behind the start, trains wrongly
with, or passes over. What is taken here has trained, saved and exported in a real engine; tests do it again, and hold
the keys against DeepSpeed's.
"""

import copy
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    ValidationError,
    model_validator,
)

from xdscale.errors import XdscaleError
from xdscale.recipe_values import describe_validation_error

Precision = Literal["fp32", "bf16", "fp16"]


def _number(value: Any) -> Any:
    if isinstance(value, bool | str):
        raise ValueError("expected a number")
    return value


def _stage(value: Any) -> int:
    if type(value) is not int or value not in range(4):  # true would be 1
        raise ValueError("expected 0, 1, 2 or 3")
    return value


Whole = Annotated[int, BeforeValidator(_number)]
"""Also as 5e8, which people write for sizes of buckets."""
Elements = Annotated[Whole, Field(ge=0)]
Number = Annotated[FiniteFloat, BeforeValidator(_number)]


class DSSection(BaseModel):
    """A JSON object of which all keys are known."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _is_object(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object")
        return values


class BF16(DSSection):
    """Training in bf16."""

    enabled: StrictBool = False
    immediate_grad_update: StrictBool = False


class FP16(DSSection):
    """Training in fp16; 2^32 is halved down to what fits in 32 steps."""

    enabled: StrictBool = False
    auto_cast: StrictBool = False
    loss_scale: Annotated[Number, Field(ge=0, le=2**32)] = 0.0
    initial_scale_power: Annotated[Whole, Field(ge=0, le=32)] = 16
    loss_scale_window: Annotated[Whole, Field(ge=1)] = 1000
    hysteresis: Annotated[Whole, Field(ge=1)] = 2
    consecutive_hysteresis: StrictBool = False
    min_loss_scale: Annotated[Whole, Field(ge=1)] = 1


class Offload(DSSection):
    """Where optimizer or parameters live."""

    device: Literal["none", "cpu"] = "none"
    pin_memory: StrictBool = True


class Zero(DSSection):
    """How model states are shared; defaults are DeepSpeed's."""

    stage: Annotated[int, BeforeValidator(_stage)] = 0
    contiguous_gradients: StrictBool = True
    reduce_scatter: StrictBool = True
    reduce_bucket_size: Annotated[Whole, Field(ge=1)] = 500_000_000
    use_multi_rank_bucket_allreduce: StrictBool = True
    allgather_partitions: StrictBool = True
    allgather_bucket_size: Annotated[Whole, Field(ge=2, multiple_of=2)] = 500_000_000
    overlap_comm: StrictBool | None = None
    offload_param: Offload | None = None
    offload_optimizer: Offload | None = None
    sub_group_size: Elements = 1_000_000_000
    stage3_prefetch_bucket_size: Elements = 50_000_000
    stage3_param_persistence_threshold: Elements = 100_000
    stage3_model_persistence_threshold: Elements = 2**63 - 1
    stage3_max_live_parameters: Elements = 1_000_000_000
    stage3_max_reuse_distance: Elements = 1_000_000_000
    stage3_gather_16bit_weights_on_model_save: StrictBool = False
    stage3_use_all_reduce_for_fetch_params: StrictBool = False
    stage3_allgather_sequential: StrictBool = False
    parameter_alignment: StrictBool = False
    memory_efficient_linear: StrictBool = True
    override_module_apply: StrictBool = True
    log_trace_cache_warnings: StrictBool = False
    enable_sanity_checks: StrictBool = False


class CommsLogger(DSSection):
    """DeepSpeed's own record of what is sent."""

    enabled: StrictBool = False
    prof_all: StrictBool = True
    prof_ops: list[str] = []
    verbose: StrictBool = False
    debug: StrictBool = False


class DataTypes(DSSection):
    """The precision that gradients are summed in."""

    grad_accum_dtype: Precision | None = None


class ActivationCheckpointing(DSSection):
    """Whether layers are recomputed in the backward pass; xdscale's own."""

    enabled: StrictBool = False


class Optimizer(DSSection):
    """Says again what the recipe says."""

    type: Any = None
    params: dict[str, Any] = {}


class DSConfig(DSSection):
    """A whole file. What the recipe may contradict is checked beside the recipe."""

    train_batch_size: Any = None
    train_micro_batch_size_per_gpu: Any = None
    gradient_accumulation_steps: Any = None
    gradient_clipping: Any = None
    optimizer: Optimizer = Optimizer()
    bf16: BF16 = BF16()
    fp16: FP16 = FP16()
    data_types: DataTypes = DataTypes()
    zero_optimization: Zero = Zero()
    zero_allow_untested_optimizer: StrictBool = False
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing()
    communication_data_type: Precision | None = None
    prescale_gradients: StrictBool = False
    gradient_predivide_factor: Annotated[Number, Field(gt=0)] = 1.0
    comms_logger: CommsLogger = CommsLogger()
    wall_clock_breakdown: StrictBool = False
    steps_per_print: Annotated[Whole, Field(ge=1)] = 1
    disable_python_gc: StrictBool = False

    @property
    def precision(self) -> str:
        """What is trained in: fp32, bf16 or fp16."""
        return "bf16" if self.bf16.enabled else "fp16" if self.fp16.enabled else "fp32"


_OWN = "DeepSpeed takes it with its own optimizers alone, and xdscale brings PyTorch's AdamW"
_QUANTIZED = "quantised weights and gradients change the result, and on a CPU DeepSpeed has no code for them"
_NVME = "for device nvme, which checkpoints of xdscale do not know"
_RENAMED = 'DeepSpeed\'s old name; write "{}": {{"device": "cpu"}}'

_NEW_NAMES = {
    "cpu_offload": "offload_optimizer",
    "cpu_offload_param": "offload_param",
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
"""Of old names, beside which DeepSpeed does not take the new ones, whatever they say."""

REFUSED: dict[str, tuple[Any, str]] = {
    "zero_force_ds_cpu_optimizer": (False, _OWN),
    "memory_breakdown": (False, "it resets the peaks that log.jsonl records, and takes longer than a pass"),
    "bf16.check_grad_overflow": (True, "a step whose gradient is not finite would be made, and the weights lost"),
    "bf16.bf16_master_weights_and_grads": (False, _OWN),
    "bf16.bf16_optimizer_states": (False, _OWN),
    "fp16.fp16_master_weights_and_grads": (False, _OWN),
    "zero_optimization.compute_grad_norm": (True, "gradients are clipped by their norm, and log.jsonl records it"),
    "zero_optimization.cpu_offload": (False, _RENAMED.format("offload_optimizer")),
    "zero_optimization.cpu_offload_param": (False, _RENAMED.format("offload_param")),
    "zero_optimization.cpu_offload_use_pin_memory": (False, "DeepSpeed's old name; write pin_memory in offload_…"),
    "zero_optimization.elastic_checkpoint": (False, "its checkpoints cannot be loaded; xdscale reshards others"),
    "zero_optimization.ignore_unused_parameters": (True, "the first step without an objective's targets would end it"),
    "zero_optimization.leaf_module": ({}, "no module of xdscale needs it"),
    "zero_optimization.legacy_stage1": (False, "DeepSpeed no longer has it"),
    "zero_optimization.load_from_fp32_weights": (True, "a continued run would begin with rounded weights"),
    "zero_optimization.pipeline_loading_checkpoint": (False, "no system of xdscale has pipeline stages"),
    "zero_optimization.round_robin_gradients": (False, "no run could go on with another number of ranks"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": (False, "it is for the optimizer Muon"),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (False, "xdscale saves weights itself"),
    "zero_optimization.stage3_module_granularity_threshold": (
        0,
        "modules that are fetched whole end the backward pass",
    ),
    "zero_optimization.zenflow": (None, _OWN),
    "zero_optimization.zero_hpz_partition_size": (
        1,
        "its second copy of the weights misses the averages that validation puts in",
    ),
    "zero_optimization.zero_quantized_gradients": (False, _QUANTIZED),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, _QUANTIZED),
    "zero_optimization.zero_quantized_weights": (False, _QUANTIZED),
    "zero_optimization.offload_optimizer.ratio": (1.0, _OWN),
    "zero_optimization.offload_optimizer.super_offload": (False, _OWN),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": (0.8, _OWN),
    "zero_optimization.offload_optimizer.nvme_path": (None, _NVME),
    "zero_optimization.offload_optimizer.buffer_count": (4, _NVME),
    "zero_optimization.offload_optimizer.pipeline_read": (False, _NVME),
    "zero_optimization.offload_optimizer.pipeline_write": (False, _NVME),
    "zero_optimization.offload_optimizer.fast_init": (False, _NVME),
    "zero_optimization.offload_param.nvme_path": (None, _NVME),
    "zero_optimization.offload_param.buffer_count": (5, _NVME),
    "zero_optimization.offload_param.buffer_size": (100_000_000, _NVME),
    "zero_optimization.offload_param.max_in_cpu": (1_000_000_000, _NVME),
}
"""Keys of DeepSpeed's that only have their defaults here, and why."""


def check_sections(name: str, values: dict[str, Any]) -> None:
    """Checks every key and value of a DeepSpeed configuration, and what goes together.

    Args:
        name: the file, for messages.
        values: as they stand in it.

    Raises:
        XdscaleError: an unknown key (the nearest right one is named), a value that none is expected to be, keys that
            xdscale does not take, or values of which one excludes the other; each with what to do.
    """
    try:
        config = DSConfig.model_validate(_without_refused(name, values))
    except ValidationError as error:
        raise XdscaleError(describe_validation_error(name, error, DSConfig)) from None
    for problem in _contradictions(config):
        raise XdscaleError(f"{name}: {problem}")


def _without_refused(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Returns values without the keys that may only have their defaults.

    Raises:
        XdscaleError: one of them has another value.
    """
    kept = copy.deepcopy(values)
    for key, (default, why) in REFUSED.items():
        *outer, last = key.split(".")
        place = kept
        for part in outer:
            place = place.get(part) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            continue
        found = place.pop(last)
        # Null is DeepSpeed's own default of these; of the others it takes none.
        if found != default and not (found is None and last.startswith("cpu_offload")):
            expected = json.dumps(default)
            raise XdscaleError(f"{name}: {key} = {found!r}: expected {expected}: {why}; leave it out")
        if (new := _NEW_NAMES.get(last)) in place:
            raise XdscaleError(f"{name}: {key} = {found!r}: DeepSpeed does not take it beside {new}; leave it out")
    return kept


def _contradictions(config: DSConfig) -> Iterator[str]:
    """Says what does not go together: key, value, what was expected, what to do."""
    zero, fp16, sums = config.zero_optimization, config.fp16, config.data_types.grad_accum_dtype
    if config.bf16.enabled and fp16.enabled:
        yield "bf16 and fp16 are both enabled; expected one of them, take the other away"
    if zero.stage == 0 and config.precision == "fp16":
        yield (
            "zero_optimization.stage = 0 with fp16: DeepSpeed divides the gradients there by a loss scale that it has "
            "not multiplied them by; expected stage 1, 2 or 3, of which 1 is closest"
        )
    if zero.stage == 0 and sums not in (None, config.precision):
        yield (
            f"data_types.grad_accum_dtype = {sums!r}: zero_optimization.stage 0 sums gradients in the precision that "
            f"it trains in, here {config.precision}; leave it out, or take stage 1"
        )
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        if (getattr(zero, key) or Offload()).device != "none" and zero.stage not in stages:
            expected = ", ".join(map(str, stages))
            yield f"zero_optimization.{key} is for stage {expected}, not {zero.stage}: leave it out, or take such a one"
    scattered = zero.stage >= 2 and zero.reduce_scatter
    if config.prescale_gradients and scattered:
        yield (
            f"prescale_gradients = True: zero_optimization.stage {zero.stage} expects false where it scatters "
            "gradients; leave it out, or write zero_optimization.reduce_scatter: false"
        )
    if config.gradient_predivide_factor != 1 and (scattered or zero.stage == 3):
        yield (
            f"gradient_predivide_factor = {config.gradient_predivide_factor}: expected 1 where gradients are "
            "scattered, and in stage 3, where DeepSpeed does not multiply them again; leave it out"
        )
    if fp16.enabled and not fp16.loss_scale and fp16.min_loss_scale > 2**fp16.initial_scale_power:
        yield (
            f"fp16.min_loss_scale = {fp16.min_loss_scale}: expected at most the first scale, "
            f"2^initial_scale_power = {2**fp16.initial_scale_power}; leave it out"
        )
