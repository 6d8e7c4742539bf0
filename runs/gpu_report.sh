#!/usr/bin/env bash
# Run all checks and benchmarks on this machine's GPU and write results/gpu/<GPU>.md. Run it again to continue.
#
#   bash runs/gpu_report.sh                  # all stages, at most 45 minutes
#   bash runs/gpu_report.sh --minutes 9      # as many stages as fit, the most important first
#   bash runs/gpu_report.sh --rehearse       # all stages on the CPU, with tiny sizes
set -euo pipefail
cd "$(dirname "$0")/.."
# A stage that runs again finds its compiled code in the cache.
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/out/gpu-report/inductor}
exec "${PYTHON:-python3}" -m benchmarks.gpu_report "$@"
