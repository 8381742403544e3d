"""The batch script for Slurm.

`srun` starts the ranks themselves, one task per GPU, without DeepSpeed's launcher in between: the launcher neither
passes SIGUSR1 on (it dies of it and orphans its ranks) nor the exit code of ranks it was told to end. So Slurm's
warning reaches every rank, and exit code 75 comes back.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from xdscale.errors import EXIT_STOPPED, XdscaleError

SECONDS_TO_SAVE = 300
"""How long before the end of its time a job is told to save."""

RANKS_FROM_SLURM = (
    "exec env RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID "
    'LOCAL_SIZE=${SLURM_NTASKS_PER_NODE:-1} "$@"'
)
"""Shell text that starts its arguments as the rank which Slurm's variables describe."""

RENDEZVOUS_FROM_SLURM = """\
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
"""
"""Shell text that sets where ranks meet: the first machine, at a port of this job's own."""

_TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")
_WORD = re.compile(r"[\w.,-]+")


@dataclass(frozen=True)
class SlurmRequest:
    """What is asked of Slurm.

    Attributes:
        nodes: machines.
        gpus_per_node: GPUs, and ranks, of each.
        time: Slurm's notation, as in 24:00:00 or 2-12:00:00.
        partition: queue, or None for the cluster's default.
        account: who pays, or None for the user's default.

    Raises:
        XdscaleError: a value that Slurm would not take.
    """

    nodes: int
    gpus_per_node: int
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None

    def __post_init__(self) -> None:
        if not _TIME.fullmatch(self.time):
            raise XdscaleError(f"--time {self.time}: expected Slurm's notation, as in 24:00:00 or 2-12:00:00")
        for option, value in {"--partition": self.partition, "--account": self.account}.items():
            if value is not None and not _WORD.fullmatch(value):
                raise XdscaleError(f"{option} {value!r}: expected a plain name")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node


def sbatch_text(
    name: str, request: SlurmRequest, python: str, arguments: tuple[str, ...], environment: Mapping[str, str]
) -> str:
    """Returns the batch script.

    Args:
        name: of the job.
        request: machines, GPUs, time.
        python: interpreter, as the machines find it.
        arguments: of `xdscale.adapt`.
        environment: variables that every rank is to have; Triton's cache is made one per job.
    """
    options = [
        f"--job-name={name}",
        f"--nodes={request.nodes}",
        f"--ntasks-per-node={request.gpus_per_node}",
        f"--gpus-per-node={request.gpus_per_node}",
        f"--time={request.time}",
        *([f"--partition={request.partition}"] if request.partition else []),
        *([f"--account={request.account}"] if request.account else []),
        f"--signal=USR1@{SECONDS_TO_SAVE}",
        "--requeue",
        "--open-mode=append",
    ]
    exports = {key: shlex.quote(value) for key, value in environment.items()}
    exports["TRITON_CACHE_DIR"] += "-$SLURM_JOB_ID"
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in options),
        exports="\n".join(f"export {key}={value}" for key, value in exports.items()),
        rendezvous=RENDEZVOUS_FROM_SLURM,
        minutes=SECONDS_TO_SAVE // 60,
        stopped=EXIT_STOPPED,
        ranks=RANKS_FROM_SLURM,
        command=shlex.join([python, "-u", "-m", "xdscale.adapt", *arguments]),
    )


_SCRIPT = """\
#!/bin/bash
{options}
# Written by 'xdscale launch … --slurm'. One task per GPU. {minutes} minutes before the time is up Slurm sends SIGUSR1
# to every rank: a checkpoint is saved, exit code {stopped} queues the job again, and the same script then continues.
set -u
# A handler, unlike a shell without one, lets srun end first; what it ends with is looked at below.
trap : TERM USR1

{rendezvous}{exports}

srun --kill-on-bad-exit=1 bash -c '{ranks}' rank \\
    {command}
code=$?
if [ "$code" -eq {stopped} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
