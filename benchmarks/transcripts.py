"""Run the commands of a new user's first hour in two checkouts, and write what they print, one after the other.

    python benchmarks/transcripts.py BEFORE [AFTER] [--out results/first-hour/transcripts.md]

BEFORE and AFTER are checkouts; AFTER defaults to this one. The commands run in a temporary directory with generated
texts. Models are tiny, so that everything takes a few minutes on a CPU.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.helpers import save, save_hellaswag  # noqa: E402

from benchmarks.table import machine, write_table  # noqa: E402

RUN = (
    "--data.dataset data/novel --general.device cpu --model.block-size 32 --model.n-layer 2 --model.n-embd 32 "
    "--model.n-head 2 --training.batch-tokens 512 --training.micro-batch-size 4 --validation.every-n-steps 100 "
    "--logging.every-n-steps 5 --sampling.every-n-steps 0 --training.compile off"
)
TRAIN = "--general.mode train val"
COMMANDS = {  # title -> commands, run in one directory in this order
    "One text file": [
        "python fineweb.py files --input novel.txt --out-dir data/novel",
    ],
    "Four large documents": [
        "python fineweb.py files --input 'novels/*.txt' --out-dir data/novels",
    ],
    "Named validation documents": [
        "python fineweb.py files --input pages.csv --val-input val.csv --out-dir data/val",
    ],
    "Documents within a file": [
        "python fineweb.py files --input poems.txt --separator '<|endoftext|>' --out-dir data/poems",
    ],
    "A directory with files of many types": [
        "python fineweb.py files --input mixed --out-dir data/mixed",
    ],
    "A directory of save_to_disk": [
        "python fineweb.py files --input saved --out-dir data/saved",
    ],
    "Encodings": [
        "python fineweb.py files --input utf16.txt --out-dir data/utf16",
        "python fineweb.py files --input latin1.txt novel.txt --out-dir data/latin1",
        "ls data",
        "python fineweb.py files --input latin1.txt --encoding latin-1 --out-dir data/latin1",
        "python fineweb.py files --input latin1.txt novel.txt --skip-bad --out-dir data/skipped",
    ],
    "Characters as tokens": [
        "python fineweb.py files --input novel.txt --tokenizer char --out-dir data/char",
        f"python train.py gpt2 {RUN} {TRAIN} --data.dataset data/char --general.out-dir out/char --training.max-steps "
        "2",
        "python sample.py out/char --prompt 'na\u00efve'",
    ],
    "Resume and evaluate without repeating the settings": [
        f"python train.py gpt2 {RUN} {TRAIN} --general.out-dir out/a --training.max-steps 4 --saving.every-n-steps 2",
        "rm -r out/a/checkpoints/step_00000004 out/a/finished",
        "python train.py --general.out-dir out/a --general.init-from resume",
        "python train.py --general.out-dir out/a --general.mode val",
    ],
    "The settings of a run as a preset": [
        "python train.py out/a/config.json --optimizer.max-lr 1e-3",
    ],
    "The architecture of other weights": [
        "python train.py gpt2 --data.dataset data/novel --general.init-from out/a --general.mode train val "
        "--general.out-dir out/b --training.batch-tokens 512 --training.max-steps 2 --general.device cpu",
    ],
    "A run that failed before its first checkpoint": [
        f"timeout -s KILL 20 python train.py gpt2 {RUN} {TRAIN} --general.out-dir out/c --training.max-steps 100000",
        f"python train.py gpt2 {RUN} {TRAIN} --general.out-dir out/c --training.max-steps 2",
    ],
    "Epochs": [
        f"python train.py gpt2 {RUN} {TRAIN} --general.out-dir out/d --training.epochs 0.05",
        f"python train.py gpt2 {RUN} --general.mode train --general.out-dir out/e --training.max-steps 3 "
        "--data.dataset data/poems --training.batch-tokens 128 --training.max-steps 400 --logging.every-n-steps 200",
    ],
    "Short flags": [
        f"python train.py gpt2 {RUN} {TRAIN} --out-dir out/f --max-steps 2 --seed 7",
        f"python train.py gpt2 {RUN} {TRAIN} --out-dir out/f --every-n-steps 5",
    ],
    "HellaSwag with endings longer than the block size": [
        f"python train.py gpt2 {RUN} --general.mode train eval --general.out-dir out/g --training.max-steps 2 "
        "--model.block-size 8 --evaluation.file hellaswag.jsonl",
    ],
    "Two ranks": [
        "torchrun --standalone --nproc_per_node=2 train.py demo --data.dataset data/novel --general.device cpu "
        "--general.mode train --training.max-steps 2 --model.n-embd 32 --model.n-head 2 --general.out-dir out/h",
        "torchrun --standalone --nproc_per_node=2 train.py gpt2 --data.dataset data/none --general.device cpu",
    ],
    "A non-finite loss before the first checkpoint": [
        f"python train.py gpt2 {RUN} {TRAIN} --general.out-dir out/i --training.max-steps 60 --optimizer.max-lr 1e30 "
        "--optimizer.warmup-steps 0 --optimizer.grad-clip 0",
    ],
    "The console and the files of a run": [
        f"python train.py gpt2 {RUN} --general.out-dir out/j --general.mode train val sample --training.max-steps 12 "
        "--data.dataset data/novels "
        "--sampling.every-n-steps 12 --sampling.num-samples 2 --sampling.max-new-tokens 16 --saving.every-n-steps 12",
        "ls out/j",
        "head -n 2 out/j/log.csv",
        "cat out/j/samples.txt",
    ],
    "Ctrl-C": [
        f"timeout -s INT 12 python train.py gpt2 {RUN} {TRAIN} --general.out-dir out/k --training.max-steps 100000 "
        "--data.dataset data/novels --logging.every-n-steps 1000",
    ],
    "A plot of a run that has one": [
        "sha256sum out/j/plot.png && python -m tools.plot out/j out/k && sha256sum out/j/plot.png",
        "python -m tools.plot out/j --out out/j/plot.png",
        "python -m tools.plot out/j out/k --out compare.html",
    ],
    "A table of the runs": [
        "python -m tools.runs out/ --sort tokens",
    ],
    "An interactive session": [
        "printf 'Alice wrote\\nAlice wrote\\n/temperature 0\\n/new\\nAlice wrote\\n' | "
        "python sample.py out/j --device cpu --max-new-tokens 16",
    ],
}
SHOWN_IN_FULL = {"The console and the files of a run"}  # with the settings, without progress bars
PROGRESS_BAR = re.compile(r"it/s|step/s|^(tokenize|write): ")
NOISE = re.compile(
    PROGRESS_BAR.pattern + r"|^ *$"
    r"|^ +(general|data|model|training|optimizer|validation|evaluation|sampling|saving|logging) {2}"
    r"|^[WE]\d{4} |^ +(time|host|error_file) *:"  # of torchrun, and its traceback
    r"|^ +File \"|^Traceback|^ +\^+$|^ {4}(sys|return|raise|run|main|elastic)"
)


def make_files(directory: Path, checkout: Path) -> None:
    for path in checkout.iterdir():
        if path.suffix == ".py" or path.name in ("babygpt", "assets", "tools"):
            (directory / path.name).symlink_to(path.resolve())

    def novel(name: str, lines: int) -> str:
        return "".join(f"{name} wrote line {i} of a novel, and read it aloud.\n" for i in range(lines))

    save(directory / "novel.txt", novel("Alice", 4000).encode())
    for i, name in enumerate(("Ann", "Bob", "Eve", "Tom")):
        save(directory / "novels" / f"{name}.txt", novel(name, 1000 + 200 * i).encode())
    save(directory / "pages.csv", ("id,text\n" + "".join(f'{i},"page {i}, with text"\n' for i in range(50))).encode())
    save(directory / "val.csv", b'id,text\n7,"page 7, with text"\n99,"another page"\n')
    save(directory / "poems.txt", "<|endoftext|>".join(novel("Poet", i % 5 + 3) + f"{i}" for i in range(60)).encode())
    for name in ("a.txt", "B.TXT", "notes.md", "photo.png", "paper.pdf"):
        save(directory / "mixed" / name, novel(name, 5).encode())
    save(directory / "mixed" / "list.json", b'[{"text": "one"}, {"text": "two"}]')
    save(directory / "mixed" / "table.csv", b"text\nthree\n")
    save(directory / "utf16.txt", novel("Zo\u00eb", 100).encode("utf-16"))
    save(directory / "latin1.txt", novel("Zo\u00eb", 100).encode("latin-1"))
    save_hellaswag(directory / "hellaswag.jsonl", 8)
    from datasets import Dataset

    Dataset.from_dict({"text": [f"row {i}" for i in range(9)]}).save_to_disk(directory / "saved")


def run_command(command: str, directory: Path, in_full: bool) -> str:
    """Return what a command prints, and its exit code.

    Progress bars are removed, and unless `in_full`, also settings, torchrun's log lines and the middle of long outputs.
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "110"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=300,
    )  # fmt: skip
    text = done.stdout.replace(sys.prefix, "VENV")
    lines = text.replace(str(directory), "DIRECTORY").replace(str(directory.resolve()), "DIRECTORY").splitlines()
    lines = [line for line in lines if not (PROGRESS_BAR if in_full else NOISE).search(line)]
    shown = lines if in_full or len(lines) <= 14 else [*lines[:4], "...", *lines[-10:]]
    return "\n".join([f"$ {command}", *shown, f"(exit code {done.returncode})"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="checkout of an earlier commit")
    parser.add_argument("after", type=Path, metavar="AFTER", nargs="?", default=ROOT, help="checkout (default: this)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    printed: dict[str, dict[str, list[str]]] = {}  # title -> checkout -> transcripts
    for name, checkout in (("before", options.before), ("after", options.after)):
        with tempfile.TemporaryDirectory() as directory:
            make_files(Path(directory), checkout)
            for title, commands in COMMANDS.items():
                transcripts = [run_command(command, Path(directory), title in SHOWN_IN_FULL) for command in commands]
                printed.setdefault(title, {})[name] = transcripts
    lines = [f"`python benchmarks/transcripts.py BEFORE`, {machine()}", ""]
    for title, checkouts in printed.items():
        lines += [f"## {title}", ""]
        for name, transcripts in checkouts.items():
            lines += [f"{name.capitalize()}:", "", "```", "\n\n".join(transcripts), "```", ""]
    write_table(lines[:-1], options.out)


if __name__ == "__main__":
    main()
