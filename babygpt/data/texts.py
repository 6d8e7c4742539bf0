"""Read documents from text files: plain text, jsonl, json, csv and tsv, also compressed, in UTF-8 or other encodings.

A plain-text file is one document, or several with a separator. In the other formats, each object or row is one. If
data cannot be read, a UserError names the file and the location.
"""

import codecs
import csv
import gzip
import io
import json
import lzma
import math
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

from babygpt import files
from babygpt.data import tasks
from babygpt.data.tasks import UNDECODABLE, Task, TextOptions, check_columns, format_of
from babygpt.errors import UserError

BLOCK_BYTES = 1 << 20
BYTE_ORDER_MARKS = {  # those of UTF-32 first, since the one of UTF-16 is its beginning
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


class Utf8Stream(io.RawIOBase):
    """A file in another encoding as a stream of UTF-8."""

    def __init__(self, file: Any, encoding: str):
        self.file, self.decoder, self.buffer = file, codecs.getincrementaldecoder(encoding)(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, out: Any) -> int:
        block = b"-"
        while not self.buffer and block:
            block = self.file.read(BLOCK_BYTES)
            self.buffer = self.decoder.decode(block, final=not block).encode()
        count = min(len(out), len(self.buffer))
        out[:count], self.buffer = self.buffer[:count], self.buffer[count:]
        return count


def open_utf8(path: str, encoding: str | None) -> IO[bytes]:
    """Open the decompressed contents of a file as UTF-8 without a byte order mark.

    The encoding is that of the byte order mark, or `encoding`, or UTF-8, which is not checked here.
    """
    file: Any = files.open_for_reading(path)
    suffix = path.lower()
    if suffix.endswith(".gz"):
        file = gzip.GzipFile(fileobj=file)
    elif suffix.endswith(".xz"):
        file = lzma.LZMAFile(file)  # noqa: SIM115, the caller closes it
    elif suffix.endswith(".zst"):
        import pyarrow as pa

        file = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
    if not hasattr(file, "peek"):
        file = io.BufferedReader(file)
    start = file.peek(4)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), encoding)
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    elif encoding and codecs.lookup(encoding).name != "utf-8":
        return io.BufferedReader(Utf8Stream(file, encoding), BLOCK_BYTES)
    return file


def is_decodable(path: str, encoding: str | None) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open_utf8(path, encoding) as file:
            while block := file.read(BLOCK_BYTES):
                decoder.decode(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def split_text_file(path: str, size: int, columns: tuple[str, ...], options: TextOptions) -> list[Task]:
    """Return tasks of TASK_BYTES each for an uncompressed jsonl file in UTF-8, and otherwise a single task."""
    start = files.read_bytes(path, 0, 3)
    is_utf8 = codecs.lookup(options.encoding or "utf-8").name == "utf-8" and not start.startswith((b"\xff", b"\xfe"))
    if format_of(path) != "jsonl" or is_compressed(path) or not is_utf8 or options.skip_bad:
        return [Task("files", (path,), columns, options=options)]
    starts = range(0, size, tasks.TASK_BYTES)
    return [Task("files", (path,), columns, (i, min(i + tasks.TASK_BYTES, size)), options) for i in starts]


def is_compressed(path: str) -> bool:
    return path.lower().endswith(tasks.COMPRESSION_SUFFIXES)


def read_texts(task: Task) -> Iterator[tuple]:
    """Yield the text of each document of a task in UTF-8, followed by its numbers."""
    readers = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "tsv": _read_csv, "text": _read_plain}
    options = task.options
    for path in task.location:
        reader = readers[format_of(path) or "text"]
        try:
            if options.skip_bad and not is_decodable(path, options.encoding):
                yield (UNDECODABLE, *(math.nan for _ in task.columns[1:]))
                continue
            with open_utf8(path, options.encoding) as file:
                yield from reader(path, file, task)
        except UnicodeDecodeError as error:
            encoding = options.encoding or "UTF-8"
            raise UserError(
                f"{path} is not valid {encoding}: {error}. Set its encoding with --encoding, or skip such files with "
                "--skip-bad."
            ) from None
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"{path} cannot be read and may be corrupted: {error}") from None


