"""Measure the effect of the shuffle: train the same model on data sorted by source, shuffled and not shuffled.

    python benchmarks/shuffle.py --path PATH [--steps 500] [--out results/shuffle]

PATH is a directory of Parquet files with the columns `source` and `text`. The benchmark takes an equal amount of text
from each of the largest sources and sorts the documents by source. From these it prepares a dataset with a vocabulary
of 4,096 and runs train.py twice, in a temporary directory. One run uses the default order (shuffled chunks, 64
streams), the other reads the data front to back (one chunk, one stream). Nothing else differs, and both runs end within
the first epoch. The benchmark writes shuffle.md, loss.png and loss.csv.

The amplitude is the standard deviation of the 20-step mean of the training loss around its linear fit, over the second
half of the steps.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from babygpt.data.shards import Dataset, open_dataset  # noqa: E402
from babygpt.data.tokenizer import load_tokenizer  # noqa: E402
from babygpt.training.log import column, read_log  # noqa: E402
from dataloader import Order  # noqa: E402

NUM_SOURCES, SOURCE_CHARS, VOCAB_SIZE = 12, 800_000, 4096
T, BATCH_TOKENS, WINDOW = 128, 4096, 20
MODEL_FLAGS = {"n-layer": 2, "n-head": 4, "n-embd": 128, "block-size": T}


def load_documents(directory: Path) -> list[tuple[str, str]]:
    """Return (source, text) of about SOURCE_CHARS characters of each of the largest sources, sorted by source."""
    import pyarrow.parquet as pq

    texts: dict[str, dict[str, None]] = {}  # per source, without duplicates
    for file in sorted(directory.glob("*.parquet")):
        rows = pq.read_table(file, columns=["source", "text"])
        for source, text in zip(rows["source"].to_pylist(), rows["text"].to_pylist(), strict=True):
            texts.setdefault(source, {})[text] = None
    largest = sorted(texts, key=lambda source: -sum(map(len, texts[source])))[:NUM_SOURCES]
    documents = []
    for source in sorted(largest):
        num_chars = 0
        for text in texts[source]:
            if num_chars >= SOURCE_CHARS:
                break
            documents.append((source, text))
            num_chars += len(text)
    return documents


def run_script(name: str, *arguments: object) -> None:
    command = [sys.executable, *name.split(), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the model is too small for several threads
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if process.returncode:
        sys.exit(f"error: {name} failed:\n{process.stderr[-3000:]}")


def prepare(documents: list[tuple[str, str]], directory: Path) -> tuple[Dataset, list[tuple[str, int]]]:
    """Write the dataset, in the order of the documents; return it and the first training token of each source."""
    (directory / "sorted.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _, text in documents))
    run_script(
        "-m tools.train_tokenizer", "--input", directory / "sorted.jsonl", "--vocab-size", VOCAB_SIZE,
        "--out", directory / "bpe.json",
    )  # fmt: skip
    run_script(
        "fineweb.py", "files", "--input", directory / "sorted.jsonl", "--tokenizer", directory / "bpe.json",
        "--out-dir", directory / "data",
    )  # fmt: skip
    dataset = open_dataset(directory / "data")
    tokenizer = load_tokenizer(dataset.tokenizer)
    val, train = (tokens.read(0, len(tokens)) for tokens in (dataset.val, dataset.train))
    val_texts = {tokenizer.decode(ids[1:].tolist()) for ids in np.split(val, np.flatnonzero(val == dataset.eot_id))}
    document_sources = [source for source, text in documents if text not in val_texts]
    document_starts = np.flatnonzero(train == dataset.eot_id).tolist()
    source_starts: dict[str, int] = {}
    for source, start in zip(document_sources, document_starts, strict=True):
        source_starts.setdefault(source, start)
    return dataset, list(source_starts.items())


def train(dataset: Dataset, out: Path, steps: int, *order: object) -> list[dict]:
    """Run train.py and return the rows of its log."""
    arguments = [
        "gpt2", "--general.mode", "train", "val", "--general.device", "cpu", "--general.out-dir", out,
        "--data.dataset", dataset.directory, *order, "--training.max-steps", steps,
        "--training.batch-tokens", BATCH_TOKENS, "--training.micro-batch-size", 8,
        "--optimizer.max-lr", 3e-3, "--optimizer.warmup-steps", steps // 10, "--validation.every-n-steps", steps,
        "--evaluation.every-n-steps", 0, "--sampling.every-n-steps", 0, "--saving.every-n-steps", 0,
        "--logging.every-n-steps", 0,
    ]  # fmt: skip
    run_script(
        "train.py", *arguments, *(part for name, value in MODEL_FLAGS.items() for part in (f"--model.{name}", value))
    )
    return read_log(out / "log.csv")


def smooth(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the centers of all windows of WINDOW steps and the mean loss in each."""
    means = np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")
    return np.arange(len(means)) + (WINDOW - 1) / 2, means


def residuals(losses: np.ndarray) -> np.ndarray:
    """Return the smoothed loss minus its linear fit, over the second half of the steps."""
    steps, means = smooth(losses)
    steps, means = steps[steps >= len(losses) / 2], means[steps >= len(losses) / 2]
    return means - np.polyval(np.polyfit(steps, means, 1), steps)


