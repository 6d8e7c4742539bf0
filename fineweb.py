#!/usr/bin/env python
r"""Prepare a dataset of token shards from a Hugging Face dataset or from files.

    python fineweb.py                                        # FineWeb-Edu 10BT into data/fineweb-edu-10BT
    python fineweb.py fineweb2-pl --tokenizer data/pl.json   # FineWeb-2 in Polish
    python fineweb.py roneneldan/TinyStories                 # a dataset on the Hugging Face Hub
    python fineweb.py files --input 'pages/*.jsonl.gz' --out-dir data/pages
    python fineweb.py files --input novel.txt --separator '\n\n' --out-dir data/novel
    python fineweb.py shakespeare --tokenizer char           # tiny Shakespeare, one token per character
    python fineweb.py fineweb-edu-100BT --min-score 3.5 --out-dir s3://bucket/edu
    python fineweb.py verify data/pages                      # check every byte of a dataset

Three stages. Tokenize: worker processes read, filter and encode the source, one task at a time. Plan: drop
duplicates, choose validation documents, and assign each document its place in the shards. Write: copy the tokens into
shards. Finished tasks are kept, so the same command resumes a stopped run. The source and the settings
determine the dataset, byte for byte; the number of workers does not affect it.
"""

import os
import re
import shlex
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Ge, Le, Lt
from tqdm import tqdm
from tyro.conf import Positional

from babygpt import files
from babygpt.console import counted
from babygpt.constraints import Name, metavar, parse_command_line, summary, violations
from babygpt.data.filters import Filters
from babygpt.data.plan import plan_shards
from babygpt.data.quality import QualityModel
from babygpt.data.resources import check_resources
from babygpt.data.shards import open_dataset, verify
from babygpt.data.sources import find, read_documents
from babygpt.data.stages import tokenize, write_shards
from babygpt.data.tasks import TextOptions
from babygpt.data.tokenizer import character_tokenizer, load_tokenizer
from babygpt.data.workers import Pool, Setup, local_workers, preload_workers, ray_workers
from babygpt.data.workspace import Workspace
from babygpt.errors import UserError, run

Threshold = Annotated[float | None, metavar("SCORE", "off")]


