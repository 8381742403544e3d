"""What a DeepSpeed configuration means for memory and traffic, with DeepSpeed 0.19.8's own defaults filled in."""

from dataclasses import dataclass
from typing import Any

from xdscale.ds_config import activation_checkpointing, precision, zero_stage
from xdscale.recipe import Optim

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of one element, by precision."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The quantities of a DeepSpeed configuration that a plan reads.

    Attributes:
        stage: ZeRO stage, 0 to 3.
        precision: of parameters and activations, `fp32`, `bf16` or `fp16`.
        micro_batch: sequences per rank and forward pass.
        checkpointing: whether layers are recomputed in the backward pass.
        overlap: whether gradients are reduced while the backward pass runs; doubles the bucket of stages 1 and 2.
        reduce_bucket: elements of a gradient bucket.
        offload_optimizer: whether master weights and moments live in the host's memory.
        offload_parameters: whether stage 3 keeps its parameter shards there too.
        persistence_threshold: stage 3 keeps parameters of at most so many elements on every rank.
        reuse_distance: stage 3 keeps a parameter that is needed again within so many elements.
        prefetch_bucket: elements that stage 3 gathers ahead.
        kept_bytes: per trained parameter, kept beside its fp32 weight: see `kept_bytes`.
    """

    stage: int
    precision: str
    micro_batch: int
    checkpointing: bool = False
    overlap: bool = False
    reduce_bucket: int = 500_000_000
    offload_optimizer: bool = False
    offload_parameters: bool = False
    persistence_threshold: int = 100_000
    reuse_distance: int = 1_000_000_000
    prefetch_bucket: int = 50_000_000
    kept_bytes: int = 8

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one parameter in the forward pass."""
        return BYTES[self.precision]


def kept_bytes(optim: Optim) -> int:
    """Returns the bytes that training keeps per trained parameter, beside its weight: moments and average, in fp32."""
    return (8 if optim.optimizer == "adamw" else 4) + (4 if optim.ema_decay is not None else 0)


def read_settings(values: dict[str, Any]) -> Settings:
    """Returns the settings of a DeepSpeed configuration as `read_ds_config` gives it."""
    zero = values.get("zero_optimization", {})
    stage = zero_stage(values)
    overlap = zero.get("overlap_comm")
    return Settings(
        stage=stage,
        precision=precision(values),
        micro_batch=values["train_micro_batch_size_per_gpu"],
        checkpointing=activation_checkpointing(values),
        overlap=stage == 3 if overlap is None else overlap,
        reduce_bucket=int(zero.get("reduce_bucket_size", Settings.reduce_bucket)),
        offload_optimizer=_on_host(zero, "offload_optimizer"),
        offload_parameters=_on_host(zero, "offload_param"),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", Settings.persistence_threshold)),
        reuse_distance=int(zero.get("stage3_max_reuse_distance", Settings.reuse_distance)),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", Settings.prefetch_bucket)),
    )


def _on_host(zero: dict[str, Any], key: str) -> bool:
    return (zero.get(key) or {}).get("device", "none") != "none"
