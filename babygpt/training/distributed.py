"""Ranks, the device, what ranks tell each other, stop signals, and time on a device's own clock.

>>> with process_group("auto") as ranks:
...     ranks.print(f"{ranks.world_size} ranks on {ranks.device}")
"""

import os
import re
import resource
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from babygpt.errors import ConfigError, UserError, leave, spoken

# dense bf16 peak of the matrix units, FLOP/s, from the makers' data sheets; a longer name goes first
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "H20": 148e12, "A100": 312e12, "A800": 312e12, "A40": 149.7e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 6000 Ada": 364e12, "A6000": 154.8e12, "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12, "RTX 4080": 97.5e12, "RTX 3090": 71e12, "RTX 3080": 59.5e12,
}  # fmt: skip

TESTED_TORCH = ("2.11", "2.13")  # the tests run on these: the pin of requirements.txt, and by hand the other


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

    def watch(self, model: DistributedDataParallel) -> None:
        """From now on `bad_gradient` notes where a gradient of the rank isn't finite, which their mean doesn't tell."""
        self.bad_gradient = torch.zeros((), dtype=torch.bool, device=self.device)

        def note_and_reduce(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            self.bad_gradient |= ~bucket.buffer().sum().isfinite()
            return allreduce_hook(group, bucket)

        model.register_comm_hook(dist.group.WORLD, note_and_reduce)

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


def choose_device(name: str, local_rank: int = 0, local_ranks: int = 1) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. ConfigError where a rank of this node has no device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        count = torch.cuda.device_count()
        if local_ranks > count:  # the same on all ranks of the node, whichever has none
            raise ConfigError(
                f"{local_ranks} processes need as many CUDA devices, and {count} are seen. Give a smaller "
                "--nproc_per_node, or --general.device cpu."
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("there is no MPS device here. Give --general.device auto.")
    return torch.device(name)


# in the words of either backend
LOST = re.compile(
    "(gloo|nccl|c10d).*(closed|reset|broken pipe|refused|timed? ?out|aborted|prematurely)", re.IGNORECASE | re.DOTALL
)


@contextmanager
def process_group(device_name: str, timeout_minutes: float = 30) -> Iterator[Ranks]:
    """Joins the processes that torchrun started (nccl on CUDA, gloo on the CPU), or stands alone.

    Where a rank ends or says nothing for `timeout_minutes`, the others end with a UserError that says in what.
    """
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
            "nccl" if device.type == "cuda" else "gloo", store=_store_of_this_start(rank, world_size, timeout),
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


def _store_of_this_start(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Where the ranks leave word for each other until they are joined, empty.

    torchrun keeps one store over its restarts, in which the addresses of ended processes still stand, and who reads
    those never joins (pytorch/pytorch#135712). So rank 0 makes up a name for this start and tells it to every process
    that calls by a name of its own, until all have confirmed it.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    if rank > 0:
        caller = uuid.uuid4().hex
        store.set(f"caller {rank}", caller)
        start = store.get(f"start for {caller}").decode()
        store.set(f"{start} confirmed by {rank}", "")
        return dist.PrefixStore(start, store)
    start, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    missing = set(range(1, world_size))
    while missing:
        for other in missing:
            if store.check([f"caller {other}"]):
                store.set(f"start for {store.get(f'caller {other}').decode()}", start)
        missing = {other for other in missing if not store.check([f"{start} confirmed by {other}"])}
        if time.monotonic() > end:
            raise RuntimeError(f"c10d timed out: rank {min(missing)} did not come")
        time.sleep(0.01)
    return dist.PrefixStore(start, store)


def checksum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Of all bits of float32 tensors, () float32 on their device: a sum modulo a prime that float32 can tell.

    A power of two would not see the bits above it.
    """
    return (sum(t.detach().view(torch.int32).sum() for t in tensors) % 16_777_213).float()


def uses_bfloat16(device: torch.device, dtype: str) -> bool:
    """Whether matrix products run in bfloat16. `auto`: where the device has it in hardware."""
    if dtype != "auto":
        return dtype == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # twice as fast as float32 on a CPU with these instructions, several times slower without
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)


def autocast(device: torch.device, dtype: str):
    """The context that a forward pass runs in."""
    return torch.autocast(device.type, torch.bfloat16) if uses_bfloat16(device, dtype) else nullcontext()


def untested_torch_warning() -> str | None:
    """A warning if the tests have not been run on this version of PyTorch, else None.

    Versions differ in what their compilers make of the same code: 2.11 turned an in-place sum in the loss into
    gradients of zero.
    """
    if torch.__version__.startswith(tuple(f"{version}." for version in TESTED_TORCH)):
        return None
    return (
        f"warning: BabyGPT has not been tested on PyTorch {torch.__version__}, only on {', '.join(TESTED_TORCH)}. "
        "Run `bash runs/test.sh`, or install the version in requirements.txt."
    )


def peak_flops(device: torch.device) -> float | None:
    """bf16 peak of a known CUDA device, FLOP/s; None for any other."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # an A40 is no A4000, and a Ti, a laptop's or a slice of a card has a peak of its own
    known = [
        key for key in PEAK_FLOPS if re.search(rf"\b{key}\b(?! (?:Ti|SUPER|NVL|D)\b)(?!.*\b(?:Laptop|MIG)\b)", name)
    ]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def peak_memory_mib(device: torch.device) -> float:
    """The most that this process held, MiB: on the device for CUDA, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10  # bytes there, KiB elsewhere


class Mark:
    """A point in the work of a device: a CUDA event in its queue, elsewhere the time of now."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record()
        self.time = time.perf_counter()

    def wait(self) -> None:
        """Until the device has come here."""
        if self.event is not None:
            self.event.synchronize()

    def ms_since(self, earlier: "Mark") -> float:
        """Milliseconds of the device between two marks; the later one must have been waited for."""
        if self.event is not None:
            return earlier.event.elapsed_time(self.event)
        return (self.time - earlier.time) * 1e3


class Stopped(Exception):
    """A rank was told to stop in the middle of a scene, and all have left it."""


class StopSignals:
    """Notes SIGTERM, SIGINT, SIGHUP and SIGUSR1 (Slurm's early warning), so that the loop can stop at a step's end.

    While there is `nothing_to_lose`, before the first step is done, a signal ends the process at once, with code 0, and
    leaves an empty file `marker`. A second SIGINT ends it at once with code 130. Both by a thread: the main one may be
    in a compiler for minutes, or wait for a rank that never comes, and Python's handlers wait for it.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self):
        self.marker: Path | None = None
        self.received: str | None = None
        self.nothing_to_lose = True

    def __enter__(self) -> "StopSignals":
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        signal.set_wakeup_fd(self.write_end, warn_on_full_buffer=False)
        Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        os.close(self.write_end)  # the thread ends with it

    def _note(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number).name

    def _watch(self) -> None:
        interrupts = 0
        while number := os.read(self.read_end, 1):
            if number[0] not in self.NUMBERS:
                continue
            interrupts += number[0] == signal.SIGINT
            if self.nothing_to_lose:
                name = signal.Signals(number[0]).name
                with spoken():
                    os.write(2, f"{name} before the first step was done: nothing to save\n".encode())
                # torchrun ends the others with one that crashed by SIGTERM: that is no wish to stop
                by_torchrun = number[0] == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ
                if self.marker is not None and not by_torchrun:
                    with suppress(OSError):
                        self.marker.touch()
                leave(0)
            elif interrupts > 1:
                leave(130)
        os.close(self.read_end)

    def told(self) -> bool:
        """Whether there was one."""
        return self.received is not None
