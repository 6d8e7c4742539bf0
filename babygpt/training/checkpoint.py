"""Checkpoints: written whole or not at all, verified when they are read.

`out/<run>/checkpoints/step_00005000/` holds `model.safetensors`, `optimizer.pt` (tensors by parameter name,
whatever the number of ranks), `state.json` (step, place in the data, architecture) and, written last,
`manifest.json` with the sha256 of each. A checkpoint is written beside its place, synced, and renamed.

    >>> with Saver(Path("out/gpt2"), keep=2, keep_every=0) as saver:
    ...     saver.save(5000, model_tensors(model), optimizer_state(optimizers, model), state)     # and train on
    >>> path = latest("out/gpt2")
    >>> checkpoint = load(path)
"""

import errno
import json
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
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.pt", "state.json", "manifest.json"


@dataclass
class Checkpoint:
    """What a run needs to go on: weights and optimizer tensors by name, and `state.json`."""

    path: Path
    model: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]
    state: dict


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights by name; a tied head is the embedding, and is not stored again."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def check_fit(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """UserError where names or shapes of the weights are not the model's."""
    ours = model_tensors(model)
    wrong = [
        f"\n  {name}: {_shape(tensors, name)} in the weights, {_shape(ours, name)} in the model"
        for name in sorted(ours.keys() | tensors.keys())
        if _shape(tensors, name) != _shape(ours, name)
    ]
    if wrong:
        raise UserError(f"the weights don't fit the model:{''.join(wrong[:10])}")


