"""Bytes of model states and collectives, worked out by hand for a small model; test_engines measures real engines."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from xdscale.plan.settings import Settings, kept_bytes
from xdscale.plan.states import Module, States, count, model_states
from xdscale.plan.traffic import Collective, collectives, keeps_gathered
from xdscale.recipe import load_recipe

# 20 trained elements, in two halves of which each is one rank's part, and 12 frozen ones; 7 stand in two modules.
MODEL = [Module("a", (7, 3)), Module("b", (4, 8), trained=False), Module("c", (4, 6), tied=7)]
FIRST = {"reduce_bucket": 8, "persistence_threshold": 4}
"""Stage 3 keeps parameters of 3 and 4 elements whole. Two ranks hold 2, 2 and 2 of these, and 4, 4 and 3 of the others:
17 in all, of which 11 are trained."""


def settings(way: str, precision: str, **other: int | bool) -> Settings:
    offloads = {"offload_optimizer": "-offload" in way, "offload_parameters": way == "zero3-offload"}
    return Settings(stage=int(way[4]), precision=precision, micro_batch=1, **{**FIRST, **offloads, **other})


def states(parameters: int, gradients: int, optimizer: int, buckets: int, gathered: int = 0, host: int = 0) -> States:
    return States(**locals())


@pytest.mark.parametrize(
    ("way", "precision", "expected"),
    [
        # Whole on every rank; gradients once more while they are reduced. The optimizer: fp32 weight, two moments.
        ("zero0", "fp32", states(4 * 32, 4 * 20, 8 * 20, 4 * 20)),
        ("zero0", "bf16", states(2 * 32, 2 * 20, 12 * 20, 2 * 20)),
        # Gradients in fp32 until the step's last backward pass.
        ("zero1", "fp32", states(4 * 32, 4 * 20, 12 * 10, 4 * 8)),
        ("zero1", "fp16", states(2 * 32, 4 * 20, 12 * 10, 4 * 8)),
        # The other optimizer: gradients in bf16 and in fp32, which go through a bucket of all of them.
        ("zero1", "bf16", states(2 * 32, (2 + 4) * 20, 12 * 10, 2 * 20)),
        ("zero2", "bf16", states(2 * 32, 4 * 10, 12 * 10, 2 * 8)),
        ("zero2", "fp32", states(4 * 32, 4 * 10, 12 * 10, 4 * 8)),
        # On the host: the optimizer, sums and copies of the part, the longest gradient of 7 elements, on both sides.
        ("zero1-offload", "bf16", states(2 * 32, 4 * 20, 0, 4 * 8 + 2 * 7, host=(12 + 4 + 2) * 10 + 2 * 7)),
        ("zero2-offload", "bf16", states(2 * 32, 4 * 10, 0, 2 * 8 + 2 * 7, host=(12 + 4 + 2) * 10 + 2 * 7)),
        ("zero2-offload", "fp32", states(4 * 32, 4 * 10, 0, 4 * 8 + 4 * 7, host=(12 + 4 + 4) * 10 + 4 * 7)),
        # Shards, and 4 + 4 + 4 elements whole beside them; at most the 7 + 8 + 6 others are gathered.
        ("zero3", "bf16", states(2 * (12 + 17), 4 * 11, 12 * 11, 2 * 8, gathered=2 * 21)),
        ("zero3", "fp32", states(4 * (12 + 17), 4 * 11, 12 * 11, 4 * 8, gathered=4 * 21)),
        ("zero3-offload", "fp16", states(2 * 12, 0, 0, 2 * 8, 2 * 21, host=(12 + 2 * 4) * 11 + 2 * 17)),
    ],
)
def test_states_of_two_ranks(way: str, precision: str, expected: States) -> None:
    for rank in range(2):
        found = model_states(MODEL, settings(way, precision), 2, rank)
        assert found == expected
    assert found.resident + found.buckets + found.gathered == found.device + found.host
    assert found.resident == expected.parameters + expected.gradients + expected.optimizer + expected.host


@pytest.mark.parametrize(
    ("ranks", "rank", "whole"),
    [(2, 0, 9 + 4), (2, 1, 4 + 7), (4, 0, 9), (4, 1, 9 + 4), (4, 2, 4 + 7), (4, 3, 7)],
)
def test_gradients_in_fp32_are_whole_where_partitions_cut_them(ranks: int, rank: int, whole: int) -> None:
    """Of 9, 4 and 7 elements; two ranks have 10 each, four 6 each (5, to a multiple of two)."""
    found = model_states([Module("a", (9, 4, 7))], settings("zero2", "fp32"), ranks, rank)
    assert found.gradients == 4 * whole


def test_partitions_are_padded_to_two_elements_per_rank() -> None:
    """20 elements over three ranks: 8 each."""
    found = model_states(MODEL, settings("zero1", "bf16"), 3)
    assert found == states(2 * (3 * 8 + 12), 2 * 20 + 4 * 24, 12 * 8, 2 * 24)


def test_buckets_are_two_where_reducing_overlaps() -> None:
    assert model_states(MODEL, settings("zero2", "fp16", overlap=True), 2).buckets == 2 * 2 * 8
    assert model_states(MODEL, settings("zero1", "fp16", overlap=True), 2).buckets == 2 * 4 * 8
    assert model_states(MODEL, settings("zero3", "fp16", overlap=True), 2).buckets == 2 * 8


@pytest.mark.parametrize(("threshold", "whole", "longest"), [(4, 0, 10 + 7 + 7), (7, 5 * 8, 10)])
def test_most_that_is_gathered_is_what_is_needed_again_and_two_modules(
    threshold: int, whole: int, longest: int
) -> None:
    """Of five modules of 10 and 7 elements, one of which has 7 more in common with another module."""
    found = [Module(str(number), (10, 7), tied=7 * (number == 2)) for number in range(5)]
    options = {"persistence_threshold": threshold, "reuse_distance": 5, "prefetch_bucket": 3}
    held = model_states(found, settings("zero3", "bf16", **options), 2)
    assert held.gathered == 2 * (5 + 3 + 2 * longest)
    assert held.parameters == 2 * (whole + 5 * (5 + 4))


def test_what_is_kept_beside_weights_is_two_moments_or_one_and_an_average() -> None:
    found = [
        kept_bytes(load_recipe("quickstart", [f"optim.optimizer={optimizer}", f"optim.ema_decay={decay}"]).optim)
        for optimizer in ("adamw", "sgd")
        for decay in ("null", "0.9")
    ]
    assert found == [8, 12, 4, 8]
    averaged = model_states(MODEL, settings("zero2", "bf16", kept_bytes=12), 2)
    assert averaged.optimizer == (4 + 12) * 10


def test_parameters_are_counted_once_and_apart() -> None:
    assert [count(MODEL), count(MODEL, trained=True), count(MODEL, trained=False)] == [32, 20, 12]


LOOP = [("all_reduce", "int64", 8 * (2 + 2 + 3 * 2), 1), ("all_reduce", "float64", 8 * 2 * 2, 1)]
"""Of two objectives and three micro-batches: targets, tokens and stop, and what each carries; losses and metrics."""
NORM, OVERFLOW = ("all_reduce", "float32", 4, 1), ("all_reduce", "uint8", 1, 1)


def scattered(dtype: str, width: int, once: int) -> Iterator[tuple[str, str, int, int]]:
    """Stage 3's: `once` elements for each of three micro-batches, six small ones, 2 × 11 of gradients in 3 buckets."""
    yield "all_gather", dtype, 3 * width * once, 3 * 2 * 3
    yield "all_gather", dtype, width * 6, 1
    yield "reduce_scatter", dtype, 3 * width * 22, 3 * 3


