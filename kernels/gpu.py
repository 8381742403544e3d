"""What all launches of Triton kernels share about the GPUs that they run on."""

import contextlib

import torch

PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
"""Multiprocessors of an A100, H100, B200 and MI300X."""


def launch_on(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a tensor's GPU the current one: Triton launches there and on its stream. On CPU nothing happens."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
