"""Two equal small models on the same Polish text, one with GPT-2's vocabulary and one with its own of 32,768 entries.

python results/polish/run.py PATH [PATH ...]       # texts, as `fineweb.py files --input` takes them
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from babygpt.data.sources import find, read_documents  # noqa: E402

MODEL = "--model.block-size 256 --model.n-layer 4 --model.n-head 4 --model.n-embd 128"
TRAINING = (
    "--training.batch-tokens 2048 --training.micro-batch-size 8 --training.max-steps 240 --optimizer.max-lr 3e-3 "
    "--optimizer.warmup-steps 24 --validation.every-n-steps 120 --saving.every-n-steps 240 --logging.every-n-steps 20"
)


def call(*arguments: object) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


def split(paths: list[str], out: Path) -> None:
    """The texts as documents of some 3,000 characters, so that books don't go to one side as a whole."""
    with open(out, "w", encoding="utf-8") as file:
        for text in read_documents(find("files", tuple(paths))):
            piece = ""
            for paragraph in text.split("\n"):
                piece += paragraph + "\n"
                if len(piece) > 3000:
                    file.write(json.dumps({"text": piece}) + "\n")
                    piece = ""
            file.write(json.dumps({"text": piece}) + "\n")


def prepare(name: str, tokenizer: object, val_tokens: int) -> int:
    """Makes a data set; returns the bytes of text that validate."""
    folder = ROOT / "data" / f"polish-{name}"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    options = ("--tokenizer", tokenizer, "--val-tokens", val_tokens, "--out-dir", folder)
    call("fineweb.py", "files", "--input", pages, *options)
    return json.loads((folder / "dataset.json").read_text())["counts"]["text_bytes"]["val"]


pages, bpe = ROOT / "data" / "polish.jsonl", ROOT / "data" / "polish-bpe.json"
pages.parent.mkdir(exist_ok=True)
split(sys.argv[1:], pages)
call("-m", "tools.train_tokenizer", "--input", pages, "--vocab-size", 32768, "--out", bpe)
call("-m", "tools.compare_tokenizers", "gpt2", bpe, "--input", pages)
wanted = prepare("gpt2", "gpt2", 50_000)
tokens = 20_000
while prepare("own", bpe, tokens) < wanted:  # until the same documents validate
    tokens += 300
for name in ("gpt2", "own"):
    run = ("train.py", "gpt2", "--general.mode", "train", "val", "--general.out-dir", f"out/polish-{name}")
    call(*run, "--data.dataset", f"data/polish-{name}", *MODEL.split(), *TRAINING.split())
