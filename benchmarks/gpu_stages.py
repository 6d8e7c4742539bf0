"""The stages of gpu_report.py: what is checked and measured on a GPU, each in a process of its own.

A stage is a function of `Sizes` (and of the command's options) that returns a dictionary to print. It raises
AssertionError if a check fails.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from babygpt.errors import leave
from babygpt.evaluation.validation import mean_loss
from babygpt.nn import attention
from babygpt.training import checkpoint
from babygpt.training.device import Mark, make_deterministic, peak_flops, peak_memory_mib
from babygpt.training.distributed import Ranks
from babygpt.training.guard import Gate, checksum
from babygpt.training.metrics import read_log
from babygpt.training.optim import make_optimizers, optimizer_state, set_rates
from benchmarks.cases import Case
from dataloader import Position, Step
from model import GPT
from train import train_step
from train_config import PRESETS, Config, variant

ROOT = Path(__file__).parent.parent
Result = dict[str, Any]


class Sizes:
    """What is measured: GPT-2 124M on a GPU, a tiny model in a rehearsal."""

    def __init__(self, rehearse: bool):
        self.rehearse = rehearse
        self.device = torch.device("cpu") if rehearse else torch.device("cuda", 0)
        self.model: dict[str, Any] = {"vocab_size": 50257}
        if rehearse:
            self.model = {"vocab_size": 300, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}
        self.batch_rows = 8 if rehearse else 512
        self.steps = 2 if rehearse else 8
        self.rows = {16: 1, 32: 2, 64: 4, 128: 8} if rehearse else {n: n for n in (16, 32, 64, 128)}
        self.side = 64 if rehearse else 8192
        self.group = 1 if rehearse else 40  # of products that are timed together
        self.copy_bytes = 1 << 20 if rehearse else 4 << 30

    def config(self, preset: str, rows: int, **changes: Any) -> Config:
        """A preset at this size, with a batch of `batch_rows` in micro-batches of `rows`."""
        shape = self.model | changes
        if self.rehearse:
            shape["value_embeddings"] = min(1, PRESETS[preset].model.value_embeddings)
        config = variant(PRESETS[preset], model=shape)
        training = {"micro_batch_size": rows, "batch_tokens": self.batch_rows * config.model.block_size}
        return variant(config, training=training)

    def compile(self, module: Any) -> Any:
        return torch.compile(
            module, dynamic=False, fullgraph=True, backend="aot_eager" if self.rehearse else "inductor"
        )


def median_ms(
    call: Callable[[], object], device: torch.device, times: int = 10, warm_up: int = 3, group: int = 1
) -> float:
    """Median time of a call on the device, ms; `group` calls are timed together, to hide the launch of short ones."""
    for _ in range(warm_up * group):
        call()
    spent = []
    for _ in range(times):
        begin = Mark(device)
        for _ in range(group):
            call()
        end = Mark(device)
        end.wait()
        spent.append(end.ms_since(begin) / group)
    return statistics.median(spent)


# ---------------------------------------------------------------------------------------------------------
# stages


def gpu(sizes: Sizes) -> Result:
    """Name, memory and versions."""
    found: Result = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    if not sizes.rehearse:
        properties = torch.cuda.get_device_properties(0)
        found |= {"name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
        found |= {"multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}
    return found


def ceilings(sizes: Sizes) -> Result:
    """Copy, GB/s read and written; products of random bfloat16 matrices, TFLOP/s."""
    device, found = sizes.device, {}
    source = torch.randn(sizes.copy_bytes // 4, device=device)
    ms = median_ms(partial(torch.empty_like(source).copy_, source), device)
    found["copy, GB/s"] = 2 * sizes.copy_bytes / ms / 1e6
    del source
    config = sizes.config("gpt2", sizes.rows[64]).model
    rows, C, V = sizes.rows[64] * config.block_size, config.n_embd, config.padded_vocab_size
    shapes = {
        "large": (sizes.side, sizes.side, sizes.side), "c_attn": (rows, C, 3 * C), "c_proj": (rows, C, C),
        "c_fc": (rows, C, 4 * C), "mlp.c_proj": (rows, 4 * C, C), "head, one chunk": (rows // 4, C, V),
        "head, its weight gradient": (V, rows // 4, C), "head, its input gradient": (rows // 4, V, C),
    }  # fmt: skip
    for name, (m, k, n) in shapes.items():
        a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        b = torch.randn(k, n, device=device, dtype=torch.bfloat16)
        found[f"{name}, TFLOP/s"] = 2 * m * k * n / median_ms(partial(torch.mm, a, b), device, group=sizes.group) / 1e9
    return found


def attend(backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gradient: torch.Tensor) -> None:
    with sdpa_kernel(getattr(SDPBackend, backend)):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.autograd.grad(out, (q, k, v), gradient)


def attention_kernels(sizes: Sizes) -> Result:
    """Causal attention, forward and backward together, ms for one layer of a micro-batch, by kernel and head size."""
    config = sizes.config("gpt2", sizes.rows[64]).model
    found: Result = {}
    for heads in (config.n_head, config.n_head // 2):
        shape = (sizes.rows[64], heads, config.block_size, config.n_embd // heads)
        q, k, v = (torch.randn(shape, device=sizes.device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
            name = f"{heads} heads of {shape[-1]}, {backend.split('_')[0].lower()}"
            try:
                found[name] = median_ms(partial(attend, backend, q, k, v, torch.randn_like(q)), sizes.device)
            except RuntimeError as error:  # this GPU or build has no such kernel
                found[name] = f"{error}"[:60]
    return found


class Training:
    """A model, its optimizers, and one step of training on random tokens."""

    def __init__(self, sizes: Sizes, config: Config, compiled: bool = True, ranks: Ranks | None = None):
        torch.manual_seed(0)
        self.config, self.sizes = config, sizes
        self.ranks = ranks or Ranks(0, 0, 1, sizes.device)
        self.raw_model = GPT(config.model).to(sizes.device)
        self.raw_model.bf16_activations = config.training.bf16_activations
        self.raw_model.recompute = config.training.activation_checkpointing
        self.optimizers = make_optimizers(self.raw_model, asdict(config.optimizer))
        set_rates(self.optimizers, 10, 0.1, 0, 100)
        fast = sizes.compile(self.raw_model) if compiled else self.raw_model
        self.model = self.ranks.data_parallel(fast)
        if dist.is_initialized() and self.ranks.world_size == 1:
            self.model = DistributedDataParallel(fast, gradient_as_bucket_view=True)
        self.gate = Gate(sizes.device)
        rows = config.training.micro_batch_size
        micro_batches = config.training.batch_tokens // config.model.block_size // rows
        generator = torch.Generator().manual_seed(1)
        shape = (micro_batches, rows, config.model.block_size + 1)
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
        self.batches = [batch if sizes.rehearse else batch.pin_memory() for batch in tokens]

    def step(self) -> torch.Tensor:
        data = Step(Position(), Position(), self.batches, self.config.training.batch_tokens)
        return train_step(self.model, self.optimizers, data, self.config, self.ranks, 0, self.gate, stop=False)


def correct(sizes: Sizes, preset: str) -> Result:
    """Losses and gradient norms of three steps, compiled against eager, and that a step never waits for the device."""
    found: Result = {}
    config = sizes.config(preset, sizes.rows[16], **({} if sizes.rehearse else {"n_layer": 4}))
    config = variant(config, training={"batch_tokens": 2 * sizes.rows[16] * config.model.block_size})
    for name in ("eager", "compiled"):
        training = Training(sizes, config, compiled=name == "compiled")
        statuses = [training.step()]  # this one compiles, and the optimizers make their state
        if not sizes.rehearse:
            torch.cuda.set_sync_debug_mode("error")
        try:
            statuses += [training.step() for _ in range(2)]
        finally:
            if not sizes.rehearse:
                torch.cuda.set_sync_debug_mode("default")
        found[f"{name}, losses"] = [round(status[0].item(), 5) for status in statuses]
        found[f"{name}, norms"] = [round(status[1].item(), 5) for status in statuses]
    for key, tolerance in (("losses", 2e-3), ("norms", 3e-2)):
        for a, b in zip(found[f"eager, {key}"], found[f"compiled, {key}"], strict=True):
            if not (abs(a - b) <= tolerance * abs(a) and b > 0):
                raise AssertionError(f"{key} differ: {found}")
    return found | {"equal": True, "a step never waits for the device": "not checked" if sizes.rehearse else True}


def deterministic(sizes: Sizes) -> Result:
    """Whether two trainings of three steps have the same weights, to the bit, with and without the switch."""
    found: Result = {}
    for wanted in (False, True):
        if wanted:
            make_deterministic()
        sums = []
        for _ in range(2):
            training = Training(
                sizes, sizes.config("gpt2", sizes.rows[16], **({} if sizes.rehearse else {"n_layer": 4}))
            )
            for _ in range(3):
                training.step()
            sums.append(checksum(list(training.raw_model.parameters())).item())
        found["--general.deterministic, equal" if wanted else "without, equal"] = sums[0] == sums[1]
    if not found["--general.deterministic, equal"]:
        raise AssertionError(f"two deterministic runs differ: {found}")
    return found


def rank_of_two(rank: int, rehearse: bool, backend: str, world_size: int, folder: str) -> None:
    sizes = Sizes(rehearse)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    config = sizes.config("gpt2", sizes.rows[16], **({} if rehearse else {"n_layer": 4}))
    tokens = 4 * sizes.rows[16] * config.model.block_size
    config = variant(config, training={"batch_tokens": tokens})
    training = Training(sizes, config, ranks=Ranks(rank, 0, world_size, sizes.device))
    training.batches = training.batches[rank::world_size]
    losses = [training.step()[:2].tolist() for _ in range(2)]
    ones = torch.ones(8, device=sizes.device)
    dist.all_reduce(ones)
    assert ones.tolist() == [world_size] * 8
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


def ranks_agree(sizes: Sizes) -> Result:
    """Loss and gradient norm of two steps: NCCL with one rank, and gloo with two ranks on the same GPU."""
    found: Result = {}
    for name, backend, world_size in (
        ("one rank", "gloo" if sizes.rehearse else "nccl", 1), ("two ranks, gloo", "gloo", 2),
    ):  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(rank_of_two, (sizes.rehearse, backend, world_size, folder), world_size)
            found[name] = json.loads(Path(folder, "losses.json").read_text())
    alone, together = (torch.tensor(losses) for losses in found.values())
    if not torch.allclose(alone, together, rtol=1e-2):
        raise AssertionError(f"ranks differ: {found}")
    return found | {"equal": True}


def training_step(sizes: Sizes, case: Case) -> Result:
    """Steps of 524,288 tokens: tokens/s, MFU, time of the first step, peak memory."""
    if case.deterministic:
        make_deterministic()
    config = sizes.config(case.preset, sizes.rows[case.rows], **({} if sizes.rehearse else {"n_head": case.n_head}))
    switches = {name: getattr(case, name) for name in ("bf16_activations", "activation_checkpointing")}
    config = variant(config, training=switches)
    cudnn = mock.patch.object(attention, "CUDA_BACKENDS", [SDPBackend.CUDNN_ATTENTION])
    with case.loss(), cudnn if case.cudnn else nullcontext():
        training = Training(sizes, config, case.compiled)
        begin = time.perf_counter()
        training.step().tolist()
        first = time.perf_counter() - begin
        ms = median_ms(training.step, sizes.device, sizes.steps, 2)
    rate = config.training.batch_tokens / ms * 1e3
    flops = training.raw_model.flops_per_token()
    peak = peak_flops(sizes.device)
    return {
        "tokens/s": rate, "ms": ms, "TFLOP/s": rate * flops / 1e12, "MFU": rate * flops / peak if peak else None,
        "first step, s": first, "MFLOP per token": flops / 1e6,
        "peak GB": peak_memory_mib(sizes.device) * 2**20 / 1e9,
    }  # fmt: skip


def other_work(sizes: Sizes) -> Result:
    """Validation, HellaSwag, sampling and saving, of gpt2."""
    from benchmarks import speed as peers

    config = sizes.config("gpt2", sizes.rows[64])
    training = Training(sizes, config)
    device, ranks, T = sizes.device, training.ranks, config.model.block_size
    batches = [(torch.randint(0, 300, (sizes.rows[64], T)),) * 2 for _ in range(8)]
    batches = batches if sizes.rehearse else [(a.pin_memory(), b.pin_memory()) for a, b in batches]
    token_bytes = torch.ones(config.model.padded_vocab_size, dtype=torch.int64)
    found: Result = {}
    for name, module in (("compiled", training.model), ("eager", training.raw_model)):
        ms = median_ms(lambda: mean_loss(module, batches, token_bytes, ranks), device, 3, 2)  # noqa: B023
        found[f"validation, {name}, K tokens/s"] = len(batches) * sizes.rows[64] * T / ms
    training.raw_model.eval()
    if not sizes.rehearse:  # its questions and prompts are of GPT-2's vocabulary
        examples = peers.questions(None, 1000)
        begin = time.perf_counter()
        peers.losses(training.raw_model, examples, device)
        torch.cuda.synchronize()
        found["HellaSwag, all 10,042 examples, s, estimated from 1,000"] = (time.perf_counter() - begin) * 10.042
        for texts in (1, 8):
            for compiled in (False, True):
                rate = peers.sample_ours(texts, "bfloat16", compiled)["tokens_per_s"]
                found[f"sampling, {texts} texts{', compiled' if compiled else ''}, tokens/s"] = rate
        with mock.patch.object(attention, "CUDA_BACKENDS", [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]):
            found["sampling, 1 text, cuDNN attention, tokens/s"] = peers.sample_ours(1, "bfloat16")["tokens_per_s"]
    training.step()
    with tempfile.TemporaryDirectory() as folder, checkpoint.Saver(Path(folder), 1, 0) as saver:
        begin = time.perf_counter()
        state = optimizer_state(training.optimizers, training.raw_model)
        saver.save(1, checkpoint.model_tensors(training.raw_model), state, {"step": 1})
        found["save, training waits, s"] = time.perf_counter() - begin
        saver.wait()
        found["save, in a temporary directory after, s"] = time.perf_counter() - begin
    return found


def dataset_of(options: argparse.Namespace, folder: Path) -> Path:
    if options.dataset:
        return Path(options.dataset)
    if not (folder / "data" / "dataset.json").exists():
        tokenizer = folder / "tokenizer.json"
        vocabulary = ["-m", "tools.train_tokenizer", "stdlib", "--vocab-size", "4096", "--out", str(tokenizer)]
        data = ["fineweb.py", "stdlib", "--tokenizer", str(tokenizer), "--val-tokens", "50000"]
        for command in (vocabulary, [*data, "--out-dir", str(folder / "data")]):
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=sys.stderr)
    return folder / "data"


def killed_and_resumed(sizes: Sizes, options: argparse.Namespace) -> Result:
    """train.py: the first 20 losses, a SIGKILL, and a resume, whose losses are compared with an unbroken run's."""
    folder = options.folder.resolve()
    dataset, found, losses = dataset_of(options, folder), {}, {}
    for preset in ("gpt2", "modern"):
        small = ["--model.n-layer", "2", "--model.n-head", "2", "--model.n-embd", "32", "--model.block-size", "64"]
        small += ["--training.batch-tokens", "1024", "--general.device", "cpu"]
        small += ["--model.value-embeddings", "1"] if preset == "modern" else []
        base = [
            sys.executable, "train.py", preset, "--data.dataset", str(dataset), "--training.max-steps", "20",
            "--general.mode", "train", "val", "--validation.every-n-steps", "20", "--saving.every-n-steps", "5",
            "--general.init-from", "resume", *(small if sizes.rehearse else ["--data.num-streams", "8"]),
        ]  # fmt: skip
        for name in ("unbroken", "killed"):
            out = folder / f"run-{preset}-{name}"
            command = [*base, "--general.out-dir", str(out)]
            shutil.rmtree(out, ignore_errors=True)  # of a stage that was interrupted
            if name == "killed":
                process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
                while process.poll() is None and not list(out.glob("checkpoints/step_0000001*")):
                    time.sleep(0.05)
                process.send_signal(signal.SIGKILL)
                if process.wait() != -signal.SIGKILL:
                    raise AssertionError(f"{preset}: the run ended before it could be killed")
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            losses[name] = [row["loss"] for row in read_log(out / "log.csv") if row["loss"] is not None]
        found[f"{preset}, first 20 losses"] = [round(loss, 4) for loss in losses["unbroken"]]
        off = max(abs(a - b) / a for a, b in zip(losses["unbroken"], losses["killed"], strict=True))
        found[f"{preset}, largest relative difference after the kill"] = off
        if off > (0 if sizes.rehearse else 1e-2):
            raise AssertionError(f"{preset}: the resumed run differs: {losses}")
    return found


def nanogpt(options: argparse.Namespace, kind: str) -> Result:
    """A step of nanoGPT, by benchmarks/speed.py."""
    command = [sys.executable, "benchmarks/speed.py", "--nanogpt", str(options.nanogpt), "--way", "step", kind]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"tokens/s": found["tokens_per_s"], "ms": found["ms"], "peak GB": found["memory_mib"] * 2**20 / 1e9}
