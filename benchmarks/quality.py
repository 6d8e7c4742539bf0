"""The gain from the quality filter: bits per byte on good text of two equal models, on filtered and random documents.

    python benchmarks/quality.py --path FOLDER [--good 'wikipedia|openstax'] [--out results/quality/filtered.md]

FOLDER has two or more parquet files with the columns `text` and `source`; --good is a regular expression that the
sources of good text begin with. The first file gives the classifier its sample and, apart from that, the good text that
both models are measured on. The others, mixed, are the pool: its own vocabulary, and of it two data sets of the same
number of tokens, one with --min-quality and one without. Everything is done by the commands a user has. On two cores
the whole takes about ten minutes, with --quick, which only shows that it runs, one.
"""

import argparse
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from xxhash import xxh3_64_intdigest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from babygpt.data.shards import MANIFEST, open_dataset  # noqa: E402
from babygpt.data.tokenizer import load_tokenizer  # noqa: E402
from benchmarks.table import write_table  # noqa: E402

FULL = {"vocab_size": 4096, "block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 256, "steps": 350, "rows": 16}
QUICK = {"vocab_size": 512, "block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 16, "steps": 6, "rows": 16}
QUICK_DOCUMENTS = 300  # of each file
HELD_OUT = 10  # one good document in so many of the first file


def command(script: str, *arguments: object) -> str:
    """What a script of ours prints; ends this one where it fails."""
    line = [sys.executable, *script.split(), *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {script} {' '.join(map(str, arguments))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def search(pattern: str, output: str) -> re.Match[str]:
    """The first match of `pattern` in a script's output."""
    if (found := re.search(pattern, output)) is None:
        sys.exit(f"error: the output has no match of {pattern!r}:\n{output[-2000:]}")
    return found


def counts_of(folder: Path) -> dict[str, dict[str, int]]:
    """The counts in a data set's manifest."""
    if (manifest := open_dataset(folder).manifest) is None:
        sys.exit(f"error: {folder} has no {MANIFEST}.")
    return manifest["counts"]


def split(files: list[Path], good: str, folder: Path, quick: bool) -> dict[str, bool]:
    """Writes good.parquet, other.parquet, held-out.parquet and pool.parquet; returns of each text of the pool whether
    it is good."""

    def read(file: Path) -> tuple[pa.Table, np.ndarray]:
        table = pq.read_table(file, columns=["source", "text"])
        table = table.slice(0, QUICK_DOCUMENTS) if quick else table
        return table, pc.match_substring_regex(table["source"], f"^({good})").to_numpy()

    first, is_good = read(files[0])
    chosen = [xxh3_64_intdigest(text.encode()) % HELD_OUT == 0 for text in first["text"].to_pylist()]
    held_out = is_good & np.array(chosen)
    for name, mask in {"held-out": held_out, "good": is_good & ~held_out, "other": ~is_good}.items():
        pq.write_table(first.filter(pa.array(mask)), folder / f"{name}.parquet")
    never = set(first["text"].to_pylist())
    pool: dict[str, bool] = {}
    for file in files[1:]:
        table, is_good = read(file)
        pool |= dict(zip(table["text"].to_pylist(), is_good.tolist(), strict=True))
    texts = sorted(pool.keys() - never)
    random.Random(0).shuffle(texts)
    pq.write_table(pa.table({"text": texts}), folder / "pool.parquet", row_group_size=1000)
    return pool


def shares(folder: Path, pool: dict[str, bool]) -> tuple[float, float, int]:
    """Of a data set's training documents: the share that is good, the same of its tokens, and how many there are."""
    dataset = open_dataset(folder)
    tokens, tokenizer = dataset.train.read(0, len(dataset.train)), load_tokenizer(dataset.tokenizer)
    documents = np.split(tokens, np.flatnonzero(tokens == dataset.eot_id))[1:]
    good = np.array([pool[tokenizer.decode(document[1:])] for document in documents])
    sizes = np.array([len(document) for document in documents])
    return good.mean(), sizes[good].sum() / sizes.sum(), len(documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help="a folder of parquet files")
    parser.add_argument("--good", default="wikipedia|openstax", help="how the sources of good text begin")
    parser.add_argument("--min-quality", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337], help="a pair of trainings each")
    parser.add_argument("--quick", action="store_true", help="the same path with tiny sizes: no measurement")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table")
    options = parser.parse_args()
    files = sorted(options.path.glob("*.parquet"))
    if len(files) < 2:
        parser.error("give a folder of two or more parquet files")
    size = QUICK if options.quick else FULL
    batch_tokens = size["rows"] * size["block_size"]

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pool = split(files, options.good, folder, options.quick)
        bpe, model = folder / "bpe.json", folder / "quality.safetensors"
        command("-m tools.train_tokenizer", "--input", folder / "pool.parquet", "--vocab-size", size["vocab_size"],
                "--out", bpe)  # fmt: skip
        sides = ("--good", folder / "good.parquet", "--other", folder / "other.parquet")
        learnt = command("-m tools.train_quality_filter", *sides, "--tokenizer", bpe, "--out", model)
        print(learnt, file=sys.stderr)

        def prepare(name: str, source: str, *arguments: object) -> Path:
            command("fineweb.py", "files", "--input", folder / f"{source}.parquet", "--tokenizer", bpe,
                    "--out-dir", folder / name, *arguments)  # fmt: skip
            return folder / name

        # under one epoch: what an epoch leaves unread is less than (rows + streams) x block_size
        enough = ("--max-tokens", size["steps"] * batch_tokens + 100 * size["block_size"], "--val-tokens", 0)
        quality = ("--quality", model, "--min-quality", options.min_quality)
        sets = {
            "random": prepare("random", "pool", *enough),
            "filtered": prepare("filtered", "pool", *enough, *quality),
        }
        measured_on = prepare("measured-on", "held-out", "--val-tokens", 2**31 - 1)  # all but one document

        architecture = [
            argument
            for name in ("block_size", "n_layer", "n_head", "n_embd")
            for argument in (f"--model.{name.replace('_', '-')}", size[name])
        ]
        rows, parameters = [], ""
        for seed in options.seeds:
            for name, dataset in sets.items():
                run = ["--general.out-dir", folder / f"{name}-{seed}", *architecture,
                       "--training.micro-batch-size", size["rows"]]  # fmt: skip
                told = command(
                    "train.py", "gpt2", *run, "--general.mode", "train", "--general.seed", seed,
                    "--data.dataset", dataset, "--training.batch-tokens", batch_tokens,
                    "--training.max-steps", size["steps"], "--optimizer.max-lr", 2e-3,
                    "--optimizer.warmup-steps", size["steps"] // 10,
                )  # fmt: skip
                parameters = search(r"([\d,]+) parameters", told)[1]
                told = command("train.py", "gpt2", *run, "--general.mode", "val", "--data.dataset", measured_on)
                loss, bits = search(r"validation loss ([\d.]+) \| ([\d.]+) bits per byte", told).groups()
                good, of_tokens, documents = shares(dataset, pool)
                tokens = counts_of(dataset)["tokens"]["train"]
                rows.append(
                    f"| {name} | {seed} | {documents:,} | {tokens:,} | {good:.1%} | {of_tokens:.1%} | {loss} | {bits} |"
                )
                print(rows[-1], file=sys.stderr, flush=True)

        counts = counts_of(sets["filtered"])["documents"]
        held_out = counts_of(measured_on)
        auc = search("AUC [0-9.]+", learnt)[0]
        lines = [
            f"`python benchmarks/quality.py --good '{options.good}' --min-quality {options.min_quality}"
            f"{' --quick' if options.quick else ''}`",
            "",
            f"{parameters} parameters, vocabulary {size['vocab_size']:,}, {size['steps']:,} steps of {batch_tokens:,} "
            f"tokens; measured on {held_out['documents']['val']:,} good documents, {held_out['tokens']['val']:,} "
            "tokens, that neither the classifier nor a model has seen. The filter looked at "
            f"{counts['seen']:,} documents of the pool and kept {counts['kept']:,}. The classifier has {auc} on "
            "documents that were held out from it.",
            "",
            f"{date.today()}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}, Python "
            f"{platform.python_version()}, torch {version('torch')}, scikit-learn {version('scikit-learn')}",
            "",
            "| training set | seed | documents | tokens | good documents | good tokens | loss | bits per byte |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
            *rows,
        ]
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
