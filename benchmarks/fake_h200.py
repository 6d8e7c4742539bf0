"""The code that torch.compile generates for an H200, without the GPU: bytes moved, kernels, atomics, peak memory.

    python -m benchmarks.fake_h200                                       # compare with the committed figures
    python -m benchmarks.fake_h200 --write                               # replace them
    python -m benchmarks.fake_h200 --checkout ../older --rows "gpt2, 64 rows"    # another revision's model

It needs Linux, gcc, and a CUDA build of PyTorch, in an environment of its own (5 GB):

    python -m venv .venv-cuda && . .venv-cuda/bin/activate
    pip install 'torch==2.11.*' 'nvidia-cuda-crt==13.0.*' -r <(grep -v torch requirements.txt)

A stub in place of CUDA's runtime (fake_cuda.c) reports an H200. The model is traced with tensors that have no data, and
Inductor's code for forward and backward runs with kernels that do nothing. So these are exact for the generated code:

- KB per token: Inductor's own count, each buffer counted once per Triton kernel that reads or writes it; matrix
  products and attention are not counted;
- kernels, products (by cuBLAS) and kernels with atomic additions, per micro-batch;
- peak GB: parameters, gradients, optimizer state and all that the code keeps at the same time, without the temporaries
  of the optimizer, the workspace of cuBLAS and the allocator's losses.

The prediction adds two limits, as if nothing overlapped: floating-point operations at 790 TFLOP/s and these bytes at
4.3 TB/s, both measured on an H200 (large bfloat16 products of random data, and a copy). The command fails if KB per
token or peak memory is more than 3 % above the committed figures.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

from benchmarks.cases import CASES, Case
from benchmarks.table import write_table

ROOT = Path(__file__).parent.parent
OUT = ROOT / "results" / "speed" / "fake-h200.csv"
FLOPS, BYTES_PER_SECOND = 790e12, 4.3e12
TOLERANCE = 1.03


# ---------------------------------------------------------------------------------------------------------
# the fake GPU


def restart_with_fake_gpu() -> None:
    """Build the stubs and replace this process by one that has them; return in that process."""
    if "FAKE_H200" in os.environ:
        return
    packages = Path(sysconfig.get_paths()["purelib"])
    headers = packages / "nvidia" / "cu13" / "include"
    if not (headers / "crt" / "host_defines.h").exists():
        sys.exit("error: this needs a CUDA build of PyTorch and nvidia-cuda-crt: see --help for the environment.")
    folder = Path(tempfile.mkdtemp(prefix="fake-h200-"))
    compile_c = ["gcc", "-w", "-shared", "-fPIC"]
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run([*compile_c, f"-I{headers}", str(source), "-o", str(folder / "runtime.so")], check=True)
    # the driver: every function that PyTorch looks up, returning 0
    listing = subprocess.run(
        ["nm", "-D", packages / "torch" / "lib" / "libcaffe2_nvrtc.so"], capture_output=True, text=True, check=True
    ).stdout
    names = re.findall(r" U (cu[A-Z]\w+)", listing)
    (folder / "driver.c").write_text("".join(f"int {name}() {{ return 0; }}\n" for name in names))
    driver = ["-Wl,-soname,libcuda.so.1", str(folder / "driver.c"), "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*compile_c, *driver], check=True)
    environment = {"FAKE_H200": str(folder), "LD_PRELOAD": str(folder / "runtime.so"), "LD_LIBRARY_PATH": str(folder)}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.fake_h200", *sys.argv[1:]], os.environ | environment)


# ---------------------------------------------------------------------------------------------------------
# Inductor's code


@dataclass
class Kernel:
    """In place of a compiled Triton kernel: what one launch moves."""

    bytes: float
    atomic: bool
    counts: "Counts"

    def run(self, *arguments: object, **options: object) -> None:
        self.counts.kernels += 1
        self.counts.bytes += self.bytes
        self.counts.atomics += self.atomic


class Counts:
    """What the generated code did, and the memory that its tensors held."""

    def __init__(self) -> None:
        self.kernels = self.products = self.atomics = 0
        self.bytes = self.live = self.peak = 0.0
        self.attention: set[str] = set()
        self.seen: set[int] = set()

    def hold(self, value: Any) -> Any:
        """Count a tensor's storage until it is freed."""
        import torch

        if isinstance(value, torch.Tensor) and value.device.type == "cuda":
            storage = value.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.seen:
                self.seen.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key, size)
        elif isinstance(value, tuple | list):
            for part in value:
                self.hold(part)
        return value

    def _free(self, key: int, size: float) -> None:
        self.seen.discard(key)
        self.live -= size


