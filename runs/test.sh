#!/usr/bin/env bash
# Installs and runs the checks (CPU, no network but the package index), in three tiers.
#
#   bash runs/test.sh                # what CI runs: style, types, import rules, all tests
#   bash runs/test.sh --quick        # style, import rules and unit tests: no ranks, Ray, S3 server or transformers
#   bash runs/test.sh --slow         # by hand: other packages' results, another version of PyTorch
#   bash runs/test.sh -k optimizer   # further arguments go to pytest, and nothing else runs
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/environment.sh

tier=full
case "${1:-}" in
    --quick | --slow) tier=${1#--}; shift ;;
esac
quick=(requirements.txt tests/requirements-tools.txt tests/requirements-quick.txt)

case $tier in
    quick)
        environment "${quick[@]}"
        ruff check .
        ruff format --check .
        lint-imports --no-logo
        # test_huggingface.py needs transformers
        python -m pytest --numprocesses auto tests/unit --ignore tests/unit/test_huggingface.py "$@"
        ;;
    full)
        environment "${quick[@]}" tests/requirements.txt
        if [ $# -gt 0 ]; then
            python -m pytest "$@"
            exit
        fi
        ruff check .
        ruff format --check .
        lint-imports --no-logo
        mypy
        python -m pytest --numprocesses auto tests/unit
        python -m pytest tests/distributed tests/faults  # one after another: they start processes of their own
        ;;
    slow)
        export VENV=.venv-slow  # an environment of its own: these packages choose versions of others
        environment "${quick[@]}" tests/requirements.txt tests/requirements-slow.txt
        python -m pytest tests/slow "$@"
        export VENV=.venv-torch-2.11  # PyTorch's default build comes with CUDA: 5 GB
        requirements=$(mktemp)
        sed 's/^torch==.*/torch==2.11.*/' requirements.txt > "$requirements"
        environment "$requirements" tests/requirements-quick.txt
        python -m pytest --numprocesses auto tests/unit --ignore tests/unit/test_huggingface.py "$@"
        python tests/mistakes.py 25
        ;;
esac
