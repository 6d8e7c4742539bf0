#!/usr/bin/env bash
# Train on 2,400 FineWeb documents for ten minutes on two CPU cores, with a tokenizer trained on them (8,192 entries).
#
#   bash results/fineweb-10m/run.sh 'PATH/*.parquet'
set -euo pipefail
python -m tools.train_tokenizer --input "$1" --vocab-size 8192 --out data/fineweb-bpe.json
python fineweb.py files --input "$1" --tokenizer data/fineweb-bpe.json --val-tokens 100000 --out-dir data/fineweb-8k
python train.py gpt2 --general.out-dir out/fineweb-10m --data.dataset data/fineweb-8k \
    --model.block-size 256 --model.n-layer 6 --model.n-head 5 --model.n-embd 320 \
    --training.batch-tokens 4096 --training.micro-batch-size 16 --training.max-steps 750 \
    --optimizer.max-lr 2e-3 --optimizer.warmup-steps 75 \
    --validation.every-n-steps 75 --evaluation.every-n-steps 750 --sampling.every-n-steps 250 --saving.every-n-steps 250 \
    --logging.every-n-steps 25
