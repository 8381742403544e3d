"""A cluster of two machines on loopback: the programs that start ranks elsewhere, made to start them here."""

import os
import sys
from pathlib import Path

import pytest

# As the real programs do: pdsh joins its words with blanks and names the machine before each line; ssh hands them to a
# shell in a fresh environment.
FAKES = {
    "pdsh": """
while [ $# -gt 0 ]; do
    case $1 in -S) shift ;; -f) shift 2 ;; -w) hosts=$2; shift 2 ;; *) break ;; esac
done
number=0
for host in ${hosts//,/ }; do
    words="$*" per=$'\\001'
    words=${words//%%/$per} words=${words//%n/$number} words=${words//%h/$host}
    { set -o pipefail; ssh "$host" "${words//$per/%}" | sed -u "s/^/$host: /"; } &
    tasks+=($!)
    number=$((number + 1))
done
for task in "${tasks[@]}"; do wait "$task"; code=$?; [ "$code" -gt "${worst:-0}" ] && worst=$code; done
exit "${worst:-0}"
""",
    "ssh": """
while [[ $1 == -* ]]; do shift 2; done
echo "$1" >> "$FAKE_LOG/ssh"
shift
exec env -i HOME="$HOME" PATH=/usr/bin:/bin bash -c "$*"
""",
    "srun": """
while [[ $1 == -* ]]; do shift; done
for number in 0 1; do
    SLURM_PROCID=$number SLURM_NODEID=$number SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 "$@" &
    tasks+=($!)
done
if [ -n "${FAKE_SIGNAL_AFTER:-}" ]; then
    until grep -qs '"kind": *"step"' "$FAKE_SIGNAL_AFTER" || ! kill -0 "${tasks[0]}"; do sleep 0.2; done
    kill -USR1 "${tasks[@]}"
fi
for task in "${tasks[@]}"; do wait "$task"; code=$?; [ "$code" -gt "${worst:-0}" ] && worst=$code; done
exit "${worst:-0}"
""",
    "scontrol": """
echo "$*" >> "$FAKE_LOG/scontrol"
[ "$1" = show ] && printf '127.0.0.1\\n127.0.0.1\\n'
exit 0
""",
    "sbatch": """
export SLURM_JOB_ID=$FAKE_JOB_ID SLURM_JOB_NODELIST='node-[1-2]'
exec bash "$1"
""",
    "salloc": """
while [[ $1 == -* ]]; do shift; done
export SLURM_JOB_ID=$FAKE_JOB_ID SLURM_JOB_NODELIST='node-[1-2]'
exec "$@"
""",
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> dict[str, str]:
    """Environment in which those programs are found; `FAKE_LOG` is the folder where they note how they were called."""
    folder = tmp_path_factory.mktemp("cluster")
    for name, body in FAKES.items():
        program = folder / name
        program.write_text(f"#!/bin/bash\n{body.lstrip()}")
        program.chmod(0o755)
    settings = {
        "PATH": f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin",
        "FAKE_LOG": str(folder),
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return os.environ | settings
