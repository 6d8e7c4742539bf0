"""What the bfloat16 switches do to the loss: three seeds of `gpt2` and `modern`, without and with each switch.

    python benchmarks/precision.py DATASET [--steps 400] [--jobs 2] [--out results/speed/precision.md]

The model and the data are those of benchmarks/recipe.py: 4 layers, 128 wide, T = 256, 4,096 tokens per step, a prepared
data set with a small vocabulary. Matrix products run in bfloat16 in all runs. Differences are between runs of one seed.

    default             the residual stream and the gradients are float32
    bf16-activations    the residual stream is bfloat16
    bf16-gradients      two ranks exchange gradients in bfloat16; compared with two ranks that do not

Runs go to out/precision and are resumed; a finished one is not run again.
"""

import argparse
import os
import platform
import statistics
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.recipe import SEEDS, Runs  # noqa: E402
from benchmarks.table import show  # noqa: E402

# a rate and a warmup at which runs of 400 steps differ little by rounding alone; at 4e-3 they differ by 0.1 nats
RECIPES = {"gpt2": ["--optimizer.max-lr", "1e-3", "--optimizer.warmup-steps", "100"], "modern": []}
# name: flags, ranks, what it is compared with
VARIANTS = {
    "default": ([], 1, None),
    "bf16-activations": (["--training.bf16-activations"], 1, "default"),
    "default, two ranks": ([], 2, "default"),
    "bf16-gradients": (["--training.bf16-gradients"], 2, "default, two ranks"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--runs", default="out/precision", help="directory of the runs")
    parser.add_argument("--out", type=Path, help="file for the table")
    options = parser.parse_args()
    runs = Runs(options)

    def name(preset: str, variant: str, seed: int) -> str:
        return f"{preset}-{variant.replace(',', '').replace(' ', '-')}-{seed}"

    ranks = {
        name(preset, variant, seed): ranks
        for preset in RECIPES for variant, (_, ranks, _) in VARIANTS.items() for seed in SEEDS
    }  # fmt: skip
    runs.all(
        [
            (
                name(preset, variant, seed), preset, options.steps, seed, "--training.dtype", "bfloat16",
                "--training.micro-batch-size", "8", *recipe, *flags,
            )
            for seed in SEEDS for preset, recipe in RECIPES.items() for variant, (flags, _, _) in VARIANTS.items()
        ],
        ranks,
    )  # fmt: skip
    lines = [
        f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}",
        "",
        f"4 layers, 128 wide, T = 256, {options.steps} steps of 4,096 tokens; {Path(options.dataset).name}. Validation",
        f"loss after the last step, seeds {', '.join(map(str, SEEDS))}.",
        "",
        "| preset | switch | mean (min to max) | difference from the same seed without it, mean (min to max) |",
        "|---|---|---:|---:|",
    ]
    for preset in RECIPES:
        for variant, (_, _, other) in VARIANTS.items():
            names = [name(preset, variant, seed) for seed in SEEDS]
            row = f"| {preset} | {variant} | {runs.spread(names)} |"
            if other:
                apart = [
                    runs.loss(name(preset, variant, seed)) - runs.loss(name(preset, other, seed)) for seed in SEEDS
                ]
                row += f" {statistics.mean(apart):+.4f} ({min(apart):+.4f} to {max(apart):+.4f})"
            lines.append(row + " |")
    show(lines, options.out)


if __name__ == "__main__":
    main()
