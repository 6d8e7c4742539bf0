"""Device selection, dtypes, peak FLOP/s, memory, and timing."""

import os
import re
import resource
import sys
import time
from contextlib import nullcontext

import torch

from babygpt.errors import ConfigError

# dense bfloat16 peak of the tensor cores in FLOP/s, from the vendors' data sheets; the longest matching name wins
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "H20": 148e12, "A100": 312e12, "A800": 312e12, "A40": 149.7e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 6000 Ada": 364e12, "A6000": 154.8e12, "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12, "RTX 4080": 97.5e12, "RTX 3090": 71e12, "RTX 3080": 59.5e12,
}  # fmt: skip

TESTED_TORCH = ("2.11", "2.13")  # CI tests the version in requirements.txt, `runs/test.sh --slow` tests 2.11


def choose_device(name: str, local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """Return the device of a rank; `auto` is CUDA if it is available, otherwise the CPU.

    ConfigError if the device is not available, or if the node has fewer GPUs than ranks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ConfigError(
                "--device cuda: PyTorch finds no CUDA device. Use --device cpu, or install PyTorch with CUDA."
            )
        if local_world_size > count:  # so all ranks of the node raise the same error
            raise ConfigError(
                f"{local_world_size} processes on this node need {local_world_size} CUDA devices, but PyTorch finds "
                f"{count}. Use a smaller --nproc_per_node, or --device cpu."
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: this machine has no MPS device. Use --device auto.")
    return torch.device(name)


def make_deterministic(enabled: bool = True) -> None:
    """Make PyTorch use deterministic kernels only, and raise an error for an operation that has none; or undo this.

    By default, CUDA kernels sum the gradients of embeddings and attention by atomic additions, in varying order.
    `warn_only=True` is not enough: attention stays nondeterministic then. Call this before the first use of CUDA.
    """
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # one of the two deterministic values in cuBLAS's documentation
    import torch._inductor.config

    torch.use_deterministic_algorithms(enabled)
    if hasattr(torch._inductor.config, "deterministic"):  # no autotuning: it can change the order of a sum
        torch._inductor.config.deterministic = enabled
    # filling is slow, and no kernel here reads uninitialized memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def uses_bfloat16(device: torch.device, dtype: str) -> bool:
    """Return whether matrix products run in bfloat16; with `auto`, if the hardware supports it."""
    if dtype != "auto":
        return dtype == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # on a CPU, bfloat16 is twice as fast as float32 with these instructions, and several times slower without them
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


def autocast(device: torch.device, dtype: str):
    """Return the autocast context of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16) if uses_bfloat16(device, dtype) else nullcontext()


def untested_torch_warning() -> str | None:
    """Return a warning if BabyGPT is not tested on this version of PyTorch, else None.

    A version matters: torch.compile in PyTorch 2.11 turned an in-place sum in the loss into zero gradients.
    """
    if torch.__version__.startswith(tuple(f"{version}." for version in TESTED_TORCH)):
        return None
    return (
        f"BabyGPT is not tested on PyTorch {torch.__version__}, only on {', '.join(TESTED_TORCH)}. "
        "Run `python -m pytest tests/unit`, or install the version in requirements.txt."
    )


def peak_flops(device: torch.device) -> float | None:
    """Return the bfloat16 peak of a CUDA device in FLOP/s; None if it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # "A40" must not match A4000; a Ti or SUPER, a laptop GPU and a MIG slice have other peaks
    known = [
        key for key in PEAK_FLOPS if re.search(rf"\b{key}\b(?! (?:Ti|SUPER|NVL|D)\b)(?!.*\b(?:Laptop|MIG)\b)", name)
    ]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def device_memory(device: torch.device) -> int:
    """Return the memory of a CUDA device in bytes; 0 for any other device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: device memory on CUDA, otherwise resident host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB on Linux
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the error says that device or host memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return re.search("can't allocate memory|ALLOC_FAILED", str(error)) is not None


class DeviceEvent:
    """A timing event: a CUDA event in the current stream, or the current time on other devices."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event is not None:
            self.event.record()
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Wait until the device has reached the event."""
        if self.event is not None:
            self.event.synchronize()

    def ms_since(self, earlier: "DeviceEvent") -> float:
        """Return the milliseconds between two events. Call `synchronize` on the later one first."""
        if self.event is not None and earlier.event is not None:
            return earlier.event.elapsed_time(self.event)
        return (self.time - earlier.time) * 1e3