def plot_losses(losses: dict[str, np.ndarray], source_starts: list[tuple[str, int]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
        "legend.frameon": False,
    })  # fmt: skip
    figure, axis = plt.subplots(figsize=(11, 5.4), layout="constrained")
    steps = len(next(iter(losses.values())))
    for (name, values), color in zip(losses.items(), ("#2a6fbb", "#d1495b"), strict=True):
        axis.plot(values, color=color, alpha=0.25, linewidth=0.7)
        label = f"{name}: amplitude {residuals(values).std():.3f}"
        axis.plot(*smooth(values), color=color, linewidth=2, label=label)
    visible = np.concatenate([values[steps // 15 :] for values in losses.values()])
    low, high = visible.min(), visible.max()
    axis.set_ylim(low - 0.3 * (high - low), high + 0.45 * (high - low))  # room for the legend and the sources
    axis.set_xlim(0, steps)
    source_ends = [*(start for _, start in source_starts[1:]), steps * BATCH_TOKENS]
    for i, ((source, start), end) in enumerate(zip(source_starts, source_ends, strict=True)):
        left, right = start / BATCH_TOKENS, min(end / BATCH_TOKENS, steps)
        if left >= steps:
            break
        axis.axvspan(left, right, color="black", alpha=0.05 * (i % 2), linewidth=0)
        name = source.split("/")[-1][:24]
        axis.text((left + right) / 2, axis.get_ylim()[1], name, rotation=90, ha="center", va="top", fontsize=9)
    axis.set_xlabel(
        f"step of {BATCH_TOKENS:,} tokens; the bands are the sources as the unshuffled run (red) reads them"
    )
    axis.set_ylabel("training loss (nats per token)")
    axis.set_title(
        "Documents sorted by source: shuffling removes the differences between sources from the training loss"
    )
    axis.legend(loc="lower left", title=f"thick: mean of {WINDOW} steps; thin: each step", alignment="left")
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help="directory of Parquet files")
    parser.add_argument("--steps", type=int, default=500, help="training steps per run (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("results/shuffle"), help="directory for the results (default: %(default)s)"
    )
    options = parser.parse_args()
    if not list(options.path.glob("*.parquet")):
        parser.error(f"--path {options.path} contains no Parquet files.")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        documents = load_documents(options.path)
        dataset, source_starts = prepare(documents, directory)
        num_tokens = len(dataset.train)
        unshuffled = Order(dataset.train, dataset.eot_id, T, 1, 1337, num_tokens)
        assert unshuffled.epoch(0).row(7) == [(7 * T, 8 * T + 1)], "the order is not front to back"
        assert unshuffled.rows_per_epoch >= options.steps * BATCH_TOKENS // T, "the steps exceed an epoch"
        logs = {
            "shuffled (the default)": train(dataset, directory / "shuffled", options.steps),
            "not shuffled": train(
                dataset, directory / "plain", options.steps, "--data.num-streams", 1, "--data.chunk-tokens", num_tokens
            ),
        }
        settings = json.loads((directory / "shuffled" / "config.json").read_text())
    losses = {name: np.array(column(rows, "loss")[1]) for name, rows in logs.items()}
    lines = [
        f"`python benchmarks/shuffle.py --path PATH --steps {options.steps}`; {date.today()}, {os.cpu_count()} cores, "
        f"{processor_name()}, Python {platform.python_version()}, torch {torch.__version__}",
        "",
        f"{len(documents):,} documents of {len(source_starts)} sources, sorted by source: {num_tokens:,} training "
        f"tokens with a vocabulary of {VOCAB_SIZE:,}. {settings['model']['n_layer']} layers, "
        f"n_embd = {settings['model']['n_embd']}, T = {T}, {BATCH_TOKENS:,} tokens per step; {options.steps} steps are "
        f"{options.steps * BATCH_TOKENS / num_tokens:.0%} of an epoch.",
        "",
        "| order | amplitude | max - min | training loss, mean of the last 100 steps | final validation loss |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, values in losses.items():
        deviations = residuals(values)
        lines.append(
            f"| {name} | {deviations.std():.3f} | {np.ptp(deviations):.3f} | {values[-100:].mean():.3f} "
            f"| {column(logs[name], 'val_loss')[1][-1]:.3f} |"
        )
    lines += ["", re.sub(r"\s+", " ", __doc__.split("\n\n")[-1]).strip() + " All losses are in nats per token."]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "shuffle.md").write_text("\n".join(lines) + "\n")
    table = np.column_stack([np.arange(options.steps), *losses.values()])
    np.savetxt(options.out / "loss.csv", table, "%d,%.4f,%.4f", header="step,shuffled,not_shuffled", comments="")
    plot_losses(losses, source_starts, options.out / "loss.png")
    print("\n".join(lines))


def processor_name() -> str:
    """Return the processor's name from /proc/cpuinfo, or the machine type if there is none."""
    try:
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1] if match else platform.machine()


if __name__ == "__main__":
    main()
