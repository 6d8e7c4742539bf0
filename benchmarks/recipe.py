"""Tokens to loss: how many the modern recipe needs for the classic's final loss, and what each part of it is worth.

    python benchmarks/recipe.py DATASET [--steps 1600] [--jobs 2] [--out results/recipe]

DATASET is a prepared folder with a small vocabulary (`python -m tools.train_tokenizer --vocab-size 8192`). The model is
the same in both recipes but for their switches: 4 layers, 4 heads, 128 wide, T = 256, 4,096 tokens a step.

    classic    the preset gpt2 at five learning rates, one seed; the best of them with two seeds more
    modern     the preset modern as it is, at shares of the classic's steps, three seeds; the first share whose mean
               loss is not above the classic's tells how many tokens it needs
    parts      modern with each part taken out alone, and some put in, at a quarter of the steps, one seed
    clock      a step of both, alone on the machine with all its threads, three times in turns

Runs go to out/recipe and are resumed: a finished one is not run again. --jobs at once, one thread each if several.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from babygpt.training.log import column, read_log  # noqa: E402
from benchmarks.table import show  # noqa: E402

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = (1337, 1338, 1339)
SHARES = (0.125, 0.1875, 0.25, 0.375, 0.5)
# what is taken out, or put in, by the flags that do it
OUT = {
    "Muon (AdamW at the classic's best rate)": ["--optimizer.name", "adamw", "--optimizer.max-lr", "BEST"],
    "constant rate, then linear (cosine)": ["--optimizer.cooldown", "None"],
    "warm-up of momentum": ["--optimizer.momentum-warmup-steps", "0"],
    "RoPE (learned positions)": ["--model.no-rope"],
    "QK-norm": ["--model.no-qk-norm"],
    "ReLU^2 (GELU)": ["--model.no-relu2"],
    "RMS norm (layer norm)": ["--model.no-rms-norm"],
    "norm of the embedding": ["--model.no-embedding-norm"],
    "zero initialisation": ["--model.no-zero-init"],
    "untied head": ["--model.tie-head"],
    "no biases (biases)": ["--model.bias"],
    "value embeddings": ["--model.value-embeddings", "0"],
    "x0 shortcut": ["--model.no-x0-shortcut"],
    "U-Net shortcuts": ["--model.no-unet"],
    "soft-cap": ["--model.logit-softcap", "None"],
}
IN = {
    "2 key and value heads of 4": ["--model.n-kv-head", "2"],
    "attention scale 0.12": ["--model.attention-scale", "0.12"],
    "document mask": ["--model.document-mask"],
    "window of 128": ["--model.window", "128"],
    "weight decay 0.1": ["--optimizer.weight-decay", "0.1"],
    "cautious weight decay 0.1": ["--optimizer.weight-decay", "0.1", "--optimizer.cautious"],
}


class Runs:
    """Trainings by name, each done once."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.out = options, Path(options.runs)

    def train(
        self, name: str, preset: str, steps: int, seed: int, *flags: str, alone: bool = False, ranks: int = 1
    ) -> str:
        """Trains, unless that is done already; returns the name."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        threads = {"OMP_NUM_THREADS": "1"} if self.options.jobs > 1 and not alone else {}
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
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | threads)
        if done.returncode:
            sys.exit(f"error: {name} failed:\n{done.stderr[-3000:]}")
        print(f"{name}: {self.loss(name):.4f}", file=sys.stderr, flush=True)
        return name

    def all(self, wanted: list[tuple], ranks: dict[str, int] | None = None) -> list[str]:
        with ThreadPoolExecutor(self.options.jobs) as pool:
            return list(pool.map(lambda a: self.train(*a, ranks=(ranks or {}).get(a[0], 1)), wanted))

    def loss(self, name: str) -> float:
        return column(read_log(self.out / name / "log.csv"), "val_loss")[1][-1]

    def ms(self, name: str) -> float:
        """Of a step, the median: other work on the machine comes and goes."""
        return statistics.median(column(read_log(self.out / name / "log.csv"), "step_ms")[1])

    def mean(self, names: list[str]) -> float:
        return statistics.mean(map(self.loss, names))

    def spread(self, names: list[str]) -> str:
        losses = sorted(map(self.loss, names))
        return f"{statistics.mean(losses):.4f} ({losses[0]:.4f} to {losses[-1]:.4f})"


def draw(curves: dict[str, list[Path]], goal: float, out: Path) -> None:
    """Training losses against tokens, averaged over 20 steps and the seeds, and the validation losses at the ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for (name, folders), colour in zip(curves.items(), ("#2a6fbb", "#d1495b"), strict=True):
        logs = [read_log(folder / "log.csv") for folder in folders]
        losses = torch.tensor([column(log, "loss")[1] for log in logs]).mean(dim=0)
        losses = losses[: len(losses) // 20 * 20].view(-1, 20).mean(dim=1)
        tokens = 4096 * (20 * torch.arange(len(losses)) + 10)
        axis.plot(tokens / 1e6, losses, color=colour, label=f"{name}: training")
        ends = [column(log, "val_loss")[1][-1] for log in logs]
        end = [logs[0][-1]["tokens"] / 1e6] * len(ends)
        axis.plot(end, ends, "o", color=colour, markersize=4, label=f"{name}: validation, {len(ends)} seeds")
    axis.axhline(goal, color="#4a4a4a", linewidth=0.8, linestyle="--")
    axis.set(xlabel="million tokens", ylabel="loss (nats a token)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--steps", type=int, default=1600, help="of the classic")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--runs", default="out/recipe", help="folder for the runs")
    parser.add_argument("--out", type=Path, help="folder for table and picture")
    options = parser.parse_args()
    runs, steps = Runs(options), options.steps

    def classic(rate: float, seed: int) -> tuple:
        flags = ["--optimizer.max-lr", str(rate), "--optimizer.warmup-steps", str(steps // 20)]
        return (f"classic-{rate:g}-{seed}", "gpt2", steps, seed, *flags)

    def modern(share: float, seed: int) -> tuple:
        return (f"modern-{share:g}-{seed}", "modern", round(share * steps), seed)

    rates = dict(zip(RATES, runs.all([classic(rate, SEEDS[0]) for rate in RATES]), strict=True))
    best = min(rates, key=lambda rate: runs.loss(rates[rate]))
    classics = runs.all([classic(best, seed) for seed in SEEDS])
    moderns, needed = {}, None
    for share in SHARES:
        moderns[share] = runs.all([modern(share, seed) for seed in SEEDS])
        if runs.mean(moderns[share]) <= runs.mean(classics):
            needed = share
            break
    quarters = moderns[0.25] = runs.all([modern(0.25, seed) for seed in SEEDS])
    parts = [("all of it", quarters[0])]
    wanted = [
        (
            f"{kind} {what}",
            (
                "-".join([kind, *(f.replace("BEST", f"{best:g}").strip("-") for f in flags)]),
                "modern",
                round(0.25 * steps),
                SEEDS[0],
                *(f.replace("BEST", str(best)) for f in flags),
            ),
        )
        for kind, table in (("without", OUT), ("with", IN))
        for what, flags in table.items()
    ]
    parts += zip((what for what, _ in wanted), runs.all([arguments for _, arguments in wanted]), strict=True)

    paces: dict[str, list[str]] = {"gpt2": [], "modern": []}
    for turn in range(3):
        for preset, names in paces.items():
            names.append(runs.train(f"clock-{preset}-{turn}", preset, 30, SEEDS[0], alone=True))
    ms = {preset: statistics.median(map(runs.ms, names)) for preset, names in paces.items()}
    slower = statistics.median(runs.ms(m) / runs.ms(c) for c, m in zip(*paces.values(), strict=True))

    def row(recipe: str, rate: str, share: float, names: list[str]) -> str:
        return f"| {recipe} | {rate} | {len(names)} | {round(share * steps) * 4096:,} | {runs.spread(names)} |"

    told = "Modern does not reach the classic's loss at any of these shares."
    if needed:
        told = f"Modern needs at most {needed:g} of the classic's tokens, and {needed * slower:.2f} of its time"
        told += f": a step takes {ms['modern']:.0f} ms, a classic one {ms['gpt2']:.0f} ({slower:.2f} times, in pairs)."
    lines = [
        f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}; {options.jobs} runs at once" + (" with one thread each" if options.jobs > 1 else ""),
        "",
        f"4 layers, 4 heads, 128 wide, T = 256, 4,096 tokens a step; {Path(options.dataset).name}. Loss in validation,",
        "at the end.",
        "",
        "| recipe | learning rate | seeds | tokens | validation loss, mean (min to max) |",
        "|---|---:|---:|---:|---:|",
        *(row("classic", f"{rate:g}", 1.0, [name]) for rate, name in rates.items()),
        row("classic", f"{best:g}", 1.0, classics),
        *(row("modern", "as the preset", share, names) for share, names in sorted(moderns.items())),
        "",
        told,
        "",
        f"## Parts, at {round(0.25 * steps) * 4096:,} tokens, one seed",
        "",
        f"The three seeds of all of it: {runs.spread(quarters)}.",
        "",
        "| modern | validation loss | worse by |",
        "|---|---:|---:|",
    ]
    for what, name in parts:
        worse = runs.loss(name) - runs.loss(quarters[0])
        lines.append(f"| {what} | {runs.loss(name):.4f} | {worse:+.4f} |")
    show(lines, options.out and options.out / "recipe.md")
    if options.out:
        curves = {"classic": classics, f"modern, {needed or 0.25:g} of the tokens": moderns[needed or 0.25]}
        folders = {name: [runs.out / run for run in names] for name, names in curves.items()}
        draw(folders, runs.mean(classics), options.out / "recipe.png")


if __name__ == "__main__":
    main()
