"""Runs the tests of the Triton kernels: in the interpreter, or natively where there is a GPU.

The interpreter has to be chosen before the kernels are decorated, hence a process of its own for all files.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = (
    "attention_triton_cases.py",
    "masked_token_loss_kernels.py",
    "residual_norm_kernels.py",
    "pre_norm_kernels.py",
    "quick_gelu_kernels.py",
    "linear_kernels.py",
)


def run_tests(request: pytest.FixtureRequest, marker: str) -> None:
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    paths = [str(Path(__file__).with_name(file)) for file in FILES]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marker, *paths]
    profile = request.config.getoption("--hypothesis-profile")  # as in the run that this test belongs to
    command += ["--hypothesis-profile", profile] if profile else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_kernels(request: pytest.FixtureRequest) -> None:
    run_tests(request, "not slow")


@pytest.mark.proof
@pytest.mark.timeout(2400)
def test_kernels_at_a_true_shape(request: pytest.FixtureRequest) -> None:
    run_tests(request, "slow")