KEPT, ANEW = 4 + 4 + 3, 2 * 4 + 4 + 2 * 3 + 2 * 4
"""Shards of large parameters; forward and backward, a frozen one in one of them, what is tied for both modules."""


@pytest.mark.parametrize(
    ("way", "precision", "expected"),
    [
        ("zero0", "fp32", [("all_reduce", "float32", 4 * 20, 3), NORM]),
        ("zero0", "bf16", [("all_reduce", "bfloat16", 2 * 20, 3)]),
        ("zero0", "fp16", [("all_reduce", "float16", 2 * 20, 3)]),
        ("zero1", "fp32", [("all_reduce", "float32", 4 * 20, 3), ("all_gather", "float32", 4 * 10, 1), NORM]),
        ("zero1", "bf16", [("all_reduce", "bfloat16", 2 * 20, 3), ("all_gather", "bfloat16", 2 * 10, 1)]),
        ("zero1", "fp16", [("all_reduce", "float16", 40, 3), ("all_gather", "float16", 20, 1), NORM, OVERFLOW]),
        (
            "zero1-offload",
            "bf16",
            [("all_reduce", "bfloat16", 40, 3), ("all_gather", "bfloat16", 20, 1), NORM, OVERFLOW],
        ),
        ("zero2", "fp32", [("all_reduce", "float32", 3 * 80, 9), ("all_gather", "float32", 40, 1), NORM]),
        ("zero2", "bf16", [("all_reduce", "bfloat16", 3 * 40, 9), ("all_gather", "bfloat16", 20, 1), NORM, OVERFLOW]),
        ("zero3", "fp32", [*scattered("float32", 4, KEPT), ("all_reduce", "float64", 8, 1)]),
        ("zero3", "fp16", [*scattered("float16", 2, KEPT), ("all_reduce", "float64", 8, 1), OVERFLOW]),
        ("zero3-offload", "bf16", [*scattered("bfloat16", 2, KEPT), NORM]),
    ],
)
def test_collectives_of_two_ranks(way: str, precision: str, expected: list[tuple[str, str, int, int]]) -> None:
    """All-reduced are the gradients of every micro-batch under stage 2, once per step under stages 0 and 1."""
    chosen = settings(way, precision)
    found = collectives(MODEL, chosen, 2, 3, 2)
    assert [(one.operation, one.dtype, one.payload_bytes, one.calls) for one in found] == [*LOOP, *expected]
    assert collectives(MODEL, chosen, 1, 3, 2) == []
    if chosen.stage == 3:
        released = replace(chosen, reuse_distance=0, prefetch_bucket=0)
        payloads = [one.payload_bytes for one in collectives(MODEL, released, 2, 3, 2)]
        assert payloads[2] == 3 * chosen.parameter_bytes * ANEW
        assert payloads[:2] + payloads[3:] == [one.payload_bytes for one in (*found[:2], *found[3:])]


