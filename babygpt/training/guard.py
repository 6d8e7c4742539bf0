"""The outcome of a training step, and the decision on its update: loss spikes, non-finite values, differing ranks."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from babygpt.errors import ConfigError


@dataclass
class StepStatus:
    """The outcome of a training step on W ranks, packed into one float32 tensor for one all-reduce and one copy."""

    loss: torch.Tensor  # () mean over the targets of all ranks
    stop_requested: torch.Tensor  # () number of ranks that received a stop signal
    nonfinite: torch.Tensor  # (W,) per rank, not 0 if its loss or one of its own gradients is non-finite
    checksums: torch.Tensor  # (W,) per rank, a checksum of its weights; 0 if they are not compared in this step
    grad_norm: torch.Tensor  # () before clipping
    z_score: torch.Tensor  # () standard deviations of the loss above the mean of recent losses
    skip_update: torch.Tensor  # () 1 if the update was skipped

    @classmethod
    def of_rank(
        cls, rank: int, world_size: int, loss: torch.Tensor, nonfinite: torch.Tensor, stop: bool,
        checksum: torch.Tensor | None,
    ) -> "StepStatus":  # fmt: skip
        """Return one rank's share; the sum over all ranks is the step's status, except for the last three fields."""
        zero = torch.zeros_like(loss)
        # a fill, since a copy of `stop` from the host would wait for the device
        return cls(
            loss, torch.full_like(loss, float(stop)), _at(rank, world_size, nonfinite),
            _at(rank, world_size, zero if checksum is None else checksum), zero, zero, zero,
        )  # fmt: skip

    def pack(self) -> torch.Tensor:
        """Return the fields as one tensor (5 + 2 W,) float32."""
        return torch.cat([getattr(self, field.name).reshape(-1).float() for field in fields(self)])

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> "StepStatus":
        world_size = (len(packed) - 5) // 2
        loss, stop, nonfinite, checksums, *rest = packed.split([1, 1, world_size, world_size, 1, 1, 1])
        return cls(loss[0], stop[0], nonfinite, checksums, *(part[0] for part in rest))


def _at(rank: int, world_size: int, value: torch.Tensor) -> torch.Tensor:
    """Return zeros (world_size,) float32 with `value` at `rank`."""
    return torch.cat([value.reshape(1).float() if r == rank else value.new_zeros(1).float() for r in range(world_size)])


class UpdateGuard:
    """Decide on the device whether an update is skipped, so that the host does not wait for the numbers.

    All updates are skipped from the first one whose loss or gradient norm is non-finite, or whose gradient norm is
    exactly 0. With `skip_spikes`, so is an update whose loss is more than that many standard deviations above the mean
    of the last WINDOW losses. The window stores such a loss clamped to that limit, so that a lasting rise is not
    skipped forever.
    """

    WINDOW = 64

    def __init__(self, device: torch.device, skip_spikes: float | None = None, losses: Sequence[float] = ()):
        """`losses`: the last ones of a resumed run, at most WINDOW."""
        self.skip_spikes = math.inf if skip_spikes is None else skip_spikes
        self.halted = torch.zeros((), device=device)
        unknown = [math.nan] * (self.WINDOW - len(losses))
        self.recent = torch.tensor([*unknown, *losses], dtype=torch.float32, device=device)

    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return whether the update is skipped, 0 or 1, and the z-score of the loss, () float32 each.

        The z-score is 0 until WINDOW losses are known.
        """
        mean, deviation = self.recent.mean(), self.recent.std().clamp(min=1e-6)
        z_score = ((loss - mean) / deviation).nan_to_num(0.0)
        spike = z_score > self.skip_spikes
        # a norm of exactly 0: the loss does not depend on any weight, so a kernel or the model is wrong
        self.halted = torch.maximum(self.halted, (~(loss + norm).isfinite() | (norm == 0)).float())
        skip_update = torch.maximum(self.halted, spike.float())
        known = torch.where(spike, mean + self.skip_spikes * deviation, loss)
        self.recent = torch.cat([self.recent[1:], known[None]])
        return skip_update, z_score

    def losses(self) -> list[float]:
        """Return the known recent losses, for another guard."""
        return self.recent[self.recent.isfinite()].tolist()


def checksum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a checksum of all bits of float32 tensors, () float32 on their device.

    It is a sum modulo a prime that float32 can represent; a power of two would not depend on the higher bits.
    """
    sums = [tensor.detach().view(torch.int32).sum() for tensor in tensors]
    return (torch.stack(sums).sum() % 16_777_213).float()


def check_status(step: int, status: StepStatus, compare_every: int) -> None:
    """ConfigError if the loss or gradient norm is non-finite, the norm is 0, or the weights of the ranks differ.

    `status` is on the host, and the same on all ranks. Weights are compared every `compare_every` steps.
    """
    loss, norm = status.loss.item(), status.grad_norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        ranks = status.nonfinite.nonzero().flatten().tolist()
        raise ConfigError(
            f"Step {step}: the loss is {loss}, the gradient norm {norm}"
            + (f", first on rank {ranks[0]}. " if ranks else ". ")
            + "The update was skipped, and nothing of it is saved. Resume from the last checkpoint with a lower "
            "learning rate: --general.init-from resume --optimizer.max-lr ..."
        )
    if norm == 0:
        raise ConfigError(
            f"Step {step}: the gradient norm is exactly 0 at a loss of {loss:.4f}, and the update was skipped. Either "
            "the model predicts every target with probability 1, or its loss does not depend on any weight: then the "
            f"model, or a kernel of PyTorch {torch.__version__}, is wrong. Run `python -m pytest tests/unit`, or try "
            "--training.compile off."
        )
    checksums = status.checksums.tolist()
    if differing := [rank for rank, value in enumerate(checksums) if value != statistics.mode(checksums)]:
        raise ConfigError(
            f"Step {step}: the weights of rank {', '.join(map(str, differing))} differ from those of the other ranks. "
            "The GPU or memory of that rank may be faulty, or it may be another GPU model. The weights were last "
            f"compared at step {max(0, step - compare_every)} or later: delete the checkpoints after that step, and "
            "resume without that GPU (--general.init-from resume)."
        )
