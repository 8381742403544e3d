#!/usr/bin/env bash
# Installs what is missing, then lint and tests, two files at a time. What judges seconds of the clock runs apart, what
# compares speeds alone. Proofs of minutes are left to scripts/proofs.sh.
set -euo pipefail
source "$(dirname "$0")/install.sh"
ruff check .
ruff format --check .
clocks=(tests/training/test_signals_under_launcher.py tests/training/test_watchdog.py)
speeds=(tests/bench)
apart=("${clocks[@]}" "${speeds[@]}")
test() {
    "$PYTHON" -m pytest -m "not proof" "$@"
}
two_files_at_a_time() {
    # One thread each: threads that wait for each other on a busy core would take most of the time.
    OMP_NUM_THREADS=1 test -n 2 --dist loadfile --no-loadscope-reorder "$@"
}
two_files_at_a_time "${apart[@]/#/--ignore=}"
two_files_at_a_time "${clocks[@]}"
test "${speeds[@]}"