def test_the_optimizer_for_bf16_reduces_its_padding_too() -> None:
    """20 elements over three ranks: 8 each."""
    found = collectives(MODEL, settings("zero1", "bf16"), 3, 3, 2)
    assert [one.payload_bytes for one in found[2:]] == [2 * 24, 2 * 8]


@pytest.mark.parametrize(
    ("reuse", "prefetch", "checkpointing", "keeps"),
    [
        (2 * (32 + 7), 0, False, True),  # twice all parameters, tied ones counted twice: the longest distance there is
        (2 * (32 + 7), 0, True, True),
        (2 * (32 + 7) - 1, 0, False, None),
        (0, 0, False, False),
        (0, 1, False, None),
        (0, 0, True, None),
    ],
)
def test_stage_3_gathers_once_anew_or_between(reuse: int, prefetch: int, checkpointing: bool, keeps: bool) -> None:
    options = {"reuse_distance": reuse, "prefetch_bucket": prefetch, "checkpointing": checkpointing}
    assert keeps_gathered(MODEL, settings("zero3", "bf16", **options)) is keeps


@pytest.mark.parametrize(("operation", "sent"), [("all_reduce", 150), ("reduce_scatter", 75), ("all_gather", 300)])
def test_a_ring_of_four_sends_three_quarters_of_the_tensor_in_each_pass(operation: str, sent: float) -> None:
    """An all-gather hands over its own part, a quarter."""
    assert Collective(operation, "float32", 100, "").wire_bytes(4) == sent
