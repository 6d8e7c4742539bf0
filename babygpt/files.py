"""Files on this machine, or at any URL that `fsspec` supports: s3://bucket/name, gs://..., sftp://...

>>> with create("s3://bucket/set/set_train_000001.bin") as file: file.write(...)
>>> download("s3://bucket/set", ["set_train_000001.bin"], Path("data/cache/set"), is_current, is_valid)

Writes are atomic: by a rename on this machine, by a single put in an object store. A path without :// is local.
"""

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO

from babygpt.errors import UserError

# a put is atomic in these
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"}
READ_AHEAD = 1 << 20  # bytes; the default of some file systems is up to 50 MB, which they copy for every line
MAX_TRANSFERS = 8  # concurrent
TEMPORARY_SUFFIX = re.compile(r"\.[0-9a-f]{32}\.tmp$")  # of a file that `create` has not committed


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def local_directory(path: str | Path) -> Path:
    """Return the local directory for a path: the path itself, or for a URL its directory below data/cache/."""
    if not is_remote(path):
        return Path(path)
    url = str(path).rstrip("/")
    name = re.sub(r"\W+", "-", url)[-60:].strip("-")  # readable; the hash distinguishes s3://a-b/c from s3://a/b-c
    return Path("data") / "cache" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def _filesystem(url: str | Path):
    """Return the fsspec file system of a URL and the path in it."""
    import fsspec

    protocol = str(url).split("://")[0]
    options = {"use_listings_cache": False} if protocol in OBJECT_STORES else {}  # other processes change the files
    try:
        return fsspec.core.url_to_fs(str(url), **options)
    except ImportError as error:
        raise UserError(f"{url} requires a package that is not installed ({error}). Install it with pip.") from None
    except ValueError as error:
        raise UserError(f"{url} is not supported: {error}") from None


@contextmanager
def _convert_errors(path: str | Path) -> Iterator[None]:
    """Turn the exceptions of a remote file system into UserErrors."""
    try:
        yield
    except Exception as error:  # every file system raises its own types
        if not is_remote(path) or isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read or written ({type(error).__name__}: {error}). Check the path and your credentials."
        ) from None


@contextmanager
def create(path: str | Path) -> Iterator[IO[bytes]]:
    """Create a file atomically: yield a binary file to write to, and commit it unless the block raises."""
    if not is_remote(path):
        temporary_path = (
            f"{path}.{uuid.uuid4().hex}.tmp"  # unique, because a cluster may run a task twice at the same time
        )
        try:
            with open(temporary_path, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary_path, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary_path)
            raise
        return
    with tempfile.NamedTemporaryFile() as file:
        yield file
        file.flush()
        upload(file.name, path)


def write(path: str | Path, data: bytes) -> None:
    """Write a file atomically, locally or at a URL."""
    with create(path) as file:
        file.write(data)


def write_json(path: str | Path, content: dict) -> None:
    """Write a JSON file atomically, locally or at a URL."""
    write(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a local file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload(local: str | Path, url: str | Path) -> None:
    """Copy a local file to a URL."""
    with _convert_errors(url):
        fs, path = _filesystem(url)
        if OBJECT_STORES & ({fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)):
            fs.put_file(str(local), path)
        else:
            fs.makedirs(os.path.dirname(path), exist_ok=True)
            fs.put_file(str(local), f"{path}.tmp")
            fs.mv(f"{path}.tmp", path)


def open_for_reading(path: str | Path) -> IO[bytes]:
    """Open a binary file that supports seek; the caller closes it."""
    if not is_remote(path):
        return open(path, "rb")
    with _convert_errors(path):
        fs, path = _filesystem(path)
        return io.BufferedReader(fs.open(path, "rb", block_size=READ_AHEAD), READ_AHEAD)


def read_bytes(path: str | Path, start: int = 0, stop: int | None = None) -> bytes:
    """Return bytes start ... stop - 1 of a file."""
    with _convert_errors(path):
        if is_remote(path):
            fs, path = _filesystem(path)
            return fs.cat_file(path, start=start, end=stop)
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else stop - start)


def exists(path: str | Path) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    with _convert_errors(path):
        fs, path = _filesystem(path)
        return fs.exists(path)


def size(path: str | Path) -> int:
    """Return the size of a file in bytes."""
    if not is_remote(path):
        return os.path.getsize(path)
    with _convert_errors(path):
        fs, remote_path = _filesystem(path)
        num_bytes = fs.size(remote_path)
    if num_bytes is None:
        raise UserError(
            f"The size of {path} is unknown, because its server does not report it. Download the file first."
        )
    return num_bytes


def version(url: str) -> str:
    """Return a text that changes with the contents of a remote file: its size and its ETag, hash or time."""
    with _convert_errors(url):
        fs, path = _filesystem(url)
        info = fs.info(path)
    return " ".join(str(info.get(key)) for key in ("size", "ETag", "etag", "md5Hash", "LastModified", "mtime"))


def list_names(directory: str | Path) -> list[str]:
    """Return the sorted names of the files in a directory; an empty list if there is no such directory."""
    if not is_remote(directory):
        if not os.path.isdir(directory):
            return []
        return sorted(entry.name for entry in os.scandir(directory) if entry.is_file())
    with _convert_errors(directory):
        fs, path = _filesystem(directory)
        try:
            entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return sorted(os.path.basename(entry["name"]) for entry in entries if entry["type"] == "file")


def glob(pattern: str) -> list[str]:
    """Return the sorted URLs of the remote files that a pattern matches, or of a file or all files of a directory."""
    with _convert_errors(pattern):
        fs, path = _filesystem(pattern)
        if fs.isfile(path):
            paths = [path]
        else:
            paths = fs.find(path) if fs.isdir(path) else [p for p in fs.glob(path) if fs.isfile(p)]
        return sorted(map(fs.unstrip_protocol, paths))


def remove(path: str | Path) -> None:
    """Delete a file, or a directory with its contents, if it exists."""
    if is_remote(path):
        with _convert_errors(path), suppress(FileNotFoundError):
            fs, remote_path = _filesystem(path)
            fs.rm(escape(remote_path), recursive=True)  # escaped, because rm takes a pattern
    elif os.path.isdir(path):
        shutil.rmtree(os.path.realpath(path))  # for a symbolic link, the directory that it points to
        if os.path.islink(path):
            os.unlink(path)
    else:
        Path(path).unlink(missing_ok=True)


def download(
    url: str, names: list[str], directory: Path, is_current: Callable[[Path], bool], is_valid: Callable[[Path], bool],
    quiet: bool = False,
) -> None:  # fmt: skip
    """Download files of a remote directory to `directory`, several at the same time.

    An existing file is kept if `is_current(path)`. A downloaded file that is not `is_valid(path)` is a UserError.
    """
    from tqdm import tqdm

    def download_file(name: str) -> None:
        path = directory / name
        if path.exists() and is_current(path):
            return
        with create(path) as file, _convert_errors(f"{url}/{name}"):
            fs, remote_path = _filesystem(f"{url}/{name}")
            fs.get_file(remote_path, file.name)
        if not is_valid(path):
            path.unlink()
            raise UserError(f"{url}/{name} is corrupted: its sha256 is not the one in the manifest. Upload it again.")

    with ThreadPoolExecutor(MAX_TRANSFERS) as threads:
        downloads = threads.map(download_file, names)
        for _ in tqdm(downloads, total=len(names), desc=f"download {url}", unit="file", disable=quiet):
            pass
