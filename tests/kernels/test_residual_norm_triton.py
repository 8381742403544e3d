"""Runs the tests of the Triton kernels in a process where the interpreter is on from the start, or on the GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent / "residual_norm_kernels.py"


def run_tests(marker):
    environment = dict(os.environ) if torch.cuda.is_available() else os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marker, str(TESTS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_kernels():
    run_tests("not slow")


@pytest.mark.slow
def test_kernels_at_a_true_shape():
    run_tests("slow")
