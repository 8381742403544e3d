#!/usr/bin/env bash
# Installs what is missing, then lint and all tests.
set -euo pipefail
source "$(dirname "$0")/install.sh"
ruff check .
ruff format --check .
"$PYTHON" -m pytest "$@"
