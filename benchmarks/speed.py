"""Measure the speed of a training step, sampling and HellaSwag: BabyGPT and the common alternatives, in one run.

    python benchmarks/speed.py --nanogpt PATH [--stages step sample hellaswag muon] [--out results/speed/cpu.md]
    python benchmarks/speed.py --only gpt2 --against OLD --stages step    # OLD: another checkout of BabyGPT

--nanogpt is a checkout of nanoGPT, whose model.py is imported. Each measurement runs in a new process, and the
implementations alternate. All weights are random. On a CPU, the step trains a small model (4 layers, 4 heads,
n_embd = 256, T = 256, batch size 8); on CUDA, GPT-2 124M (T = 1,024). Sampling and HellaSwag always use GPT-2 124M:

    step       forward, backward, gradient clipping and AdamW; ours is train.train_step
    sample     128 new tokens after a prompt of 32 tokens, with batch sizes 1 and 8
    hellaswag  --examples examples of --hellaswag FILE, or generated ones without it. build-nanogpt's method, applied to
               our model, is one example at a time, four padded rows, all logits. The predictions are compared.
    muon       one Muon update of 6 layers with n_embd = 384, on 1, 2 and 4 gloo ranks with one thread each (CPU)
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from arguments import with_momentum_defaults  # noqa: E402
from babygpt.data.tokenizer import load_tokenizer  # noqa: E402
from babygpt.errors import exit_now  # noqa: E402
from babygpt.evaluation.packing import Example  # noqa: E402
from babygpt.nn.generation import SamplingParams, generate  # noqa: E402
from babygpt.training.device import autocast, peak_flops, peak_memory_mib, uses_bfloat16  # noqa: E402
from babygpt.training.distributed import Ranks  # noqa: E402
from babygpt.training.guard import UpdateGuard  # noqa: E402
from babygpt.training.optim import (  # noqa: E402
    make_optimizers,
    muon,
    set_learning_rates,
)
from babygpt.training.schedule import LRSchedule  # noqa: E402
from benchmarks.table import write_table  # noqa: E402
from dataloader import Batch, Position  # noqa: E402
from hellaswag import load_examples, losses, predictions  # noqa: E402
from model import GPT, GPTConfig, build_model  # noqa: E402
from train import TrainState, next_token_loss, train_step  # noqa: E402
from train_config import Config, preset, variant  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
SMALL_MODEL: dict[str, object] = {"n_layer": 4, "n_head": 4, "n_embd": 256, "block_size": 256, "vocab_size": 50257}
PROMPT_TOKENS, NEW_TOKENS = 32, 128


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def time_calls(call: Callable[[], object], repeats: int, warmup: int) -> dict:
    """Return the milliseconds of the first call and the median of the `repeats` calls after the warmup."""
    times = []
    for _ in range(1 + warmup + repeats):
        start = time.perf_counter()
        call()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return {"first_ms": times[0], "ms": statistics.median(times[1 + warmup :] or times)}


# ---------------------------------------------------------------------------------------------------------
# training step


def step_config(name: str, dtype: str) -> Config:
    config = variant(preset(name), model={"vocab_size": 50257}, training={"dtype": dtype})
    if CUDA:
        return variant(config, training={"micro_batch_size": 32, "batch_tokens": 32 * 1024})
    return variant(config, model=SMALL_MODEL, training={"micro_batch_size": 8, "batch_tokens": 8 * 256})


def step_ours(name: str, dtype: str, compiled: bool) -> dict:
    config, ranks = step_config(name, dtype), Ranks(0, 0, 1, DEVICE)
    training = config.training
    torch.manual_seed(0)
    raw_model = build_model(config.model).to(DEVICE)
    optimizers = make_optimizers(raw_model, asdict(with_momentum_defaults(config).optimizer))
    model: torch.nn.Module = raw_model
    if compiled:
        model = cast(torch.nn.Module, torch.compile(raw_model, dynamic=False))  # typed as returning a function
    rows = torch.randint(0, 50257, (training.micro_batch_size, config.model.block_size + 1))
    rows = rows.pin_memory() if CUDA else rows
    state = TrainState(model, optimizers, UpdateGuard(DEVICE), ranks, dtype, config.optimizer.grad_clip)
    set_learning_rates(optimizers, LRSchedule(100, min_lr_ratio=0.1), 1)

    def step() -> None:
        batch = Batch(Position(), Position(), [rows], training.batch_tokens, training.batch_tokens)
        train_step(state, batch, next_token_loss, seed=0)

    timing = time_calls(step, 20, 3)
    rate = training.batch_tokens / timing["ms"] * 1e3
    peak = peak_flops(DEVICE)
    return timing | {
        "tokens_per_s": rate,
        "mfu": rate * raw_model.flops_per_token() / peak if peak and uses_bfloat16(DEVICE, dtype) else None,
    }


def step_nanogpt(bfloat16: bool, compiled: bool) -> dict:
    from nanogpt_model import GPT as NanoGPT
    from nanogpt_model import GPTConfig as NanoGPTConfig

    config = step_config("gpt2", "auto")
    m, (B, T) = config.model, (config.training.micro_batch_size, config.model.block_size)
    torch.manual_seed(0)
    raw_model = NanoGPT(
        NanoGPTConfig(block_size=T, vocab_size=50304, n_layer=m.n_layer, n_head=m.n_head, n_embd=m.n_embd, bias=True)
    ).to(DEVICE)
    optimizer = raw_model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), DEVICE.type)
    model = torch.compile(raw_model) if compiled else raw_model
    rows = torch.randint(0, 50257, (B, T + 1))
    rows = rows.pin_memory() if CUDA else rows

    def step() -> None:
        x, y = (part.contiguous().to(DEVICE, non_blocking=True) for part in (rows[:, :-1], rows[:, 1:]))
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bfloat16):
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timing = time_calls(step, 20, 3)
    return timing | {"tokens_per_s": B * T / timing["ms"] * 1e3, "mfu": None}


# ---------------------------------------------------------------------------------------------------------
# sampling


def build_gpt2() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig()).to(DEVICE).eval()


def make_prompts(batch_size: int) -> torch.Tensor:
    return torch.randint(0, 50257, (batch_size, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def time_sampling(call: Callable[[], object], batch_size: int, repeats: int) -> dict:
    """Return the milliseconds of the first call, the milliseconds per decode step and the tokens per second."""
    timing = time_calls(call, repeats, 0)
    rate = batch_size * NEW_TOKENS / timing["ms"] * 1e3
    return {"first_ms": timing["first_ms"], "ms": timing["ms"] / NEW_TOKENS, "tokens_per_s": rate}


def sample_ours(batch_size: int, dtype: str, compiled: bool = False) -> dict:
    model, prompts = build_gpt2(), make_prompts(batch_size).tolist()
    params = SamplingParams(NEW_TOKENS, top_k=50, compile=compiled)

    def sample() -> None:
        with autocast(DEVICE, dtype):
            for _ in generate(model, prompts, params):
                pass

    return time_sampling(sample, batch_size, 3)


@torch.no_grad()
def sample_nanogpt(batch_size: int, dtype: str) -> dict:
    from nanogpt_model import GPT as NanoGPT
    from nanogpt_model import GPTConfig as NanoGPTConfig

    model, idx = NanoGPT(NanoGPTConfig(vocab_size=50304, bias=True)).to(DEVICE).eval(), make_prompts(batch_size)

    def sample() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            model.generate(idx, NEW_TOKENS, 1.0, 50)

    return time_sampling(sample, batch_size, 0)  # takes minutes, so one call is measured, without warmup


@torch.no_grad()
def sample_transformers(batch_size: int, dtype: str) -> dict:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: Any = GPT2LMHeadModel(GPT2Config())  # Any: mypy rejects its to() and generate()
    model.to(DEVICE, getattr(torch, dtype)).eval()
    idx = make_prompts(batch_size)
    settings = {"do_sample": True, "top_k": 50, "use_cache": True}
    settings |= {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}

    def sample() -> None:
        model.generate(idx, attention_mask=torch.ones_like(idx), pad_token_id=50256, **settings)

    return time_sampling(sample, batch_size, 3)


# ---------------------------------------------------------------------------------------------------------
# HellaSwag


def make_examples(path: str | None, count: int) -> list[Example]:
    """Load the first examples of a file, or generate examples with lengths typical of HellaSwag."""
    if path:
        return load_examples(Path(path), load_tokenizer("gpt2"), "karpathy", count)
    rng = random.Random(0)

    def random_tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(50257) for _ in range(rng.randint(low, high))]

    examples = []
    for _ in range(count):
        endings = [random_tokens(8, 40) for _ in range(4)]
        examples.append(Example(random_tokens(20, 110), endings, 0, [len(ending) for ending in endings]))
    return examples


def time_evaluation(
    call: Callable[[GPT, list[Example]], torch.Tensor], dtype: str, options: argparse.Namespace
) -> dict:
    model, examples = build_gpt2(), make_examples(options.hellaswag, options.examples)
    with torch.no_grad(), autocast(DEVICE, dtype):
        call(model, examples[:16])
        synchronize()
        start = time.perf_counter()
        sums = call(model, examples)
        synchronize()
        ms = (time.perf_counter() - start) * 1e3 / len(examples)
    return {"first_ms": None, "ms": ms, "tokens_per_s": None, "predictions": predictions(sums, examples)}


def hellaswag_ours(dtype: str, options: argparse.Namespace) -> dict:
    return time_evaluation(
        lambda model, examples: losses(model, examples, DEVICE, dtype, options.batch_size), dtype, options
    )


def hellaswag_build_nanogpt(dtype: str, options: argparse.Namespace) -> dict:
    def four_rows(model: GPT, examples: list[Example]) -> torch.Tensor:
        sums = []
        for example in examples:
            rows = [example.context + ending for ending in example.endings]
            tokens = torch.zeros(4, max(map(len, rows)), dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            for i, row in enumerate(rows):
                tokens[i, : len(row)] = torch.tensor(row)
                mask[i, len(example.context) : len(row)] = 1
            tokens, mask = tokens.to(DEVICE), mask.to(DEVICE)
            logits = model(tokens)[:, :-1].float()
            token_losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            sums.append((token_losses.view(4, -1) * mask[:, 1:]).sum(dim=1))
        return torch.stack(sums).cpu().double()

    return time_evaluation(four_rows, dtype, options)


# ---------------------------------------------------------------------------------------------------------
# Muon with several ranks


def run_muon_rank(rank: int, world_size: int, directory: str) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world_size)
    torch.manual_seed(0)
    config = replace(preset("modern").model, n_layer=6, n_head=6, n_embd=384, vocab_size=256)
    model = build_model(config)
    (optimizer, _) = muon(model, 0.04, 0.6, 0.008, 0.04)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    timing = time_calls(optimizer.step, 5, 1)
    if rank == 0:
        Path(directory, "timing.json").write_text(json.dumps(timing))
    if world_size > 1:
        dist.barrier()  # gloo aborts a rank if another rank closes its connections first
        dist.destroy_process_group()
        exit_now(0)


def muon_step(world_size: int) -> dict:
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(run_muon_rank, (world_size, directory), world_size)
        return json.loads(Path(directory, "timing.json").read_text()) | {"tokens_per_s": None}


# ---------------------------------------------------------------------------------------------------------
# measurement

Benchmark = Callable[[], dict[str, Any]]


def make_benchmarks(options: argparse.Namespace) -> dict[str, dict[str, Benchmark]]:
    """Return the benchmarks of each stage by name. The speedup is relative to the first one of a stage."""
    dtype_auto = "bfloat16" if uses_bfloat16(DEVICE, "auto") else "float32"
    steps: dict[str, Benchmark] = {
        "nanoGPT, float32, eager": partial(step_nanogpt, False, False),
        "nanoGPT, bfloat16, eager": partial(step_nanogpt, True, False),
        "nanoGPT, bfloat16, compiled": partial(step_nanogpt, True, True),
        "gpt2, float32": partial(step_ours, "gpt2", "float32", False),
        f"gpt2, {dtype_auto}": partial(step_ours, "gpt2", "auto", False),
        f"modern, {dtype_auto}": partial(step_ours, "modern", "auto", False),
    }
    if CUDA:
        steps |= {
            f"gpt2, {dtype_auto}, compiled": partial(step_ours, "gpt2", "auto", True),
            f"modern, {dtype_auto}, compiled": partial(step_ours, "modern", "auto", True),
        }
    samples: dict[str, Benchmark] = {}
    for batch_size in (1, 8):
        for dtype in dict.fromkeys(("float32", dtype_auto)):
            samples |= {
                f"nanoGPT, batch size {batch_size}, {dtype}": partial(sample_nanogpt, batch_size, dtype),
                f"transformers, batch size {batch_size}, {dtype}": partial(sample_transformers, batch_size, dtype),
                f"ours, batch size {batch_size}, {dtype}": partial(sample_ours, batch_size, dtype),
            }
            if CUDA:
                samples[f"ours, batch size {batch_size}, {dtype}, compiled"] = partial(
                    sample_ours, batch_size, dtype, True
                )
    hellaswag: dict[str, Benchmark] = {}
    for dtype in dict.fromkeys(("float32", dtype_auto)):
        hellaswag[f"build-nanogpt's method, {dtype}"] = partial(hellaswag_build_nanogpt, dtype, options)
        hellaswag[f"ours, {dtype}"] = partial(hellaswag_ours, dtype, options)
    muon_steps: dict[str, Benchmark] = {f"world size {n}": partial(muon_step, n) for n in (1, 2, 4)}
    stages = {"step": steps, "sample": samples, "hellaswag": hellaswag, "muon": muon_steps}
    return {
        stage: {name: run for name, run in runs.items() if options.nanogpt or not name.startswith("nanoGPT")}
        for stage, runs in stages.items()
    }


def measure(stage: str, name: str, options: argparse.Namespace, root: Path = ROOT) -> dict:
    """Run a benchmark in a new process, with benchmarks/speed.py of the checkout `root`."""
    command = [sys.executable, "benchmarks/speed.py", "--threads", str(options.threads)]
    command += ["--examples", str(options.examples), "--batch-size", str(options.batch_size), "--way", stage, name]
    for flag, path in (("--nanogpt", options.nanogpt), ("--hellaswag", options.hellaswag)):
        command += [flag, str(Path(path).resolve())] if path else []
    process = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"error: {name} failed in {root}:\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def run_benchmark(stage: str, name: str, options: argparse.Namespace) -> None:
    """Run a benchmark in this process and print its result as JSON."""
    if options.nanogpt:
        import importlib.util

        path = Path(options.nanogpt) / "model.py"
        spec = importlib.util.spec_from_file_location("nanogpt_model", path)
        if spec is None or spec.loader is None:
            sys.exit(f"error: {path} cannot be imported. --nanogpt must be a checkout of nanoGPT.")
        sys.modules["nanogpt_model"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    torch.set_num_threads(options.threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    result = make_benchmarks(options)[stage][name]()
    result["memory_mib"] = peak_memory_mib(DEVICE) - (0 if CUDA else before)  # without Python and its libraries
    print(json.dumps(result))


def format_table(stage: str, results: dict[str, list[dict]]) -> list[str]:
    base = next(iter(results.values()))
    lines = [
        "",
        f"## {stage}",
        "",
        "| implementation | ms, median (min to max) | tokens/s | speedup | MFU | first call, s | peak memory, MiB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, runs in results.items():
        ms, speedups = [run["ms"] for run in runs], [a["ms"] / b["ms"] for a, b in zip(base, runs, strict=True)]
        medians = {
            key: statistics.median(run[key] for run in runs) if runs[0].get(key) is not None else None
            for key in ("tokens_per_s", "mfu", "first_ms", "memory_mib")
        }
        rate = f"{medians['tokens_per_s']:,.0f}" if medians["tokens_per_s"] else ""
        mfu = f"{medians['mfu']:.1%}" if medians["mfu"] else ""
        first = f"{medians['first_ms'] / 1e3:.2f}" if medians["first_ms"] else ""
        lines.append(
            f"| {name} | {statistics.median(ms):,.1f} ({min(ms):,.1f} to {max(ms):,.1f}) | {rate} | "
            f"{statistics.median(speedups):.2f} | {mfu} | {first} | {medians['memory_mib']:,.0f} |"
        )
    if stage == "hellaswag":
        lines.append("")
        for name, runs in list(results.items())[1:]:
            for k, loss in enumerate(("sum", "mean")):
                pairs = list(zip(runs[0]["predictions"][k], base[0]["predictions"][k], strict=True))
                equal = sum(a == b for a, b in pairs)
                lines.append(
                    f"- {name}: {equal:,} of {len(pairs):,} predictions by {loss} of losses equal those of "
                    f"{next(iter(results))}"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", help="path of a nanoGPT checkout")
    parser.add_argument(
        "--stages", nargs="+", default=["step", "sample", "hellaswag"],
        choices=["step", "sample", "hellaswag", "muon"], help="stages (default: step sample hellaswag)",
    )  # fmt: skip
    parser.add_argument("--only", default="", help="run only the benchmarks whose name contains this text")
    parser.add_argument("--against", type=Path, help="path of another BabyGPT checkout to compare with")
    parser.add_argument("--runs", type=int, default=3, help="runs per benchmark (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--hellaswag", help="file of HellaSwag examples")
    parser.add_argument("--examples", type=int, default=200, help="number of examples (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16 if CUDA else 4, help="packed rows per batch")
    parser.add_argument("--out", type=Path, help="Markdown file for the tables")
    parser.add_argument("--way", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        stage, name = options.way
        return run_benchmark(stage, name, options)

    hardware = torch.cuda.get_device_name() if CUDA else f"{options.threads} cores, {platform.machine()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        f"{date.today()}, {hardware}, Python {platform.python_version()}, {versions}; runs per row: {options.runs}, "
        "alternating"
    ]
    for stage in options.stages:
        all_names = list(make_benchmarks(options)[stage])
        names = [name for name in all_names if options.only in name]
        if not names:
            sys.exit(f"error: --only {options.only!r} matches no benchmark of {stage}: {'; '.join(all_names)}.")
        rows = {name: (name, ROOT) for name in names}
        if options.against:  # alternate between the checkouts
            root_by_suffix = {f" ({options.against})": options.against, "": ROOT}
            rows = {name + suffix: (name, root) for name in names for suffix, root in root_by_suffix.items()}
        results: dict[str, list[dict]] = {label: [] for label in rows}
        for _ in range(options.runs):
            for label, (name, root) in rows.items():
                results[label].append(measure(stage, name, options, root))
                print(f"{stage}, {label}: {results[label][-1]['ms']:,.1f} ms", file=sys.stderr, flush=True)
        lines += format_table(stage, results)
    write_table(lines, options.out)


if __name__ == "__main__":
    main()
