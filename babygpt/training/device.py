"""The device: selection, dtypes, peak FLOP/s, memory, timing."""

import os
import re
import resource
import sys
import time
from contextlib import nullcontext

import torch

from babygpt.errors import ConfigError

# dense bf16 peak of the matrix units, FLOP/s, from the makers' data sheets; a longer name goes first
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "H20": 148e12, "A100": 312e12, "A800": 312e12, "A40": 149.7e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12,
    "L40S": 362e12, "L40": 181e12, "L4": 121e12, "RTX 6000 Ada": 364e12, "A6000": 154.8e12, "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12, "RTX 4080": 97.5e12, "RTX 3090": 71e12, "RTX 3080": 59.5e12,
}  # fmt: skip

TESTED_TORCH = ("2.11", "2.13")  # CI tests the pin of requirements.txt, `runs/test.sh --slow` 2.11


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


def make_deterministic() -> None:
    """Select kernels whose results do not vary from run to run. An operation without one is an error.

    On CUDA the gradients of embeddings and attention are otherwise summed by atomic additions, in varying order. A mode
    that only warns would not do: PyTorch's attention stays nondeterministic in it. Call this before the first use of
    CUDA.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one of the two values that cuBLAS documents for this
    import torch._inductor.config

    torch.use_deterministic_algorithms(True)
    if hasattr(torch._inductor.config, "deterministic"):  # no benchmarking that chooses the order of sums
        torch._inductor.config.deterministic = True
    # slow, and no kernel here reads uninitialized memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def uses_bfloat16(device: torch.device, dtype: str) -> bool:
    """Whether matrix products run in bfloat16. `auto`: where the device has it in hardware."""
    if dtype != "auto":
        return dtype == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # twice as fast as float32 on a CPU with these instructions, several times slower without
    cpu: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)


def autocast(device: torch.device, dtype: str):
    """The context that a forward pass runs in."""
    return torch.autocast(device.type, torch.bfloat16) if uses_bfloat16(device, dtype) else nullcontext()


def untested_torch_warning() -> str | None:
    """A warning if the tests have not been run on this version of PyTorch, else None.

    torch.compile of PyTorch 2.11 turned an in-place sum in the loss into zero gradients.
    """
    if torch.__version__.startswith(tuple(f"{version}." for version in TESTED_TORCH)):
        return None
    return (
        f"BabyGPT has not been tested on PyTorch {torch.__version__}, only on {', '.join(TESTED_TORCH)}. "
        "Run `python -m pytest tests/unit`, or install the version in requirements.txt."
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


def device_memory(device: torch.device) -> int:
    """Memory of a CUDA device, bytes; 0 for any other device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def peak_memory_mib(device: torch.device) -> float:
    """The most that this process held, MiB: on the device for CUDA, else of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10  # bytes there, KiB elsewhere


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the error says that device or host memory ran out."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or re.search("can't allocate memory|ALLOC_FAILED", str(error)) is not None


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
        if self.event is not None and earlier.event is not None:
            return earlier.event.elapsed_time(self.event)
        return (self.time - earlier.time) * 1e3
