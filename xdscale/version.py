"""Which xdscale this is."""

import shutil
import subprocess
from pathlib import Path


def commit() -> str:
    """Returns the commit of the checkout that xdscale runs from, with `-dirty` where files differ; else nothing."""
    checkout = Path(__file__).parents[1]
    git = shutil.which("git")
    if git is None or not (checkout / ".git").exists():
        return ""
    command = [git, "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
