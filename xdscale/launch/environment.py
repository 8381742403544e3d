"""Environment variables of a run on several machines, and the `.deepspeed_env` file that carries them.

Under pdsh DeepSpeed's launcher exports only names that begin with PYTHON, MLFLOW, MV2, UCX and, on GPUs, NCCL. The
rest must stand in `.deepspeed_env`: one NAME=VALUE per line. It has no comments and no empty lines (either one ends
the launcher with an error). The launcher puts a value of other than plain characters between double quotes, escapes
nothing in it, and hands it to pdsh and to a shell on every machine; so what it reads is escaped already.
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

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def carried_environment(environment: Mapping[str, str], extra: list[str] | tuple[str, ...] = ()) -> dict[str, str]:
    """Returns the variables that every rank is to have.

    Args:
        environment: where the run is started.
        extra: NAME=VALUE items that come on top.

    Returns:
        Names and values as they are given, sorted by name.

    Raises:
        XdscaleError: an item is not NAME=VALUE.
    """
    values = {"TOKENIZERS_PARALLELISM": "false"}
    values |= {name: value for name, value in environment.items() if is_carried(name)}
    for item in extra:
        name, equals, value = item.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise XdscaleError(f"--env {item}: expected NAME=VALUE")
        values[name] = value
    return dict(sorted(values.items()))


def local_cache() -> dict[str, str]:
    """Returns where Triton compiles to unless told otherwise: ranks of several machines race in a home folder."""
    return {"TRITON_CACHE_DIR": f"/tmp/triton-{getpass.getuser()}"}


def is_carried(name: str) -> bool:
    """Returns whether a variable is one that all machines should agree on."""
    return name in CARRIED or name.startswith(CARRIED_PREFIXES)


def deepspeed_env_text(values: Mapping[str, str]) -> str:
    """Returns the file that the launcher reads.

    Raises:
        XdscaleError: a value of several lines, of which the launcher would make several variables.
    """
    for name, value in values.items():
        if "".join(value.splitlines()) != value:
            raise XdscaleError(f"environment variable {name} = {value!r}: the deepspeed launcher takes one line only")
    return "".join(f"{name}={_escaped(value)}\n" for name, value in values.items())


def _escaped(value: str) -> str:
    """Returns what the launcher, pdsh and the shell on the other machine turn into a value."""
    # The launcher strips blanks; a pair of quotes, which closes and opens again those that it sets, protects them.
    before, after = ('""' if value != stripped else "" for stripped in (value.lstrip(), value.rstrip()))
    return before + in_double_quotes(value) + after


def in_double_quotes(value: str) -> str:
    """Returns a text as it must stand between double quotes of a shell that pdsh calls; pdsh itself replaces %h, %u."""
    return re.sub(r'([\\"$`])', r"\\\1", value).replace("%", "%%")
