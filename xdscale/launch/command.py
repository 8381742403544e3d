"""`xdscale launch`: from one recipe to the files and the command that start it on several machines."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from xdscale.errors import XdscaleError
from xdscale.files import check_output_folder, is_text, shown, write_outputs
from xdscale.launch.environment import carried_environment, deepspeed_env_text, local_cache
from xdscale.launch.hosts import Host, hostfile_text
from xdscale.launch.job import TrainingJob
from xdscale.launch.slurm import SlurmRequest, sbatch_text
from xdscale.launch.start import (
    Rendezvous,
    launcher_command,
    on_one_node,
    only_here,
    program,
    require_ssh,
    with_environment,
)

_MODULE = "xdscale.train"


def launch_on_hosts(
    job: TrainingJob, hosts: list[Host], meet: Rendezvous, out: Path, *, env: list[str], run: bool, force: bool
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
        XdscaleError: as `carried_environment`, `launcher_command`, `write_files`; with `run`, pdsh or ssh is missing.
    """
    out = out.absolute()
    hostfile, environment_file = out / "hostfile", out / ".deepspeed_env"
    command = launcher_command(hosts, hostfile, meet, _MODULE, job.arguments)
    here = only_here(hosts)
    if run and not here:
        require_ssh()
    environment = local_cache() | carried_environment(os.environ, env)
    write_files(
        {hostfile: hostfile_text(hosts), environment_file: deepspeed_env_text(environment)},
        force=force,
    )
    # The launcher looks for a file of this name in the home and the working folder; an absolute one is found as such.
    settings = environment if here else {"DS_ENV_FILE": str(environment_file)}
    if run:
        _become(command, settings)
    if here:
        print("# all ranks on this machine:")
        print(with_environment(command, settings))
        return
    print("# all machines from here, through pdsh and ssh:")
    print(with_environment(command, settings))
    print(f"# or without ssh, on each machine, with its number 0 to {len(hosts) - 1} for NODE:")
    print(on_one_node(hostfile, environment, meet, _MODULE, job.arguments))


def launch_on_slurm(
    job: TrainingJob, request: SlurmRequest, out: Path, *, env: list[str], run: bool, force: bool
) -> None:
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


def slurm_script(job: TrainingJob, request: SlurmRequest, environment: Mapping[str, str], env: list[str]) -> str:
    """Returns the batch script of a job as started from an environment."""
    carried = carried_environment(environment, env)
    return sbatch_text(job.name, request, program("python"), job.arguments, carried, job.recipe.output.folder)


def write_files(files: Mapping[Path, str], *, force: bool) -> None:
    """Writes text files, all of them or none.

    Raises:
        XdscaleError: a file exists with another content and `force` is not given, or one cannot be written, as where an
            argument is not UTF-8.
    """
    for path, text in files.items():
        check_output_folder(path.parent, "--out")
        if not is_text(text):
            wrong = next(word for word in text.split() if not is_text(word))
            raise XdscaleError(f"{path}: is written in UTF-8, which {shown(wrong)} is not; give another value or name")
        if not force and path.is_file() and path.read_bytes() != text.encode():
            raise XdscaleError(f"{path}: exists and differs; --force replaces it, --out writes to another folder")
    write_outputs(files)
    for path in files:
        print(f"wrote {path}", file=sys.stderr)


def _become(command: list[str], settings: Mapping[str, str]) -> None:
    """Replaces this process, so that signals reach the command and its exit code is ours."""
    print(shlex.join(command), file=sys.stderr, flush=True)
    os.execvpe(command[0], command, os.environ | settings)
