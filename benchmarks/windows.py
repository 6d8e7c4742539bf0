"""Compare the loss after training on the data order with that after training on independent windows.

    python benchmarks/windows.py shakespeare-char-cpu [--dataset DATASET] [--streams 12 64 1024] [--jobs 2] [-- FLAGS]

nanoGPT starts each row at a random token, independently of all others, so some tokens are read several times and
others never. This benchmark trains a preset (changed by FLAGS of train.py) on such windows, and on the data order with
several numbers of streams; `1024:1` is version 1 of the order with 1,024 streams. All runs have the same model, number
of tokens and validation tokens. Runs are written to the directory --runs, and finished runs are not repeated. Use a new
directory if the code or the dataset has changed. If --jobs is greater than 1, each run uses one thread.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import train  # noqa: E402
from arguments import parse  # noqa: E402
from babygpt.data.shards import open_dataset  # noqa: E402
from babygpt.training.log import column, read_log  # noqa: E402
from benchmarks.table import machine, map_jobs, write_table  # noqa: E402
from dataloader import Order, default_chunk_tokens, default_num_streams  # noqa: E402

SEEDS = (1337, 1338, 1339)


class IndependentWindows(Order):
    """Rows that start at random tokens, drawn with replacement."""

    def read_rows(self, epoch: int, rows: Sequence[int], out: np.ndarray) -> None:
        for n, row in zip(rows, out, strict=True):
            start = int(np.random.default_rng([self.seed, epoch, n]).integers(len(self.tokens) - self.block_size))
            self.tokens.read(start, start + self.block_size + 1, row)


def train_run(options: argparse.Namespace, order: str, seed: int) -> float:
    """Train a run unless it has finished, and return its final validation loss."""
    name = f"{options.preset}-{Path(options.dataset).name}-{order.replace(':', '-order')}-{seed}"
    directory = Path(options.runs) / name
    log = directory / "log.csv"
    if not (directory / "finished").exists():
        shutil.rmtree(directory, ignore_errors=True)  # left by an interrupted benchmark
        number, _, version = order.partition(":")
        streams = [] if order == "windows" else ["--num-streams", number, "--order", version or "2"]
        command = [
            sys.executable, __file__, "--train", order, options.preset, "--dataset", options.dataset, "--out-dir",
            str(directory), "--seed", str(seed), "--mode", "train", "val", "--validation.every-n-steps", "1000000",
            "--saving.every-n-steps", "0", "--compile", "off", *streams, *options.flags,
        ]  # fmt: skip
        environment = os.environ | ({"OMP_NUM_THREADS": "1"} if options.jobs > 1 else {})
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"error: {directory.name} failed:\n{done.stderr[-3000:]}")
    loss = column(read_log(log), "val_loss")[1][-1]
    print(f"{directory.name}: {loss:.4f}", file=sys.stderr, flush=True)
    return loss


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        order, sys.argv[1:] = sys.argv[2], sys.argv[3:]
        if order == "windows":
            train.Order = IndependentWindows  # type: ignore[misc]
        return train.main()
    words = [*sys.argv[1:], "--"]
    own, flags = words[: words.index("--")], words[words.index("--") + 1 : -1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", metavar="PRESET", help="preset of train_config.py")
    parser.add_argument("--dataset", help="directory of the prepared dataset (default: that of the preset)")
    parser.add_argument("--streams", nargs="+", default=["12", "64", "1024"], help="numbers of streams to compare")
    parser.add_argument("--jobs", type=int, default=1, help="number of concurrent runs (default: %(default)s)")
    parser.add_argument("--runs", default="out/windows", help="directory of the runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args(own)
    options.flags = flags
    _, config = parse([options.preset, *(["--dataset", options.dataset] if options.dataset else []), *options.flags])
    options.dataset = os.path.abspath(config.data.dataset)
    num_tokens, block_size = len(open_dataset(options.dataset).train), config.model.block_size
    default = default_num_streams(num_tokens, block_size)
    orders = ["windows", *sorted({*options.streams, str(default)}, key=lambda order: (int(order.split(":")[0]), order))]
    jobs = [(order, seed) for seed in SEEDS for order in orders]
    losses = dict(zip(jobs, map_jobs(lambda job: train_run(options, *job), jobs, options.jobs), strict=True))
    tokens = config.training.max_steps * config.training.batch_tokens
    lines = [
        f"`python benchmarks/windows.py {' '.join(sys.argv[1:])}`, {machine()}",
        "",
        f"{num_tokens:,} training tokens, of which {config.training.max_steps:,} steps read {tokens:,} "
        f"({tokens / num_tokens:.2f} epochs); T = {block_size}; seeds {', '.join(map(str, SEEDS))}. The default number "
        f"of streams is {default:,}.",
        "",
        "| order | chunk, tokens | validation loss, mean (min to max) | difference from windows, mean (by seed) |",
        "|---|---:|---:|---:|",
    ]
    for order in orders:
        values = [losses[order, seed] for seed in SEEDS]
        differences = [losses[order, seed] - losses["windows", seed] for seed in SEEDS]
        name, chunk = "independent windows", ""
        if order != "windows":
            number, _, version = order.partition(":")
            name = f"{int(number):,} streams" + (f", version {version}" if version else "")
            chunk = f"{default_chunk_tokens(num_tokens, int(number), block_size):,}"
        by_seed = ", ".join(f"{difference:+.4f}" for difference in differences)
        lines.append(
            f"| {name} | {chunk} | {statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f}) | "
            f"{statistics.mean(differences):+.4f} ({by_seed}) |"
        )
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
