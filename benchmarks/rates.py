"""Measure the best learning rates of the preset modern by width and batch size.

    python benchmarks/rates.py DATASET [--jobs 2] [--out results/recipe/rates.md]

Model and data are those of benchmarks/recipe.py, except for the width (with heads of 32 channels) or the batch size.
Each run multiplies all four learning rates of the preset (Muon, embeddings, head, scalars) by one of --factors. All
runs have the same number of steps, so larger batches see more tokens. A parabola through the three losses around the
lowest, over the logarithm of the factor, gives the best factor, and how much higher the loss is with the preset's
learning rates.

Runs are written to the directory --runs, and finished runs are not repeated. Use a new directory if the code or the
dataset has changed. If --jobs is greater than 1, each run uses one thread.
"""

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.recipe import SEEDS, Runs  # noqa: E402
from benchmarks.table import machine, write_table  # noqa: E402
from train_config import preset  # noqa: E402

CASES = [  # width, tokens per step
    (128, 4_096), (256, 4_096), (384, 4_096),
    (128, 2_048), (128, 8_192), (128, 16_384), (128, 32_768),
]  # fmt: skip
RATES = ("max_lr", "embedding_lr", "head_lr", "scalar_lr")


def flags_of(width: int, batch_tokens: int, factor: float) -> list[str]:
    flags = {
        "model.n-embd": width, "model.n-head": width // 32, "training.batch-tokens": batch_tokens,
        "training.micro-batch-size": min(16, batch_tokens // 256),
    }  # fmt: skip
    optimizer = preset("modern").optimizer
    flags |= {f"optimizer.{name.replace('_', '-')}": factor * getattr(optimizer, name) for name in RATES}
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def lowest(factors: list[float], losses: list[float]) -> tuple[float, float] | None:
    """Return the factor and the loss at the vertex of a parabola through the lowest loss and its neighbors.

    None if the lowest loss is that of the smallest or largest factor.
    """
    i = int(np.nanargmin(losses))
    if i in (0, len(losses) - 1):
        return None
    near = slice(i - 1, i + 2)
    a, b, c = np.polyfit(np.log(factors[near]), losses[near], 2)
    return math.exp(-b / (2 * a)), c - b * b / (4 * a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="directory of the prepared dataset")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run (default: %(default)s)")
    parser.add_argument(
        "--factors",
        type=float,
        nargs="+",
        default=[0.5, 1.0, 2.0],
        help="factors of the learning rates (default: 0.5 1 2)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS[:1], help="seeds (default: 1337)")
    parser.add_argument(
        "--max-batch-tokens", type=int, default=32_768, help="skip larger batches (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of concurrent runs (default: %(default)s)")
    parser.add_argument("--runs", default="out/rates", help="directory of the runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    factors, steps = sorted(options.factors), options.steps
    if 1.0 not in factors:
        parser.error(f"--factors {factors} does not include 1, which stands for the preset's learning rates. Add 1.")
    runs, cases = Runs(options), [case for case in CASES if case[1] <= options.max_batch_tokens]

    def run_name(case: tuple[int, int], factor: float, seed: int) -> str:
        return "-".join(map(str, (*case, f"{factor:g}", steps, seed)))

    runs.train_all([
        (run_name(case, factor, seed), "modern", steps, seed, *flags_of(*case, factor))
        for case in cases for factor in factors for seed in options.seeds
    ])  # fmt: skip
    lines = [
        f"{machine()}; {options.jobs} concurrent runs" + (" with one thread each" if options.jobs > 1 else ""),
        "",
        f"The preset modern with 4 layers and heads of 32 channels, T = 256, {steps} steps; dataset: "
        f"{Path(options.dataset).name}; seeds: {', '.join(map(str, options.seeds))}. The columns after the second have "
        "the mean validation loss if all learning rates are multiplied by this factor.",
        "",
        f"| width | tokens per step | {' | '.join(f'{factor:g}' for factor in factors)} | best factor | "
        "loss at factor 1, minus the lowest |",
        "|---:|---:" + "|---:" * (len(factors) + 2) + "|",
    ]
    for case in cases:
        losses = [runs.mean_loss([run_name(case, factor, seed) for seed in options.seeds]) for factor in factors]
        at_1, best = losses[factors.index(1.0)], lowest(factors, losses)
        if best:
            summary = f"{best[0]:.2f} | {at_1 - best[1]:.3f}"
        elif losses[0] < losses[-1]:
            summary = f"at most {factors[0]:g} | at least {at_1 - losses[0]:.3f}"
        else:
            summary = f"at least {factors[-1]:g} | at least {at_1 - losses[-1]:.3f}"
        cells = [f"{case[0]}", f"{case[1]:,}", *(f"{loss:.3f}" for loss in losses), summary]
        lines.append(f"| {' | '.join(cells)} |")
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
