#!/usr/bin/env bash
# Train, evaluate and sample a small GPT on the source code of Python's standard library. Training takes about three
# minutes on two CPU cores and seconds on a GPU. Nothing is downloaded except packages from the package index.
#
#   bash runs/demo.sh            # run it again to resume; a finished run is only evaluated and sampled again
#   bash runs/demo.sh --quick    # the same commands with a few steps, as a test
set -euo pipefail
cd "$(dirname "$0")/.."
source runs/environment.sh

run=demo
options=()
if [ "${1:-}" = --quick ]; then
    run=demo-quick
    options=(--training.max-steps 12 --validation.every-n-steps 6 --sampling.every-n-steps 12
        --evaluation.limit 20)
elif [ $# -gt 0 ]; then
    echo "usage: bash runs/demo.sh [--quick]" >&2
    exit 2
fi
set_up_environment .venv requirements.txt

echo; echo "--- 1. Train a tokenizer with a vocabulary of 4,096 on Python's standard library"
[ -e data/demo-tokenizer.json ] ||
    python -m tools.train_tokenizer stdlib --vocab-size 4096 --out data/demo-tokenizer.json

echo; echo "--- 2. Tokenize the same files and write token shards"
python fineweb.py stdlib --tokenizer data/demo-tokenizer.json --val-tokens 50000 --out-dir data/demo

echo; echo "--- 3. Train, with validation, HellaSwag and samples"
python train.py demo --general.init-from resume --general.out-dir "out/$run" ${options[@]+"${options[@]}"}

echo; echo "--- 4. Generate text from a prompt"
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
--- Done
{rows[-1]["tokens"]:,} tokens in {seconds:,.0f} s: validation loss {val[0]:.2f} -> {val[-1]:.2f}, HellaSwag \
{hellaswag[-1]:.3f} (chance is 0.25; this model was trained only on code)
results  {run}/report.html, {run}/plot.png, {run}/samples.txt, {run}/log.csv
next     source .venv/bin/activate
         python sample.py {run}                                  # interactive session
         python fineweb.py files --input 'my/texts/*.txt' --tokenizer data/demo-tokenizer.json --out-dir data/my-texts
         python train.py tiny --dataset data/my-texts --out-dir out/my-run
         python fineweb.py && torchrun --standalone --nproc_per_node=8 train.py     # GPT-2 124M on 8 GPUs""")
PYTHON
