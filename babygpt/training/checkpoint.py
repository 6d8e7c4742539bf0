"""Save checkpoints atomically, and verify them on load.

`out/<run>/checkpoints/step_00005000/` contains `model.safetensors`, `optimizer.pt` (tensors by parameter name, for any
number of ranks), `state.json` (step, position in the data, architecture) and `manifest.json` with the sha256 of each.
The files are written to a temporary directory, which is synced and then renamed.

    >>> with Saver(Path("out/gpt2"), keep=2, keep_every=0) as saver:
    ...     saver.save(5000, model_tensors(model), optimizer_state(optimizers, model), state)  # in the background
    >>> path = latest("out/gpt2")
    >>> checkpoint = load(path)
"""

import errno
import json
import math
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from babygpt.console import console
from babygpt.errors import UserError
from babygpt.files import sha256, write_json

FORMAT = 2  # of a checkpoint's files; 1 had other parameter names
# removed fields of ModernConfig, and the values that turn them off
REMOVED_SWITCHES = {"logit_softcap": None, "rms_norm": False, "unet": False}
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.pt", "state.json", "manifest.json"


@dataclass
class Checkpoint:
    """The contents of a checkpoint: weights and optimizer tensors by parameter name, and `state.json`."""

    path: Path
    model: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]
    state: dict


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters by name. A tied head is the same parameter as the embedding, and is stored once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def check_fit(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Raise a UserError if the names or shapes of the weights are not those of the model."""
    parameters = model_tensors(model)
    mismatches = [
        f"\n  {name}: {_shape(tensors, name)} in the weights, {_shape(parameters, name)} in the model"
        for name in sorted(parameters.keys() | tensors.keys())
        if _shape(tensors, name) != _shape(parameters, name)
    ]
    if mismatches:
        shown = "".join(mismatches[:10]) + ("\n  ..." if len(mismatches) > 10 else "")
        raise UserError(f"The weights do not match the model ({len(mismatches)} tensors):{shown}")


def load_model_tensors(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy weights into a model. UserError if they do not fit."""
    check_fit(model, tensors)
    model.load_state_dict(tensors, strict=False)


def _shape(tensors: dict[str, torch.Tensor], name: str) -> tuple | str:
    return tuple(tensors[name].shape) if name in tensors else "missing"


# ---------------------------------------------------------------------------------------------------------
# saving


def save(run: Path, step: int, model: dict, optimizer: dict, state: dict, keep: int, keep_every: int = 0) -> Path:
    """Save the checkpoint of `step`, then delete old ones.

    The newest `keep` checkpoints remain (0: all), and those whose step is a multiple of `keep_every` (0: none).
    UserError if the disk is full or the directory is not writable. Earlier checkpoints are then intact.
    """
    directory = run / "checkpoints"
    final = directory / f"step_{step:08d}"
    temporary = directory / f".{final.name}.tmp"
    try:
        for stale in directory.glob(".step_*.tmp"):  # left by a killed process
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in model.items()}, temporary / MODEL)
        with open(temporary / OPTIMIZER, "wb") as file:
            torch.save(optimizer, file)
        (temporary / STATE).write_text(json.dumps({"format": FORMAT} | state, indent=1) + "\n", encoding="utf-8")
        hashes = {name: sha256(temporary / name) for name in (MODEL, OPTIMIZER, STATE)}
        (temporary / MANIFEST).write_text(json.dumps({"files": hashes}, indent=1) + "\n", encoding="utf-8")
        for path in (*(temporary / name for name in (MODEL, OPTIMIZER, STATE, MANIFEST)), temporary):
            _sync(path)
        if final.exists():  # it is corrupted, since the run resumed from an earlier checkpoint
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync(directory)
        _sync(run)  # in case `checkpoints` is new
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and PyTorch raise the latter two
        shutil.rmtree(temporary, ignore_errors=True)
        # PyTorch replaces the OSError by a RuntimeError
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(
            f"The checkpoint of step {step:,} could not be written to {directory} ({cause}). Earlier checkpoints are "
            "intact: fix the cause (such as a full disk), and resume the run."
        ) from error
    # checkpoints of later steps are corrupted, since this run resumed from an earlier one: they do not count
    counted = [path for path in list_checkpoints(run) if step_of(path) <= step]
    for path in counted[:-keep] if keep else []:
        if not keep_every or step_of(path) % keep_every:
            shutil.rmtree(path, ignore_errors=True)
    return final


