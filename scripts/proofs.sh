#!/usr/bin/env bash
# The proofs that take minutes: every command of the pages for Table 1, clusters and analyses, an engine for every shipped
# DeepSpeed configuration, the plan's bytes and traffic against real engines, checkpoints at other numbers of ranks,
# ranks killed while they save. scripts/chaos.sh repeats the random ones longer.
set -euo pipefail
source "$(dirname "$0")/install.sh"
"$PYTHON" -m pytest -n 2 --dist loadfile -m proof tests
