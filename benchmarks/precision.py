"""Measure how the bfloat16 switches change the loss: `gpt2` and `modern`, three seeds, with and without each switch.

    python benchmarks/precision.py DATASET [--steps 400] [--jobs 2] [--out results/speed/precision.md]

Model and data are those of benchmarks/recipe.py: 4 layers, 4 heads, n_embd = 128, T = 256, 4,096 tokens per step, a
prepared dataset with a small vocabulary. All runs compute matrix products in bfloat16. Differences are between runs
with the same seed.

    default             the residual stream and the gradients are float32
    bf16-activations    the residual stream is bfloat16; compared with the default
    bf16-gradients      two ranks all-reduce gradients in bfloat16; compared with two ranks and float32 gradients

Runs are written to the directory --runs, and finished runs are not repeated. Use a new directory if the code or the
dataset has changed.
"""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.recipe import SEEDS, Runs  # noqa: E402
from benchmarks.table import machine, write_table  # noqa: E402

# At this learning rate and warmup, rounding errors change the loss after 400 steps little; at 4e-3, by 0.1 nats.
RECIPES = {"gpt2": ["--optimizer.max-lr", "1e-3", "--optimizer.warmup-steps", "100"], "modern": []}
# name: (flags, ranks, name of the variant it is compared with)
VARIANTS = {
    "default": ([], 1, None),
    "bf16-activations": (["--training.bf16-activations"], 1, "default"),
    "default, two ranks": ([], 2, "default"),
    "bf16-gradients": (["--training.bf16-gradients"], 2, "default, two ranks"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="directory of the prepared dataset")
    parser.add_argument("--steps", type=int, default=400, help="training steps per run (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="number of concurrent runs (default: %(default)s)")
    parser.add_argument("--runs", default="out/precision", help="directory of the runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    runs = Runs(options)

    def run_name(preset: str, variant: str, seed: int) -> str:
        return f"{preset}-{variant.replace(',', '').replace(' ', '-')}-{seed}"

    ranks = {
        run_name(preset, variant, seed): ranks
        for preset in RECIPES for variant, (_, ranks, _) in VARIANTS.items() for seed in SEEDS
    }  # fmt: skip
    runs.train_all(
        [
            (
                run_name(preset, variant, seed), preset, options.steps, seed, "--training.dtype", "bfloat16",
                "--training.micro-batch-size", "8", *recipe, *flags,
            )
            for seed in SEEDS for preset, recipe in RECIPES.items() for variant, (flags, _, _) in VARIANTS.items()
        ],
        ranks,
    )  # fmt: skip
    lines = [
        machine(),
        "",
        f"4 layers, 4 heads, n_embd = 128, T = 256, {options.steps} steps of 4,096 tokens; dataset: "
        f"{Path(options.dataset).name}.",
        f"Validation loss after the last step, seeds {', '.join(map(str, SEEDS))}.",
        "",
        "| preset | switch | loss, mean (min to max) | difference from the same seed without it, mean (min to max) |",
        "|---|---|---:|---:|",
    ]
    for preset in RECIPES:
        for variant, (_, _, baseline) in VARIANTS.items():
            names = [run_name(preset, variant, seed) for seed in SEEDS]
            row = f"| {preset} | {variant} | {runs.format_losses(names)} |"
            if baseline:
                differences = [
                    runs.final_loss(run_name(preset, variant, seed)) - runs.final_loss(run_name(preset, baseline, seed))
                    for seed in SEEDS
                ]
                row += f" {statistics.mean(differences):+.4f} ({min(differences):+.4f} to {max(differences):+.4f})"
            lines.append(row + " |")
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
