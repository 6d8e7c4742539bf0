"""Measure the best learning rates of the preset modern by width and batch size.

    python benchmarks/rates.py DATASET [--jobs 2] [--out results/recipe/rates.md]

Model and data are those of benchmarks/recipe.py, except for the width (with heads of 32 channels) or the batch size.
Each run multiplies all four learning rates of the preset (Muon, embeddings, head, scalars) by one of --factors. A
parabola through the three losses around the lowest, over the logarithm of the factor, gives the best factor, and the
loss that the preset's own rates lose against it.

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


def run_name(width: int, batch_tokens: int, factor: float) -> str:
    return f"{width}-{batch_tokens}-{factor:g}"


def flags_of(width: int, batch_tokens: int, factor: float) -> list[str]:
    flags = {
        "model.n-embd": width, "model.n-head": width // 32, "training.batch-tokens": batch_tokens,
        "training.micro-batch-size": min(16, batch_tokens // 256),
    }  # fmt: skip
    optimizer = preset("modern").optimizer
    flags |= {f"optimizer.{name.replace('_', '-')}": factor * getattr(optimizer, name) for name in RATES}
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def lowest(factors: list[float], losses: list[float]) -> tuple[float, float]:
    """Return the factor and the loss at the vertex of a parabola through the lowest loss and its neighbors.

    If the lowest loss is at an end of the factors, return that factor and its loss.
    """
    i = int(np.argmin(losses))
    if i in (0, len(losses) - 1):
        return factors[i], losses[i]
    near = slice(i - 1, i + 2)
    a, b, c = np.polyfit(np.log(factors[near]), losses[near], 2)
    return math.exp(-b / (2 * a)), c - b * b / (4 * a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="directory of the prepared dataset")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run (default: %(default)s)")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="in increasing order")
    parser.add_argument("--jobs", type=int, default=1, help="number of concurrent runs (default: %(default)s)")
    parser.add_argument("--runs", default="out/rates", help="directory of the runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    if 1.0 not in options.factors:
        parser.error("--factors must include 1, the rates of the preset")
    runs = Runs(options)
    runs.train_all([
        (run_name(*case, factor), "modern", options.steps, SEEDS[0], *flags_of(*case, factor))
        for case in CASES for factor in options.factors
    ])  # fmt: skip
    lines = [
        f"{machine()}; {options.jobs} concurrent runs" + (" with one thread each" if options.jobs > 1 else ""),
        "",
        f"The preset modern with 4 layers and heads of 32 channels, T = 256, {options.steps} steps; dataset: "
        f"{Path(options.dataset).name}; seed {SEEDS[0]}. Validation loss by the factor of all learning rates.",
        "",
        f"| width | tokens per step | {' | '.join(f'{factor:g}' for factor in options.factors)} | best factor | "
        "loss above the best with the preset's rates |",
        "|---:|---:" + "|---:" * (len(options.factors) + 2) + "|",
    ]
    for case in CASES:
        losses = [runs.final_loss(run_name(*case, factor)) for factor in options.factors]
        best_factor, best_loss = lowest(options.factors, losses)
        cells = [f"{case[0]}", f"{case[1]:,}", *(f"{loss:.4f}" for loss in losses), f"{best_factor:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {losses[options.factors.index(1.0)] - best_loss:.4f} |")
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