def _read_plain(path: str, file: IO[bytes], task: Task) -> Iterator[tuple]:
    if task.columns[1:]:
        raise UserError(
            f"{path} is a text file, so it cannot be filtered by {task.columns[1]!r}. Remove that filter, or use files "
            "of another format."
        )
    pieces = _split(file, task.options.separator.encode()) if task.options.separator else [file.read()]
    for text in pieces:
        text.decode()  # checks that it is UTF-8
        yield (text,)


def _split(file: IO[bytes], separator: bytes) -> Iterator[bytes]:
    buffer, searched = bytearray(), 0  # the separator does not start before `searched`
    while block := file.read(BLOCK_BYTES):
        buffer += block
        while (end := buffer.find(separator, searched)) >= 0:
            yield bytes(buffer[:end])
            del buffer[: end + len(separator)]  # takes no copy
            searched = 0
        searched = max(0, len(buffer) - len(separator) + 1)
    yield bytes(buffer)


def read_objects(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the location and the value of each line of a jsonl file, or of each item of a json file."""
    parse = _parse_jsonl if format_of(path) == "jsonl" else _parse_items
    try:
        with open_utf8(path, None) as file:
            yield from parse(path, file)
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be read and may be corrupted: {error}") from None


def _read_jsonl(path: str, file: IO[bytes], task: Task) -> Iterator[tuple]:
    for location, row in _parse_jsonl(path, file, task.range):
        yield select_columns(row, task.columns, location)


def _parse_jsonl(path: str, file: IO[bytes], limits: tuple[int, int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the location and the value of each line that starts in the range `limits` of bytes."""
    offset, stop = limits or (0, float("inf"))
    from_start = offset == 0  # of the file, so that line numbers are known
    if offset > 0:
        file.seek(offset - 1)
        offset += len(file.readline()) - 1  # a line that starts before the range belongs to the previous task
    mark = file.tell() if from_start and limits else 0  # bytes of a byte order mark, part of the first line
    for number, line in enumerate(file, 1):  # a binary file splits at \n only, not at U+2028 in a text
        if offset >= stop:
            break
        location = f"{path}, line {number}" if from_start else f"{path}, the line at byte {offset:,}"
        offset, mark = offset + len(line) + mark, 0
        if not line.strip():
            continue
        yield location, _parse_json(line, location)


def _read_json(path: str, file: IO[bytes], task: Task) -> Iterator[tuple]:
    for location, row in _parse_items(path, file):
        yield select_columns({task.columns[0]: row} if isinstance(row, str) else row, task.columns, location)


def _parse_items(path: str, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Yield the location and the value of each item of an array, a single object, or lines as in a jsonl file."""
    data = file.read()
    first_line, _, rest = data.lstrip().partition(b"\n")
    if rest.lstrip().startswith(b"{") and first_line.rstrip().endswith(b"}"):
        yield from _parse_jsonl(path, io.BytesIO(data))
        return
    rows = _parse_json(data, path)
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        yield f"{path}, item {number}", row


def _parse_json(data: bytes, location: str) -> Any:
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise UnicodeDecodeError(error.encoding, data, error.start, error.end, f"{error.reason} ({location})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location} is not valid JSON: {error}") from None


def _read_csv(path: str, file: IO[bytes], task: Task) -> Iterator[tuple]:
    csv.field_size_limit(1 << 30)  # characters; the default is 131,072
    text = io.TextIOWrapper(file, "utf-8", newline="")
    if format_of(path) == "tsv":  # without quotes: in text they are ordinary characters
        rows = csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.DictReader(text, strict=True)
    try:
        for row in rows:
            location = f"{path}, line {rows.line_num}"
            for column in task.columns[1:]:
                with suppress(ValueError):  # select_columns reports it
                    if column in row:
                        row[column] = float(row[column]) if row[column] else None
            yield select_columns(row, task.columns, location)
    except csv.Error as error:
        line = rows.reader.line_num
        raise UserError(f"{path}, line {line} is not valid CSV: {error}. Quotes within quotes are doubled.") from None


def select_columns(row: Any, columns: tuple[str, ...], location: str) -> tuple:
    """Return the text of a row in UTF-8, then its numbers."""
    if not isinstance(row, dict):
        raise UserError(f"{location} is not a JSON object: {str(row)[:60]!r}")
    check_columns(columns, list(map(str, row)), location)
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
