"""Read documents from parquet, jsonl and txt files, the latter two also compressed, and from streams from the hub.

>>> for task in split_parquet("pages.parquet", ("text", "score")):
...     for batch in read(task):
...         batch.texts, batch.numbers["score"]

If data cannot be read, a UserError names the file and the location.
"""

import codecs
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from babygpt import files, hub
from babygpt.errors import UserError

BATCH_DOCUMENTS = 256  # documents read, filtered and encoded at once
TASK_BYTES = 16 << 20  # uncompressed text per task; a killed preparation repeats its unfinished tasks
TEXT_SUFFIXES = (".jsonl", ".txt", ".py")  # and .parquet
COMPRESSION_SUFFIXES = (".gz", ".xz", ".zst")


@dataclass(frozen=True)
class Task:
    """A part of a source that one worker reads; picklable."""

    kind: str  # parquet, files, stream
    location: tuple[str, ...]  # paths; for a stream: repo, config, split, revision, index and number of shards
    columns: tuple[str, ...]  # the text column, then numeric columns
    range: tuple[int, int] | None = None  # of row groups, or of bytes: the lines of a jsonl file that start in it


@dataclass
class Batch:
    """Documents in source order."""

    texts: list[bytes]  # UTF-8, empty if missing
    numbers: dict[str, np.ndarray]  # by numeric column: (documents,) float64, NaN if missing


def uncompressed_name(path: str) -> str:
    """Return a path without the suffix of a compression."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix in COMPRESSION_SUFFIXES else path


def check_columns(required: tuple[str, ...], existing: list[str], location: str) -> None:
    for column in required:
        if column not in existing:
            fix = "Choose one with --text-column." if column == required[0] else f"Do not filter by {column}."
            raise UserError(f"{location} has no column {column!r}: it has {', '.join(existing)}. {fix}")


def split_parquet(path: str, columns: tuple[str, ...]) -> list[Task]:
    """Return tasks of consecutive row groups with about TASK_BYTES of text each."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        metadata = pq.read_metadata(_path_or_file(path))
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from None
    check_columns(columns, metadata.schema.to_arrow_schema().names, path)
    text_column = next((i for i in range(metadata.num_columns) if metadata.schema.column(i).path == columns[0]), None)
    if text_column is None:
        raise UserError(
            f"{path}: the column {columns[0]!r} is nested, but must have type string. Choose another column with "
            "--text-column."
        )
    tasks, first_group, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).column(text_column).total_uncompressed_size
        if size >= TASK_BYTES or group == metadata.num_row_groups - 1:
            tasks.append(Task("parquet", (path,), columns, (first_group, group + 1)))
            first_group, size = group + 1, 0
    return tasks


def _path_or_file(path: str):
    """Return a local path, which pyarrow opens itself and reads faster, or an open remote file."""
    return files.open_for_reading(path) if files.is_remote(path) else path


def split_jsonl(path: str, size: int, columns: tuple[str, ...]) -> list[Task]:
    """Return tasks of TASK_BYTES each."""
    ranges = [(start, min(start + TASK_BYTES, size)) for start in range(0, size, TASK_BYTES)]
    return [Task("files", (path,), columns, byte_range) for byte_range in ranges]


def read(task: Task) -> Iterator[Batch]:
    """Yield the documents of a task in source order."""
    if task.kind == "parquet":
        yield from _read_parquet(task)
        return
    rows = _read_stream(task) if task.kind == "stream" else _read_files(task)
    while batch := list(islice(rows, BATCH_DOCUMENTS)):
        texts, *numbers = zip(*batch, strict=True)
        arrays = (np.array(values, np.float64) for values in numbers)
        yield Batch(list(texts), dict(zip(task.columns[1:], arrays, strict=True)))