@dataclass(frozen=True)
class PrepareArgs:
    """The command line: each field is a flag, and its comment is the help."""

    # fineweb-edu-10BT, fineweb-edu-100BT, fineweb-10BT, fineweb2-pl (or another language), wikipedia-en, stdlib (source
    # code of Python's standard library), shakespeare, files (with --input), or OWNER/NAME of a Hugging Face dataset
    source: Annotated[Positional[str], metavar("[SOURCE]")] = "fineweb-edu-10BT"
    # files, directories, glob patterns or URLs for the source `files`: .parquet, .arrow (and save_to_disk directories),
    # .jsonl, .json, .csv, .tsv, .txt, .md or .py; all but the first two may be compressed (.gz, .xz, .zst)
    input: Annotated[tuple[str, ...], metavar("PATH [PATH ...]")] = ()
    # validation documents, specified like --input; documents that are also in --input are excluded from training
    val_input: Annotated[tuple[str, ...], metavar("PATH [PATH ...]")] = ()
    # text between the documents of a text file; \n means a newline
    separator: Annotated[str | None, metavar("TEXT", "a file is one document")] = None
    # encoding of text files without a byte order mark, such as latin-1
    encoding: Annotated[str | None, metavar("NAME", "utf-8")] = None
    skip_bad: bool = False  # skip and count text files that cannot be decoded
    # directory of the dataset, or a URL such as s3://bucket/name
    out_dir: Annotated[str | None, metavar("PATH|URL", "data/SOURCE, or data/SOURCE-char")] = None
    # gpt2, the path to a tokenizer.json, or char: one token per character of the source
    tokenizer: Annotated[str, metavar("gpt2|char|PATH")] = "gpt2"
    # number of validation tokens, rounded up to whole documents; if that would double it, a document is divided
    val_tokens: Annotated[int | None, Ge(0), Lt(2**31), metavar("TOKENS", "11M, but at most 5% of all tokens")] = None
    shard_tokens: Annotated[int, Ge(1), Lt(2**31), metavar("TOKENS")] = 100_000_000  # tokens per shard
    # stop after the document that brings the total to this number of tokens
    max_tokens: Annotated[int | None, Ge(1), metavar("TOKENS", "no limit")] = None
    # drop documents with fewer characters than this
    min_chars: Annotated[int | None, Ge(0), metavar("CHARACTERS", "off")] = None
    min_score: Threshold = None  # drop documents whose `score` (0 to 5, a column of FineWeb-Edu) is below this value
    # drop documents whose `language_score` (0 to 1, a column of FineWeb) is below this value
    min_language_score: Threshold = None
    min_quality: Threshold = None  # drop documents whose score from the --quality model is below this value (0 to 1)
    # quality model, written by tools.train_quality_filter
    quality: Annotated[Path | None, metavar("PATH")] = None
    # number of worker processes
    workers: Annotated[int | None, Ge(1), Le(10_000), metavar("N", "one per core, if memory allows")] = None
    engine: Literal["local", "ray"] = "local"  # run workers on this machine or on a Ray cluster (pip install ray)
    # address of the Ray cluster; auto: the cluster that this machine belongs to
    address: Annotated[str, metavar("ADDRESS")] = "auto"
    text_column: Name = "text"  # column of a table or csv file, or key of a JSON object, that contains the text
    # configuration, if SOURCE is OWNER/NAME
    config: Annotated[str | None, metavar("NAME", "the dataset's default")] = None
    split: Name = "train"  # split, if SOURCE is OWNER/NAME or --input is a save_to_disk directory

    def check(self) -> None:
        """Raise a UserError that lists all invalid values."""
        problems = violations(self)
        if (self.quality is None) != (self.min_quality is None):
            given = f"--quality {self.quality}" if self.quality else f"--min-quality {self.min_quality}"
            problems.append(f"{given} has no effect on its own. Use --quality and --min-quality together.")
        if self.val_input and self.val_tokens is not None:
            problems.append(f"--val-tokens {self.val_tokens:,} has no effect with --val-input. Use one of them.")
        if self.source == "shakespeare" and self.val_tokens is not None:
            problems.append(f"--val-tokens {self.val_tokens:,} has no effect with shakespeare. Remove it.")
        if self.separator == "":
            problems.append("--separator is empty. Use a text such as '\\n\\n', or omit it.")
        try:
            "".encode(self.encoding or "utf-8")
            b"".decode(self.encoding or "utf-8")
        except (LookupError, ValueError):
            problems.append(f"--encoding {self.encoding!r} is unknown. Use a name such as latin-1 or cp1252.")
        if problems:
            raise UserError(summary(problems, "The arguments are invalid:"))

    @property
    def directory(self) -> str:
        """Directory or URL of the dataset."""
        suffix = "-char" if self.tokenizer == "char" else ""
        directory = self.out_dir or f"data/{self.source.split('/')[-1]}{suffix}"
        directory = directory.removeprefix("file://").rstrip("/") or "/"
        return os.path.abspath(directory) if self.engine == "ray" and not files.is_remote(directory) else directory

    def settings(self, setup: Setup) -> dict[str, Any]:
        """Return the settings that determine the bytes of the dataset, except for the revision of the source."""
        return {
            "source": self.source, "config": self.config, "split": self.split, "text_column": self.text_column,
            "tokenizer_sha256": setup.tokenizer.sha256, "val_tokens": self.val_tokens,
            "shard_tokens": self.shard_tokens, "max_tokens": self.max_tokens, **asdict(setup.filters),
            "quality_sha256": setup.quality and setup.quality.sha256,
            "encoding": self.encoding, "separator": self.separator, "skip_bad": self.skip_bad or None,
        }  # fmt: skip

    @property
    def text_options(self) -> TextOptions:
        """The options for text files, with the escapes of the separator replaced."""
        escapes = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
        separator = self.separator and re.sub(r"\\([ntr\\])", lambda match: escapes[match[1]], self.separator)
        return TextOptions(self.encoding, separator, self.skip_bad)


