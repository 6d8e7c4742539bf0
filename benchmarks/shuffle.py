"""What the shuffle is for: the same model trained on data sorted by source, with the shuffle and without.

    python benchmarks/shuffle.py --path PATH [--steps 500] [--out results/shuffle]

PATH is a folder of parquet files with columns `source` and `text`. The largest sources give equally much text each, and
their documents are written source after source: a vocabulary of 4,096, a data set, and two runs of train.py are made
of them in a temporary folder. One run has the default order (shuffled chunks, 64 streams), the other the data front to
back (one chunk, one stream); nothing else differs, and neither ends its first epoch. Written are shuffle.md, loss.png
and loss.csv.

The amplitude is the standard deviation of the 20-step mean of the training loss around its own straight line, over
the second half of the steps.
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

SOURCES, SOURCE_CHARS, VOCABULARY = 12, 800_000, 4096
T, BATCH_TOKENS, SMOOTH = 128, 4096, 20
MODEL = {"n-layer": 2, "n-head": 4, "n-embd": 128, "block-size": T}


def sorted_documents(folder: Path) -> list[tuple[str, str]]:
    """Source and text, SOURCE_CHARS of each of the largest sources, sorted by source."""
    import pyarrow.parquet as pq

    texts: dict[str, dict[str, None]] = {}  # of each source, each text once
    for file in sorted(folder.glob("*.parquet")):
        rows = pq.read_table(file, columns=["source", "text"])
        for source, text in zip(rows["source"].to_pylist(), rows["text"].to_pylist(), strict=True):
            texts.setdefault(source, {})[text] = None
    largest = sorted(texts, key=lambda source: -sum(map(len, texts[source])))[:SOURCES]
    documents = []
    for source in sorted(largest):
        taken = 0
        for text in texts[source]:
            if taken >= SOURCE_CHARS:
                break
            documents.append((source, text))
            taken += len(text)
    return documents


def script(name: str, *arguments: object) -> None:
    command = [sys.executable, *name.split(), *map(str, arguments)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # so small a model's threads would mostly wait for each other
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=one_thread)
    if done.returncode:
        sys.exit(f"error: {name} failed:\n{done.stderr[-3000:]}")


def prepare(documents: list[tuple[str, str]], folder: Path) -> tuple[Dataset, list[tuple[str, int]]]:
    """The data set in the documents' order; each source with the training token that it begins at."""
    (folder / "sorted.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for _, text in documents))
    script(
        "-m tools.train_tokenizer", "--input", folder / "sorted.jsonl", "--vocab-size", VOCABULARY,
        "--out", folder / "bpe.json",
    )  # fmt: skip
    script(
        "fineweb.py", "files", "--input", folder / "sorted.jsonl", "--tokenizer", folder / "bpe.json",
        "--out-dir", folder / "data",
    )  # fmt: skip
    dataset = open_dataset(folder / "data")
    tokenizer = load_tokenizer(dataset.tokenizer)
    val, train = (tokens.read(0, len(tokens)) for tokens in (dataset.val, dataset.train))
    held_out = {tokenizer.decode(ids[1:].tolist()) for ids in np.split(val, np.flatnonzero(val == dataset.eot_id))}
    sources = [source for source, text in documents if text not in held_out]
    begins = np.flatnonzero(train == dataset.eot_id).tolist()
    first: dict[str, int] = {}
    for source, begin in zip(sources, begins, strict=True):
        first.setdefault(source, begin)
    return dataset, list(first.items())


def train(dataset: Dataset, out: Path, steps: int, *order: object) -> list[dict]:
    """The log of a run."""
    line = [
        "gpt2", "--general.mode", "train", "val", "--general.device", "cpu", "--general.out-dir", out,
        "--data.dataset", dataset.directory, *order, "--training.max-steps", steps,
        "--training.batch-tokens", BATCH_TOKENS, "--training.micro-batch-size", 8,
        "--optimizer.max-lr", 3e-3, "--optimizer.warmup-steps", steps // 10, "--validation.every-n-steps", steps,
        "--evaluation.every-n-steps", 0, "--sampling.every-n-steps", 0, "--saving.every-n-steps", 0,
        "--logging.every-n-steps", 0,
    ]  # fmt: skip
    script("train.py", *line, *(cell for name, value in MODEL.items() for cell in (f"--model.{name}", value)))
    return read_log(out / "log.csv")


def smoothed(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of SMOOTH steps, and the middle of each."""
    means = np.convolve(losses, np.ones(SMOOTH) / SMOOTH, mode="valid")
    return np.arange(len(means)) + (SMOOTH - 1) / 2, means


def swings(losses: np.ndarray) -> np.ndarray:
    """Where the smoothed loss of the second half lies above (+) or below (-) its own straight line."""
    steps, means = smoothed(losses)
    steps, means = steps[steps >= len(losses) / 2], means[steps >= len(losses) / 2]
    return means - np.polyval(np.polyfit(steps, means, 1), steps)


def picture(losses: dict[str, np.ndarray], first: list[tuple[str, int]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
        "legend.frameon": False,
    })  # fmt: skip
    figure, axis = plt.subplots(figsize=(11, 5.4), layout="constrained")
    steps = len(next(iter(losses.values())))
    for (name, values), colour in zip(losses.items(), ("#2a6fbb", "#d1495b"), strict=True):
        axis.plot(values, color=colour, alpha=0.25, linewidth=0.7)
        label = f"{name}: amplitude {swings(values).std():.3f}"
        axis.plot(*smoothed(values), color=colour, linewidth=2, label=label)
    shown = np.concatenate([values[steps // 15 :] for values in losses.values()])
    low, high = shown.min(), shown.max()
    axis.set_ylim(low - 0.3 * (high - low), high + 0.45 * (high - low))  # room for the legend and the sources
    axis.set_xlim(0, steps)
    ends = [*(begin for _, begin in first[1:]), steps * BATCH_TOKENS]
    for i, ((source, begin), end) in enumerate(zip(first, ends, strict=True)):
        left, right = begin / BATCH_TOKENS, min(end / BATCH_TOKENS, steps)
        if left >= steps:
            break
        axis.axvspan(left, right, color="black", alpha=0.05 * (i % 2), linewidth=0)
        name = source.split("/")[-1][:24]
        axis.text((left + right) / 2, axis.get_ylim()[1], name, rotation=90, ha="center", va="top", fontsize=9)
    axis.set_xlabel(f"step of {BATCH_TOKENS:,} tokens; the bands are the sources that the unshuffled run (red) reads")
    axis.set_ylabel("training loss (nats a token)")
    axis.set_title("Documents sorted by source: the shuffle takes the sources' ups and downs out of the training loss")
    axis.legend(loc="lower left", title=f"line: mean of {SMOOTH} steps; thin: each step", alignment="left")
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help="a folder of parquet files")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("results/shuffle"), help="a folder for table, picture, losses")
    options = parser.parse_args()
    if not list(options.path.glob("*.parquet")):
        parser.error(f"{options.path} has no parquet files")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        documents = sorted_documents(options.path)
        dataset, first = prepare(documents, folder)
        num_tokens = len(dataset.train)
        plain = Order(dataset.train, dataset.eot_id, T, 1, 1337, num_tokens)
        assert plain.epoch(0).row(7) == [(7 * T, 8 * T + 1)], "front to back"
        assert plain.rows_per_epoch >= options.steps * BATCH_TOKENS // T, "the steps are within an epoch"
        logs = {
            "shuffled (the default)": train(dataset, folder / "shuffled", options.steps),
            "not shuffled": train(
                dataset, folder / "plain", options.steps, "--data.num-streams", 1, "--data.chunk-tokens", num_tokens
            ),
        }
        settings = json.loads((folder / "shuffled" / "config.json").read_text())
    losses = {name: np.array(column(rows, "loss")[1]) for name, rows in logs.items()}
    lines = [
        f"`python benchmarks/shuffle.py --path PATH --steps {options.steps}`; {date.today()}, {os.cpu_count()} cores, "
        f"{_processor()}, Python {platform.python_version()}, torch {torch.__version__}",
        "",
        f"{len(documents):,} documents of {len(first)} sources, sorted by source: {num_tokens:,} training tokens of a "
        f"vocabulary of {VOCABULARY:,}. {settings['model']['n_layer']} layers, {settings['model']['n_embd']} wide, "
        f"T = {T}, {BATCH_TOKENS:,} tokens a step: {options.steps} steps are "
        f"{options.steps * BATCH_TOKENS / num_tokens:.0%} of an epoch.",
        "",
        "| order | amplitude | largest less smallest | last training loss, mean of 100 | validation loss at the end |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, values in losses.items():
        off = swings(values)
        lines.append(
            f"| {name} | {off.std():.3f} | {np.ptp(off):.3f} | {values[-100:].mean():.3f} "
            f"| {column(logs[name], 'val_loss')[1][-1]:.3f} |"
        )
    lines += ["", re.sub(r"\s+", " ", __doc__.split("\n\n")[-1]).strip() + " All losses are in nats a token."]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "shuffle.md").write_text("\n".join(lines) + "\n")
    table = np.column_stack([np.arange(options.steps), *losses.values()])
    np.savetxt(options.out / "loss.csv", table, "%d,%.4f,%.4f", header="step,shuffled,not_shuffled", comments="")
    picture(losses, first, options.out / "loss.png")
    print("\n".join(lines))


def _processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    main()
