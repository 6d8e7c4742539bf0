"""A small data set, made once for all tests."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # small models, several processes: more threads would only wait for each other

import random
from pathlib import Path

import pytest
from helpers import call, save_jsonl

import fineweb
import tokenizer
import train
from runs import flags


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """30 documents of a few made-up sentences."""
    words = ("the a of and model data token loss step train shard reads writes small large old new is was over").split()  # noqa: SIM905
    rng = random.Random(0)
    return [" ".join(rng.choices(words, k=rng.randint(15, 60))) + "." for _ in range(30)]


@pytest.fixture(scope="session")
def dataset(texts, tmp_path_factory) -> Path:
    """A folder with shards of about 2,300 training tokens, from a trained vocabulary of 300."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer.train(texts, 300, folder / "bpe.json", progress=False)
    save_jsonl(folder / "texts.jsonl", texts)
    call(
        fineweb.main, "files", "--input", folder / "texts.jsonl", "--tokenizer", folder / "bpe.json",
        "--out-dir", folder / "tiny", "--val-tokens", 300, "--workers", 1,
    )  # fmt: skip
    return folder / "tiny"


@pytest.fixture(scope="session")
def unbroken(dataset, tmp_path_factory) -> Path:
    """A run of train.py that nothing interrupted, with a checkpoint behind every step."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    call(train.main, *flags(dataset, out))
    return out
