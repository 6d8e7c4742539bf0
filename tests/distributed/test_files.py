"""files.py: datasets in object stores, on a local S3 server: the bytes of a local dataset, only complete files."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest
from support.helpers import call, save
from support.s3_server import s3_server, save_pages, snapshot

import fineweb
from babygpt import files
from babygpt.data.shards import MANIFEST, open_dataset
from babygpt.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def requests():
    """The requests that the S3 server received."""
    with s3_server() as requests:
        yield requests


@pytest.fixture
def bucket(requests, request) -> str:
    name = f"bucket-{abs(hash(request.node.name))}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    return save_pages(tmp_path_factory.mktemp("pages"), "jsonl.gz")


OPTIONS = ("--val-tokens", 300, "--shard-tokens", 2000, "--workers", 2)


@pytest.fixture(scope="module")
def local(pages, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("local") / "set"
    call(fineweb.main, "files", "--input", pages, "--out-dir", directory, *OPTIONS)
    return directory


def start(cwd: Path, *arguments) -> subprocess.Popen:
    """Start fineweb.py in its own working directory, which also contains its cache."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, str(ROOT / "fineweb.py"), *map(str, arguments)], cwd=cwd, **pipes)


def prepare(cwd: Path, *arguments) -> None:
    process = start(cwd, *arguments)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr


def contents(url: str) -> dict[str, bytes]:
    """Return the bytes of all files below a URL, by path."""
    system, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {name.split(path.rstrip("/") + "/")[-1]: system.cat_file(name) for name in system.find(path)}


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_remote_dataset_has_the_bytes_of_a_local_one(bucket, tmp_path, pages, local, kind):
    url = f"{bucket}/set" if kind == "s3" else f"file://{tmp_path}/remote/set"
    prepare(tmp_path, "files", "--input", pages, "--out-dir", url, *OPTIONS)
    assert contents(url) == snapshot(local)
    assert not list(tmp_path.rglob("parts"))


def test_documents_are_read_from_an_object_store(bucket, tmp_path, pages, local):
    fsspec.filesystem("s3").put([str(p) for p in pages.iterdir()], f"{bucket}/raw/")
    prepare(tmp_path, "files", "--input", f"{bucket}/raw/*.jsonl.gz", "--out-dir", tmp_path / "set", *OPTIONS)
    assert snapshot(tmp_path / "set") == snapshot(local)


def test_killed_remote_preparation_resumes_on_another_machine(bucket, tmp_path, pages, local):
    url, system = f"{bucket}/set", fsspec.filesystem("s3", use_listings_cache=False)
    arguments = ("files", "--input", pages, "--out-dir", url, *OPTIONS)
    process = start(tmp_path, *arguments)
    while process.poll() is None and not (system.exists(f"{url}/parts") and "npz" in str(system.ls(f"{url}/parts"))):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    before = contents(f"{url}/parts")
    assert MANIFEST not in contents(url)
    (tmp_path / "another machine").mkdir()
    prepare(tmp_path / "another machine", *arguments)
    assert any(name.endswith(".npz") for name in before)
    assert contents(url) == snapshot(local)


@pytest.fixture
def remote(bucket, local, tmp_path, monkeypatch) -> str:
    """The URL of the dataset in the bucket; the cache is in tmp_path."""
    fsspec.filesystem("s3").put([str(p) for p in local.iterdir()], f"{bucket}/set/")
    monkeypatch.chdir(tmp_path)
    return f"{bucket}/set"


def test_remote_dataset_is_downloaded_once_and_verified(remote, local):
    expected, dataset = open_dataset(local), open_dataset(remote)
    assert dataset.fingerprint == expected.fingerprint
    assert dataset.train.read(0, len(dataset.train)).tolist() == expected.train.read(0, len(expected.train)).tolist()
    fsspec.filesystem("s3").rm([f"{remote}/{path.name}" for path in local.glob("*.bin")])
    assert open_dataset(remote).fingerprint == expected.fingerprint  # nothing is downloaded again
    call(fineweb.main, "verify", remote)


def test_changed_file_of_the_cache_is_downloaded_again(remote, local):
    directory = open_dataset(remote).directory
    shard = next(directory.glob("*_train_*.bin"))
    with open(shard, "r+b") as file:
        file.seek(1100)
        file.write(b"\xff\xff")
    os.utime(shard, (1, 1))
    open_dataset(remote)
    assert shard.read_bytes() == (local / shard.name).read_bytes()


@pytest.mark.parametrize("damage", ["changed byte", "truncated", "missing"])
def test_corrupted_or_missing_remote_shard_is_named_in_the_error(remote, local, damage):
    name, system = "set_train_000002.bin", fsspec.filesystem("s3")
    data = (local / name).read_bytes()
    if damage == "missing":
        system.rm(f"{remote}/{name}")
    else:
        system.pipe_file(
            f"{remote}/{name}", data[:-7] if damage == "truncated" else data[:1500] + b"\0\1" + data[1502:]
        )
    with pytest.raises(UserError, match=name):
        open_dataset(remote)
    assert not (files.local_directory(remote) / name).exists()


