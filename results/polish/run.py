"""Train two equal small models on the same Polish text, one with GPT-2's tokenizer and one with a tokenizer of its own.

    python results/polish/run.py PATH [PATH ...]       # as for `fineweb.py files --input`

The second tokenizer is trained on the same text and has 32,768 entries.
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


def run_python(*arguments: object) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


def split_texts(paths: list[str], out: Path) -> None:
    """Write the texts as documents of about 3,000 characters, so that each book contributes to both splits."""
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
    """Write a dataset and return the number of bytes of its validation text."""
    directory = ROOT / "data" / f"polish-{name}"
    subprocess.run(["rm", "-rf", str(directory)], check=True)
    options = ("--tokenizer", tokenizer, "--val-tokens", val_tokens, "--out-dir", directory)
    run_python("fineweb.py", "files", "--input", pages, *options)
    return json.loads((directory / "dataset.json").read_text())["counts"]["text_bytes"]["val"]


pages, bpe = ROOT / "data" / "polish.jsonl", ROOT / "data" / "polish-bpe.json"
pages.parent.mkdir(exist_ok=True)
split_texts(sys.argv[1:], pages)
run_python("-m", "tools.train_tokenizer", "--input", pages, "--vocab-size", 32768, "--out", bpe)
run_python("-m", "tools.compare_tokenizers", "gpt2", bpe, "--input", pages)
val_bytes = prepare("gpt2", "gpt2", 50_000)
val_tokens = 20_000
while prepare("own", bpe, val_tokens) < val_bytes:  # until both datasets validate on the same documents
    val_tokens += 300
for name in ("gpt2", "own"):
    run = ("train.py", "gpt2", "--general.mode", "train", "val", "--general.out-dir", f"out/polish-{name}")
    run_python(*run, "--data.dataset", f"data/polish-{name}", *MODEL.split(), *TRAINING.split())