def runnable(source: str, counts: Counts) -> Callable[[list], Any]:
    """The `call` function of Inductor's wrapper code, with Triton kernels that only count."""
    import torch
    from torch._inductor.async_compile import AsyncCompile

    def kernel(self: object, name: str, code: str, **options: object) -> Kernel:
        found = re.search(r"'kernel_num_gb': ([\d.e+-]+)", code)
        assert found, f"{name} does not state its bytes"
        return Kernel(float(found.group(1)) * 1e9, "atomic_" in code.split("def triton_")[-1], counts)

    def product(*arguments: object, out: Any, **options: object) -> None:
        counts.products += 1

    counts.attention |= set(re.findall(r"_scaled_dot_product_(\w+?)_attention\.", source))
    namespace: dict[str, Any] = {"__name__": "generated"}
    with mock.patch.object(AsyncCompile, "triton", kernel), mock.patch.object(AsyncCompile, "wait"):
        exec(compile(source, "generated", "exec"), namespace)
    nothing = lambda *a, **k: None  # noqa: E731
    namespace |= {
        "assert_size_stride": nothing, "assert_alignment": nothing, "get_raw_stream": nothing, "start_graph": nothing,
        "end_graph": nothing,
        "empty_strided_cuda": lambda size, stride, dtype: counts.hold(
            torch.empty_strided(size, stride, dtype=dtype, device="cuda:0")
        ),
        "reinterpret_tensor": lambda t, size, stride, offset=0: t.as_strided(size, stride, t.storage_offset() + offset),
        "extern_kernels": SimpleNamespace(mm=product, addmm=product, bmm=product),
    }  # fmt: skip
    return namespace["call"]


class Generated(Exception):
    """Raised with the wrapper code in place of loading it."""


@contextmanager
def compiler_for_h200() -> Iterator[Callable[[Counts], Callable]]:
    """Give a function from counts to a backend for torch.compile that generates code for the fake GPU and runs it."""
    import torch
    import triton
    from torch._inductor import compile_fx, config
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.graph import GraphLowering
    from torch.utils._python_dispatch import TorchDispatchMode
    from triton.backends.compiler import GPUTarget

    class OnCPU(TorchDispatchMode):
        """Folds constants on the CPU: a GPU that computes nothing would give wrong values."""

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if kwargs.get("device") is not None:
                kwargs["device"] = torch.device("cpu")
            return operation(*args, **kwargs)

    def generate(self: GraphLowering) -> None:
        raise Generated(self.codegen()[0].value)

    fold = UniformValueConstantFolder.run

    def fold_on_cpu(self: UniformValueConstantFolder, *arguments: Any, **options: Any) -> Any:
        with OnCPU():
            return fold(self, *arguments, **options)

    compile_inner = compile_fx.compile_fx_inner

    def backend(counts: Counts) -> Callable:
        def inner(graph: torch.fx.GraphModule, inputs: list, **options: Any) -> Callable:
            try:
                compile_inner(graph, inputs, **options)
            except Exception as error:
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, Generated):
                    cause = getattr(cause, "inner_exception", None) or cause.__cause__
                if cause is None:
                    raise
                call = runnable(cause.args[0], counts)
            else:
                raise AssertionError("Inductor generated no code")
            call_boxed = lambda arguments: counts.hold(call(arguments))  # noqa: E731
            call_boxed._boxed_call = True  # type: ignore[attr-defined]
            return call_boxed

        return lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=cast(Any, inner))

    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )  # fmt: skip
    triton.runtime.driver.set_active(target)
    with (
        config.patch(profile_bandwidth=True, fx_graph_cache=False, compile_threads=1, shape_padding=False),
        mock.patch.object(GraphLowering, "compile_to_module", generate),
        mock.patch.object(UniformValueConstantFolder, "run", fold_on_cpu),
    ):
        yield backend


