#!/usr/bin/env bash
# Installs what is missing, then lint and tests: two files at a time, and alone what judges seconds of the clock.
# Proofs of minutes are left to scripts/proofs.sh.
set -euo pipefail
source "$(dirname "$0")/install.sh"
ruff check .
ruff format --check .
alone=(tests/bench tests/training/test_signals_under_launcher.py tests/training/test_watchdog.py)
"$PYTHON" -m pytest -n 2 --dist loadfile -m "not proof" "${alone[@]/#/--ignore=}"
"$PYTHON" -m pytest "${alone[@]}"
