"""Manage the run directory: lock, markers, settings, and provenance."""

import fcntl
import functools
import json
import platform
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from babygpt import files
from babygpt.errors import ConfigError
from babygpt.training import checkpoint
from babygpt.training.device import uses_bfloat16
from babygpt.training.distributed import Ranks

# empty marker files for scripts: the run is finished, or it stopped on request and saved a checkpoint
FINISHED, STOPPED = "finished", "stopped"
LOCK = ".lock"  # the main rank of a run locks this file


@contextmanager
def lock_run_dir(out: Path, ranks: Ranks) -> Iterator[None]:
    """Create a run directory and lock it. ConfigError if another process has locked it."""

    def lock() -> tuple[TextIO, bool] | None:
        if not ranks.is_main:
            return None
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--out-dir {out} is a file. Use the path to a directory.")
        is_new = not out.exists()
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = open(out / LOCK, "w")  # noqa: SIM115, open during the run
        except OSError as error:
            raise ConfigError(f"--out-dir {out} cannot be written to ({error}). Use a different one.") from None
        try:
            _lock_file(file)
        except BlockingIOError:
            file.close()
            raise ConfigError(
                f"Another process is training in {out}. Wait for it to finish, or use a different --out-dir."
            ) from None
        except OSError:  # the file system does not support locks
            pass
        if not (out / LOCK).exists():  # a failed launch has just deleted it
            file.close()
            return lock()
        (out / STOPPED).unlink(missing_ok=True)
        for path in [path for path in out.iterdir() if files.TEMPORARY_SUFFIX.search(path.name)]:
            path.unlink()  # left by a killed process
        return file, is_new

    locked = ranks.main_process_first(lock)
    try:
        yield
    finally:
        if locked is not None:
            file, is_new = locked
            if not (out / "config.json").exists():  # the launch failed before the run started
                (out / LOCK).unlink(missing_ok=True)
                if is_new:
                    with suppress(OSError):
                        out.rmdir()
            file.close()


def _lock_file(file: TextIO) -> None:
    """Lock a file exclusively. BlockingIOError if it stays locked: `tools.runs` locks it for an instant."""
    for _ in range(10):
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.02)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def resume_command(out: Path) -> str:
    """Return the command that resumes the run in `out` on one process, with the settings of its config.json."""
    if is_finetuning(out):
        return shlex.join(["python", "finetune.py", "resume", str(out)])
    return shlex.join(["python", "train.py", "--out-dir", str(out), "--init-from", "resume"])


def is_finetuning(out: Path) -> bool:
    """Return whether a run directory is of finetune.py."""
    return "chat" in read_config(out / "config.json")


def latest_checkpoint(out: Path, ranks: Ranks) -> Path | None:
    """Return the newest intact checkpoint of a run, or None if the run has no checkpoints.

    ConfigError if the ranks see different checkpoints, or if none is intact.
    """
    path = checkpoint.latest(out)
    steps = ranks.gather(checkpoint.step_of(path) if path else -1)
    if len(set(steps)) > 1:
        raise ConfigError(
            f"The ranks see different checkpoints in {out} (latest step by rank: "
            f"{', '.join('none' if step < 0 else f'{step:.0f}' for step in steps)}). Use a directory that all "
            "nodes share."
        )
    if path is None and (paths := checkpoint.list_checkpoints(out)):
        raise ConfigError(
            f"None of the {len(paths)} checkpoints of {out} is intact. Restore one of them, or start again with "
            "a different --out-dir."
        )
    return path


def identity_of(config: Any, dataset: Any, order: Any, tokenizer: Any) -> dict[str, dict]:
    """Return the settings that must not change on resume: architecture, optimizer, tokenizer, data and their order."""
    return {
        "model": asdict(config.model),
        "data": {
            "fingerprint": dataset.fingerprint, "block_size": order.block_size, "num_streams": order.num_streams,
            "chunk_tokens": order.chunk_tokens, "seed": order.seed, "order": order.version,
        },
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
        "optimizer": {"name": config.optimizer.name},
    }  # fmt: skip


