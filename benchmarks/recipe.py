"""Tokens to loss: the tokens that the modern recipe needs to reach the classic recipe's final loss, and an ablation.

    python benchmarks/recipe.py DATASET [--steps 1600] [--jobs 2] [--out results/recipe]

DATASET is a prepared dataset with a small vocabulary (`python -m tools.train_tokenizer --vocab-size 8192`). Both
recipes use 4 layers, 4 heads, n_embd = 128, T = 256 and 4,096 tokens per step. The benchmark runs

- classic: the preset gpt2 with five learning rates and one seed, then the best learning rate with two more seeds;
- modern: the preset modern, unchanged, with three seeds, at increasing fractions of the classic steps up to the first
  fraction whose mean loss is at most that of classic;
- an ablation: modern with one part removed or added at a time, at a quarter of the steps, with one seed;
- timing: both recipes alternate three times, alone on the machine and with all its threads.

Runs are written to the directory --runs, and finished runs are not repeated. Use a new directory if the code or the
dataset has changed. If --jobs is greater than 1, each run uses one thread.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from babygpt.training.log import column, read_log  # noqa: E402
from benchmarks.table import machine, map_jobs, write_table  # noqa: E402

LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = (1337, 1338, 1339)
FRACTIONS = (0.125, 0.1875, 0.25, 0.375, 0.5)  # of the classic steps
# rows of the ablation table, with the flags of the run; BEST stands for the best learning rate of classic
ABLATIONS = {
    "AdamW instead of Muon, best learning rate of classic": ["--optimizer.name", "adamw", "--optimizer.max-lr", "BEST"],
    "Muon instead of NorMuon": ["--optimizer.no-normuon"],
    "cosine schedule instead of constant with linear cooldown": ["--optimizer.cooldown", "None"],
    "momentum and beta1 of large batches": ["--optimizer.momentum", "0.95", "--optimizer.beta1", "0.8"],
    "learned position embeddings instead of RoPE": ["--model.no-rope"],
    "no QK-norm": ["--model.no-qk-norm"],
    "no sharper attention": ["--model.attention-sharpness", "1"],
    "GELU instead of ReLU^2": ["--model.no-relu2"],
    "no norm after the embedding": ["--model.no-embedding-norm"],
    "tied head": ["--model.tie-head"],
    "biases": ["--model.bias"],
    "no value embeddings": ["--model.value-embeddings", "0"],
    "no bigram embeddings": ["--model.bigram-tables", "0"],
    "no x0 shortcut": ["--model.no-x0-shortcut"],
    "no partial key offset": ["--model.no-partial-key-offset"],
}
ADDITIONS = {
    "2 key and value heads for 4 query heads": ["--model.n-kv-head", "2"],
    "document mask": ["--model.document-mask"],
    "attention window of 128": ["--model.window", "128"],
    "weight decay 0.1": ["--optimizer.weight-decay", "0.1"],
    "cautious weight decay 0.1": ["--optimizer.weight-decay", "0.1", "--optimizer.cautious"],
}


class Runs:
    """Training runs by name. Each run is trained once."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, Path(options.runs)

    def train(
        self, name: str, preset: str, steps: int, seed: int, *flags: str, alone: bool = False, ranks: int = 1
    ) -> str:
        """Train the run unless it has finished, and return its name."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        thread_environment = {"OMP_NUM_THREADS": "1"} if self.options.jobs > 1 and not alone else {}
        command = [
            *(torchrun if ranks > 1 else [sys.executable]), "train.py", preset,
            "--general.out-dir", str(self.out / name), "--general.init-from", "resume",
            "--general.mode", "train", "val", "--general.seed", str(seed), "--data.dataset", self.options.dataset,
            "--model.block-size", "256", "--model.n-layer", "4", "--model.n-head", "4", "--model.n-embd", "128",
            "--training.batch-tokens", "4096", "--training.micro-batch-size", "16", "--training.max-steps", str(steps),
            "--validation.every-n-steps", "1000000", "--saving.every-n-steps", "0", *flags,
        ]  # fmt: skip
        if (self.out / name / "log.csv").exists() and read_log(self.out / name / "log.csv")[-1]["step"] == steps:
            return name
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | thread_environment)
        if done.returncode:
            sys.exit(f"error: {name} failed:\n{done.stderr[-3000:]}")
        print(f"{name}: {self.final_loss(name):.4f}", file=sys.stderr, flush=True)
        return name

    def train_all(self, runs: list[tuple], ranks: dict[str, int] | None = None) -> list[str]:
        """Train runs given as arguments of `train`, on one rank unless `ranks` says otherwise; return their names."""
        return map_jobs(lambda a: self.train(*a, ranks=(ranks or {}).get(a[0], 1)), runs, self.options.jobs)

    def final_loss(self, name: str) -> float:
        return column(read_log(self.out / name / "log.csv"), "val_loss")[1][-1]

    def step_ms(self, name: str) -> float:
        """Return the median, because the load on the machine varies."""
        return statistics.median(column(read_log(self.out / name / "log.csv"), "step_ms")[1])

    def mean_loss(self, names: list[str]) -> float:
        return statistics.mean(map(self.final_loss, names))

    def format_losses(self, names: list[str]) -> str:
        losses = sorted(map(self.final_loss, names))
        return f"{statistics.mean(losses):.4f} ({losses[0]:.4f} to {losses[-1]:.4f})"


def plot_losses(curves: dict[str, list[Path]], target_loss: float, out: Path) -> None:
    """Plot training losses averaged over 20 steps and all seeds, and the final validation loss of each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for (name, directories), color in zip(curves.items(), ("#2a6fbb", "#d1495b"), strict=True):
        logs = [read_log(directory / "log.csv") for directory in directories]
        losses = torch.tensor([column(log, "loss")[1] for log in logs]).mean(dim=0)
        losses = losses[: len(losses) // 20 * 20].view(-1, 20).mean(dim=1)
        tokens = 4096 * (20 * torch.arange(len(losses)) + 10)
        axis.plot(tokens / 1e6, losses, color=color, label=f"{name}: training")
        val_losses = [column(log, "val_loss")[1][-1] for log in logs]
        positions = [logs[0][-1]["tokens"] / 1e6] * len(val_losses)
        label = f"{name}: validation, {len(val_losses)} seeds"
        axis.plot(positions, val_losses, "o", color=color, markersize=4, label=label)
    axis.axhline(target_loss, color="#4a4a4a", linewidth=0.8, linestyle="--")
    axis.set(xlabel="million tokens", ylabel="loss (nats per token)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="directory of the prepared dataset")
    parser.add_argument("--steps", type=int, default=1600, help="steps of the classic recipe (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="number of concurrent runs (default: %(default)s)")
    parser.add_argument("--runs", default="out/recipe", help="directory of the runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="directory for recipe.md and recipe.png")
    options = parser.parse_args()
    runs, steps = Runs(options), options.steps

    def classic_run(rate: float, seed: int) -> tuple:
        flags = ["--optimizer.max-lr", str(rate), "--optimizer.warmup-steps", str(steps // 20)]
        return (f"classic-{rate:g}-{seed}", "gpt2", steps, seed, *flags)

    def modern_run(fraction: float, seed: int) -> tuple:
        return (f"modern-{fraction:g}-{seed}", "modern", round(fraction * steps), seed)

    rate_runs = runs.train_all([classic_run(rate, SEEDS[0]) for rate in LEARNING_RATES])
    runs_by_lr = dict(zip(LEARNING_RATES, rate_runs, strict=True))
    best_lr = min(runs_by_lr, key=lambda lr: runs.final_loss(runs_by_lr[lr]))
    classic = runs.train_all([classic_run(best_lr, seed) for seed in SEEDS])
    modern, needed = {}, None
    for fraction in FRACTIONS:
        modern[fraction] = runs.train_all([modern_run(fraction, seed) for seed in SEEDS])
        if runs.mean_loss(modern[fraction]) <= runs.mean_loss(classic):
            needed = fraction
            break
    baseline = modern[0.25] = runs.train_all([modern_run(0.25, seed) for seed in SEEDS])
    variants = [
        (
            change,
            (
                "-".join([kind, *(f.replace("BEST", f"{best_lr:g}").strip("-") for f in flags)]),
                "modern",
                round(0.25 * steps),
                SEEDS[0],
                *(f.replace("BEST", str(best_lr)) for f in flags),
            ),
        )
        for kind, changes in (("without", ABLATIONS), ("with", ADDITIONS))
        for change, flags in changes.items()
    ]
    variant_names = runs.train_all([arguments for _, arguments in variants])
    ablation = [("none", baseline[0]), *zip((change for change, _ in variants), variant_names, strict=True)]

    timed: dict[str, list[str]] = {"gpt2": [], "modern": []}
    for turn in range(3):
        for preset, names in timed.items():
            names.append(runs.train(f"clock-{preset}-{turn}", preset, 30, SEEDS[0], alone=True))
    ms = {preset: statistics.median(map(runs.step_ms, names)) for preset, names in timed.items()}
    time_ratio = statistics.median(runs.step_ms(m) / runs.step_ms(c) for c, m in zip(*timed.values(), strict=True))

    def row(recipe: str, rate: str, fraction: float, names: list[str]) -> str:
        tokens = round(fraction * steps) * 4096
        return f"| {recipe} | {rate} | {len(names)} | {tokens:,} | {runs.format_losses(names)} |"

    summary = "At none of these fractions does modern reach the loss of classic."
    if needed:
        summary = (
            f"Modern reaches the loss of classic with at most {needed:g} of its tokens, in {needed * time_ratio:.2f} "
            f"of its time: a step takes {ms['modern']:.0f} ms instead of {ms['gpt2']:.0f} ms (ratio {time_ratio:.2f}, "
            "median of three pairs of runs)."
        )
    lines = [
        f"{machine()}; {options.jobs} concurrent runs" + (" with one thread each" if options.jobs > 1 else ""),
        "",
        f"4 layers, 4 heads, n_embd = 128, T = 256, 4,096 tokens per step; dataset: {Path(options.dataset).name}. The",
        "validation loss is that after the last step.",
        "",
        "| recipe | learning rate | seeds | tokens | validation loss, mean (min to max) |",
        "|---|---:|---:|---:|---:|",
        *(row("classic", f"{rate:g}", 1.0, [name]) for rate, name in runs_by_lr.items()),
        row("classic", f"{best_lr:g}", 1.0, classic),
        *(row("modern", "preset default", fraction, names) for fraction, names in sorted(modern.items())),
        "",
        summary,
        "",
        f"## Ablation of modern, at {round(0.25 * steps) * 4096:,} tokens, one seed",
        "",
        f"Modern without a change, three seeds: {runs.format_losses(baseline)}.",
        "",
        "| change | validation loss | difference |",
        "|---|---:|---:|",
    ]
    for change, name in ablation:
        difference = runs.final_loss(name) - runs.final_loss(baseline[0])
        lines.append(f"| {change} | {runs.final_loss(name):.4f} | {difference:+.4f} |")
    write_table(lines, options.out and options.out / "recipe.md")
    if options.out:
        curves = {"classic": classic, f"modern, {needed or 0.25:g} of the tokens": modern[needed or 0.25]}
        directories = {name: [runs.out / run for run in names] for name, names in curves.items()}
        plot_losses(directories, runs.mean_loss(classic), options.out / "recipe.png")


if __name__ == "__main__":
    main()
