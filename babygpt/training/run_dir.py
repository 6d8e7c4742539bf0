"""The run directory: lock, markers, settings, and provenance."""

import fcntl
import functools
import json
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from babygpt import files
from babygpt.errors import ConfigError
from babygpt.training import checkpoint
from babygpt.training.device import uses_bfloat16
from babygpt.training.distributed import Ranks

# empty files in a run directory, for scripts: the run has finished, or has stopped on request and saved
FINISHED, STOPPED = "finished", "stopped"
LOCK = ".lock"  # locked by the process that trains in the directory


@contextmanager
def lock_run_dir(out: Path, ranks: Ranks) -> Iterator[None]:
    """Create a run directory and lock it. ConfigError if another process has locked it."""

    def lock() -> tuple[TextIO, bool] | None:
        if not ranks.is_main:
            return None
        if out.exists() and not out.is_dir():
            raise ConfigError(f"--general.out-dir {out} is a file. Use the path of a directory.")
        is_new = not out.exists()
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = open(out / LOCK, "w")  # noqa: SIM115, locked during the run
        except OSError as error:
            raise ConfigError(f"--general.out-dir {out} cannot be written to ({error}). Use another one.") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(f"Another process is training in {out}. Use another --general.out-dir.") from None
        except OSError:  # a file system without locks
            pass
        if not (out / LOCK).exists():  # another run that was refused has just deleted it
            file.close()
            return lock()
        (out / STOPPED).unlink(missing_ok=True)
        stale_files = [path for path in out.iterdir() if files.TEMPORARY_SUFFIX.search(path.name)]
        for stale in stale_files:  # left by a killed process
            stale.unlink()
        return file, is_new

    locked = ranks.main_process_first(lock)
    try:
        yield
    finally:
        if locked is not None:
            file, is_new = locked
            if not (out / "config.json").exists():  # the run was refused
                (out / LOCK).unlink(missing_ok=True)
                if is_new:
                    with suppress(OSError):
                        out.rmdir()
            file.close()


def latest_checkpoint(out: Path, ranks: Ranks) -> Path | None:
    """Return the newest intact checkpoint of a run, the same on all ranks; None if the run has no checkpoints."""
    found = checkpoint.latest(out)
    if len(steps := set(ranks.gather(checkpoint.step_of(found) if found else -1))) > 1:
        raise ConfigError(
            f"The ranks see different checkpoints in {out} (steps {sorted(map(int, steps))}). Use a directory that all "
            "nodes share."
        )
    if found is None and checkpoint.checkpoints(out):
        raise ConfigError(
            f"None of the {len(checkpoint.checkpoints(out))} checkpoints of {out} is intact. Restore one of them, "
            "or start again with another --general.out-dir."
        )
    return found


def check_identity(found: Path, state: dict, now: dict[str, dict]) -> None:
    """ConfigError if the settings that a resume must keep (`now`) differ from those of the checkpoint `found`."""
    differing = differences({section: state[section] for section in now}, now)
    if wrong := [f"  {name}: {there} there, {value} now\n" for name, there, value in differing]:
        raise ConfigError(
            f"{found} cannot be resumed with another model, optimizer or data order:\n{''.join(wrong)}Use the earlier "
            "values, or start again with another --general.out-dir."
        )


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """Return the sections of config.json, none if it is missing or corrupted: checkpoints have the same information."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: section for name, section in found.items() if isinstance(section, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def differences(earlier: dict, now: dict) -> list[tuple[str, object, object]]:
    """Return the fields in which two configs differ: section.name, earlier value, value now.

    A field that is missing from one of them counts as off.
    """
    found = []
    for section, values in now.items():
        before = earlier.get(section, values)
        for name in {**before, **values}:
            a, b = before.get(name), values.get(name)
            if a != b and (a or b or (name in before and name in values)):
                found.append((f"{section}.{name}", a, b))
    return found


def changed_settings(path: Path, config: dict) -> list[str]:
    """Return the settings that differ from a run's config.json, one line each, except those of `general`."""
    return [
        f"  {name} was {earlier}, is now {value}"
        for name, earlier, value in differences(read_config(path), config)
        if not name.startswith("general.")
    ]


def settings_text(config: dict) -> str:
    """Return the settings, one line per section."""
    return "\n".join(
        f"{section:>11}  " + "  ".join(f"{name}={value}" for name, value in values.items())
        for section, values in config.items()
    )


def record_launch(launches: list[dict], step: int, settings: dict, ranks: Ranks) -> None:
    """Append that training continues at `step` with these settings and provenance, unless nothing has changed."""
    launch = {"config": settings, "provenance": provenance(ranks)}
    if not launches or launches[-1] | launch != launches[-1]:
        launches.append({"step": step} | launch)


def provenance(ranks: Ranks) -> dict:
    """Return what decides the last bits of a run's numbers: versions, device, ranks and threads."""
    cuda = ranks.device.type == "cuda"
    return {
        "commit": _commit(), "python": platform.python_version(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability(),
        "bfloat16": uses_bfloat16(ranks.device, "auto"),
        "ranks": ranks.world_size, "threads": torch.get_num_threads(),
    }  # fmt: skip


@functools.cache
def _commit() -> str | None:
    """Return the commit of the code, with a + if it was changed since; None without git."""
    here = Path(__file__).parents[2]
    try:
        commit, changed = (
            subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)
