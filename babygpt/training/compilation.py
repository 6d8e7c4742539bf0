"""Whether torch.compile pays for a run, and where compiled code is cached.

>>> setting = resolve(config, model, ranks, launches, first_step)  # "on" or "off"
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from babygpt.console import console
from babygpt.training.device import autocast, make_deterministic
from babygpt.training.distributed import Ranks
from babygpt.training.run_dir import provenance

CACHE_DIR = "~/.cache/babygpt/inductor"  # of CPU code; not in /tmp, so that a resume finds it
# Small models on two cores compile in 31 to 41 s (results/speed/compile-cpu.md), and not all of them get faster. So it
# is tried if the most that it might save is worth the attempt.
CPU_COMPILE_SECONDS = 60
MAX_SAVING = 0.25  # fraction of the time
SLOW_SECONDS = 5  # after this time, no further pass is timed
MIN_GAIN = 0.95  # of the eager time; a smaller difference is noise
SAME_MACHINE = ("device", "bfloat16", "ranks", "threads")  # fields of provenance that must be equal for equal results


def resolve(
    config: Any, model: nn.Module, ranks: Ranks, launches: Sequence[dict] = (), first_step: int = 0
) -> str:  # fmt: skip
    """Return --training.compile as "on" or "off". `config` is a train_config.Config.

    With "auto", a model is compiled on CUDA, and on a CPU if there is one rank, many steps remain, and the compiled
    step is faster. If the last of `launches` had the same kind of CPU, threads and ranks, its decision is repeated, so
    that a resumed run stays bitwise equal to an uninterrupted one. For the same reason, a compiled run on a CPU uses
    deterministic kernels only: otherwise, several threads sum the gradients of embeddings in varying order. Earlier
    versions recorded "auto" and did not compile on a CPU.
    """
    setting, is_cpu = config.training.compile, ranks.device.type == "cpu"
    if is_cpu:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser(CACHE_DIR))
    if is_cpu and setting == "on":
        make_deterministic()
    if setting != "auto":
        return setting
    if not is_cpu:
        return "on" if ranks.device.type == "cuda" else "off"
    if ranks.world_size > 1 or not can_compile_for_cpu():
        return "off"
    here = provenance(ranks)
    if launches and all(launches[-1]["provenance"].get(name) == here[name] for name in SAME_MACHINE):
        pays = launches[-1]["config"]["training"]["compile"] == "on"
    else:
        make_deterministic()
        pays = compiling_pays(config, model, config.training.max_steps - first_step)
        model.zero_grad(set_to_none=True)
    make_deterministic(pays or config.general.deterministic)
    return "on" if pays else "off"


def can_compile_for_cpu() -> bool:
    """Return whether the system is Linux and has the C++ compiler that Inductor calls."""
    return sys.platform == "linux" and shutil.which(os.environ.get("CXX", "g++")) is not None


def compiling_pays(config: Any, model: nn.Module, steps: int) -> bool:
    """Return whether the compiled model is faster, tried only if `steps` training steps take long enough."""
    training, T = config.training, config.model.block_size
    rows = torch.randint(config.model.vocab_size, (training.micro_batch_size, T + 1))
    seconds = time_pass(model, rows, training.dtype)
    passes = training.batch_tokens // T / len(rows) * steps
    if seconds * passes * MAX_SAVING < CPU_COMPILE_SECONDS:
        return False
    console.info(
        f"Training takes about {seconds * passes / 60:,.0f} minutes. Compiling the model to see if it gets faster"
    )
    try:
        compiled_seconds = time_pass(torch.compile(model, dynamic=False), rows, training.dtype)
    except (RuntimeError, OSError) as error:  # of the C++ compiler, for instance
        console.warning(f"The model cannot be compiled, so training is not compiled: {error!r:.300}")
        return False
    finally:
        torch._dynamo.reset()  # training compiles anew, from the cache: a resumed run has no trial
    console.info(f"A pass takes {1e3 * seconds:,.0f} ms, compiled {1e3 * compiled_seconds:,.0f} ms")
    return compiled_seconds < MIN_GAIN * seconds


def time_pass(model: Callable[..., torch.Tensor], rows: torch.Tensor, dtype: str) -> float:
    """Return the least seconds of a forward and a backward pass on rows (B, T + 1) int64, after one to warm up.

    Up to three passes are timed; after SLOW_SECONDS in total, no further one is started.
    """
    seconds = list[float]()
    while len(seconds) < 2 or (len(seconds) < 4 and sum(seconds[1:]) < SLOW_SECONDS):
        start = time.perf_counter()
        with autocast(rows.device, dtype):
            loss = model(rows[:, :-1], rows[:, 1:], reduction="sum")
        loss.backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
