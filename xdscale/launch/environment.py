"""Environment variables of a run on several machines, and the `.deepspeed_env` file that carries them.

Under pdsh DeepSpeed's launcher exports only names that begin with PYTHON, MLFLOW, MV2, UCX and, on GPUs, NCCL. The
rest must stand in `.deepspeed_env`: one NAME=VALUE per line. It has no comments and no empty lines (either one ends
the launcher with an error), and a value reaches the ranks through a shell on every machine.
"""

import getpass
import re
from collections.abc import Mapping

from xdscale.errors import XdscaleError

CARRIED = (
    "CUDA_HOME",
    "DS_ACCELERATOR",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "TOKENIZERS_PARALLELISM",
    "TRITON_CACHE_DIR",
)
"""Variables that change how a rank runs; those that are set where the run is started are set on every machine."""

CARRIED_PREFIXES = ("GLOO_", "NCCL_", "TORCH_NCCL_", "UCX_")

# Neither a shell nor `export NAME="VALUE"`, which the launcher makes of it, changes text of these characters.
_SAFE_VALUE = re.compile(r"[\w@%+=:,./^-]*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def carried_environment(environment: Mapping[str, str], extra: list[str] | tuple[str, ...] = ()) -> dict[str, str]:
    """Returns the variables that every rank is to have.

    Args:
        environment: where the run is started.
        extra: NAME=VALUE items that come on top.

    Returns:
        Names and values, sorted by name. Triton's cache lies in /tmp unless told otherwise: ranks of several
        machines race in a shared home folder.

    Raises:
        XdscaleError: an item is not NAME=VALUE, or a value could not pass through the launcher unchanged.
    """
    values = {"TOKENIZERS_PARALLELISM": "false", "TRITON_CACHE_DIR": f"/tmp/triton-{getpass.getuser()}"}
    values |= {name: value for name, value in environment.items() if is_carried(name)}
    for item in extra:
        name, equals, value = item.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise XdscaleError(f"--env {item}: expected NAME=VALUE")
        values[name] = value
    for name, value in values.items():
        if not _SAFE_VALUE.fullmatch(value):
            raise XdscaleError(
                f"environment variable {name} = {value!r}: blanks, quotes, $ and the like do not pass through the "
                "launcher unchanged; give a plain value with --env, or unset it and set it on every machine"
            )
    return dict(sorted(values.items()))


def is_carried(name: str) -> bool:
    """Returns whether a variable is one that all machines should agree on."""
    return name in CARRIED or name.startswith(CARRIED_PREFIXES)


def deepspeed_env_text(values: Mapping[str, str]) -> str:
    """Returns the file: also a shell script of plain assignments, so that it can be sourced where there is no ssh."""
    return "".join(f"{name}={value}\n" for name, value in values.items())
