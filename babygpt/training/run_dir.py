"""The run directory: lock, markers, provenance, and the settings that a resumed run must keep."""

import fcntl
import functools
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch

from babygpt.errors import ConfigError
from babygpt.training import checkpoint
from babygpt.training.device import uses_bfloat16
from babygpt.training.distributed import Ranks

# empty files in a run's folder, for scripts: it has done all its steps, or was told to stop and has saved
FINISHED, STOPPED = "finished", "stopped"
LOCK = ".lock"  # held by the process that trains in the folder


@contextmanager
def lock_run_dir(out: Path, ranks: Ranks) -> Iterator[None]:
    """Makes a run's folder and keeps other processes from training in it meanwhile; ConfigError where one does."""

    def lock() -> TextIO | None:
        if not ranks.is_main:
            return None
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--general.out-dir {out} is a file.")
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = open(out / LOCK, "w")  # noqa: SIM115, held as long as the run
        except OSError as error:
            raise ConfigError(f"--general.out-dir {out} can't be written to ({error}).") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(f"another process trains in {out} now. Give another --general.out-dir.") from None
        except OSError:  # a file system without locks
            pass
        if not (out / LOCK).exists():  # a run that was refused has just deleted it
            file.close()
            return lock()
        (out / STOPPED).unlink(missing_ok=True)
        for stale in out.glob("*.tmp"):  # of a process that was killed
            stale.unlink()
        return file

    file = ranks.main_first(lock)
    try:
        yield
    finally:
        if file is not None:
            if out.exists() and os.listdir(out) == [LOCK]:  # the run was refused
                (out / LOCK).unlink()
                out.rmdir()
            file.close()


def latest_checkpoint(out: Path, ranks: Ranks) -> Path | None:
    """The newest intact checkpoint of a run, the same on all ranks, or None if there is none at all."""
    found = checkpoint.latest(out)
    if len(steps := set(ranks.gather(checkpoint.step_of(found) if found else -1))) > 1:
        raise ConfigError(f"the ranks see different checkpoints in {out} (steps {sorted(map(int, steps))}): share it.")
    if found is None and checkpoint.checkpoints(out):
        raise ConfigError(f"none of the {len(checkpoint.checkpoints(out))} checkpoints of {out} is intact.")
    return found


def check_identity(found: Path, state: dict, now: dict[str, dict]) -> None:
    """ConfigError if a run's settings are not those of its checkpoint `found`: of each section of `now`, all that a
    resumed run may not change (architecture, optimizer, data and their order, tokenizer)."""
    wrong = [
        f"  {section}.{name}: {state[section].get(name)} there, {value} now\n"
        for section, values in now.items()
        for name, value in values.items()
        if state[section].get(name) != value
    ]
    if wrong:
        raise ConfigError(
            f"{found} can't be gone on with: model, optimizer and order of the data must stay.\n{''.join(wrong)}"
            "Give the earlier values, or begin anew with another --general.out-dir."
        )


def record_launch(launches: list[dict], step: int, settings: dict, ranks: Ranks) -> None:
    """Record that training continues at `step` with these settings and machine, unless nothing has changed."""
    launch = {"config": settings, "made_by": made_by(ranks)}
    if not launches or launches[-1] | launch != launches[-1]:
        launches.append({"step": step} | launch)


def made_by(ranks: Ranks) -> dict:
    """What decides about the last bits of a run's numbers: versions, device, ranks and threads."""
    cuda = ranks.device.type == "cuda"
    return {
        "commit": _commit(), "python": platform.python_version(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "bfloat16": uses_bfloat16(ranks.device, "auto"),
        "ranks": ranks.world_size, "threads": torch.get_num_threads(),
    }  # fmt: skip


@functools.cache
def _commit() -> str | None:
    """Of the code, with a + where it was changed since; None without git."""
    here = Path(__file__).parents[2]
    try:
        commit, changed = (
            subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)
