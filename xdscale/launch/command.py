"""`xdscale launch`: from one recipe to the files and the command that start it on several machines."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from xdscale.errors import XdscaleError
from xdscale.launch.environment import carried_environment, deepspeed_env_text
from xdscale.launch.hosts import Host, hostfile_text
from xdscale.launch.job import Job
from xdscale.launch.slurm import SlurmRequest, sbatch_text
from xdscale.launch.start import Rendezvous, on_one_node, over_ssh, program, require_ssh
from xdscale.training.run_folder import write_atomically

_MODULE = "xdscale.adapt"


def launch_on_hosts(
    job: Job, hosts: list[Host], meet: Rendezvous, out: Path, *, env: list[str], run: bool, force: bool
) -> None:
    """Writes `hostfile` and `.deepspeed_env`, prints the commands, and with `run` becomes the first one.

    Args:
        job: what to train.
        hosts: machines and their ranks.
        meet: where ranks meet.
        out: folder for the files.
        env: NAME=VALUE items for every rank, on top of those that are set here.
        run: start it.
        force: replace files that differ.

    Raises:
        XdscaleError: as `carried_environment`, `over_ssh`, `write_files`; with `run`, pdsh or ssh is missing.
    """
    out = out.absolute()
    hostfile, environment_file = out / "hostfile", out / ".deepspeed_env"
    command = over_ssh(hostfile, meet, _MODULE, job.arguments)
    if run:
        require_ssh()
    environment = carried_environment(os.environ, env)
    write_files(
        {hostfile: hostfile_text(hosts), environment_file: deepspeed_env_text(environment)},
        force=force,
    )
    # The launcher looks for a file of this name in the home and the working folder; an absolute one is found as such.
    settings = {"DS_ENV_FILE": str(environment_file)}
    if run:
        _become(command, settings)
    print("# all machines from here, through pdsh and ssh:")
    print(shlex.join(["env", *(f"{name}={value}" for name, value in settings.items()), *command]))
    print(f"# or without ssh, on each machine, with its number 0 to {len(hosts) - 1} for NODE:")
    print(on_one_node(hostfile, environment_file, meet, _MODULE, job.arguments))


def launch_on_slurm(job: Job, request: SlurmRequest, out: Path, *, env: list[str], run: bool, force: bool) -> None:
    """Writes `job.sbatch`, prints the command that queues it, and with `run` becomes that command.

    Args:
        job: what to train.
        request: machines, GPUs, time.
        out: folder for the file.
        env: NAME=VALUE items for every rank, on top of those that are set here.
        run: queue it.
        force: replace a file that differs.

    Raises:
        XdscaleError: as `carried_environment` and `write_files`; with `run`, sbatch is missing.
    """
    script = out / "job.sbatch"
    command = ["sbatch", str(script)]
    if run and shutil.which("sbatch") is None:
        raise XdscaleError(f"sbatch not found on PATH: queue {script} where Slurm's programs are installed")
    write_files({script: slurm_script(job, request, os.environ, env)}, force=force)
    if run:
        _become(command, {})
    print(shlex.join(command))


def slurm_script(job: Job, request: SlurmRequest, environment: Mapping[str, str], env: list[str]) -> str:
    """Returns the batch script of a job as started from an environment."""
    return sbatch_text(job.name, request, program("python"), job.arguments, carried_environment(environment, env))


def write_files(files: Mapping[Path, str], *, force: bool) -> None:
    """Writes text files, each whole or not at all.

    Raises:
        XdscaleError: a file exists with another content and `force` is not given; nothing is written then.
    """
    for path, text in files.items():
        if path.exists() and not force and path.read_text(encoding="utf-8") != text:
            raise XdscaleError(f"{path}: exists and differs; --force replaces it, --out writes to another folder")
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        print(f"wrote {path}", file=sys.stderr)


def _become(command: list[str], settings: Mapping[str, str]) -> None:
    """Replaces this process, so that signals reach the command and its exit code is ours."""
    print(shlex.join(command), file=sys.stderr, flush=True)
    os.execvpe(command[0], command, os.environ | settings)
