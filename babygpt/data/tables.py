"""Read documents from tables: parquet files, and the Arrow files of `datasets`' save_to_disk.

>>> for task in split_parquet("pages.parquet", ("text", "score")):
...     for batch in read_parquet(task):
...         batch.texts, batch.numbers["score"]

If data cannot be read, a UserError names the file and the location.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from babygpt import files
from babygpt.data import tasks
from babygpt.data.tasks import BATCH_DOCUMENTS, Batch, Task, check_columns
from babygpt.errors import UserError


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
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    sizes = [group.column(text_column).total_uncompressed_size for group in groups]
    return [Task("parquet", (path,), columns, limits) for limits in _split_sizes(sizes)]


def split_arrow(path: str, columns: tuple[str, ...]) -> list[Task]:
    """Return tasks of consecutive record batches with about TASK_BYTES of text each."""
    with _explain_errors(path, columns, "a record batch"), _open_arrow(path) as (schema, batches):
        check_columns(columns, schema.names, path)
        sizes = [rows.column(columns[0]).nbytes for rows in batches]
    return [Task("arrow", (path,), columns, limits) for limits in _split_sizes(sizes)]


def _split_sizes(sizes: list[int]) -> list[tuple[int, int]]:
    """Return ranges of consecutive items with about TASK_BYTES each."""
    limits, first, total = [], 0, 0
    for i, size in enumerate(sizes):
        total += size
        if total >= tasks.TASK_BYTES or i == len(sizes) - 1:
            limits.append((first, i + 1))
            first, total = i + 1, 0
    return limits


def _path_or_file(path: str):
    """Return a local path, which pyarrow opens itself and reads faster, or an open remote file."""
    return files.open_for_reading(path) if files.is_remote(path) else path


@contextmanager
def _open_arrow(path: str) -> Iterator[tuple]:
    """Yield the schema and an iterable of record batches of an Arrow file, in the stream format or the file format."""
    import pyarrow as pa

    with files.open_for_reading(path) if files.is_remote(path) else pa.memory_map(path) as file:
        is_file_format = file.read(6) == b"ARROW1"
        file.seek(0)
        reader = pa.ipc.open_file(file) if is_file_format else pa.ipc.open_stream(file)
        yield reader.schema, map(reader.get_batch, range(reader.num_record_batches)) if is_file_format else reader


def read_parquet(task: Task) -> Iterator[Batch]:
    """Yield the documents of the row groups of a task."""
    import pyarrow.parquet as pq

    path, columns = task.location[0], list(task.columns)
    assert task.range is not None, "a parquet task has a range of row groups"
    with _explain_errors(path, task.columns, f"row groups {task.range[0]} to {task.range[1] - 1}"):
        file = pq.ParquetFile(_path_or_file(path))
        yield from _to_batches(
            file.iter_batches(BATCH_DOCUMENTS, row_groups=range(*task.range), columns=columns, use_threads=False), task
        )


def read_arrow(task: Task) -> Iterator[Batch]:
    """Yield the documents of the record batches of a task."""
    assert task.range is not None, "an arrow task has a range of record batches"
    start, stop = task.range
    place = f"record batches {start} to {stop - 1}"
    with _explain_errors(task.location[0], task.columns, place), _open_arrow(task.location[0]) as (_, batches):
        selected = (rows for i, rows in zip(range(stop), batches, strict=False) if i >= start)
        slices = (rows.slice(i, BATCH_DOCUMENTS) for rows in selected for i in range(0, len(rows), BATCH_DOCUMENTS))
        yield from _to_batches(slices, task)


@contextmanager
def _explain_errors(path: str, columns: tuple[str, ...], place: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except KeyError:
        raise UserError(
            f"{path} has more than one column called {' or '.join(map(repr, columns))}. Rename all but one."
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is corrupted in {place}: {error}. Copy or download it again.") from None


def _to_batches(tables: Iterable, task: Task) -> Iterator[Batch]:
    """Convert record batches. UserError if the type of a column is wrong."""
    import pyarrow as pa

    text_like_types: tuple[Callable, ...] = (pa.types.is_dictionary, pa.types.is_string_view, pa.types.is_null)
    path, column = task.location[0], task.columns[0]
    for rows in tables:
        texts = rows.column(column)
        if any(is_type(texts.type) for is_type in text_like_types):
            texts = texts.cast(pa.large_string())
        if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
            raise UserError(
                f"{path}: the column {column!r} has type {texts.type}, but must have type string. Choose another "
                "column with --text-column."
            )
        texts.validate(full=True)  # checks that it is UTF-8
        numbers = {}
        for name in task.columns[1:]:
            try:
                numbers[name] = rows.column(name).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise UserError(
                    f"{path}: the column {name!r} has type {rows.column(name).type}, which is not numeric. Do not "
                    "filter by it."
                ) from None
        yield Batch([text or b"" for text in texts.cast(pa.large_binary()).to_pylist()], numbers)
