"""Small runs of train.py, and comparisons of two runs."""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

import fineweb
import train
from babygpt.errors import run
from babygpt.training import checkpoint
from babygpt.training.log import read_log
from support.helpers import call, save_jsonl
from tools.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
TIMING_COLUMNS = {"tokens_per_s", "mfu", "step_ms", "memory_mib", "elapsed_s"}
STEPS = 14  # an epoch of the dataset has 8 steps


def make_tiny_dataset(texts: list[str], directory: Path, vocab_size: int = 300) -> Path:
    """Prepare a dataset of a few short texts with fineweb.py, with a tokenizer trained on them."""
    train_tokenizer(texts, vocab_size, directory / "bpe.json", progress=False)
    save_jsonl(directory / "texts.jsonl", texts)
    call(
        fineweb.main, "files", "--input", directory / "texts.jsonl", "--tokenizer", directory / "bpe.json",
        "--out-dir", directory / "tiny", "--val-tokens", 300, "--workers", 1,
    )  # fmt: skip
    return directory / "tiny"


def flags(dataset: Path, out: Path, preset: str = "gpt2", **changes: object) -> list[str]:
    """Return the command line of a small run; `changes` are given as section__field=value."""
    fields = {
        "data__dataset": dataset, "general__out_dir": out, "data__num_streams": 4, "data__chunk_tokens": 100,
        "model__block_size": 16, "model__n_layer": 2, "model__n_head": 2, "model__n_embd": 16, "model__dropout": 0.1,
        "training__max_steps": STEPS, "training__batch_tokens": 256, "training__micro_batch_size": 4,
        "optimizer__warmup_steps": 3, "optimizer__max_lr": 1e-2, "validation__every_n_steps": 4,
        "evaluation__every_n_steps": 0, "sampling__every_n_steps": 5, "sampling__max_new_tokens": 8,
        "saving__every_n_steps": 1, "saving__keep": 0, "general__device": "cpu", "training__dtype": "float32",
    } | changes  # fmt: skip
    arguments = [preset]
    for name, value in fields.items():
        section, field = name.split("__")
        arguments += [f"--{section}.{field.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
    return arguments


def torchrun(
    world_size: int, *arguments: object, script: str = "train.py", check: bool = True, fault: str = "",
    restarts: int = 0,
) -> subprocess.CompletedProcess:  # fmt: skip
    """Run `script`, a file or a module, with torchrun; with a `fault`, run tests/support/faulty_train.py instead."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    script = "tests/support/faulty_train.py" if fault else script
    target = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    done = subprocess.run(
        [*command, f"--max-restarts={restarts}", *target, *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"FAULT": fault}, capture_output=True, text=True,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fork_ranks(world_size: int, *arguments: object, fault: str = "", script: ModuleType = train) -> None:
    """Run train.py or another script on several ranks, as `torchrun` does, in forks of this process.

    The forks have already imported everything, which saves seconds. With an accelerator this calls `torchrun`, since
    PyTorch does not support a backward pass in a forked process there.
    """
    if torch.accelerator.is_available():
        torchrun(world_size, *arguments, fault=fault, script=f"{script.__name__}.py")
        return
    group = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    group |= {"MASTER_PORT": free_port(), "TORCHELASTIC_RESTART_COUNT": 0, "FAULT": fault}
    with tempfile.TemporaryFile() as output:
        children = []
        for rank in range(world_size):
            if (child := os.fork()) == 0:
                try:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                    os.environ |= {
                        name: str(value) for name, value in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()
                    }
                    if fault:
                        importlib.import_module("support.faulty_train")  # replaces train.train_step
                    call(lambda: run(script.main), *arguments)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(1)
            children.append(child)
        statuses = [os.waitpid(child, 0)[1] for child in children]
        output.seek(0)
        assert statuses == [0] * world_size, output.read().decode()[-3000:]


def read_recorded_rows(run: Path) -> list[list]:
    """Return the rows of each step over all ranks, which the faults `record_rows` and `sigterm` record.

    A step that was repeated after a resume appears once: it has the same rows.
    """
    steps = {}
    for path in sorted(run.glob("rows_*.jsonl")):
        for line in path.read_text().splitlines():
            epoch, n, rows = json.loads(line)
            steps.setdefault((epoch, n), set()).update(map(tuple, rows))
    return [sorted(steps[key]) for key in sorted(steps)]


def read_log_without_timing(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in read_log(run / "log.csv")]


def load_tensors(run: Path, step: int) -> tuple[dict, dict]:
    """Return the tensors of the model and of the optimizer from the checkpoint of a step."""
    loaded = checkpoint.load(run / "checkpoints" / f"step_{step:08d}")
    return loaded.model, loaded.optimizer


def assert_bitwise_equal(one: Path, other: Path, step: int = STEPS) -> None:
    """Compare the logs of two runs without their timing, the weights, the optimizer states and the samples."""
    assert read_log_without_timing(one) == read_log_without_timing(other)
    (model, optimizer), (other_model, other_optimizer) = load_tensors(one, step), load_tensors(other, step)
    assert model.keys() == other_model.keys()
    assert all(torch.equal(model[name], other_model[name]) for name in model)
    assert optimizer.keys() == other_optimizer.keys()
    for name in optimizer:
        assert all(torch.equal(optimizer[name][key], other_optimizer[name][key]) for key in optimizer[name])
    assert (one / "samples.txt").read_text() == (other / "samples.txt").read_text()


def completes_before_call(n: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child process that exits before its n-th call of a function that writes, renames or deletes.

    Returns whether `work` completed before that call.
    """
    if (child := os.fork()) == 0:
        remaining = n

        def or_exit(function):
            def wrapper(*args, **kwargs):
                nonlocal remaining
                remaining -= 1
                if remaining == 0:
                    os._exit(9)
                return function(*args, **kwargs)

            return wrapper

        save_functions = ("babygpt.training.checkpoint.save_file", "torch.save")
        for name in ("os.rename", "os.replace", "os.fsync", "os.rmdir", "os.unlink", *save_functions):
            module, function = name.rsplit(".", 1)
            setattr(sys.modules[module], function, or_exit(getattr(sys.modules[module], function)))
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def copy_killed_run(run: Path, step: int, target: Path) -> Path:
    """Copy a run as a kill after `step` leaves it: without later checkpoints, and with an incomplete last line in the
    log."""
    shutil.copytree(run, target)
    for path in checkpoint.list_checkpoints(target):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    text = (target / "log.csv").read_text()
    (target / "log.csv").write_text(text[: len(text) - 15])
    return target
