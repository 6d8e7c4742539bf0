"""The ranks of a run: collectives, and setup and shutdown of the process group.

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
from babygpt.errors import ConfigError, OtherRankError, RankFailedError, UserError
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
    """The rank of this process, its device, and the collectives of the training loop."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    phase: str = "startup"  # what the rank is doing, for error messages
    has_nonfinite_grad: torch.Tensor | None = None  # () bool: a local gradient of this rank was non-finite

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum(self, values: list[float]) -> list[float]:
        """Return each value summed over all ranks, in float64."""
        if self.world_size == 1:
            return values
        return self.all_reduce(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def gather(self, value: float) -> list[float]:
        """Return the values of all ranks, in rank order."""
        return self.sum([value if rank == self.rank else 0.0 for rank in range(self.world_size)])

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def data_parallel(self, model: nn.Module, bf16_gradients: bool = False) -> nn.Module:
        """Wrap the model in DistributedDataParallel; with one rank, return the model itself.

        With `bf16_gradients`, gradients are rounded to bfloat16 before the all-reduce, which halves the traffic.
        `has_nonfinite_grad` records whether a local gradient was non-finite, because the averaged gradient does not
        show which rank it came from.
        """
        if self.world_size == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        has_nonfinite_grad = self.has_nonfinite_grad = torch.zeros((), dtype=torch.bool, device=self.device)
        reduce = bf16_compress_hook if bf16_gradients else allreduce_hook

        def check_and_reduce(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            has_nonfinite_grad.logical_or_(~bucket.buffer().sum().isfinite())
            return reduce(group, bucket)

        wrapped.register_comm_hook(dist.group.WORLD, check_and_reduce)
        return wrapped

    def pop_nonfinite_flag(self) -> torch.Tensor:
        """Return whether a local gradient was non-finite since the last call, () bool."""
        if self.has_nonfinite_grad is None:
            return torch.zeros((), dtype=torch.bool, device=self.device)
        value = self.has_nonfinite_grad.clone()
        self.has_nonfinite_grad.zero_()
        return value

    def memory_for(self, dtype: str) -> int:
        """Return the smallest device memory of all ranks in bytes, halved for float32 activations; 0 without CUDA."""
        divisor = 1 if uses_bfloat16(self.device, dtype) else 2
        return int(min(self.gather(device_memory(self.device)))) // divisor

    def main_process_first(self, call: Callable[[], T]) -> T:
        """Call on rank 0, then on the first rank of each node, then on all other ranks, and return the result.

        Later ranks find the files that earlier ones downloaded, whether or not the nodes share a disk. If the call
        raises a UserError on one rank, all ranks raise one, and only that rank prints its message.
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
                raise RankFailedError(f"Rank {failed[0]} failed; see its error message.")
        return results[0]


# messages of gloo, NCCL and c10d about a lost connection
LOST_CONNECTION = re.compile(
    "(gloo|nccl|c10d).*(closed|reset|broken pipe|refused|timed? ?out|aborted|prematurely)", re.IGNORECASE | re.DOTALL
)


@contextmanager
def process_group(device_name: str, timeout_minutes: float = 30, deterministic: bool = False) -> Iterator[Ranks]:
    """Initialize the process group of the processes that torchrun started (NCCL on CUDA, gloo on CPUs).

    Without torchrun, there is a single rank and no process group. If a rank exits or does not respond for
    `timeout_minutes`, the other ranks raise an OtherRankError. Only the main rank prints information to the console;
    the first rank of each node also prints warnings.
    """
    if deterministic:
        make_deterministic()
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING if local_rank == 0 else logging.ERROR)
    device = choose_device(device_name, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for float32 matrix products
    if world_size == 1:
        yield Ranks(0, 0, 1, device)
        return
    if device.type == "mps":
        raise ConfigError("--device mps supports one process only. Start the script without torchrun.")
    ranks, timeout = Ranks(rank, local_rank, world_size, device), timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=rendezvous(rank, world_size, timeout),
            rank=rank, world_size=world_size, timeout=timeout, device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
        yield ranks
        # gloo aborts a rank whose peers exit first. After an error, skip the barrier: the other ranks may wait in a
        # collective, and the message of this rank would never appear
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, dist.DistNetworkError | dist.DistStoreError) and not LOST_CONNECTION.search(
            str(error)
        ):
            raise
        raise OtherRankError(
            f"Another rank exited, or did not respond for {timeout_minutes:g} minutes, during {ranks.phase} "
            f"({str(error).splitlines()[0]}). See the error message of that rank, fix the cause, and "
            "resume the run."
        ) from error


@contextmanager
def explain_failures(ranks: Ranks, memory_advice: str) -> Iterator[None]:
    """Turn disk errors and out-of-memory errors into a UserError that says how to fix them."""
    try:
        yield
    except OSError as error:  # while writing the log, samples or plot; the saver handles those of a checkpoint
        raise UserError(
            f"{error} during {ranks.phase}. All checkpoints are intact. Fix the cause and resume."
        ) from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what = (str(error).splitlines() or [""])[0]
        raise UserError(f"Out of memory during {ranks.phase} ({what:.100}). {memory_advice}") from None
