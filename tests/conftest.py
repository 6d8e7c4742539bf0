"""Fixtures of all tests: a small dataset and a training run on it, each made once."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # tests run several processes; more threads than cores would slow them down

import random
from pathlib import Path

import pytest
from support.helpers import call
from support.runs import flags, make_tiny_dataset

import train
from babygpt.training import metrics


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """30 documents of a few made-up sentences."""
    words = ("the a of and model data token loss step train shard reads writes small large old new is was over").split()  # noqa: SIM905
    rng = random.Random(0)
    return [" ".join(rng.choices(words, k=rng.randint(15, 60))) + "." for _ in range(30)]


@pytest.fixture(scope="session")
def dataset(texts, tmp_path_factory) -> Path:
    """The directory of a dataset of about 2,300 training tokens, with a trained vocabulary of 300."""
    return make_tiny_dataset(texts, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def uninterrupted_run(dataset, tmp_path_factory) -> Path:
    """The run directory of an uninterrupted run of train.py, with a checkpoint after every step."""
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    call(train.main, *flags(dataset, out))
    return out


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Skip plot.png, which takes most of the time of a small run. The session fixture `uninterrupted_run` draws it."""
    monkeypatch.setattr(metrics, "plot", lambda runs, out: None)
