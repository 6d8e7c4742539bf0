"""Measure how the number of streams of the data order affects the loss of a short run.

    python benchmarks/streams.py DATASET [--streams 64 1024] [--jobs 2] [--out results/shuffle/streams.md]

DATASET is a prepared dataset with a small vocabulary. The preset modern trains --steps steps with the model of
benchmarks/recipe.py, two seeds each. Runs are written to the directory --runs, and finished runs are not
repeated. Use a new directory if the code or the dataset has changed. If --jobs is greater than 1, each run uses one
thread.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from babygpt.data.shards import open_dataset  # noqa: E402
from benchmarks.recipe import Runs  # noqa: E402
from benchmarks.table import machine, write_table  # noqa: E402
from dataloader import default_num_streams  # noqa: E402

NUM_STREAMS = (64, 256, 1024, 4096)
SEEDS = (1337, 1338)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="directory of the prepared dataset")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run (default: %(default)s)")
    parser.add_argument("--streams", type=int, nargs="+", default=NUM_STREAMS, help="numbers of streams to compare")
    parser.add_argument("--jobs", type=int, default=1, help="number of concurrent runs (default: %(default)s)")
    parser.add_argument("--runs", default="out/streams", help="directory of the runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    runs, train_tokens = Runs(options), len(open_dataset(options.dataset).train)
    names = runs.train_all(
        [
            (
                f"{num_streams}-{options.steps}-{seed}",
                "modern",
                options.steps,
                seed,
                "--data.num-streams",
                str(num_streams),
            )
            for num_streams in options.streams
            for seed in SEEDS
        ]
    )
    lines = [
        f"`python benchmarks/streams.py {Path(options.dataset).name} --steps {options.steps} --jobs {options.jobs}`, "
        + machine(),
        "",
        f"The preset modern with 4 layers and n_embd = 128, T = 256; {train_tokens:,} training tokens, of which "
        f"{options.steps} steps read {options.steps * 4096:,}. The default for this dataset is "
        f"{default_num_streams(train_tokens, 256):,} streams.",
        "",
        "| streams | validation loss, mean (min to max) |",
        "|---:|---:|",
    ]
    for i, num_streams in enumerate(options.streams):
        losses = runs.format_losses(names[i * len(SEEDS) : (i + 1) * len(SEEDS)])
        lines.append(f"| {num_streams:,} | {losses} |")
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
