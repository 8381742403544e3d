"""Pages are executed as their readers execute them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_page():
    """Returns a function (a page's commands, each with what runs in its place, folder) -> what each printed."""

    def of(commands, folder):
        settings = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        settings |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        outputs = {}
        for command, smaller in commands.items():
            done = subprocess.run(
                ["bash", "-c", smaller],
                cwd=folder, env=os.environ | settings, capture_output=True, text=True, timeout=400, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
            outputs[command] = done.stdout
        return outputs

    return of