def load_model_tensors(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Puts weights into a model they fit."""
    check_fit(model, tensors)
    model.load_state_dict(tensors, strict=False)


def _shape(tensors: dict[str, torch.Tensor], name: str) -> tuple | str:
    return tuple(tensors[name].shape) if name in tensors else "missing"


# ---------------------------------------------------------------------------------------------------------
# writing


def save(run: Path, step: int, model: dict, optimizer: dict, state: dict, keep: int, keep_every: int = 0) -> Path:
    """Writes the checkpoint of `step`, then deletes all but the newest `keep` (0: keeps all) and those of every
    `keep_every`-th step. UserError where the disk is full or the folder can't be written to: what was there before
    is there still."""
    folder = run / "checkpoints"
    final = folder / f"step_{step:08d}"
    temporary = folder / f".{final.name}.tmp"
    try:
        for stale in folder.glob(".step_*.tmp"):  # of a save that was killed
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in model.items()}, temporary / MODEL)
        with open(temporary / OPTIMIZER, "wb") as file:
            torch.save(optimizer, file)
        write_json(temporary / STATE, {"format": FORMAT} | state)
        write_json(
            temporary / MANIFEST, {"files": {name: sha256(temporary / name) for name in (MODEL, OPTIMIZER, STATE)}}
        )
        for path in (*(temporary / name for name in (MODEL, OPTIMIZER, STATE, MANIFEST)), temporary):
            _sync(path)
        if final.exists():  # a damaged one, behind which this run was resumed
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync(folder)
        _sync(run)  # `checkpoints` may be new in it
    except (OSError, SafetensorError, RuntimeError) as error:  # the latter two from libraries' own writing
        shutil.rmtree(temporary, ignore_errors=True)
        cause = error.__context__ if isinstance(error.__context__, OSError) else error  # of PyTorch's zip writer
        raise UserError(
            f"the checkpoint of step {step:,} could not be written to {folder} ({cause}). Those before are as they "
            "were: mend it (free some room?) and go on with --general.init-from resume."
        ) from error
    # later ones are damaged: this run began before them
    earlier = [path for path in checkpoints(run) if step_of(path) <= step]
    for old in earlier[:-keep] if keep else []:
        if not keep_every or step_of(old) % keep_every:
            shutil.rmtree(old, ignore_errors=True)
    return final


class Saver:
    """Saves in the background: a call takes as long as a copy to host memory. One save is on its way at most.

    As a context it waits for the last one at the end.
    """

    def __init__(self, run: Path, keep: int, keep_every: int):
        self.settings = (keep, keep_every)
        self.run = run
        self.thread: Thread | None = None
        self.error: UserError | None = None

    def save(self, step: int, model: dict, optimizer: dict, state: dict) -> None:
        """Begins to save. After an error nothing more is saved, and `wait` raises it."""
        self._join()
        if self.error is not None:
            return
        try:
            copies = (
                {name: _on_host(tensor) for name, tensor in model.items()},
                {name: {key: _on_host(t) for key, t in tensors.items()} for name, tensors in optimizer.items()},
            )
        except (RuntimeError, MemoryError) as error:
            self.error = UserError(f"main memory has no room for a copy of weights and optimizer ({error!r:.100}).")
            return
        self.thread = Thread(target=self._write, args=(step, *copies, state), daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Until what was begun is on the disk; raises what went wrong."""
        self._join()
        if self.error is not None:
            raise self.error

    def _write(self, step: int, model: dict, optimizer: dict, state: dict) -> None:
        try:
            save(self.run, step, model, optimizer, state, *self.settings)
            if launches := state.get("launches"):
                write_json(self.run / "config.json", launches[-1]["config"])  # of who saved last
        except UserError as error:
            self.error = error
        except BaseException as error:
            self.error = UserError(f"the checkpoint of step {step:,} could not be written: {error!r}")

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
    except OSError as error:  # some network drives sync files alone
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------
# reading


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run by step, oldest first; they may turn out damaged when they are read."""
    found = [path for path in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named for."""
    return int(path.name.removeprefix("step_"))


def latest(run: str | Path) -> Path | None:
    """The newest sound checkpoint of a run, or None; a damaged one is told of on stderr and passed over."""
    for path in reversed(checkpoints(Path(run))):
        try:
            verify(path)
            return path
        except UserError as error:
            console.warning(str(error))
    return None


def resolve(path: Path) -> Path | None:
    """Return `path` if it is a checkpoint, or the latest intact checkpoint of a run directory; None if it is neither.

    UserError if none of the run's checkpoints is intact.
    """
    if (path / MANIFEST).exists():
        return path
    found = latest(path)
    if found is None and checkpoints(path):
        raise UserError(f"None of the {len(checkpoints(path))} checkpoints of {path} is intact.")
    return found


def verify(path: Path) -> None:
    """UserError unless every file of the checkpoint has the sha256 of its manifest."""
    try:
        hashes = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        wrong = [name for name in (MODEL, OPTIMIZER, STATE) if sha256(path / name) != hashes[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint {path} is not whole ({error!r}).") from None
    if wrong:
        raise UserError(f"the checkpoint {path} is damaged: {', '.join(wrong)} changed since it was written.")


def read_state(path: Path) -> dict:
    """Return `state.json` of a verified checkpoint. UserError if it lacks required fields or has another format."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        parts, format = (state["step"], state["model"], state["tokenizer"]["name"]), state.get("format", 1)
        valid = all(map(isinstance, parts, (int, dict, str)))
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise UserError(f"{path / STATE} is not the state of a run.")
    if format != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {format}, but this version of BabyGPT reads format {FORMAT}. Use the "
            "version that wrote it, or train again."
        )
    return state


def load(path: Path, with_optimizer: bool = True) -> Checkpoint:
    """All of a checkpoint, or all but the optimizer, on the CPU; UserError where it is damaged."""
    verify(path)
    state = read_state(path)
    try:
        optimizer = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True) if with_optimizer else {}
        return Checkpoint(path, load_file(path / MODEL), optimizer, state)
    except pickle.UnpicklingError:  # its hash is the manifest's, so someone wrote both
        raise UserError(f"{path / OPTIMIZER} holds more than tensors, and is not loaded: it could run code.") from None
    except Exception as error:
        raise UserError(f"the checkpoint {path} was written so that it can't be read: {error!r:.300}.") from None
