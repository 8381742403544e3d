"""Runs the tests of the Triton kernels: in the interpreter, or natively where there is a GPU.

The interpreter has to be chosen before the kernels are decorated, hence a process of its own for each file.
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
    "quick_gelu_kernels.py",
)


def run_tests(file: str, marker: str) -> None:
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    path = Path(__file__).with_name(file)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marker, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_kernels(file: str) -> None:
    run_tests(file, "not slow")


@pytest.mark.proof
@pytest.mark.parametrize("file", FILES)
def test_kernels_at_a_true_shape(file: str) -> None:
    run_tests(file, "slow")
