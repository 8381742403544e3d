"""Runs attention_triton_cases.py: in Triton's interpreter, or natively where there is a GPU.

The interpreter has to be chosen before the kernels are decorated, hence a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).parent / "attention_triton_cases.py"


def run(marks: str) -> None:
    environment = dict(os.environ) | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "pytest", str(CASES), "-m", marks, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CASES.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_small_shapes() -> None:
    run("not slow")


@pytest.mark.slow
def test_true_shape() -> None:
    run("slow")
