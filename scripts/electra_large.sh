#!/usr/bin/env bash
# ELECTRA-large with CLIP-T and two cross-modal layers (445 million parameters, random weights) on two CPU ranks: two
# steps under each ZeRO stage, and what the plan said of them. A few minutes and up to 16 GiB of memory per stage. A CPU
# without instructions for bf16 is a hundred times slower in it: --fp32 is for those.
#   bash scripts/electra_large.sh [--fp32] [STAGE …]      default: 1 2 3
set -euo pipefail
cd "$(dirname "$0")/.."
available=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
if [ "$available" -lt 17 ]; then
    echo "error: $available GiB of memory are available, 17 are needed" >&2
    exit 2
fi
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# Large tensors go back to the system when they are freed; without this, fragmentation adds about a GiB.
export MALLOC_MMAP_THRESHOLD_=131072
python tests/plan/electra_large.py "$@"
