"""Read the documents of a task, from tables, text files, or streams from the hub.

>>> for task in split_file("pages.parquet", size, ("text", "score"), TextOptions()):
...     for batch in read(task):
...         batch.texts, batch.numbers["score"]
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np

from babygpt import hub
from babygpt.data.tables import read_arrow, read_parquet, split_arrow, split_parquet
from babygpt.data.tasks import BATCH_DOCUMENTS, Batch, Task, TextOptions, format_of
from babygpt.data.texts import read_texts, select_columns, split_text_file


def split_file(path: str, size: int, columns: tuple[str, ...], options: TextOptions) -> list[Task]:
    """Return tasks of about TASK_BYTES of text each. `size` is that of the file in bytes."""
    tables = {"parquet": split_parquet, "arrow": split_arrow}
    if split := tables.get(format_of(path) or ""):
        return split(path, columns)
    return split_text_file(path, size, columns, options)


def read(task: Task) -> Iterator[Batch]:
    """Yield the documents of a task in source order."""
    tables = {"parquet": read_parquet, "arrow": read_arrow}
    if read_table := tables.get(task.kind):
        yield from read_table(task)
        return
    rows = _read_stream(task) if task.kind == "stream" else read_texts(task)
    while batch := list(islice(rows, BATCH_DOCUMENTS)):
        texts, *numbers = zip(*batch, strict=True)
        arrays = (np.array(values, np.float64) for values in numbers)
        yield Batch(list(texts), dict(zip(task.columns[1:], arrays, strict=True)))


def _read_stream(task: Task) -> Iterator[tuple]:
    repo, config, split, revision, index, count = task.location
    shard = hub.stream(repo, config or None, split, revision).shard(num_shards=int(count), index=int(index))
    rows, location = iter(shard), f"{repo}, shard {index}"
    while (row := hub.call_with_retries(lambda: next(rows, None), location, delays=())) is not None:
        yield select_columns(row, task.columns, location)