class Saver:
    """Saves checkpoints in a background thread, one at a time.

    As a context manager, it waits for the last save on exit.
    """

    def __init__(self, run: Path, keep: int, keep_every: int):
        self.settings = (keep, keep_every)
        self.run = run
        self.thread: Thread | None = None
        self.error: UserError | None = None

    def save(self, step: int, model: dict, optimizer: dict, state: dict) -> None:
        """Wait for the previous save, copy the tensors to host memory, and start to save them.

        After an error, nothing more is saved, and `wait` raises the error.
        """
        self._join()
        if self.error is not None:
            return
        try:
            copies = (
                {name: _on_host(tensor) for name, tensor in model.items()},
                {name: {key: _on_host(t) for key, t in tensors.items()} for name, tensors in optimizer.items()},
            )
        except (RuntimeError, MemoryError) as error:
            self.error = UserError(f"The checkpoint of step {step:,} does not fit in host memory ({error!r:.100}).")
            return
        self.thread = Thread(target=self._write, args=(step, *copies, state), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raise the error if a save failed."""
        self._join()
        if self.error is not None:
            raise self.error

    def _write(self, step: int, model: dict, optimizer: dict, state: dict) -> None:
        try:
            save(self.run, step, model, optimizer, state, *self.settings)
            if launches := state.get("launches"):
                write_json(self.run / "config.json", launches[-1]["config"])  # settings of the newest checkpoint
        except UserError as error:
            self.error = error
        except BaseException as error:
            self.error = UserError(f"The checkpoint of step {step:,} could not be written: {error!r}")

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exception: object) -> None:
        self._join()


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems do not sync directories
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------
# loading


def list_checkpoints(run: Path) -> list[Path]:
    """Return the directories of a run's checkpoints in ascending order of steps, without verifying them."""
    paths = [path for path in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(paths, key=step_of)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's directory."""
    return int(path.name.removeprefix("step_"))


def latest(run: str | Path) -> Path | None:
    """Return the newest intact checkpoint of a run, or None. Log a warning for each corrupted one."""
    for path in reversed(list_checkpoints(Path(run))):
        try:
            verify(path)
            return path
        except UserError as error:
            console.warning(f"{error} Skipping it.")
    return None


def resolve(path: Path) -> Path | None:
    """Return `path` if it is a checkpoint, or the latest intact checkpoint of a run directory; None if it is neither.

    UserError if none of the run's checkpoints is intact.
    """
    if (path / MANIFEST).exists():
        return path
    checkpoint = latest(path)
    if checkpoint is None and (paths := list_checkpoints(path)):
        raise UserError(f"All checkpoints of {path} are corrupted ({len(paths)}). Restore one of them.")
    return checkpoint


def verify(path: Path) -> None:
    """Raise a UserError unless every file of the checkpoint has the sha256 in its manifest."""
    try:
        hashes = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        wrong = [name for name in (MODEL, OPTIMIZER, STATE) if sha256(path / name) != hashes[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The checkpoint {path} is incomplete or cannot be read ({error!r}).") from None
    if wrong:
        raise UserError(f"The checkpoint {path} is corrupted: {', '.join(wrong)} changed after the save.")


def read_state(path: Path) -> dict:
    """Return `state.json` of a verified checkpoint. UserError if it lacks required fields or has a different format."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        required = (state["step"], state["model"], state["tokenizer"]["name"])
        is_valid, format = all(map(isinstance, required, (int, dict, str))), state.get("format", 1)
    except (ValueError, KeyError, TypeError, AttributeError):
        is_valid = False
    if not is_valid:
        raise UserError(f"{path / STATE} is not a valid checkpoint state. Delete the checkpoint to use an earlier one.")
    if format != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {format}, but this version of BabyGPT reads format {FORMAT}. Use the "
            "version that wrote it, or train again."
        )
    model = state["model"]
    for name, off in REMOVED_SWITCHES.items():
        if (value := model.pop(name, off)) != off:
            raise UserError(
                f"{path} has a model with {name} {value}, which this version of BabyGPT does not support. Use the "
                f"version that wrote it, or train again. {path / STATE} contains its commit."
            )
    model.pop("zero_init", None)  # a removed field that affected only the initialization
    if (scale := model.pop("attention_scale", None)) is not None:  # replaced by attention_score_factor
        model["attention_score_factor"] = scale * math.sqrt(model["n_embd"] / model["n_head"])
    return state


def load(path: Path, with_optimizer: bool = True) -> Checkpoint:
    """Load a checkpoint to the CPU. UserError if it is corrupted."""
    verify(path)
    state = read_state(path)
    try:
        optimizer = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True) if with_optimizer else {}
        return Checkpoint(path, load_file(path / MODEL), optimizer, state)
    except pickle.UnpicklingError:  # its hash is correct, so this is not damage
        raise UserError(
            f"{path / OPTIMIZER} contains objects other than tensors. It is not loaded, because it could execute code. "
            "Delete the checkpoint to use an earlier one."
        ) from None
    except Exception as error:
        raise UserError(
            f"The checkpoint {path} cannot be loaded, although its hashes are correct ({error!r:.300}). Check the free "
            "memory and the version of PyTorch."
        ) from None
