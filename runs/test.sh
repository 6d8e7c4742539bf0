#!/usr/bin/env bash
# Installs and runs all checks: style, then the tests (CPU, no network but the package index).
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/environment.sh
environment requirements.txt tests/requirements.txt

ruff check .
ruff format --check .
python -m pytest "$@"
