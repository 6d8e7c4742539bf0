"""Ranks: identity, collectives, and start and shutdown of the process group.

>>> with process_group("auto") as ranks:
...     console.info(f"{ranks.world_size} ranks on {ranks.device}")
"""

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from babygpt.console import console
from babygpt.errors import ConfigError, UserError
from babygpt.training.device import (
    choose_device,
    device_memory,
    is_out_of_memory,
    make_deterministic,
    uses_bfloat16,
)
from babygpt.training.rendezvous import rendezvous

T = TypeVar("T")


@dataclass
class Ranks:
    """The rank of this process, its device, and what it is doing, for error messages."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    doing: str = "the start"
    bad_gradient: torch.Tensor | None = None  # () bool, whether one of this rank's own gradients was non-finite

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum(self, values: list[float]) -> list[float]:
        """Return the sums of numbers over all ranks, in float64."""
        if self.world_size == 1:
            return values
        return self.all_reduce(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def gather(self, number: float) -> list[float]:
        """Return the number of every rank, by rank."""
        return self.sum([number if rank == self.rank else 0.0 for rank in range(self.world_size)])

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def data_parallel(self, model: nn.Module, bf16_gradients: bool = False) -> nn.Module:
        """Return the model with its gradients averaged over all ranks in the backward pass.

        With one rank, that is the model itself. With `bf16_gradients`, gradients are rounded to bfloat16 before the
        all-reduce, which halves its traffic. From then on `bad_gradient` records whether a gradient of this rank was
        non-finite; the average does not show whose it was.
        """
        if self.world_size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        bad_gradient = self.bad_gradient = torch.zeros((), dtype=torch.bool, device=self.device)
        reduce = bf16_compress_hook if bf16_gradients else allreduce_hook

        def check_and_reduce(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            bad_gradient.logical_or_(~bucket.buffer().sum().isfinite())
            return reduce(group, bucket)

        wrapped.register_comm_hook(dist.group.WORLD, check_and_reduce)
        return wrapped

    def take_bad_gradient(self) -> torch.Tensor:
        """Return whether a gradient of this rank was non-finite since the last call, () bool."""
        if self.bad_gradient is None:
            return torch.zeros((), dtype=torch.bool, device=self.device)
        found = self.bad_gradient.clone()
        self.bad_gradient.zero_()
        return found

    def memory_for(self, dtype: str) -> int:
        """Return the smallest device memory of all ranks, bytes; half of it for float32 activations, 0 without CUDA."""
        shares = 1 if uses_bfloat16(self.device, dtype) else 2
        return int(min(self.gather(device_memory(self.device)))) // shares

    def main_process_first(self, call: Callable[[], T]) -> T:
        """Call on rank 0, then on the first rank of each node, then on the others, and return the result.

        What one rank downloads, the later ones find, whether or not the nodes share a disk. If one rank fails, all do,
        and that rank prints the message.
        """
        results, called, error = list[T](), False, None
        for my_turn in (self.is_main, self.local_rank == 0, True):
            if my_turn and not called:
                called = True
                try:
                    results.append(call())
                except UserError as raised:
                    error = raised
            failed = [rank for rank, flag in enumerate(self.gather(float(error is not None))) if flag]
            if error:
                raise error
            if failed:
                raise ConfigError(f"Rank {failed[0]} failed; see its message.")
        return results[0]


# messages of gloo, NCCL and c10d about a lost connection
LOST = re.compile(
    "(gloo|nccl|c10d).*(closed|reset|broken pipe|refused|timed? ?out|aborted|prematurely)", re.IGNORECASE | re.DOTALL
)


@contextmanager
def process_group(device_name: str, timeout_minutes: float = 30, deterministic: bool = False) -> Iterator[Ranks]:
    """Join the processes that torchrun started (NCCL on CUDA, gloo on CPUs); without torchrun, a single process.

    If a rank exits or does not respond for `timeout_minutes`, the other ranks raise a UserError that says what they
    were doing. Only the main rank prints messages to the console. The first rank of each node also prints
    warnings.
    """
    if deterministic:
        make_deterministic()
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING if local_rank == 0 else logging.ERROR)
    device = choose_device(device_name, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for products of float32
    if world_size == 1:
        yield Ranks(0, 0, 1, device)
        return
    if device.type == "mps":
        raise ConfigError("MPS is a single device. Start train.py without torchrun.")
    ranks, timeout = Ranks(rank, local_rank, world_size, device), timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=rendezvous(rank, world_size, timeout),
            rank=rank, world_size=world_size, timeout=timeout, device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
        yield ranks
        # gloo aborts a rank whose peers exit before it. After an error there is no barrier: the other ranks may wait
        # for this one, and its message would not appear
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, dist.DistNetworkError | dist.DistStoreError) and not LOST.search(str(error)):
            raise
        raise UserError(
            f"Another rank exited, or did not respond for {timeout_minutes:g} minutes, in {ranks.doing}; see its own "
            f"message ({str(error).splitlines()[0]}). Resume from the last checkpoint with --general.init-from resume."
        ) from error


@contextmanager
def explain_failures(ranks: Ranks, memory_advice: str) -> Iterator[None]:
    """Turn disk errors and lack of memory into messages with the fix."""
    try:
        yield
    except OSError as error:  # of the log, the samples or the plot; the saver explains those of a checkpoint
        raise UserError(f"{error} in {ranks.doing}. All saved checkpoints are intact: fix it and resume.") from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = (str(error).splitlines() or [""])[0]
        raise UserError(f"Out of memory in {ranks.doing} ({what:.100}). {memory_advice}") from None
