#!/usr/bin/env bash
# Installs what is missing, then lint and tests, two files at a time. What mostly waits, for processes that died or froze,
# runs beside them; what compares speeds runs alone. Proofs of minutes are left to scripts/proofs.sh. Hypothesis draws
# the same examples in each run: a change is judged by what it changed; scripts/proofs.sh draws new ones.
set -euo pipefail
source "$(dirname "$0")/install.sh"
ruff check .
ruff format --check .
waiting=(tests/training/test_signals_under_launcher.py tests/training/test_watchdog.py)
speeds=(tests/bench/test_bench_{regions,shards,stream}.py)
apart=("${waiting[@]}" "${speeds[@]}")
# One thread each: threads that wait for each other on a busy core would take most of the time.
one_thread=(env OMP_NUM_THREADS=1 "$PYTHON" -m pytest --hypothesis-profile ci -m "not proof")
told=$(mktemp)
"${one_thread[@]}" "${waiting[@]}" >"$told" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null || true; rm -f "$told"' EXIT
"${one_thread[@]}" -n 2 --dist loadfile --no-loadscope-reorder "${apart[@]/#/--ignore=}"
failed=0
wait "$beside" || failed=$?
cat "$told"
[ "$failed" -eq 0 ] || exit "$failed"
"$PYTHON" -m pytest -m "not proof" "${speeds[@]}"
