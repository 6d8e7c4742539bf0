"""Small runs of train.py, and what two of them are held against each other by."""

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

import torch

import fineweb
import train
from babygpt.errors import run
from babygpt.training import checkpoint
from babygpt.training.log import read_log
from support.helpers import call, save_jsonl
from tools.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
TIMING = {"tokens_per_s", "mfu", "step_ms", "memory_mib"}
STEPS = 14  # the data has 8 steps an epoch


def tiny_dataset(texts: list[str], folder: Path, vocab_size: int = 300) -> Path:
    """A data set of some short texts, as fineweb.py makes it, with a trained vocabulary."""
    train_tokenizer(texts, vocab_size, folder / "bpe.json", progress=False)
    save_jsonl(folder / "texts.jsonl", texts)
    call(
        fineweb.main, "files", "--input", folder / "texts.jsonl", "--tokenizer", folder / "bpe.json",
        "--out-dir", folder / "tiny", "--val-tokens", 300, "--workers", 1,
    )  # fmt: skip
    return folder / "tiny"


def flags(dataset: Path, out: Path, preset: str = "gpt2", **changes: object) -> list[str]:
    """The command line of a small run; changes as section__field=value."""
    fields = {
        "data__dataset": dataset, "general__out_dir": out, "data__num_streams": 4, "data__chunk_tokens": 100,
        "model__block_size": 16, "model__n_layer": 2, "model__n_head": 2, "model__n_embd": 16, "model__dropout": 0.1,
        "training__max_steps": STEPS, "training__batch_tokens": 256, "training__micro_batch_size": 4,
        "optimizer__warmup_steps": 3, "optimizer__max_lr": 1e-2, "validation__every_n_steps": 4,
        "evaluation__every_n_steps": 0, "sampling__every_n_steps": 5, "sampling__max_new_tokens": 8,
        "saving__every_n_steps": 1, "saving__keep": 0, "general__device": "cpu", "training__dtype": "float32",
    } | changes  # fmt: skip
    line = [preset]
    for name, value in fields.items():
        section, field = name.split("__")
        line += [f"--{section}.{field.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
    return line


def torchrun(
    world: int, *arguments: object, script: str = "train.py", check: bool = True, fault: str = "", restarts: int = 0
) -> subprocess.CompletedProcess:
    """A run of several ranks; `script` is a file or a module, `fault` tests/support/faulty_train.py's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    script = "tests/support/faulty_train.py" if fault else script
    target = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    done = subprocess.run(
        [*command, f"--max-restarts={restarts}", *target, *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"FAULT": fault}, capture_output=True, text=True,
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def forked_ranks(world: int, *arguments: object, fault: str = "") -> None:
    """The same run as `torchrun`, by processes forked from this one, which has imported everything: seconds faster.

    With an accelerator PyTorch allows no backward pass in a forked process, and torchrun starts the run.
    """
    if torch.accelerator.is_available():
        torchrun(world, *arguments, fault=fault)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    group |= {"TORCHELASTIC_RESTART_COUNT": 0, "FAULT": fault}
    with tempfile.TemporaryFile() as output:
        children = []
        for rank in range(world):
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
                    call(lambda: run(train.main), *arguments)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(1)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        output.seek(0)
        assert codes == [0] * world, output.read().decode()[-3000:]


def rows_of(out: Path) -> list[list]:
    """The rows of every step over all ranks, in order, of a run with the fault `rows` or `stop`; an update that was
    done again has the same ones."""
    steps = {}
    for path in sorted(out.glob("rows_*.jsonl")):
        for line in path.read_text().splitlines():
            epoch, n, rows = json.loads(line)
            steps.setdefault((epoch, n), set()).update(map(tuple, rows))
    return [sorted(steps[key]) for key in sorted(steps)]


def measured(out: Path) -> list[dict]:
    """The log but for what a clock says."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_log(out / "log.csv")]


def weights(out: Path, step: int) -> tuple[dict, dict]:
    loaded = checkpoint.load(out / "checkpoints" / f"step_{step:08d}")
    return loaded.model, loaded.optimizer


def assert_equal_to_the_bit(one: Path, other: Path, step: int = STEPS) -> None:
    """Log but for timing, weights, optimizer and samples."""
    assert measured(one) == measured(other)
    (model, optimizer), (model_2, optimizer_2) = weights(one, step), weights(other, step)
    assert model.keys() == model_2.keys()
    assert all(torch.equal(model[name], model_2[name]) for name in model)
    assert optimizer.keys() == optimizer_2.keys()
    for name in optimizer:
        assert all(torch.equal(optimizer[name][key], optimizer_2[name][key]) for key in optimizer[name])
    assert (one / "samples.txt").read_text() == (other / "samples.txt").read_text()


def ends_at(nth: int, work: Callable[[], object]) -> bool:
    """Whether a child that ends itself before its nth call of the system in saving has done its work before."""
    if (child := os.fork()) == 0:
        left = [nth]

        def or_end(function):
            def call(*args, **named):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)
                return function(*args, **named)

            return call

        saving = ("babygpt.training.checkpoint.save_file", "torch.save")
        for name in ("os.rename", "os.replace", "os.fsync", "os.rmdir", "os.unlink", *saving):
            module, function = name.rsplit(".", 1)
            setattr(sys.modules[module], function, or_end(getattr(sys.modules[module], function)))
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def cut_back_to(run: Path, step: int, to: Path) -> Path:
    """A copy of a run as a kill behind `step` leaves it: no later checkpoint, half a line in the log."""
    shutil.copytree(run, to)
    for path in checkpoint.checkpoints(to):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    text = (to / "log.csv").read_text()
    (to / "log.csv").write_text(text[: len(text) - 15])
    return to
