"""Mistakes of a new user's first hour: each is a command, and a text that its message must contain."""

import shlex
from pathlib import Path

from support.helpers import save

ROOT = Path(__file__).parents[2]
SCRIPTS = (
    "fineweb.py", "train.py", "sample.py", "hellaswag.py", "model.py", "train_config.py", "arguments.py",
    "dataloader.py", "babygpt", "assets", "tools",
)  # fmt: skip
TRAIN = "python train.py tiny --dataset data/novel --device cpu"
MISTAKES = [
    ("python fineweb.py files --input 'page/*.txt'", "page/*.txt matches no file. The current directory is"),
    ("python fineweb.py files", "needs --input"),
    ("python fineweb.py files --input photo.png", "photo.png. Use parquet, arrow, jsonl"),
    ("python fineweb.py pages", "'pages' is a path, not a source. Use `python fineweb.py files --input pages`"),
    ("python fineweb.py fineweb-edu-10bt", "Did you mean 'fineweb-edu-10BT'?"),
    ("python fineweb.py files --input pages --out-dir data/x", "latin.txt is not valid UTF-8"),
    ("python fineweb.py files --input body.jsonl --out-dir data/x", "has no column 'text': it has body"),
    ("python fineweb.py files --input broken.jsonl.gz --out-dir data/x", "broken.jsonl.gz, line 1 is not valid JSON"),
    ("python fineweb.py files --input novel.txt --tokenizer gpt3", "There is no tokenizer at gpt3"),
    ("python fineweb.py files --input novel.txt --out-dir data/novel --tokenizer char", "with different settings"),
    ("python fineweb.py files --inptu novel.txt", "Perhaps you meant"),
    ("python fineweb.py files --input novel.txt --val-input novel.txt", "matches all files of --input"),
    ("python fineweb.py verify data/novle", "There is no dataset at data/novle"),
    ("python train.py", "There is no dataset at data/fineweb-edu-10BT. Prepare it with `python fineweb.py`"),
    ("python train.py tinny", "There is no preset 'tinny'. Did you mean 'tiny'?"),
    ("python train.py --max-steps 5 tiny", "A preset comes first"),
    ("python train.py tiny --dataset novel.txt", "python fineweb.py files --input novel.txt --out-dir data/novel"),
    ("python train.py tiny --dataset pages", "python fineweb.py files --input pages --out-dir data/pages"),
    (f"{TRAIN} --out-dir out/finished", "already contains a run. Resume it with"),
    (f"{TRAIN} --max_step 5", "There is no flag --max_step. Did you mean '--max-steps'?"),
    (f"{TRAIN} --max-steps ten", "invalid literal for int()"),
    (f"{TRAIN} --max-steps 0", "--training.max-steps 0 is out of range. Use at least 1."),
    (f"{TRAIN} --every-n-steps 5", "--every-n-steps is a field of several sections"),
    (f"{TRAIN} --batch-tokens 1000", "Use a multiple of 256, such as 768"),
    (f"{TRAIN} --batch-tokens 65536", "The dataset has too few rows for one step"),
    (f"{TRAIN} --n-head 3", "is not divisible by --model.n-head 3"),
    (f"{TRAIN} --epochs 1 --max-steps 5", "Use one of them"),
    (f"{TRAIN} --init-from out/nothing", "There is no model at out/nothing"),
    ("python train.py tiny --dataset data/novel --device cuda", "PyTorch finds no CUDA device"),
    ("python train.py gpt2 --dataset data/novel --rope", "Use the preset modern"),
    ("python train.py out/nothing/config.json", "cannot be read as the config.json of a run (No such file"),
    ("python train.py --out-dir out/nothing --mode val --dataset data/novel", "There is no model at out/nothing"),
    ("python sample.py out/nothing", "There is no model at out/nothing"),
    ("python sample.py", "Missing from sample.py"),
    ("python hellaswag.py out/nothing --file none.jsonl", "There is no model at out/nothing"),
    ("python -m tools.plot out/nothing", "There is no run at out/nothing"),
]  # fmt: skip


def make_files(directory: Path) -> None:
    """Make a working directory with the scripts, and the files that the commands name, except for the dataset."""
    for name in SCRIPTS:
        (directory / name).symlink_to(ROOT / name)
    save(directory / "novel.txt", "".join(f"Alice wrote line {i} of her novel.\n" for i in range(2000)).encode())
    save(directory / "photo.png", b"\x89PNG")
    save(directory / "body.jsonl", b'{"body": "a text"}\n')
    save(directory / "broken.jsonl.gz", b'{"text": "a text"\n')
    save(directory / "pages" / "latin.txt", "caf\u00e9".encode("latin-1"))
    save(directory / "pages" / "utf8.txt", "caf\u00e9".encode())
    (directory / "out" / "finished").mkdir(parents=True)
    (directory / "out" / "finished" / "finished").touch()


PREPARE = shlex.split("files --input novel.txt --out-dir data/novel --workers 1")
