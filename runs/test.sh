#!/usr/bin/env bash
# Install the dependencies and run the checks, in three tiers. All run on the CPU and use no network except the package
# index.
#
#   bash runs/test.sh                # what CI runs: linting, spelling, types, import rules, all tests
#   bash runs/test.sh --quick        # linting, import rules, unit tests without transformers; no Ray, no S3 server
#   bash runs/test.sh --slow         # run by hand: comparison with lm-eval, another version of PyTorch
#   bash runs/test.sh -k optimizer   # pytest with these arguments only
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/environment.sh
quick=(requirements.txt tests/requirements-tools.txt tests/requirements-quick.txt)
no_transformers=(--ignore tests/unit/test_huggingface.py --ignore tests/unit/test_export.py)

case "$*" in
    "")
        set_up_environment .venv "${quick[@]}" tests/requirements.txt
        ruff check .
        ruff format --check .
        codespell
        lint-imports --no-logo
        mypy
        # the longest test first, so that the other workers run the rest in the meantime
        python -m pytest --numprocesses auto --dist worksteal tests/distributed/test_commands.py tests/unit
        # sequentially: these tests start several processes and measure time
        python -m pytest tests/distributed tests/faults --ignore tests/distributed/test_commands.py
        ;;
    --quick)
        set_up_environment .venv "${quick[@]}"
        ruff check .
        ruff format --check .
        codespell
        lint-imports --no-logo
        python -m pytest --numprocesses auto tests/unit "${no_transformers[@]}"
        ;;
    --slow)
        # separate environments: these packages pin the versions of others
        set_up_environment .venv-slow "${quick[@]}" tests/requirements.txt tests/requirements-slow.txt
        python -m pytest tests/slow
        TEST_BACKEND=inductor python -m pytest tests/unit/test_compiled_step.py  # compiles C++ code for about a minute
        bash runs/gpu_report.sh --rehearse
        requirements=$(mktemp)
        trap 'rm -f "$requirements"' EXIT
        sed 's/^torch==.*/torch==2.11.*/' requirements.txt > "$requirements"
        set_up_environment .venv-torch-2.11 "$requirements" tests/requirements-quick.txt  # 5 GB with CUDA
        TEST_BACKEND=inductor python -m pytest --numprocesses auto tests/unit "${no_transformers[@]}"
        python -m pytest tests/distributed/test_compiled_ranks.py
        python tests/mistakes.py 25 26 27 28
        ;;
    *)
        set_up_environment .venv "${quick[@]}" tests/requirements.txt
        python -m pytest "$@"
        ;;
esac
