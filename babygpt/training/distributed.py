"""Ranks: identity, collectives, and start and shutdown of the process group.

>>> with process_group("auto") as ranks:
...     ranks.print(f"{ranks.world_size} ranks on {ranks.device}")
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from babygpt.console import spoken
from babygpt.errors import ConfigError, UserError
from babygpt.training.device import choose_device, device_memory, make_deterministic, uses_bfloat16
from babygpt.training.rendezvous import rendezvous


@dataclass
class Ranks:
    """Which process this is, of how many, its device, and what all are at, for the message where one is lost."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    doing: str = "the start"
    bad_gradient: torch.Tensor | None = None  # () bool, whether one of this rank's own was not finite

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *words: object, sep: str = " ", end: str = "\n") -> None:
        """Prints on rank 0 alone."""
        if self.is_main:
            with spoken():
                print(*words, sep=sep, end=end, flush=True)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum(self, values: list[float]) -> list[float]:
        """Sums numbers over all ranks in float64."""
        if self.world_size == 1:
            return values
        return self.all_reduce(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

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

    def memory_for(self, dtype: str) -> int:
        """The smallest device memory of all ranks, bytes; half of it if activations are float32, 0 without CUDA."""
        shares = 1 if uses_bfloat16(self.device, dtype) else 2
        return int(min(self.gather(device_memory(self.device)))) // shares

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, number: float) -> list[float]:
        """The number of every rank, by rank."""
        return self.sum([number if rank == self.rank else 0.0 for rank in range(self.world_size)])

    def main_first(self, call):
        """Calls on rank 0, then on the first rank of each node, then on the others: what one downloads, the
        next ones find, whether or not the nodes share a disk. Where one fails, all do, and it alone says why."""
        result, called, error = None, False, None
        for my_turn in (self.is_main, self.local_rank == 0, True):
            if my_turn and not called:
                called = True
                try:
                    result = call()
                except UserError as mistake:
                    error = mistake
            failed = [rank for rank, flag in enumerate(self.gather(float(error is not None))) if flag]
            if error:
                raise error
            if failed:
                raise ConfigError(f"rank {failed[0]} failed: its message says why.")
        return result


# in the words of either backend
LOST = re.compile(
    "(gloo|nccl|c10d).*(closed|reset|broken pipe|refused|timed? ?out|aborted|prematurely)", re.IGNORECASE | re.DOTALL
)


@contextmanager
def process_group(device_name: str, timeout_minutes: float = 30, deterministic: bool = False) -> Iterator[Ranks]:
    """Joins the processes that torchrun started (nccl on CUDA, gloo on the CPU), or stands alone.

    Where a rank ends or says nothing for `timeout_minutes`, the others end with a UserError that says in what.
    """
    if deterministic:
        make_deterministic()
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(device_name, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 where float32 is multiplied
    if world_size == 1:
        yield Ranks(0, 0, 1, device)
        return
    if device.type == "mps":
        raise ConfigError("MPS is one device: start train.py without torchrun.")
    ranks, timeout = Ranks(rank, local_rank, world_size, device), timedelta(minutes=timeout_minutes)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=rendezvous(rank, world_size, timeout),
            rank=rank, world_size=world_size, timeout=timeout, device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
        yield ranks
        # all leave together: gloo aborts a rank whose peers hang up on it. After an error there is no farewell, it
        # would wait for ranks that wait for this one, and keep its message
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, dist.DistNetworkError | dist.DistStoreError) and not LOST.search(str(error)):
            raise
        raise UserError(
            f"another rank has ended, or was silent for {timeout_minutes:g} minutes, in {ranks.doing}; its own message "
            f"says why ({str(error).splitlines()[0]}). Go on from the last checkpoint with --general.init-from resume."
        ) from error
