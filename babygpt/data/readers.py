"""Documents out of files: parquet, jsonl and txt, the latter two also compressed, and out of streams of the hub.

>>> for task in split_parquet("pages.parquet", ("text", "score")):
...     for batch in read(task):
...         batch.texts, batch.numbers["score"]

What can't be read is a UserError that names the file and the place.
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

BATCH = 256  # documents read, encoded and judged at once
TASK_BYTES = 16 << 20  # uncompressed text a task; a task is what a killed preparation does again
READABLE = (".jsonl", ".txt", ".py")  # and .parquet
COMPRESSED = (".gz", ".xz", ".zst")


@dataclass(frozen=True)
class Task:
    """What one worker reads in one go; picklable.

    `columns` are the text's and then those of numbers. `part` is a range of a parquet file's row groups, or of a
    jsonl file's bytes: the lines that begin in it.
    """

    kind: str  # parquet, files, stream
    paths: tuple[str, ...]
    columns: tuple[str, ...]
    part: tuple[int, int] | None = None


@dataclass
class Batch:
    """Documents in their order: texts in UTF-8 (a missing one is empty), and of each column of numbers a value a
    document, (n,) float64, NaN where it is missing."""

    texts: list[bytes]
    numbers: dict[str, np.ndarray]


def plain_name(path: str) -> str:
    stem, ending = os.path.splitext(path)
    return stem if ending in COMPRESSED else path


def check_columns(wanted: tuple[str, ...], there: list[str], where: str) -> None:
    for column in wanted:
        if column not in there:
            mend = "Give --text-column." if column == wanted[0] else f"A filter by {column} needs it."
            raise UserError(f"{where} has no column {column!r}: it has {', '.join(there)}. {mend}")


def split_parquet(path: str, columns: tuple[str, ...]) -> list[Task]:
    """Ranges of row groups with about TASK_BYTES of text each."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        metadata = pq.read_metadata(_parquet(path))
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable parquet file: {error}") from None
    check_columns(columns, metadata.schema.to_arrow_schema().names, path)
    leaf = next((i for i in range(metadata.num_columns) if metadata.schema.column(i).path == columns[0]), None)
    if leaf is None:
        raise UserError(f"{path}: the column {columns[0]!r} is nested, not text. Give --text-column.")
    tasks, first, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).column(leaf).total_uncompressed_size
        if size >= TASK_BYTES or group == metadata.num_row_groups - 1:
            tasks.append(Task("parquet", (path,), columns, (first, group + 1)))
            first, size = group + 1, 0
    return tasks


def _parquet(path: str):
    """What pyarrow reads a file from; files of this machine it opens itself, which is faster."""
    return files.open_for_reading(path) if files.is_remote(path) else path


def split_jsonl(path: str, size: int, columns: tuple[str, ...]) -> list[Task]:
    """Ranges of TASK_BYTES."""
    ranges = [(start, min(start + TASK_BYTES, size)) for start in range(0, size, TASK_BYTES)]
    return [Task("files", (path,), columns, part) for part in ranges]


def read(task: Task) -> Iterator[Batch]:
    """The documents of a task, in their order."""
    if task.kind == "parquet":
        yield from _read_parquet(task)
        return
    rows = _read_stream(task) if task.kind == "stream" else _read_files(task)
    while batch := list(islice(rows, BATCH)):
        texts, *numbers = zip(*batch, strict=True)
        arrays = (np.array(values, np.float64) for values in numbers)
        yield Batch(list(texts), dict(zip(task.columns[1:], arrays, strict=True)))


def _read_parquet(task: Task) -> Iterator[Batch]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert task.part is not None, "a parquet task has row groups"
    path, where = task.paths[0], f"row groups {task.part[0]} to {task.part[1] - 1}"
    groups, columns = range(*task.part), list(task.columns)
    try:
        file = pq.ParquetFile(_parquet(path))
        for rows in file.iter_batches(BATCH, row_groups=groups, columns=columns, use_threads=False):
            texts = rows.column(columns[0])
            if any(kind(texts.type) for kind in (pa.types.is_dictionary, pa.types.is_string_view, pa.types.is_null)):
                texts = texts.cast(pa.large_string())
            if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
                raise UserError(f"{path}: the column {columns[0]!r} is {texts.type}, not text. Give --text-column.")
            texts.validate(full=True)  # is it UTF-8?
            numbers = {}
            for column in columns[1:]:
                try:
                    numbers[column] = rows.column(column).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
                except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                    raise UserError(f"{path}: {column!r} is {rows.column(column).type}, no number.") from None
            yield Batch([text or b"" for text in texts.cast(pa.large_binary()).to_pylist()], numbers)
    except KeyError:
        raise UserError(f"{path} has two columns of a name, of {', '.join(columns)}. Rename one.") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged, in {where}: {error}. Fetch it again.") from None


def _read_stream(task: Task) -> Iterator[tuple]:
    repo, config, split, revision, index, count = task.paths
    shard = hub.stream(repo, config or None, split, revision).shard(num_shards=int(count), index=int(index))
    rows, where = iter(shard), f"{repo}, shard {index}"
    while (row := hub.call(lambda: next(rows, None), where, waits=())) is not None:
        yield _fields(row, task.columns, where)


def _read_files(task: Task) -> Iterator[tuple]:
    for path in task.paths:
        try:
            if plain_name(path).endswith(".jsonl"):
                yield from _read_jsonl(path, task)
            else:
                if task.columns[1:]:
                    raise UserError(f"{path} is a plain text and has no {task.columns[1]!r} to filter by.")
                with _open(path) as file:
                    text = file.read()
                text.decode()  # is it UTF-8?
                yield (text.removeprefix(codecs.BOM_UTF8),)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no UTF-8 text ({error}). Convert it, with iconv for instance.") from None
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{path} can't be read, it may be damaged: {error}") from None


def _read_jsonl(path: str, task: Task) -> Iterator[tuple]:
    at, stop = task.part or (0, float("inf"))
    with _open(path) as file:
        if at > 0:
            file.seek(at - 1)
            at += len(file.readline()) - 1  # a line that began before belongs to the part before
        counted = at == 0
        for number, line in enumerate(file, 1):  # bytes split at \n alone: U+2028 in a text is no line's end
            if at >= stop:
                break
            where = f"{path}, line {number}" if counted else f"{path}, the line at byte {at:,}"
            at += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{where} is no JSON object: {line[:60]!r}")
            yield _fields(row, task.columns, where)


def _fields(row: dict, columns: tuple[str, ...], where: str) -> tuple:
    """The text of a row, in UTF-8, and its numbers."""
    check_columns(columns, list(row), where)
    text, *numbers = (row[column] for column in columns)
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {columns[0]!r} is {type(text).__name__}, not text. Give --text-column.")
    for column, number in zip(columns[1:], numbers, strict=True):
        if number is not None and (not isinstance(number, (int, float)) or abs(number) > 1e300):
            raise UserError(f"{where}: {column!r} is {type(number).__name__} {number!r:.40}, no number to compare.")
    return (without_surrogates(text or "").encode(), *numbers)


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which UTF-8 can't hold; what tiktoken makes of them too."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _open(path: str):
    """A binary file object over the uncompressed contents."""
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