def check_identity(path: Path, state: dict, identity: dict[str, dict]) -> None:
    """Raise a ConfigError if the `identity` of a run differs from that of the checkpoint from which it resumes."""
    earlier = {section: state[section] for section in identity}
    differing = identity_differences(earlier, identity)
    if lines := [f"  {name}: {earlier} before, {value} now\n" for name, earlier, value in differing]:
        raise ConfigError(
            f"{path} cannot be resumed with a different model, optimizer or data order:\n{''.join(lines)}Use the "
            "earlier values, or start again with a different --out-dir."
        )


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of config.json, or an empty dictionary if it is missing or corrupted."""
    try:
        sections = json.loads(path.read_text(encoding="utf-8"))
        return {name: section for name, section in sections.items() if isinstance(section, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def with_order(sections: dict[str, dict]) -> dict[str, dict]:
    """Return the sections with data.order = 1 if it is missing, since earlier versions of BabyGPT did not store it."""
    return {name: ({"order": 1} if name == "data" else {}) | section for name, section in sections.items()}


def differences(earlier: dict, now: dict) -> list[tuple[str, object, object]]:
    """Return the fields in which two configurations differ: section.name, earlier value, current value.

    A field that is missing from one of them counts as off.
    """
    changes = []
    for section, values in now.items():
        before = earlier.get(section, values)
        for name in {**before, **values}:
            old, new = before.get(name), values.get(name)
            if old != new and (old or new or (name in before and name in values)):
                changes.append((f"{section}.{name}", old, new))
    return changes


def identity_differences(earlier: dict[str, dict], identity: dict[str, dict]) -> list[tuple[str, object, object]]:
    """Return the differences between two identities. If they have a data order, a missing version counts as 1."""
    return differences(with_order(earlier) if "order" in identity["data"] else earlier, identity)


def changed_settings(path: Path, config: dict) -> list[str]:
    """Return one line for each setting, except in `general`, that differs from the config.json at `path`."""
    return [
        f"  {name} was {earlier}, is now {value}"
        for name, earlier, value in differences(with_order(read_config(path)), config)
        if not name.startswith("general.")
    ]


def format_settings(config: dict[str, dict], defaults: dict[str, dict]) -> str:
    """Format the settings that differ from `defaults` for the console, one line per section."""
    lines = []
    for section, values in config.items():
        changed = [name for name, value in values.items() if (name, value) not in defaults.get(section, {}).items()]
        if changed:
            lines.append(f"{section:>11}  " + "  ".join(f"{name}={_one_line(values[name])}" for name in changed))
    return "\n".join(lines)


def _one_line(value: object) -> str:
    text = str(value)
    return text if text.isprintable() else repr(text)


def record_launch(launches: list[dict], step: int, settings: dict, ranks: Ranks) -> None:
    """Append a launch that starts at `step`, unless settings and provenance are those of the last launch."""
    launch = {"config": settings, "provenance": provenance(ranks)}
    if not launches or launches[-1] | launch != launches[-1]:
        launches.append({"step": step} | launch)


def provenance(ranks: Ranks) -> dict:
    """Return what affects the rounding of results, apart from the settings: versions, device, ranks, threads."""
    is_cuda = ranks.device.type == "cuda"
    return {
        "commit": _commit(), "python": platform.python_version(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if is_cuda else torch.backends.cpu.get_cpu_capability(),
        "bfloat16": uses_bfloat16(ranks.device, "auto"),
        "ranks": ranks.world_size, "threads": torch.get_num_threads(),
    }  # fmt: skip


@functools.cache
def _commit() -> str | None:
    """Return the commit of the code, with a + if files differ from it, or None without git."""
    root = Path(__file__).parents[2]
    try:
        commit, changed = (
            subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)
