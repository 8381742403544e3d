#!/usr/bin/env bash
# Installs what is missing, then lint and tests, two files at a time. What judges seconds of the clock runs apart, what
# compares speeds alone. Proofs of minutes are left to scripts/proofs.sh. Hypothesis draws the same examples in each run:
# a change is judged by what it changed; scripts/proofs.sh draws new ones.
set -euo pipefail
source "$(dirname "$0")/install.sh"
ruff check .
ruff format --check .
clocks=(tests/training/test_signals_under_launcher.py tests/training/test_watchdog.py)
speeds=(tests/bench)
apart=("${clocks[@]}" "${speeds[@]}")
# One thread each: threads that wait for each other on a busy core would take most of the time.
two_files_at_a_time=(env OMP_NUM_THREADS=1 "$PYTHON" -m pytest --hypothesis-profile ci -n 2 --dist loadfile --no-loadscope-reorder)
"${two_files_at_a_time[@]}" -m "not proof" "${apart[@]/#/--ignore=}"
"${two_files_at_a_time[@]}" -m "not proof" "${clocks[@]}"
"$PYTHON" -m pytest -m "not proof" "${speeds[@]}"
