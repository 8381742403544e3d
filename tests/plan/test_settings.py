"""What a plan is told of a DeepSpeed configuration and of machines: each key and each option, and what is left out."""

import pytest

from xdscale.errors import XdscaleError
from xdscale.plan.report import machine_from
from xdscale.plan.settings import Settings, read_settings

LEFT_OUT = {"train_micro_batch_size_per_gpu": 3}


def test_every_key_of_a_configuration_is_read():
    zero = {
        "stage": 3,
        "overlap_comm": False,
        "reduce_bucket_size": 5e7,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "nvme"},
        "stage3_param_persistence_threshold": 11,
        "stage3_max_reuse_distance": 12,
        "stage3_prefetch_bucket_size": 13,
    }
    values = LEFT_OUT | {"zero_optimization": zero, "fp16": {"enabled": True}}
    found = read_settings(values | {"activation_checkpointing": {"enabled": True}})
    assert found == Settings(
        stage=3,
        precision="fp16",
        micro_batch=3,
        checkpointing=True,
        overlap=False,
        reduce_bucket=50_000_000,
        offload_optimizer=True,
        offload_parameters=True,
        persistence_threshold=11,
        reuse_distance=12,
        prefetch_bucket=13,
        kept_bytes=8,
    )


@pytest.mark.parametrize(("stage", "overlap"), [(0, False), (1, False), (2, False), (3, True)])
def test_what_a_configuration_leaves_out_is_deepspeeds(stage, overlap):
    found = read_settings(LEFT_OUT | {"zero_optimization": {"stage": stage, "offload_optimizer": None}})
    assert found == Settings(
        stage=stage,
        precision="fp32",
        micro_batch=3,
        checkpointing=False,
        overlap=overlap,
        reduce_bucket=500_000_000,
        offload_optimizer=False,
        offload_parameters=False,
        persistence_threshold=100_000,
        reuse_distance=1_000_000_000,
        prefetch_bucket=50_000_000,
        kept_bytes=8,
    )
    overlapped = LEFT_OUT | {"zero_optimization": {"stage": stage, "overlap_comm": True}}
    assert read_settings(overlapped).overlap


def test_all_that_is_said_of_machines_counts():
    machine = machine_from("Mine", 16, 4, 44.5, 0.3, 2, tflops=362, bandwidth=32, network=50)
    gpu = machine.cluster.gpu
    assert (machine.memory_gib, machine.mfu, machine.price) == (44.5, 0.3, 2)
    assert (machine.cluster.gpus, machine.cluster.nodes) == (16, 4)
    assert (gpu.name, gpu.memory_gib, gpu.peak_flops, gpu.node_link, gpu.network) == ("Mine", 44.5, 362e12, 32e9, 50e9)
    assert machine_from("Mine", 8, None, 44.5, 0.3, None, tflops=1, bandwidth=1).cluster.gpu.network == 12.5e9


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (8, 1), (9, 3), (12, 2), (16, 2), (17, 17)])
def test_nodes_are_as_few_as_share_the_gpus_evenly(gpus, nodes):
    assert machine_from("A100-80G", gpus, None, None, 0.4, None).cluster.nodes == nodes


def test_numbers_reach_up_to_a_million():
    machine_from("A100-80G", 8, 1, 1_000_000, 0.4, 1_000_000, tflops=1_000_000, bandwidth=1_000_000, network=1_000_000)
    with pytest.raises(XdscaleError, match="--gpu-memory 1e.06: expected a number of at most 1,000,000"):
        machine_from("A100-80G", 8, 1, 1_000_001, 0.4, None)
    with pytest.raises(XdscaleError, match="--network nan: expected a number"):
        machine_from("A100-80G", 8, 1, None, 0.4, None, network=float("nan"))
