"""Whether torch.compile pays for a run, and where compiled code is cached.

>>> config = variant(config, training={"compile": resolve(config, lambda: build_model(config.model), ranks)})
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from babygpt.console import console
from babygpt.training.device import autocast
from babygpt.training.distributed import Ranks
from babygpt.training.run_dir import read_config

CACHE_DIR = Path.home() / ".cache" / "babygpt" / "inductor"  # not in /tmp, so that a resume finds the compiled code
# of small models on two CPU cores (results/speed/compile-cpu.md)
CPU_COMPILE_SECONDS = 120  # without a cache
CPU_STEP_RATIO = 0.8  # duration of a compiled step relative to an eager one
MAX_TOKENS = 4096  # in the passes that estimate the duration of a run


def resolve(config: Any, build: Callable[[], nn.Module], ranks: Ranks) -> str:
    """Return --training.compile as "on" or "off". `config` is a train_config.Config, `build` returns its model.

    With "auto", a model is compiled on CUDA, and on a CPU if this saves more time than compiling takes. A run that
    resumes on a CPU keeps the decision in its config.json, so that it stays bitwise equal to an uninterrupted run.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE_DIR))
    setting = config.training.compile
    if setting != "auto":
        return setting
    if ranks.device.type != "cpu":
        return "on" if ranks.device.type == "cuda" else "off"
    earlier = read_config(config.general.out_dir / "config.json").get("training", {}).get("compile")
    if earlier in ("on", "off"):
        return earlier
    pays = False
    if ranks.is_main and can_compile_for_cpu():
        seconds = estimate_seconds(config, build(), ranks.world_size)
        pays = seconds * (1 - CPU_STEP_RATIO) > CPU_COMPILE_SECONDS
        if pays:
            console.info(f"Compiling the model: without this, the run would take about {seconds / 60:,.0f} minutes")
    return "on" if ranks.gather(float(pays))[0] else "off"  # the decision of rank 0


def can_compile_for_cpu() -> bool:
    """Return whether PyTorch's compiler for CPUs has been tested on this system and finds a C++ compiler."""
    return sys.platform == "linux" and any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))


def estimate_seconds(config: Any, model: nn.Module, world_size: int) -> float:
    """Return the seconds that all steps take, from a forward and backward pass on random rows."""
    training, T = config.training, config.model.block_size
    rows = torch.randint(config.model.vocab_size, (min(training.micro_batch_size, max(1, MAX_TOKENS // T)), T + 1))
    for _ in range(2):  # the first pass allocates memory
        start = time.perf_counter()
        with autocast(rows.device, training.dtype):
            loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
    seconds_per_row = (time.perf_counter() - start) / len(rows)
    return seconds_per_row * (training.batch_tokens // T // world_size) * training.max_steps
