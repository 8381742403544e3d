#!/usr/bin/env bash
# The proofs that take minutes each, about 20 in all on two cores: every command of the pages for Table 1 and for
# clusters, an engine for every shipped DeepSpeed configuration, the plan's bytes and traffic against real engines,
# checkpoints at other numbers of ranks, ranks killed while they save. scripts/chaos.sh repeats the random ones longer.
set -euo pipefail
source "$(dirname "$0")/install.sh"
"$PYTHON" -m pytest -n 2 --dist loadfile -m proof tests
