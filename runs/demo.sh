#!/usr/bin/env bash
# From nothing to a trained, scored and sampled GPT: about three minutes of training on two CPU cores, seconds on a
# GPU. No download but from the package index. The model learns Python from Python's own standard library.
#
#   bash runs/demo.sh            # again: goes on where it was, or only scores and samples again
#   bash runs/demo.sh --quick    # the same path with a few steps, for a test
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/environment.sh

run=demo
options=()
if [ "${1:-}" = --quick ]; then
    run=demo-quick
    options=(--training.max-steps 12 --validation.every-n-steps 6 --sampling.every-n-steps 12
        --evaluation.limit 20 --optimizer.warmup-steps 4)
elif [ $# -gt 0 ]; then
    echo "usage: bash runs/demo.sh [--quick]" >&2
    exit 2
fi
environment .venv requirements.txt

echo; echo "--- 1. a vocabulary of 4,096 entries, learnt from Python's standard library"
[ -e data/demo-tokenizer.json ] || python -m tools.train_tokenizer stdlib --vocab-size 4096 --out data/demo-tokenizer.json

echo; echo "--- 2. the same files as token shards"
python fineweb.py stdlib --tokenizer data/demo-tokenizer.json --val-tokens 50000 --out-dir data/demo

echo; echo "--- 3. training, with validation, HellaSwag and samples"
python train.py demo --general.init-from resume --general.out-dir "out/$run" ${options[@]+"${options[@]}"}

echo; echo "--- 4. the model goes on from a prompt"
python sample.py "out/$run" --prompt "def " --max-new-tokens 100 --temperature 0.8

python - "out/$run" <<'PYTHON'
import sys
from pathlib import Path

from babygpt.training.log import column, read_log

run = Path(sys.argv[1])
rows = read_log(run / "log.csv")
val, hellaswag = column(rows, "val_loss")[1], column(rows, "hellaswag")[1]
seconds = sum(row["step_ms"] or 0 for row in rows) / 1e3
print(f"""
--- done
{rows[-1]["tokens"]:,} tokens in {seconds:,.0f} s: validation loss {val[0]:.2f} -> {val[-1]:.2f}, HellaSwag \
{hellaswag[-1]:.3f} (chance is 0.25: this model has read code alone)
look at  {run}/plot.png, {run}/samples.txt, {run}/log.csv
next     source .venv/bin/activate
         python sample.py {run}                                  # prompts of your own
         python fineweb.py files --input 'my/texts/*.txt' --out-dir data/mine
         python train.py demo --data.dataset data/mine --general.out-dir out/mine
         python fineweb.py && torchrun --standalone --nproc_per_node=8 train.py     # GPT-2 124M on 8 GPUs""")
PYTHON
