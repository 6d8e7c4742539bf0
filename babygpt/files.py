"""Files on this machine or, by a URL, wherever `fsspec` reaches: s3://bucket/name, gs://..., sftp://...

>>> with create("s3://bucket/set/set_train_000001.bin") as file: file.write(...)
>>> folder = pull("s3://bucket/set", ["set_train_000001.bin"], Path("data/cache/set"))

A file is committed whole or not at all, here by a rename, in an object store as it is put. A path without :// is a
file of this machine.
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

# a put is whole or not at all there
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"}
READ_AHEAD = 1 << 20  # bytes; the file systems' own is up to 50 MB, and they copy it for every line
AT_ONCE = 8  # transfers
TEMPORARY_SUFFIX = re.compile(r"\.[0-9a-f]{32}\.tmp$")  # end of the name of a file that `create` has not finished


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def local_directory(path: str | Path) -> Path:
    """The folder of this machine that stands for a path: the path itself, or of a URL one under data/cache/."""
    if not is_remote(path):
        return Path(path)
    url = str(path).rstrip("/")
    name = re.sub(r"\W+", "-", url)[-60:].strip("-")  # to read; the hash tells s3://a-b/c from s3://a/b-c
    return Path("data") / "cache" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def _system(url: str | Path):
    """The file system of a URL and the path in it."""
    import fsspec

    protocol = str(url).split("://")[0]
    options = {"use_listings_cache": False} if protocol in OBJECT_STORES else {}  # somebody else may change them
    try:
        return fsspec.core.url_to_fs(str(url), **options)
    except ImportError as error:
        raise UserError(f"{url} needs another package: {error}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


@contextmanager
def _told(path: str | Path) -> Iterator[None]:
    """What goes wrong with a file far away, in one message."""
    try:
        yield
    except Exception as error:  # each file system raises its own kinds
        if not is_remote(path) or isinstance(error, UserError):
            raise
        raise UserError(f"{path} can't be reached or written: {type(error).__name__}: {error}") from None


@contextmanager
def create(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file to write to: there whole once the block has ended, not at all where it fails."""
    if not is_remote(path):
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"  # a cluster may have a task done twice at once
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        return
    with tempfile.NamedTemporaryFile() as file:
        yield file
        file.flush()
        put(file.name, path)


def write(path: str | Path, data: bytes) -> None:
    """Write a file atomically, locally or at a URL."""
    with create(path) as file:
        file.write(data)


def write_json(path: str | Path, content: dict) -> None:
    """Writes JSON, here or at a URL, whole or not at all."""
    write(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a local file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put(local: str | Path, url: str | Path) -> None:
    """Copies a file of this machine to a URL."""
    with _told(url):
        system, path = _system(url)
        if OBJECT_STORES & ({system.protocol} if isinstance(system.protocol, str) else set(system.protocol)):
            system.put_file(str(local), path)
        else:
            system.makedirs(os.path.dirname(path), exist_ok=True)
            system.put_file(str(local), f"{path}.tmp")
            system.mv(f"{path}.tmp", path)


def reading(path: str | Path) -> IO[bytes]:
    """A binary file to read from, with seek; to be closed."""
    if not is_remote(path):
        return open(path, "rb")
    with _told(path):
        system, path = _system(path)
        return io.BufferedReader(system.open(path, "rb", block_size=READ_AHEAD), READ_AHEAD)


def read_bytes(path: str | Path, start: int = 0, stop: int | None = None) -> bytes:
    """A file's bytes start ... stop - 1."""
    with _told(path):
        if is_remote(path):
            system, path = _system(path)
            return system.cat_file(path, start=start, end=stop)
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(-1 if stop is None else stop - start)


def exists(path: str | Path) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    with _told(path):
        system, path = _system(path)
        return system.exists(path)


def size(path: str | Path) -> int:
    """Bytes of a file."""
    if not is_remote(path):
        return os.path.getsize(path)
    with _told(path):
        system, there = _system(path)
        found = system.size(there)
    if found is None:
        raise UserError(f"{path}: its server doesn't tell how large it is. Download it first.")
    return found


def state(path: str | Path) -> str:
    """What tells the contents of a remote file from others': its size, and the tag or time that its system gives."""
    with _told(path):
        system, there = _system(path)
        info = system.info(there)
    return " ".join(str(info.get(key)) for key in ("size", "ETag", "etag", "md5Hash", "LastModified", "mtime"))


def list_names(folder: str | Path) -> list[str]:
    """The names of a folder's files, sorted; none where there is no folder."""
    if not is_remote(folder):
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_file()) if os.path.isdir(folder) else []
    with _told(folder):
        system, path = _system(folder)
        try:
            found = system.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return sorted(os.path.basename(entry["name"]) for entry in found if entry["type"] == "file")


def glob(pattern: str) -> list[str]:
    """URLs of the files that a pattern, a file or a folder far away names, sorted."""
    with _told(pattern):
        system, path = _system(pattern)
        if system.isfile(path):
            found = [path]
        else:
            found = system.find(path) if system.isdir(path) else [f for f in system.glob(path) if system.isfile(f)]
        return sorted(map(system.unstrip_protocol, found))


def remove(path: str | Path) -> None:
    """Deletes a file or a folder with all that is in it; nothing where there is none."""
    if is_remote(path):
        with _told(path), suppress(FileNotFoundError):
            system, there = _system(path)
            system.rm(escape(there), recursive=True)  # it takes patterns
    elif os.path.isdir(path):
        shutil.rmtree(os.path.realpath(path))  # of a link, what is there
        if os.path.islink(path):
            os.unlink(path)
    else:
        Path(path).unlink(missing_ok=True)


def pull(
    url: str, names: list[str], folder: Path, is_here: Callable[[Path], bool], is_sound: Callable[[Path], bool],
    quiet: bool = False,
) -> None:  # fmt: skip
    """Brings files of a folder far away to `folder`, several at once: those for which `is_here` doesn't hold, and
    which must then be `is_sound`."""
    from tqdm import tqdm

    def fetch(name: str) -> None:
        path = folder / name
        if path.exists() and is_here(path):
            return
        with create(path) as file, _told(f"{url}/{name}"):
            system, there = _system(f"{url}/{name}")
            system.get_file(there, file.name)
        if not is_sound(path):
            path.unlink()
            raise UserError(f"{url}/{name} is damaged: it is not what the manifest beside it says.")

    with ThreadPoolExecutor(AT_ONCE) as threads:
        for _ in tqdm(threads.map(fetch, names), total=len(names), desc=f"pull {url}", unit="file", disable=quiet):
            pass