def _read_parquet(task: Task) -> Iterator[Batch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert task.range is not None, "a parquet task has a range of row groups"
    path, place = task.location[0], f"row groups {task.range[0]} to {task.range[1] - 1}"
    row_groups, columns = range(*task.range), list(task.columns)
    try:
        file = pq.ParquetFile(_path_or_file(path))
        for rows in file.iter_batches(BATCH_DOCUMENTS, row_groups=row_groups, columns=columns, use_threads=False):
            texts = rows.column(columns[0])
            text_like_types = (pa.types.is_dictionary, pa.types.is_string_view, pa.types.is_null)
            if any(is_type(texts.type) for is_type in text_like_types):
                texts = texts.cast(pa.large_string())
            if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
                raise UserError(
                    f"{path}: the column {columns[0]!r} has type {texts.type}, but must have type string. Choose "
                    "another column with --text-column."
                )
            texts.validate(full=True)  # checks that it is UTF-8
            numbers = {}
            for column in columns[1:]:
                try:
                    numbers[column] = rows.column(column).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                    raise UserError(
                        f"{path}: the column {column!r} has type {rows.column(column).type}, which is not numeric. Do "
                        "not filter by it."
                    ) from None
            yield Batch([text or b"" for text in texts.cast(pa.large_binary()).to_pylist()], numbers)
    except KeyError:
        raise UserError(
            f"{path} has more than one column called {' or '.join(map(repr, columns))}. Rename all but one."
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is corrupted in {place}: {error}. Copy or download it again.") from None


def _read_stream(task: Task) -> Iterator[tuple]:
    repo, config, split, revision, index, count = task.location
    shard = hub.stream(repo, config or None, split, revision).shard(num_shards=int(count), index=int(index))
    rows, location = iter(shard), f"{repo}, shard {index}"
    while (row := hub.call_with_retries(lambda: next(rows, None), location, delays=())) is not None:
        yield _select_columns(row, task.columns, location)


def _read_files(task: Task) -> Iterator[tuple]:
    for path in task.location:
        try:
            if uncompressed_name(path).endswith(".jsonl"):
                yield from _read_jsonl(path, task)
            else:
                if task.columns[1:]:
                    raise UserError(
                        f"{path} is a text file, so it cannot be filtered by {task.columns[1]!r}. Remove that filter, "
                        "or use jsonl or parquet files."
                    )
                with _open_decompressed(path) as file:
                    text = file.read()
                text.decode()  # checks that it is UTF-8
                yield (text.removeprefix(codecs.BOM_UTF8),)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}. Convert it, for example with iconv.") from None
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{path} cannot be read and may be corrupted: {error}") from None


def _read_jsonl(path: str, task: Task) -> Iterator[tuple]:
    offset, stop = task.range or (0, float("inf"))
    with _open_decompressed(path) as file:
        if offset > 0:
            file.seek(offset - 1)
            offset += len(file.readline()) - 1  # a line that starts before the range belongs to the previous task
        from_start = offset == 0  # of the file, so that line numbers are known
        for number, line in enumerate(file, 1):  # a binary file splits at \n only, not at U+2028 in a text
            if offset >= stop:
                break
            location = f"{path}, line {number}" if from_start else f"{path}, the line at byte {offset:,}"
            offset += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{location} is not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{location} is not a JSON object: {line[:60]!r}")
            yield _select_columns(row, task.columns, location)


def _select_columns(row: dict, columns: tuple[str, ...], location: str) -> tuple:
    """Return the text of a row in UTF-8, then its numbers."""
    check_columns(columns, list(row), location)
    text, *numbers = (row[column] for column in columns)
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"{location}: the value of {columns[0]!r} has type {type(text).__name__}, but must be a string. Choose "
            "another column with --text-column."
        )
    for column, number in zip(columns[1:], numbers, strict=True):
        if number is not None and (not isinstance(number, (int, float)) or abs(number) > 1e300):
            shown = f"{type(number).__name__} {number!r:.40}"
            raise UserError(f"{location}: the value of {column!r} is {shown}, not a number between -1e300 and 1e300.")
    return (without_surrogates(text or "").encode(), *numbers)


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode, with U+FFFD, as tiktoken does."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _open_decompressed(path: str):
    """Open a file for reading its decompressed contents."""
    file = files.open_for_reading(path)
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=file)
    if path.endswith(".xz"):
        return lzma.LZMAFile(file)
    if path.endswith(".zst"):
        import io

        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"))
    return file