def measure(case: Case) -> dict[str, Any]:
    """Forward and backward of one micro-batch of GPT-2's size."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from model import build_model
    from train_config import preset

    torch._dynamo.reset()
    counts = Counts()
    config = replace(preset(case.preset).model, vocab_size=50257, n_head=case.n_head)
    torch.use_deterministic_algorithms(case.deterministic, warn_only=True)
    with compiler_for_h200() as backend, FakeTensorMode(), torch.device("cuda:0"):
        model = build_model(config)
        model.bf16_activations = case.bf16_activations
        for parameter in model.parameters():
            counts.hold(parameter.data)
        idx = torch.zeros(case.rows, config.block_size, dtype=torch.int64)
        compiled = torch.compile(model, backend=backend(counts), fullgraph=True, dynamic=False)
        with case.patch_loss(), torch.autocast("cuda", torch.bfloat16):
            total = compiled(idx, idx, reduction="sum")
        total.backward()
    parameters = sum(p.numel() for p in model.parameters())
    tokens = case.rows * config.block_size
    seconds = model.flops_per_token() / FLOPS + counts.bytes / tokens / BYTES_PER_SECOND
    return {
        "KB per token": round(counts.bytes / tokens / 1e3, 1),
        "kernels": counts.kernels,
        "products": counts.products,
        "with atomics": counts.atomics,
        "peak GB": round((counts.peak + 8 * parameters) / 1e9, 2),  # Adam keeps two float32 values per parameter
        "attention": " ".join(sorted(counts.attention)),
        "K tokens/s, predicted": round(1e-3 / seconds, 1),
        "share of the ceiling": round(model.flops_per_token() / FLOPS / seconds, 3),
    }  # fmt: skip


def growth(rows: list[dict[str, Any]]) -> list[str]:
    """The figures that are more than 3 % above the committed ones, one line each."""
    with open(OUT, newline="") as file:
        known = {row["case"]: row for row in csv.DictReader(file)}
    return [
        f"  {row['case']}: {key} is {row[key]}, was {known[row['case']][key]}"
        for row in rows
        for key in ("KB per token", "peak GB")
        if row["case"] in known and row[key] > TOLERANCE * float(known[row["case"]][key])
    ]


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """Replace the committed figures: a CSV file to compare with, and a table to read."""
    import torch

    with open(out, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        "# Generated code for an H200, without the GPU",
        "",
        f"`python -m benchmarks.fake_h200 --write`, {date.today()}, torch {torch.__version__}, Triton "
        f"{version('triton')}.",
        "GPT-2 124M's size, one micro-batch of rows of 1,024 tokens, forward and backward. `--help` explains the",
        "columns. The prediction is not a measurement. The same for commit 975b3e2, before the changes that these",
        "figures led to: fake-h200-before.csv.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|---|" + "---:|" * (len(rows[0]) - 1),
        *("| " + " | ".join(map(str, row.values())) + " |" for row in rows),
    ]
    write_table(lines, out.with_suffix(".md") if out == OUT else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=ROOT, help="whose model and presets are compiled")
    parser.add_argument(
        "--rows", nargs="*", choices=[case.name for case in CASES], metavar="ROW", help="only these rows of the table"
    )
    parser.add_argument("--write", action="store_true", help=f"replace {OUT.relative_to(ROOT)} and its table")
    parser.add_argument("--out", type=Path, default=OUT, help="with --write: another file")
    options = parser.parse_args()
    restart_with_fake_gpu()
    sys.path.insert(0, str(options.checkout.resolve()))
    rows = []
    for case in CASES:
        if options.rows and case.name not in options.rows:
            continue
        rows.append({"case": case.name} | measure(case))
        print(", ".join(f"{key}: {value}" for key, value in rows[-1].items()), flush=True)
    if options.write:
        write(rows, options.out)
    elif grown := growth(rows):
        sys.exit("error: more than the committed figures allow.\n" + "\n".join(grown))


if __name__ == "__main__":
    main()
