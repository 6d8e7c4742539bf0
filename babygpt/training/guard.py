"""Checks of an update: loss spikes, non-finite values, replicas that differ."""

import math
import statistics
from collections.abc import Sequence

import torch

from babygpt.errors import ConfigError


class Gate:
    """Tells, on the device, whether an update is held back; the host need not wait for the numbers.

    All updates are skipped from the first one whose loss or gradient norm is non-finite, or whose gradient norm is
    exactly 0. With `skip_spikes`, so is an update whose loss is more than that many standard deviations above the mean
    of the last WINDOW losses; among those it counts as just that high, so a lasting rise is not skipped forever.
    """

    WINDOW = 64

    def __init__(self, device: torch.device, skip_spikes: float | None = None, losses: Sequence[float] = ()):
        """`losses`: the last ones of the run so far, at most WINDOW."""
        self.skip_spikes = math.inf if skip_spikes is None else skip_spikes
        self.halted = torch.zeros((), device=device)
        unknown = [math.nan] * (self.WINDOW - len(losses))
        self.recent = torch.tensor([*unknown, *losses], dtype=torch.float32, device=device)

    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and norm, () float32 each, to whether the update is held back, 0 or 1, and the loss's z-score: 0 until
        WINDOW losses are known."""
        mean, deviation = self.recent.mean(), self.recent.std().clamp(min=1e-6)
        z = ((loss - mean) / deviation).nan_to_num(0.0)
        spike = z > self.skip_spikes
        # a norm of exactly zero: the loss does not depend on any weight, so a kernel or the model is wrong
        self.halted = torch.maximum(self.halted, (~(loss + norm).isfinite() | (norm == 0)).float())
        held = torch.maximum(self.halted, spike.float())
        known = torch.where(spike, mean + self.skip_spikes * deviation, loss)
        self.recent = torch.cat([self.recent[1:], known[None]])
        return held, z

    def losses(self) -> list[float]:
        """Those that are known, to begin another gate with."""
        return self.recent[self.recent.isfinite()].tolist()


def checksum(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Of all bits of float32 tensors, () float32 on their device: a sum modulo a prime that float32 can tell.

    A power of two would not see the bits above it.
    """
    sums = [tensor.detach().view(torch.int32).sum() for tensor in tensors]
    return (torch.stack(sums).sum() % 16_777_213).float()


def check_numbers(step: int, loss: float, norm: float, not_finite: list[float]) -> None:
    """ConfigError if a step's loss or norm is not finite, or the norm is 0; `not_finite` has one flag per rank."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        where = [rank for rank, flag in enumerate(not_finite) if flag]
        raise ConfigError(  # the status is the same on every rank
            f"step {step}: loss is {loss}, gradient norm {norm}"
            + (f", first on rank {where[0]}" if where else "")
            + ". The update was not applied and nothing of it saved. Go on from the last checkpoint with a lower "
            "--optimizer.max-lr: --general.init-from resume."
        )
    if norm == 0:
        raise ConfigError(
            f"step {step}: the gradient norm is exactly 0 at a loss of {loss:.4f}. The update was not applied. Either "
            "the model predicts every target with probability 1, or its loss does not depend on any weight: then the "
            f"model, or a kernel of PyTorch {torch.__version__}, is wrong. Run `python -m pytest tests/unit`, or try "
            "--training.compile off."
        )


def check_replicas(step: int, sums: list[float], every: int) -> None:
    """ConfigError if the checksums of the ranks' weights differ; they are compared every `every` steps."""
    if differing := [rank for rank, value in enumerate(sums) if value != statistics.mode(sums)]:
        good = max(0, step - every)
        raise ConfigError(
            f"step {step}: the weights of rank {', '.join(map(str, differing))} are not those of the others. A card or "
            f"memory may be faulty there, or differ in kind. They were the same at step {good}: delete later "
            "checkpoints, and go on without it: --general.init-from resume."
        )
