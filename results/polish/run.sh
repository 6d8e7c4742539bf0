#!/usr/bin/env bash
# Two equal small models on the same Polish text, one with GPT-2's vocabulary and one with its own of 32,768 entries.
#   bash results/polish/run.sh 'PATH/*'
set -euo pipefail
python tokenizer.py train --input "$1" --vocab-size 32768 --out data/polish-bpe.json
python tokenizer.py compare --input "$1" gpt2 data/polish-bpe.json
train() {  # name, tokenizer, validation tokens that take the same documents
    python fineweb.py files --input "$1" --tokenizer "$3" --val-tokens "$4" --out-dir "data/polish-$2"
    python train.py gpt2 --general.mode train val --general.out-dir "out/polish-$2" --data.dataset "data/polish-$2" \
        --model.block-size 256 --model.n-layer 4 --model.n-head 4 --model.n-embd 128 \
        --training.batch-tokens 4096 --training.micro-batch-size 16 --training.max-steps 400 \
        --optimizer.max-lr 3e-3 --optimizer.warmup-steps 40 \
        --validation.every-n-steps 200 --saving.every-n-steps 400 --logging.every-n-steps 50
}
train "$1" gpt2 gpt2 200000
train "$1" own data/polish-bpe.json 100000
