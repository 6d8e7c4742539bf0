"""Measure the gain from the quality filter: train equal models on filtered and on random documents.

    python benchmarks/quality.py --path DIRECTORY [--good 'wikipedia|openstax'] [--out results/quality/filtered.md]

DIRECTORY contains at least two Parquet files with the columns `text` and `source`. --good is a regular expression that
matches the beginning of the sources of good text. The first file provides the training documents of the classifier
and, disjoint from them, the good documents that both models are evaluated on. The other files, shuffled, are the pool:
a tokenizer is trained on it, and two datasets with the same number of tokens are prepared from it, one with
--min-quality and one without. All steps use the commands that users run. On two cores the benchmark takes about ten
minutes, and about one minute with --quick, which only checks that it runs.
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
QUICK_DOCUMENTS = 300  # per file
HELD_OUT = 10  # one in 10 good documents of the first file is held out


def run_script(script: str, *arguments: object) -> str:
    """Run a script of this repository and return its standard output. If it fails, exit with its output."""
    command = [sys.executable, *script.split(), *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        output = process.stdout[-2000:] + process.stderr[-2000:]
        sys.exit(f"error: {script} {' '.join(map(str, arguments))} failed:\n{output}")
    return process.stdout


def search(pattern: str, output: str) -> re.Match[str]:
    """Return the first match of `pattern` in the output of a script, or exit."""
    if (match := re.search(pattern, output)) is None:
        sys.exit(f"error: {pattern!r} does not match the output of the script:\n{output[-2000:]}")
    return match


def read_counts(directory: Path) -> dict[str, dict[str, int]]:
    """Return the counts in the manifest of a dataset."""
    if (manifest := open_dataset(directory).manifest) is None:
        sys.exit(f"error: {directory} contains no {MANIFEST}.")
    return manifest["counts"]


def split_documents(files: list[Path], good: str, directory: Path, quick: bool) -> dict[str, bool]:
    """Write good.parquet, other.parquet, held-out.parquet and pool.parquet.

    Returns whether each text of the pool is good."""

    def read(file: Path) -> tuple[pa.Table, np.ndarray]:
        table = pq.read_table(file, columns=["source", "text"])
        table = table.slice(0, QUICK_DOCUMENTS) if quick else table
        return table, pc.match_substring_regex(table["source"], f"^({good})").to_numpy()

    first, is_good = read(files[0])
    is_selected = [xxh3_64_intdigest(text.encode()) % HELD_OUT == 0 for text in first["text"].to_pylist()]
    held_out = is_good & np.array(is_selected)
    for name, mask in {"held-out": held_out, "good": is_good & ~held_out, "other": ~is_good}.items():
        pq.write_table(first.filter(pa.array(mask)), directory / f"{name}.parquet")
    first_texts = set(first["text"].to_pylist())
    pool: dict[str, bool] = {}
    for file in files[1:]:
        table, is_good = read(file)
        pool |= dict(zip(table["text"].to_pylist(), is_good.tolist(), strict=True))
    texts = sorted(pool.keys() - first_texts)
    random.Random(0).shuffle(texts)
    pq.write_table(pa.table({"text": texts}), directory / "pool.parquet", row_group_size=1000)
    return pool


def good_fractions(directory: Path, pool: dict[str, bool]) -> tuple[float, float, int]:
    """Return the fractions of good documents and good tokens, and the number of documents, in a training set."""
    dataset = open_dataset(directory)
    tokens, tokenizer = dataset.train.read(0, len(dataset.train)), load_tokenizer(dataset.tokenizer)
    documents = np.split(tokens, np.flatnonzero(tokens == dataset.eot_id))[1:]
    good = np.array([pool[tokenizer.decode(document[1:])] for document in documents])
    sizes = np.array([len(document) for document in documents])
    return good.mean(), sizes[good].sum() / sizes.sum(), len(documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, required=True, help="directory of Parquet files")
    parser.add_argument(
        "--good",
        default="wikipedia|openstax",
        help="regular expression for the beginning of good sources (default: %(default)s)",
    )
    parser.add_argument("--min-quality", type=float, default=0.5, help="as in fineweb.py (default: %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1337], help="seeds; each adds a pair of runs (default: 1337)"
    )
    parser.add_argument("--quick", action="store_true", help="run all steps with tiny sizes; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    options = parser.parse_args()
    files = sorted(options.path.glob("*.parquet"))
    if len(files) < 2:
        parser.error(f"--path {options.path} contains {len(files)} Parquet files. At least two are needed.")
    size = QUICK if options.quick else FULL
    batch_tokens = size["rows"] * size["block_size"]

    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        pool = split_documents(files, options.good, directory, options.quick)
        bpe, model = directory / "bpe.json", directory / "quality.safetensors"
        run_script(
            "-m tools.train_tokenizer", "--input", directory / "pool.parquet", "--vocab-size", size["vocab_size"],
            "--out", bpe,
        )  # fmt: skip
        inputs = ("--good", directory / "good.parquet", "--other", directory / "other.parquet")
        filter_output = run_script("-m tools.train_quality_filter", *inputs, "--tokenizer", bpe, "--out", model)
        print(filter_output, file=sys.stderr)

        def prepare(name: str, source: str, *arguments: object) -> Path:
            run_script("fineweb.py", "files", "--input", directory / f"{source}.parquet", "--tokenizer", bpe,
                    "--out-dir", directory / name, *arguments)  # fmt: skip
            return directory / name

        # more than the runs read: an epoch drops fewer than (rows + streams) x block_size tokens
        size_flags = ("--max-tokens", size["steps"] * batch_tokens + 100 * size["block_size"], "--val-tokens", 0)
        filter_flags = ("--quality", model, "--min-quality", options.min_quality)
        datasets = {
            "random": prepare("random", "pool", *size_flags),
            "filtered": prepare("filtered", "pool", *size_flags, *filter_flags),
        }
        evaluation_set = prepare("evaluation", "held-out", "--val-tokens", 2**31 - 1)  # all documents except one

        architecture = [
            argument
            for name in ("block_size", "n_layer", "n_head", "n_embd")
            for argument in (f"--model.{name.replace('_', '-')}", size[name])
        ]
        rows, parameters = [], ""
        for seed in options.seeds:
            for name, dataset in datasets.items():
                run = ["--general.out-dir", directory / f"{name}-{seed}", *architecture,
                       "--training.micro-batch-size", size["rows"]]  # fmt: skip
                output = run_script(
                    "train.py", "gpt2", *run, "--general.mode", "train", "--general.seed", seed,
                    "--data.dataset", dataset, "--training.batch-tokens", batch_tokens,
                    "--training.max-steps", size["steps"], "--optimizer.max-lr", 2e-3,
                    "--optimizer.warmup-steps", size["steps"] // 10,
                )  # fmt: skip
                parameters = search(r"([\d,]+) parameters", output)[1]
                output = run_script("train.py", "gpt2", *run, "--general.mode", "val", "--data.dataset", evaluation_set)
                loss, bits = search(r"validation loss ([\d.]+) \| ([\d.]+) bits per byte", output).groups()
                good_documents, good_tokens, documents = good_fractions(dataset, pool)
                tokens = read_counts(dataset)["tokens"]["train"]
                rows.append(
                    f"| {name} | {seed} | {documents:,} | {tokens:,} | {good_documents:.1%} "
                    f"| {good_tokens:.1%} | {loss} | {bits} |"
                )
                print(rows[-1], file=sys.stderr, flush=True)

        counts = read_counts(datasets["filtered"])["documents"]
        held_out = read_counts(evaluation_set)
        auc = search("AUC ([0-9.]+)", filter_output)[1]
        lines = [
            f"`python benchmarks/quality.py --good '{options.good}' --min-quality {options.min_quality}"
            f"{' --quick' if options.quick else ''}`",
            "",
            f"{parameters} parameters, vocabulary {size['vocab_size']:,}, {size['steps']:,} steps of {batch_tokens:,} "
            f"tokens; evaluated on {held_out['documents']['val']:,} good documents ({held_out['tokens']['val']:,} "
            "tokens) that neither the classifier nor the models have seen. The filter evaluated "
            f"{counts['seen']:,} documents of the pool and kept {counts['kept']:,}. The AUC of the classifier on its "
            f"held-out documents is {auc}.",
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
