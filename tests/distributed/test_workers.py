"""workers.py: a Ray cluster of two nodes writes the same bytes as local processes."""

import os
import sys
import time
from pathlib import Path

import fsspec
import pytest
from support.helpers import call
from support.s3_server import TEXTS, s3_server, save_pages, snapshot

import fineweb
from babygpt.data.tokenizer import load_tokenizer
from babygpt.data.workers import Setup, ray_workers
from babygpt.errors import UserError
from tools.train_tokenizer import train_tokenizer

OPTIONS = ("--val-tokens", 300, "--shard-tokens", 2000)
with_ray = pytest.mark.skipif(" " in sys.executable, reason="Ray can't start workers from a path with a space")


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray cluster of two nodes with one core each, and an S3 server in their environment."""
    with s3_server(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        yield nodes.address
        nodes.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> tuple[Path, tuple]:
    """A dataset prepared by local processes, and the arguments of its preparation except for --out-dir."""
    directory = tmp_path_factory.mktemp("local")
    save_pages(directory / "pages", "jsonl")
    train_tokenizer(TEXTS, 300, directory / "bpe.json", progress=False)
    arguments = ("files", "--input", directory / "pages", "--tokenizer", directory / "bpe.json", *OPTIONS)
    call(fineweb.main, *arguments, "--out-dir", directory / "set")
    return directory / "set", arguments


@with_ray
def test_ray_runs_tasks_on_all_nodes_and_raises_their_errors(cluster):
    def node_id(seconds: float) -> str:
        import ray

        time.sleep(seconds)
        return ray.get_runtime_context().get_node_id()

    def fail() -> None:
        raise UserError("this page is not text")

    with ray_workers(cluster, Setup(load_tokenizer("gpt2"))) as pool:
        assert (pool.workers, pool.is_cluster) == (2, True)
        assert len({future.result() for future in [pool.submit(node_id, 0.2) for _ in range(8)]}) == 2
        with pytest.raises(UserError, match=r"^this page is not text$"):
            pool.submit(fail).result()


@with_ray
def test_ray_writes_the_same_bytes_to_a_shared_disk(cluster, local, tmp_path):
    directory, arguments = local
    call(fineweb.main, *arguments, "--out-dir", tmp_path / "set", "--engine", "ray", "--address", cluster)
    assert snapshot(tmp_path / "set") == snapshot(directory)


@with_ray
def test_ray_writes_the_same_bytes_to_an_object_store(cluster, local, tmp_path, monkeypatch):
    directory, arguments = local
    monkeypatch.chdir(tmp_path)
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    fs.mkdir("ray-bucket")
    call(fineweb.main, *arguments, "--out-dir", "s3://ray-bucket/set", "--engine", "ray", "--address", cluster)
    names = fs.find("ray-bucket/set")
    assert {os.path.basename(name): fs.cat_file(name) for name in names} == snapshot(directory)


@with_ray
def test_without_a_cluster_the_error_says_how_to_start_one(local, tmp_path):
    with pytest.raises(UserError, match="ray start --head"):
        call(fineweb.main, *local[1], "--out-dir", tmp_path / "set", "--engine", "ray", "--address", "127.0.0.1:1")


def test_python_path_with_a_space_is_rejected(monkeypatch):
    """Ray would wait forever for its workers."""
    monkeypatch.setattr(sys, "executable", "/home/user name/bin/python")
    with (
        pytest.raises(UserError, match="user name/bin/python"),
        ray_workers("127.0.0.1:1", Setup(load_tokenizer("gpt2"))),
    ):
        pass
