#!/usr/bin/env bash
# The long form of what scripts/test.sh shows briefly: kills, full disks, damage and signals, many times over, and the
# memory of a build of 1 GB.
# usage: scripts/chaos.sh [rounds (200)] [seed (1)]; an hour or more on two cores. A failure prints the seed it needs.
set -euo pipefail
source "$(dirname "$0")/install.sh"
export XDSCALE_CHAOS_ROUNDS=${1:-200} XDSCALE_CHAOS_SEED=${2:-1} XDSCALE_CHAOS_SIGNALS=20
for room in shards/test_build_faults training/test_checkpoint_faults training/test_signals_under_launcher; do
    echo "== $room, seed $XDSCALE_CHAOS_SEED" >&2
    "$PYTHON" -m pytest -s -o timeout=7200 "tests/$room.py"
done
echo "== memory of shard building" >&2
XDSCALE_MEMORY_MB=50,1000 "$PYTHON" -m pytest -s tests/shards/test_build_memory.py
