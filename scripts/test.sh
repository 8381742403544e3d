#!/usr/bin/env bash
# Installs what is missing, then lint and tests, three files at a time, since each waits a sixth of its time: for disks,
# other ranks, processes that died or froze. Two where memory is small. What compares speeds runs alone. Proofs of minutes
# are left to scripts/proofs.sh. Hypothesis draws the same examples in each run: a change is judged by what it changed;
# scripts/proofs.sh draws new ones.
set -euo pipefail
source "$(dirname "$0")/install.sh"
ruff check .
ruff format --check .
speeds=(tests/bench/test_bench_{regions,shards,stream}.py)
# The machine's memory, or what a container may have of it, in bytes; "max" where there is no limit.
memory=$(awk '/^MemTotal/ {print $2 "000"}' /proc/meminfo
    cat /sys/fs/cgroup/memory{.max,/memory.limit_in_bytes} 2> /dev/null || true)
files=$(sort -n <<< "${memory//max/}" | awk '/[0-9]/ {print ($1 < 14e9) ? 2 : 3; exit}')
# One thread each: threads that wait for each other on a busy core would take most of the time.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest --hypothesis-profile ci -m "not proof" -n "$files" --dist loadfile \
    --no-loadscope-reorder "${speeds[@]/#/--ignore=}"
"$PYTHON" -m pytest -m "not proof" "${speeds[@]}"
