"""workers.py: the same bytes from a Ray cluster of two machines as from the processes of one."""

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
    """The address of a Ray cluster of two nodes with one core each; an S3 server's is in their environment."""
    with s3_server(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        yield nodes.address
        nodes.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> tuple[Path, tuple]:
    """A data set made by this machine's processes, and the arguments that made it but for --out-dir."""
    folder = tmp_path_factory.mktemp("local")
    save_pages(folder / "pages", "jsonl")
    train_tokenizer(TEXTS, 300, folder / "bpe.json", progress=False)
    arguments = ("files", "--input", folder / "pages", "--tokenizer", folder / "bpe.json", *OPTIONS)
    call(fineweb.main, *arguments, "--out-dir", folder / "set")
    return folder / "set", arguments


@with_ray
def test_tasks_are_done_on_all_machines_and_a_mistake_is_told_as_it_was_raised(cluster):
    def where(seconds: float) -> str:
        import ray

        time.sleep(seconds)
        return ray.get_runtime_context().get_node_id()

    def fails() -> None:
        raise UserError("this page is no text")

    with ray_workers(cluster, Setup(load_tokenizer("gpt2"))) as pool:
        assert (pool.workers, pool.is_cluster) == (2, True)
        assert len({future.result() for future in [pool.submit(where, 0.2) for _ in range(8)]}) == 2
        with pytest.raises(UserError, match=r"^this page is no text$"):
            pool.submit(fails).result()


@with_ray
def test_the_same_bytes_on_a_shared_disk(cluster, local, tmp_path):
    folder, arguments = local
    call(fineweb.main, *arguments, "--out-dir", tmp_path / "set", "--engine", "ray", "--address", cluster)
    assert snapshot(tmp_path / "set") == snapshot(folder)


@with_ray
def test_the_same_bytes_in_an_object_store(cluster, local, tmp_path, monkeypatch):
    folder, arguments = local
    monkeypatch.chdir(tmp_path)
    system = fsspec.filesystem("s3", use_listings_cache=False)
    system.mkdir("ray-bucket")
    call(fineweb.main, *arguments, "--out-dir", "s3://ray-bucket/set", "--engine", "ray", "--address", cluster)
    names = system.find("ray-bucket/set")
    assert {os.path.basename(name): system.cat_file(name) for name in names} == snapshot(folder)


@with_ray
def test_without_a_cluster_it_says_how_to_start_one(local, tmp_path):
    with pytest.raises(UserError, match="ray start --head"):
        call(fineweb.main, *local[1], "--out-dir", tmp_path / "set", "--engine", "ray", "--address", "127.0.0.1:1")


def test_a_path_with_a_space_is_refused_where_ray_would_wait_for_ever(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/home/a person/bin/python")
    with (
        pytest.raises(UserError, match="a person/bin/python"),
        ray_workers("127.0.0.1:1", Setup(load_tokenizer("gpt2"))),
    ):
        pass