def test_remote_shards_without_a_manifest_open(bucket, local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fsspec.filesystem("s3").put([str(p) for p in local.glob("*.bin")], f"{bucket}/set/")
    assert len(open_dataset(f"{bucket}/set").train) == len(open_dataset(local).train)


def test_ranks_of_a_node_download_every_shard_once(remote, tmp_path, requests, local):
    code = "import sys; sys.path.insert(0, sys.argv[2]); from babygpt.data.shards import open_dataset; "
    code += "open_dataset(sys.argv[1])"
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, remote, str(ROOT)], env=os.environ | {"LOCAL_RANK": str(rank)},
                         cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]  # fmt: skip
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], errors
    assert sum(error.count("download ") > 0 for error in errors) == 1  # one progress bar
    gets = [path for method, path in requests if method == "GET" and path.startswith(remote.removeprefix("s3:/"))]
    gets = [path for path in gets if path.endswith(".bin")]
    assert sorted(gets) == sorted(f"/{remote.removeprefix('s3://')}/{path.name}" for path in local.glob("*.bin"))


@pytest.mark.parametrize(
    ("url", "message"), [("s3://no-such-bucket/set", "no dataset at"), ("nosuch://bucket/set", "Protocol not known")]
)
def test_missing_bucket_or_protocol_is_one_message(requests, tmp_path, pages, url, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        open_dataset(url)
    process = start(tmp_path, "files", "--input", pages, "--out-dir", url, *OPTIONS)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in stderr


def test_create_is_atomic(bucket, tmp_path):
    for path in (f"{bucket}/a.bin", f"file://{tmp_path}/a.bin", str(tmp_path / "b.bin")):
        with suppress(ZeroDivisionError), files.create(path) as file:
            file.write(b"incomplete")
            raise ZeroDivisionError
        assert not files.exists(path)
        with files.create(path) as file:
            file.write(b"complete")
        assert files.read_bytes(path) == b"complete"
        assert files.read_bytes(path, 1, 3) == b"om"
        files.remove(path)
        files.remove(path)  # removing a missing file is not an error
        assert not files.exists(path)


def test_names_are_not_glob_patterns(bucket):
    for name in ("a[bc]/x", "ab/x", "ac/x"):
        with files.create(f"{bucket}/{name}") as file:
            file.write(b"x")
    files.remove(f"{bucket}/a[bc]")
    assert [files.list_names(f"{bucket}/{name}") for name in ("a[bc]", "ab", "ac")] == [[], ["x"], ["x"]]


def test_every_url_has_its_own_cache():
    urls = ("s3://a/b/c", "s3://a-b/c", "s3://a/b-c", "gs://a/b/c")
    assert len({files.local_directory(url) for url in urls}) == 4
    assert files.local_directory("s3://a/b/c/") == files.local_directory("s3://a/b/c")


def test_trailing_slash_of_a_url_has_no_effect(bucket, tmp_path, pages, local, monkeypatch):
    prepare(tmp_path, "files", "--input", pages, "--out-dir", f"{bucket}/set/", *OPTIONS)
    assert contents(f"{bucket}/set") == snapshot(local)
    monkeypatch.chdir(tmp_path)
    assert open_dataset(f"{bucket}/set/").fingerprint == open_dataset(local).fingerprint


def test_cache_follows_changed_shards_without_a_manifest(bucket, local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    system, shards = fsspec.filesystem("s3"), sorted(local.glob("*_train_*.bin"))
    system.put([str(path) for path in local.glob("*.bin")], f"{bucket}/set/")
    open_dataset(f"{bucket}/set")
    data = bytearray(shards[0].read_bytes())
    data[1024:1026] = b"\7\7"
    system.pipe_file(f"{bucket}/set/{shards[0].name}", bytes(data))
    system.rm(f"{bucket}/set/{shards[1].name}")
    dataset = open_dataset(f"{bucket}/set")
    assert dataset.train.read(0, 1).tolist() == [0x0707]
    assert len(dataset.train.shards) == len(shards) - 1


def test_incomplete_remote_dataset_is_not_opened(bucket, local, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    system = fsspec.filesystem("s3")
    system.put([str(path) for path in local.glob("*.bin")], f"{bucket}/set/")
    system.pipe_file(f"{bucket}/set/parts/settings.json", b"{}")
    with pytest.raises(UserError, match="is incomplete"):
        open_dataset(f"{bucket}/set")


def test_list_names_returns_files_only(tmp_path):
    save(tmp_path / "d" / "a", b"")
    save(tmp_path / "d" / "e" / "b", b"")
    for directory in (str(tmp_path / "d"), f"file://{tmp_path}/d"):
        assert files.list_names(directory) == ["a"]
        assert files.list_names(directory + "/none") == []
