"""Tasks (the parts of a source) and batches (the documents that the readers return).

>>> format_of("Pages.JSONL.gz"), format_of("photo.png")
('jsonl', None)
"""

import os
from dataclasses import dataclass, field

import numpy as np

from babygpt.errors import UserError

BATCH_DOCUMENTS = 256  # documents read, filtered and encoded at once
TASK_BYTES = 16 << 20  # uncompressed text per task; a killed preparation repeats its unfinished tasks
COMPRESSION_SUFFIXES = (".gz", ".xz", ".zst")  # of texts; tables have their own compression
TABLE_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
TEXT_FORMATS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "text", ".md": "text",
    ".py": "text",
}  # fmt: skip
UNDECODABLE = b"\xff"  # in place of a file that was skipped; it is not valid UTF-8, so no document equals it


@dataclass(frozen=True)
class TextOptions:
    """How text files are read."""

    encoding: str | None = None  # of files without a byte order mark; None: UTF-8
    separator: str | None = None  # between the documents of a text file; None: a file is one document
    skip_bad: bool = False  # skip files that cannot be decoded


@dataclass(frozen=True)
class Task:
    """A part of a source that one worker reads; picklable."""

    kind: str  # parquet, arrow, files (of text formats), stream (from the hub)
    location: tuple[str, ...]  # paths; for a stream: repo, config, split, revision, index and number of shards
    columns: tuple[str, ...]  # the text column, then numeric columns
    # of row groups, record batches, or bytes: the lines of a jsonl file that start in it
    range: tuple[int, int] | None = None
    options: TextOptions = field(default_factory=TextOptions)


@dataclass
class Batch:
    """Documents in source order."""

    texts: list[bytes]  # UTF-8, empty if missing, or UNDECODABLE
    numbers: dict[str, np.ndarray]  # by numeric column: (documents,) float64, NaN if missing


def format_of(path: str) -> str | None:
    """Return the format of a file by its name, or None if the format is unknown."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in COMPRESSION_SUFFIXES:
        return TEXT_FORMATS.get(os.path.splitext(stem)[1])
    return TABLE_FORMATS.get(suffix) or TEXT_FORMATS.get(suffix)


def check_columns(required: tuple[str, ...], existing: list[str], location: str) -> None:
    for column in required:
        if column not in existing:
            fix = "Choose one with --text-column." if column == required[0] else f"Do not filter by {column}."
            raise UserError(f"{location} has no column {column!r}: it has {', '.join(existing)}. {fix}")
