"""Tokens to loss: the tokens that the modern recipe needs to reach the classic recipe's final loss, and an ablation.

    python benchmarks/recipe.py DATASET [--steps 1600] [--jobs 2] [--out results/recipe]

DATASET is a prepared dataset with a small vocabulary (`python -m tools.train_tokenizer --vocab-size 8192`). Both
recipes use 4 layers, 4 heads, n_embd = 128, T = 256 and 4,096 tokens per step. The benchmark runs

- classic: the preset gpt2 with three learning rates and one seed, then the best learning rate with two more seeds;
- modern: the preset modern, unchanged, with three seeds, at increasing fractions of the classic steps up to the first
  fraction whose mean loss is at most that of classic;
- an ablation: modern with one part removed or added at a time, at an eighth of the steps, with two seeds;
- timing: single steps of modern alternate with single steps of classic and of each variant, without compilation, alone
  on the machine and with all its threads. The ratio is the median over pairs of steps.

Runs are written to the directory --runs, and finished runs are not repeated. Use a new directory if the code or the
dataset has changed. If --jobs is greater than 1, each run uses one thread.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from arguments import bind, parse, resolve  # noqa: E402
from babygpt.data.shards import Dataset, open_dataset  # noqa: E402
from babygpt.training.distributed import Ranks  # noqa: E402
from babygpt.training.guard import UpdateGuard  # noqa: E402
from babygpt.training.log import column, read_log  # noqa: E402
from babygpt.training.optim import make_optimizers  # noqa: E402
from benchmarks.table import machine, map_jobs, write_table  # noqa: E402
from dataloader import Batch, Position  # noqa: E402
from model import build_model  # noqa: E402
from train import TrainState, next_token_loss, train_step  # noqa: E402

LEARNING_RATES = (2e-3, 4e-3, 8e-3)  # of the classic recipe
SEEDS = (1337, 1338, 1339)
FRACTIONS = (0.0625, 0.09375, 0.125, 0.15, 0.1875, 0.25, 0.375, 0.5)  # of the classic steps
ABLATION_FRACTION, ABLATION_SEEDS = 0.125, SEEDS[:2]
TIMED_PAIRS = 16  # even, so that each model is first in half of the pairs
SHAPE = (
    "--model.block-size", "256", "--model.n-layer", "4", "--model.n-head", "4", "--model.n-embd", "128",
    "--training.batch-tokens", "4096", "--training.micro-batch-size", "16", "--training.compile", "off",
)  # fmt: skip
# rows of the ablation table, with the flags of the run; BEST is the best learning rate of classic, and WARMUP, as for
# classic, a twentieth of the steps
ABLATIONS = {
    "AdamW instead of Muon, best learning rate and warmup of classic": [
        "--optimizer.name",
        "adamw",
        "--optimizer.max-lr",
        "BEST",
        "--optimizer.warmup-steps",
        "WARMUP",
    ],
    "Muon instead of NorMuon": ["--optimizer.no-normuon"],
    "cosine schedule instead of constant with linear cooldown": ["--optimizer.cooldown", "None"],
    "momentum and beta1 of large batches": ["--optimizer.momentum", "0.95", "--optimizer.beta1", "0.8"],
    "learned position embeddings instead of RoPE": ["--model.no-rope"],
    "no QK-norm, attention score factor 1": ["--model.no-qk-norm", "--model.attention-score-factor", "1"],
    "attention score factor 1 instead of 1.44": ["--model.attention-score-factor", "1"],
    "GELU instead of ReLU^2": ["--model.no-relu2"],
    "no norm after the embedding": ["--model.no-embedding-norm"],
    "untied head": ["--model.no-tie-head"],
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
        options.dataset = os.path.abspath(options.dataset)
        self.options, self.out = options, Path(options.runs)

    def train(self, name: str, preset: str, steps: int, seed: int, *flags: str, ranks: int = 1) -> str:
        """Train the run unless it has finished, and return its name."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        thread_environment = {"OMP_NUM_THREADS": "1"} if self.options.jobs > 1 else {}
        command = [
            *(torchrun if ranks > 1 else [sys.executable]), "train.py", preset,
            "--general.out-dir", str(self.out / name), "--general.init-from", "resume",
            "--general.mode", "train", "val", "--general.seed", str(seed), "--data.dataset", self.options.dataset,
            *SHAPE, "--training.max-steps", str(steps), "--validation.every-n-steps", "1000000",
            "--saving.every-n-steps", "0", *flags,
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

    def mean_loss(self, names: list[str]) -> float:
        return statistics.mean(map(self.final_loss, names))

    def format_losses(self, names: list[str]) -> str:
        losses = sorted(map(self.final_loss, names))
        return f"{statistics.mean(losses):.4f} ({losses[0]:.4f} to {losses[-1]:.4f})"


class TimedModel:
    """A model of a preset, and its training step on random tokens."""

    def __init__(self, dataset: Dataset, preset: str, *flags: str):
        _, config = parse([preset, *SHAPE, *flags])
        config = bind(resolve(config, 1), dataset)
        torch.manual_seed(0)
        ranks = Ranks(0, 0, 1, torch.device("cpu"))
        self.model = build_model(config.model)
        optimizers = make_optimizers(self.model, asdict(config.optimizer))
        self.state = TrainState(
            self.model, optimizers, UpdateGuard(ranks.device, None), ranks, config.training.dtype,
            config.optimizer.grad_clip,
        )  # fmt: skip
        rows = torch.randint(config.model.vocab_size, (16, 257))
        self.batch = Batch(Position(), Position(), [rows], num_targets=16 * 256, num_tokens=16 * 256)

    def step(self) -> float:
        """Run one step and return its time in seconds."""
        start = time.perf_counter()
        train_step(self.state, self.batch, next_token_loss, seed=0)
        return time.perf_counter() - start


def time_ratio(model: TimedModel, reference: TimedModel) -> float:
    """Return the time of a step of `model`, relative to that of `reference`. The order within a pair alternates."""
    ratios = []
    for i in range(TIMED_PAIRS + 2):
        if i % 2:
            seconds, reference_seconds = model.step(), reference.step()
        else:
            reference_seconds, seconds = reference.step(), model.step()
        ratios.append(seconds / reference_seconds)
    return statistics.median(ratios[2:])


def ablation_rows(runs: Runs, steps: int, best_lr: float, dataset: Dataset, reference: TimedModel) -> list[str]:
    """Train modern with each change, and return the rows of the table. `reference` is modern without a change."""
    changes: dict[str, list[str]] = {"none": []}
    for change, flags in (ABLATIONS | ADDITIONS).items():
        values = {"BEST": str(best_lr), "WARMUP": str(steps // 20)}
        changes[change] = [values.get(flag, flag) for flag in flags]
    runs.train_all([
        (run_name(change, steps, seed), "modern", steps, seed, *flags)
        for change, flags in changes.items() for seed in ABLATION_SEEDS
    ])  # fmt: skip
    rows = []
    for change, flags in changes.items():
        losses, baseline = (
            [runs.final_loss(run_name(c, steps, seed)) for seed in ABLATION_SEEDS] for c in (change, "none")
        )
        differences = [loss - base for loss, base in zip(losses, baseline, strict=True)]
        variant = TimedModel(dataset, "modern", *flags)
        rows.append(
            f"| {change} | {statistics.mean(losses):.4f} | {statistics.mean(differences):+.4f} "
            f"({', '.join(f'{difference:+.4f}' for difference in differences)}) | "
            f"{time_ratio(variant, reference):.2f} | {variant.model.num_params() / 1e6:.1f}M |"
        )
    return rows


def run_name(change: str, steps: int, seed: int) -> str:
    return f"{change}-{steps}-{seed}".replace(" ", "_")


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
        return (run_name(f"classic-{rate:g}", steps, seed), "gpt2", steps, seed, *flags)

    def modern_run(fraction: float, seed: int) -> tuple:
        return (run_name("none", round(fraction * steps), seed), "modern", round(fraction * steps), seed)

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

    dataset = open_dataset(options.dataset)
    reference = TimedModel(dataset, "modern")
    relative_time = time_ratio(reference, TimedModel(dataset, "gpt2"))

    def row(recipe: str, rate: str, fraction: float, names: list[str]) -> str:
        tokens = round(fraction * steps) * 4096
        return f"| {recipe} | {rate} | {len(names)} | {tokens:,} | {runs.format_losses(names)} |"

    summary = "Modern does not reach the loss of classic at any of these fractions."
    if needed:
        summary = (
            f"Modern reaches the loss of classic with at most {needed:g} of its tokens, in "
            f"{needed * relative_time:.2f} of its time: a step takes {relative_time:.2f} times as long."
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
        f"## Ablation of modern, at {round(ABLATION_FRACTION * steps) * 4096:,} tokens, seeds "
        f"{' and '.join(map(str, ABLATION_SEEDS))}",
        "",
        "| change | validation loss | difference, mean (by seed) | time per step, relative to modern | parameters |",
        "|---|---:|---:|---:|---:|",
        *ablation_rows(runs, round(ABLATION_FRACTION * steps), best_lr, dataset, reference),
    ]
    write_table(lines, options.out and options.out / "recipe.md")
    if options.out:
        curves = {"classic": classic, f"modern, {fraction:g} of the tokens": modern[fraction]}
        directories = {name: [runs.out / run for run in names] for name, names in curves.items()}
        plot_losses(directories, runs.mean_loss(classic), options.out / "recipe.png")


if __name__ == "__main__":
    main()
