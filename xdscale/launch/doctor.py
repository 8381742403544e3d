"""`xdscale doctor`: starts the probe where training would run, in the way training is started."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from xdscale.errors import XdscaleError
from xdscale.files import write_outputs
from xdscale.launch.environment import carried_environment, deepspeed_env_text, local_cache
from xdscale.launch.hosts import Host, hostfile_text, hosts_text
from xdscale.launch.slurm import RANKS_FROM_SLURM, RENDEZVOUS_FROM_SLURM
from xdscale.launch.start import Rendezvous, launcher_command, only_here, program, require_ssh
from xdscale.recipe import load_recipe

_MODULE = "xdscale.launch.probe"


def examine(
    hosts: list[Host], meet: Rendezvous, recipe: str | None, overrides: list[str], *, timeout_seconds: int
) -> int:
    """Examines named machines, the machines of the Slurm allocation this runs in, or this machine.

    Args:
        hosts: machines, or none.
        meet: where ranks meet, for named machines.
        recipe: whose paths and space are checked too, or None.
        overrides: `section.key=value` items.
        timeout_seconds: how long machines may take to answer.

    Returns:
        Exit code 0 or 2, after a verdict was printed.

    Raises:
        XdscaleError: bad recipe; or pdsh or ssh is missing.
    """
    if recipe:
        load_recipe(recipe, overrides)  # one message here instead of one from every machine
    arguments = (*([recipe] if recipe else []), *overrides, "--timeout", str(timeout_seconds))
    if hosts:
        return _through_launcher(hosts, meet, arguments)
    if "SLURM_JOB_ID" in os.environ:
        return _inside_slurm(arguments)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_PORT": "0"}
    command = [sys.executable, "-m", _MODULE, *arguments]
    return subprocess.run(command, env=os.environ | alone, check=False).returncode


def _through_launcher(hosts: list[Host], meet: Rendezvous, arguments: tuple[str, ...]) -> int:
    here = only_here(hosts)
    if not here:
        require_ssh()
    environment = local_cache() | carried_environment(os.environ)
    try:
        folder = tempfile.TemporaryDirectory(prefix="xdscale-doctor-")
    except OSError as error:
        raise XdscaleError(f"no temporary folder can be made: {error}; make room there, or set TMPDIR") from None
    with folder as name:
        hostfile, environment_file = Path(name, "hostfile"), Path(name, "environment")
        write_outputs({hostfile: hostfile_text(hosts), environment_file: deepspeed_env_text(environment)})
        command = launcher_command(hosts, hostfile, meet, _MODULE, (*arguments, "--hosts", hosts_text(hosts)))
        command.insert(1, "-q")
        settings = os.environ | (environment if here else {"DS_ENV_FILE": str(environment_file)})
        with subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                # pdsh puts the machine's name before each line; the launcher there cannot be told to be quiet.
                line = line.removeprefix(f"{hosts[0].address}: ")
                if "[INFO] [launch.py" not in line:
                    print(line, end="", flush=True)
        return process.returncode


def _inside_slurm(arguments: tuple[str, ...]) -> int:
    if shutil.which("srun") is None:
        raise XdscaleError("SLURM_JOB_ID is set but srun is not on PATH; run this where Slurm's programs are installed")
    start = f"{RENDEZVOUS_FROM_SLURM}exec srun bash -c '{RANKS_FROM_SLURM}' rank \"$@\""
    command = ["bash", "-c", start, "doctor", program("python"), "-m", _MODULE, *arguments]
    settings = os.environ | local_cache() | carried_environment(os.environ)
    return subprocess.run(command, env=settings, check=False).returncode
