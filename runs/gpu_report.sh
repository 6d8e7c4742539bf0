#!/usr/bin/env bash
# Checks and measures everything on this machine's GPU, and writes results/gpu/<GPU>.md. Run it again to continue.
#
#   bash runs/gpu_report.sh                  # all stages, 45 minutes at most
#   bash runs/gpu_report.sh --minutes 9      # the most important ones first
#   bash runs/gpu_report.sh --rehearse       # every command on the CPU, at tiny sizes
set -euo pipefail
cd "$(dirname "$0")/.."
# a stage that is repeated compiles faster
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/out/gpu-report/inductor}
exec "${PYTHON:-python3}" -m benchmarks.gpu_report "$@"
