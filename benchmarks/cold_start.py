"""Measure how long scripts take to print their help or a configuration error.

    python benchmarks/cold_start.py [BEFORE] [--runs 9] [--out results/first-hour/cold-start.md]

BEFORE is a checkout of an earlier commit to compare with. Each command first runs once per checkout to fill the
file cache; the timed runs alternate between the checkouts. The table lists medians.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.table import machine, write_table  # noqa: E402

IMPORT_TORCH = "-c 'import torch'"  # most of the time of the scripts that need it
COMMANDS = (
    "train.py --help", "train.py typo", "train.py gpt2 --model.n-head 5 --data.dataset none", "sample.py --help",
    "sample.py out/typo --prompt A", "hellaswag.py --help", "hellaswag.py out/typo", "finetune.py --help",
    "chat.py --help", "fineweb.py --help", "fineweb.py files --input none", "-m tools.train_tokenizer --help",
    "-m tools.plot --help", "-m tools.runs --help", IMPORT_TORCH,
)  # fmt: skip


def seconds(checkout: Path, command: str) -> float | None:
    """Return the wall time of a command, or None if the checkout does not have its script."""
    words = shlex.split(command)
    script = words[1].replace(".", "/") + ".py" if words[0] == "-m" else words[0]
    if words[0] != "-c" and not (checkout / script).exists():
        return None
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=checkout, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", type=Path, metavar="BEFORE", help="checkout of an earlier commit")
    parser.add_argument("--runs", type=int, default=9, help="runs of each command (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    checkouts = [ROOT] if options.before is None else [options.before.resolve(), ROOT]
    lines = [
        f"{machine()}; median of {options.runs} runs, in seconds",
        "",
        "| command | before | now |" if options.before else "| command | now |",
        "|---|---:|---:|" if options.before else "|---|---:|",
    ]
    for command in COMMANDS:
        times: list[list[float]] = [[] for _ in checkouts]
        for run in range(options.runs + 1):
            for checkout, measured in zip(checkouts, times, strict=True):
                found = seconds(checkout, command)
                if found is not None and run > 0:
                    measured.append(found)
        cells = [f"{statistics.median(measured):.2f}" if measured else "-" for measured in times]
        lines.append(f"| `python {command}` | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
