#!/usr/bin/env bash
# Installs and runs the checks (CPU, no network but the package index), in three tiers.
#
#   bash runs/test.sh                # what CI runs: style, types, import rules, all tests
#   bash runs/test.sh --quick        # style, import rules and unit tests: no ranks, Ray, S3 server or transformers
#   bash runs/test.sh --slow         # by hand: other packages' results, another version of PyTorch
#   bash runs/test.sh -k optimizer   # only pytest, with these arguments
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/environment.sh
quick=(requirements.txt tests/requirements-tools.txt tests/requirements-quick.txt)
no_transformers=(--ignore tests/unit/test_huggingface.py)

case "$*" in
    "")
        environment .venv "${quick[@]}" tests/requirements.txt
        ruff check .
        ruff format --check .
        lint-imports --no-logo
        mypy
        python -m pytest --numprocesses auto tests/unit
        python -m pytest tests/distributed tests/faults  # one after another: they start processes of their own
        ;;
    --quick)
        environment .venv "${quick[@]}"
        ruff check .
        ruff format --check .
        lint-imports --no-logo
        python -m pytest --numprocesses auto tests/unit "${no_transformers[@]}"
        ;;
    --slow)
        # environments of their own: these packages choose versions of others
        environment .venv-slow "${quick[@]}" tests/requirements.txt tests/requirements-slow.txt
        python -m pytest tests/slow
        TEST_BACKEND=inductor python -m pytest tests/unit/test_compiled_step.py  # compiles C++ for a minute
        bash runs/gpu_report.sh --rehearse
        requirements=$(mktemp)
        trap 'rm -f "$requirements"' EXIT
        sed 's/^torch==.*/torch==2.11.*/' requirements.txt > "$requirements"
        environment .venv-torch-2.11 "$requirements" tests/requirements-quick.txt  # with CUDA: 5 GB
        TEST_BACKEND=inductor python -m pytest --numprocesses auto tests/unit "${no_transformers[@]}"
        python -m pytest tests/distributed/test_compiled_ranks.py
        python tests/mistakes.py 25 26 27 28
        ;;
    *)
        environment .venv "${quick[@]}" tests/requirements.txt
        python -m pytest "$@"
        ;;
esac
