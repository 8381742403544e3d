#!/usr/bin/env bash
# Installs what is missing, then lint and all tests: two at a time, but one by one where a test itself starts ranks.
set -euo pipefail
source "$(dirname "$0")/install.sh"
ruff check .
ruff format --check .
"$PYTHON" -m pytest -n 2 --ignore tests/docs --ignore tests/training
"$PYTHON" -m pytest tests/docs tests/training
