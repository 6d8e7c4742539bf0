"""Checks of each training step: loss spikes, non-finite values, and ranks whose weights differ."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from babygpt.errors import ConfigError
from babygpt.training import run_dir
from babygpt.training.checkpoint import list_checkpoints


@dataclass
class StepStatus:
    """The outcome of a training step on W ranks, packed into one float32 tensor for one all-reduce and one copy."""

    loss: torch.Tensor  # () mean over the targets of all ranks
    stop_requested: torch.Tensor  # () number of ranks that received a stop signal
    nonfinite: torch.Tensor  # (W,) per rank: nonzero if its loss or one of its local gradients is non-finite
    checksums: torch.Tensor  # (W,) per rank: checksum of its weights; 0 if this step does not compare them
    grad_norm: torch.Tensor  # () before clipping
    z_score: torch.Tensor  # () distance of the loss from the mean of recent losses, in standard deviations
    skip_update: torch.Tensor  # () 1 if the update was skipped
    values: torch.Tensor  # (k,) other means over the targets of all ranks, for the log

    @classmethod
    def of_rank(
        cls, rank: int, world_size: int, losses: torch.Tensor, nonfinite: torch.Tensor, stop: bool,
        checksum: torch.Tensor | None,
    ) -> "StepStatus":  # fmt: skip
        """Return the status of one rank, for which `losses`, (1 + k,), are the loss and the values.

        Summed over ranks, it is that of the step, except for the last three scalars.
        """
        loss = losses[0]
        zero = torch.zeros_like(loss)
        # full_like fills on the device; copying `stop` from the host would synchronize
        return cls(
            loss, torch.full_like(loss, float(stop)), _place_at_rank(rank, world_size, nonfinite),
            _place_at_rank(rank, world_size, zero if checksum is None else checksum), zero, zero, zero,
            losses[1:],
        )  # fmt: skip

    def pack(self) -> torch.Tensor:
        """Return the fields as one tensor (5 + 2 W + k,) float32."""
        return torch.cat([getattr(self, field.name).reshape(-1).float() for field in fields(self)])

    @classmethod
    def unpack(cls, packed: torch.Tensor, num_values: int = 0) -> "StepStatus":
        W = (len(packed) - 5 - num_values) // 2
        loss, stop, nonfinite, checksums, norm, z_score, skip_update, values = packed.split(
            [1, 1, W, W, 1, 1, 1, num_values]
        )
        return cls(loss[0], stop[0], nonfinite, checksums, norm[0], z_score[0], skip_update[0], values)


def _place_at_rank(rank: int, world_size: int, value: torch.Tensor) -> torch.Tensor:
    """Return zeros (world_size,) float32 with `value` at `rank`."""
    return torch.cat([value.reshape(1).float() if r == rank else value.new_zeros(1).float() for r in range(world_size)])


class UpdateGuard:
    """Decides on the device whether to skip an update, so that the host does not wait for the loss.

    After a non-finite loss, a non-finite gradient norm, or a gradient norm of exactly 0, the guard skips this and all
    later updates. With `skip_spikes`, it also skips an update whose loss is more than `skip_spikes` standard deviations
    above the mean of the last WINDOW losses. The window stores such a loss clamped to this limit, so that the guard
    adapts if the loss stays high.
    """

    WINDOW = 64

    def __init__(self, device: torch.device, skip_spikes: float | None = None, losses: Sequence[float] = ()):
        """`losses` are the last ones of a resumed run, at most WINDOW."""
        self.skip_spikes = math.inf if skip_spikes is None else skip_spikes
        self.halted = torch.zeros((), device=device)
        padding = [math.nan] * (self.WINDOW - len(losses))
        self.recent = torch.tensor([*padding, *losses], dtype=torch.float32, device=device)

    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whether to skip the update, 0 or 1, and the z-score of the loss, each () float32.

        The z-score is 0 until the window is full.
        """
        mean, std = self.recent.mean(), self.recent.std().clamp(min=1e-6)
        z_score = ((loss - mean) / std).nan_to_num(0.0)
        is_spike = z_score > self.skip_spikes
        # if the norm is exactly 0, the loss does not depend on any weight: the model or a kernel is wrong
        self.halted = torch.maximum(self.halted, (~(loss + norm).isfinite() | (norm == 0)).float())
        skip_update = torch.maximum(self.halted, is_spike.float())
        clamped_loss = torch.where(is_spike, mean + self.skip_spikes * std, loss)
        self.recent = torch.cat([self.recent[1:], clamped_loss[None]])
        return skip_update, z_score

    def losses(self) -> list[float]:
        """Return the recent losses, for checkpoints."""
        return self.recent[self.recent.isfinite()].tolist()


def checksum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a checksum of all bits of float32 tensors, () float32 on their device.

    It is the sum of the bit patterns modulo a prime below 2^24, exact in float32. Modulo a power of two, the sum would
    ignore the high bits.
    """
    sums = [tensor.detach().view(torch.int32).sum() for tensor in tensors]
    return (torch.stack(sums).sum() % 16_777_213).float()


def _list_ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def check_status(step: int, status: StepStatus, compare_every: int, out: Path) -> None:
    """Raise ConfigError if the loss or gradient norm is non-finite, the norm is 0, or the weights of ranks differ.

    `status` is on the host, and equal on all ranks. `compare_every` is the interval in steps of comparing weights, and
    `out` the run directory.
    """
    loss, norm = status.loss.item(), status.grad_norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        ranks = status.nonfinite.nonzero().flatten().tolist()
        raise ConfigError(
            f"Step {step}: the loss is {loss} and the gradient norm is {norm}"
            + (f" (non-finite on {_list_ranks(ranks)}). " if ranks else ". ")
            + (
                "The update was skipped, so the checkpoints are unaffected. Resume from the last one with a lower "
                f"learning rate: {run_dir.resume_command(out)} --max-lr ..."
                if list_checkpoints(out)
                else "There is no checkpoint yet. Start again with a lower learning rate: --max-lr ..."
            )
        )
    if norm == 0:
        raise ConfigError(
            f"Step {step}: the gradient norm is exactly 0 at a loss of {loss:.4f}, and the update was skipped. Either "
            "the model predicts every target with probability 1, or the loss does not depend on any weight, which is "
            f"a bug in the model or in PyTorch {torch.__version__}. Run `python -m pytest tests/unit`"
            + ("." if run_dir.is_finetuning(out) else ", or try --compile off.")
        )
    checksums = status.checksums.tolist()
    if differing := [rank for rank, value in enumerate(checksums) if value != statistics.mode(checksums)]:
        raise ConfigError(
            f"Step {step}: the weights of {_list_ranks(differing)} differ from those of the other ranks, "
            f"but were equal at step {max(0, step - compare_every)}. A GPU or its memory may be faulty, or the GPUs "
            f"may be of different types. Delete the checkpoints saved after step {max(0, step - compare_every)}, and "
            "resume without the faulty GPU."
        )