def prepare(args: PrepareArgs) -> None:
    """Prepare a dataset. Tasks that an earlier run with the same settings finished are skipped."""
    args.check()
    filters = Filters(args.min_chars, args.min_score, args.min_language_score, args.min_quality)
    columns = (args.text_column, *filters.columns)
    source = find(args.source, args.input, columns, args.config, args.split, args.val_input, args.text_options)
    quality = None if args.quality is None else QualityModel.load(args.quality)
    is_char = args.tokenizer == "char"
    tokenizer = character_tokenizer(read_documents(source)) if is_char else load_tokenizer(args.tokenizer)
    setup = Setup(tokenizer, filters, quality)
    with Workspace(args.directory, args.settings(setup), source) as work:  # lock, compare settings
        if work.manifest:
            print(f"{work.directory} is already complete.")
        else:
            with create_worker_pool(args, setup, work) as pool:
                work.begin()
                parts, num_val_parts = tokenize(source, work, pool, args.max_tokens)
                named, buckets = num_val_parts if source.num_val_units else None, work.scratch / "buckets"
                plan = plan_shards(parts, args.val_tokens, args.max_tokens, buckets, named, tokenizer)
                plan.report()
                shards = write_shards(plan, work, pool, args.shard_tokens, tokenizer.vocab_size)
            work.commit(plan, shards, tokenizer)
    report(work, tokenizer.is_character_level)


def create_worker_pool(args: PrepareArgs, setup: Setup, work: Workspace) -> AbstractContextManager[Pool]:
    """Return the pool of a Ray cluster, or check disk and memory and return a pool of local processes."""
    if args.engine == "ray":
        return ray_workers(args.address, setup)
    return local_workers(check_resources(work, setup.tokenizer, args.workers), setup)


def report(work: Workspace, is_character_level: bool) -> None:
    """Print the size of a complete dataset and a command that trains on it."""
    counts, shards = work.manifest["counts"], work.manifest["shards"]
    documents, tokens = counted(counts["documents"]["kept"], "document"), counts["tokens"]
    print(
        f"{work.directory}: {documents}, {tokens['train']:,} training tokens and "
        f"{tokens['val']:,} validation tokens in {counted(len(shards), 'shard')}.\n"
        f"next: {training_command(work.directory, tokens['train'], tokens['val'], is_character_level)}"
    )
    if tokens["val"] == 0:
        print("note: there are no validation tokens. Use more text, or --val-input.")


def training_command(directory: str, train_tokens: int, val_tokens: int, is_character_level: bool) -> str:
    """Return a command with a preset that fits the size of the dataset and this machine."""
    import torch

    from dataloader import default_num_streams, rows_per_epoch
    from train_config import fitting_preset, preset, tokens_of

    name = fitting_preset(train_tokens, is_character_level, torch.cuda.is_available())
    config, command = preset(name), ["python", "train.py", name]
    if config.data.dataset != directory:
        command += ["--dataset", directory, "--out-dir", f"out/{os.path.basename(os.path.abspath(directory))}"]
    if not is_character_level and tokens_of(config) > 10 * train_tokens:
        command += ["--epochs", "4"]
    block_size = config.model.block_size
    if rows_per_epoch(train_tokens, default_num_streams(train_tokens, block_size), block_size) < (
        config.training.batch_tokens // block_size
    ):
        return "use more text: this is too little for training"
    if val_tokens <= config.model.block_size:
        command += ["--mode", "train", "sample"]
    return shlex.join(command)


def verify_dataset(
    directory: Annotated[Positional[str], tyro.conf.arg(metavar="DIRECTORY", help="directory or URL of the dataset")],
) -> None:
    """Check the headers, sizes, checksums, tokens and document counts of a dataset in a directory or at a URL."""
    size = sum(path.stat().st_size for path in open_dataset(directory).directory.glob("*.bin"))
    with tqdm(total=size, unit="B", unit_scale=True, desc="verify") as bar:
        totals = verify(directory, bar.update)
    print(f"{directory} is intact: " + ", ".join(counted(count, name[:-1]) for name, count in totals.items()))


def main() -> None:
    if sys.argv[1:2] == ["verify"]:
        return parse_command_line(verify_dataset, "fineweb.py verify", verify_dataset.__doc__, args=sys.argv[2:])
    preload_workers()
    prepare(parse_command_line(PrepareArgs, "fineweb.py", __doc__, config=(tyro.conf.DisallowNone,)))


if __name__ == "__main__":
    run(main)
