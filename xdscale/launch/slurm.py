"""The batch script for Slurm.

`srun` starts the ranks themselves, one task per GPU, without DeepSpeed's launcher in between: the launcher neither
passes SIGUSR1 on (it dies of it and orphans its ranks) nor the exit code of ranks it was told to end. So Slurm's
warning reaches every rank, and exit code 75 comes back.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from xdscale.errors import EXIT_FAULT, EXIT_STOPPED, XdscaleError

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
# Since Slurm 22.05 srun does not take the job's cores by itself.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
"""
"""Shell text that sets where ranks meet: the first machine, at a port of this job's own; and the cores of each rank."""

MOST_REQUEUES_AFTER_FAULTS = 5
"""How often a job is queued again because a rank died or hung; after a signal, as often as it takes."""

_TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")
# What sbatch takes for the rest of a word in a line of a script: no blank, quote, backslash or comment.
_WORD = re.compile(r"[^\s'\"\\#]+")


@dataclass(frozen=True)
class SlurmRequest:
    """What is asked of Slurm.

    Attributes:
        nodes: machines.
        gpus_per_node: GPUs, and ranks, of each.
        time: Slurm's notation, as in 24:00:00 or 2-12:00:00.
        partition: queue, or None for the cluster's default.
        account: who pays, or None for the user's default.
        qos: quality of service, or None for the user's default.
        constraint: features that machines must have, in Slurm's notation, or None.
        cpus_per_task: cores of each rank, or None for the cluster's default, which may be one.

    Raises:
        XdscaleError: a value that Slurm would not take.
    """

    nodes: int
    gpus_per_node: int
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: int | None = None

    def __post_init__(self) -> None:
        if not _TIME.fullmatch(self.time):
            raise XdscaleError(f"--time {self.time}: expected Slurm's notation, as in 24:00:00 or 2-12:00:00")
        for option, value in self.choices.items():
            if not _WORD.fullmatch(value):
                raise XdscaleError(f"{option} {value!r}: expected one word without blanks, quotes, \\ and #")

    @property
    def choices(self) -> dict[str, str]:
        """What was asked for of options that are passed on as they are."""
        named = {"partition": self.partition, "account": self.account, "qos": self.qos, "constraint": self.constraint}
        return {f"--{name}": value for name, value in named.items() if value is not None}

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node


def sbatch_text(
    name: str,
    request: SlurmRequest,
    python: str,
    arguments: tuple[str, ...],
    environment: Mapping[str, str],
    run_folder: str,
) -> str:
    """Returns the batch script.

    Args:
        name: of the job.
        request: machines, GPUs, time.
        python: interpreter, as the machines find it.
        arguments: of `xdscale.train`.
        environment: variables that every rank is to have; Triton's cache is one per job unless it stands there.
        run_folder: where its checkpoints lie.
    """
    options = [
        f"--job-name={name}",
        f"--nodes={request.nodes}",
        f"--ntasks-per-node={request.gpus_per_node}",
        f"--gpus-per-node={request.gpus_per_node}",
        f"--time={request.time}",
        *([f"--cpus-per-task={request.cpus_per_task}"] if request.cpus_per_task else []),
        *(f"{option}={value}" for option, value in request.choices.items()),
        f"--signal=USR1@{SECONDS_TO_SAVE}",
        "--requeue",
        "--open-mode=append",
    ]
    exports = {"TRITON_CACHE_DIR": "/tmp/triton-$SLURM_JOB_ID"}
    exports |= {key: shlex.quote(value) for key, value in environment.items()}
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in options),
        exports="\n".join(f"export {key}={value}" for key, value in sorted(exports.items())),
        rendezvous=RENDEZVOUS_FROM_SLURM,
        minutes=SECONDS_TO_SAVE // 60,
        stopped=EXIT_STOPPED,
        fault=EXIT_FAULT,
        most=MOST_REQUEUES_AFTER_FAULTS,
        run=shlex.quote(run_folder),
        ranks=RANKS_FROM_SLURM,
        command=shlex.join([python, "-u", "-m", "xdscale.train", *arguments]),
    )


_SCRIPT = """\
#!/bin/bash
{options}
# Written by 'xdscale launch … --slurm'. One task per GPU. {minutes} minutes before the time is up Slurm sends SIGUSR1
# to every rank: a checkpoint is saved, exit code {stopped} queues the job again, and the same script then continues.
# So it does, {most} times at most, when a rank died or hung and there is a newer checkpoint than when it was started.
set -u
# A handler, unlike a shell without one, lets srun end first; what it ends with is looked at below.
trap : TERM USR1

{rendezvous}{exports}

run_folder={run}
newest() {{ ls "$run_folder/checkpoints" 2>/dev/null | grep '^step-' | tail -n 1; }}
before=$(newest)

srun --kill-on-bad-exit=1 bash -c '{ranks}' rank \\
    {command}
code=$?
if [ "$code" -eq {stopped} ]; then
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" -eq {fault} ] || [ "$code" -gt 128 ]; then # more than 128: a rank was killed
    faults=$run_folder/faults/requeued-$SLURM_JOB_ID
    if [[ $(newest) > $before ]] && mkdir -p "$run_folder/faults" && echo "$code" >> "$faults" &&
        [ "$(wc -l < "$faults")" -le {most} ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
"""
