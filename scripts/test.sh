#!/usr/bin/env bash
# Installs what is missing, then lint and all tests: two at a time, but one by one where tests start ranks or measure.
set -euo pipefail
source "$(dirname "$0")/install.sh"
ruff check .
ruff format --check .
alone=(tests/analysis tests/bench tests/docs tests/finetune tests/launch tests/plan tests/training)
"$PYTHON" -m pytest -n 2 "${alone[@]/#/--ignore=}"
"$PYTHON" -m pytest "${alone[@]}"
