#!/usr/bin/env bash
# The proofs that take minutes: every command of the pages for Table 1, clusters and analyses, the quickstart whole and
# what it proposes to type next, an engine for every shipped DeepSpeed configuration, the plan's bytes and traffic against
# real engines, checkpoints at other numbers of ranks, ranks killed while they save or train, on texts, regions and
# pixels, the Triton kernels at a true shape. Properties are tried on new examples, other ones in each run.
# scripts/chaos.sh repeats the random ones longer.
set -euo pipefail
source "$(dirname "$0")/install.sh"
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "proof or hypothesis" tests
