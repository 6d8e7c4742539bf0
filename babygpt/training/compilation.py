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
# results/speed/compile-cpu.md: small models on two cores compile in 31 to 41 s, and their compiled steps take 0.92 to
# 1.14 of the time. So it is tried if the most that it might save is worth the attempt.
CPU_COMPILE_SECONDS = 60
MAX_SAVING = 0.25  # fraction of the time


def resolve(config: Any, build: Callable[[], nn.Module], ranks: Ranks) -> str:
    """Return --training.compile as "on" or "off". `config` is a train_config.Config, `build` returns its model.

    With "auto", a model is compiled on CUDA, and on a CPU if the run is long and its compiled step is faster. A run
    that resumes on a CPU keeps the decision in its config.json, so that it stays bitwise equal to an uninterrupted run.
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
    pays = ranks.is_main and can_compile_for_cpu() and compiling_pays(config, build(), ranks.world_size)
    return "on" if ranks.gather(float(pays))[0] else "off"  # the decision of rank 0


def can_compile_for_cpu() -> bool:
    """Return whether PyTorch's compiler for CPUs has been tested on this system and finds a C++ compiler."""
    return sys.platform == "linux" and any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))


def compiling_pays(config: Any, model: nn.Module, world_size: int) -> bool:
    """Return whether the compiled model is faster, tried only if the run is long enough. Changes gradients."""
    training, T = config.training, config.model.block_size
    model.bf16_activations = training.bf16_activations
    model.activation_checkpointing = training.activation_checkpointing
    rows = torch.randint(config.model.vocab_size, (training.micro_batch_size, T + 1))
    seconds = time_pass(model, rows, training.dtype)
    passes = training.batch_tokens // T // world_size / len(rows) * training.max_steps
    if seconds * passes * MAX_SAVING < CPU_COMPILE_SECONDS:
        return False
    console.info(
        f"Training takes about {seconds * passes / 60:,.0f} minutes. Compiling the model to see if it gets faster"
    )
    try:
        compiled_seconds = time_pass(torch.compile(model, dynamic=False), rows, training.dtype)
    except RuntimeError as error:  # of the C++ compiler, for instance
        console.warning(f"The model cannot be compiled, so training is not compiled: {error!r:.300}")
        return False
    console.info(f"A pass takes {1e3 * seconds:,.0f} ms, compiled {1e3 * compiled_seconds:,.0f} ms")
    return compiled_seconds < seconds


def time_pass(model: Callable[..., torch.Tensor], rows: torch.Tensor, dtype: str) -> float:
    """Return the least seconds of a forward and a backward pass on rows (B, T + 1) int64, after one to warm up."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        with autocast(rows.device, dtype):
            loss = model(rows[:, :-1], rows[:, 1:], reduction="sum")
        loss.backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
