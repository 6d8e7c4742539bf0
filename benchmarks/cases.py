"""Training steps of GPT-2 124M that fake_h200.py predicts without a GPU and gpu_report.py measures on a GPU."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Case:
    """A preset, the rows per micro-batch, and switches."""

    preset: str
    rows: int
    bf16_activations: bool = False
    n_head: int = 12
    plain_loss: bool = False  # F.cross_entropy on the full logits
    cudnn: bool = False  # cuDNN attention
    activation_checkpointing: bool = False
    deterministic: bool = False
    compiled: bool = True

    @property
    def name(self) -> str:
        switches = {
            "bf16 activations": self.bf16_activations,
            f"{self.n_head} heads of {768 // self.n_head}": self.n_head != 12,
            "plain F.cross_entropy": self.plain_loss,
            "cuDNN attention": self.cudnn,
            "activation checkpointing": self.activation_checkpointing,
            "deterministic": self.deterministic,
            "eager": not self.compiled,
        }
        return ", ".join([self.preset, f"{self.rows} rows", *(name for name, on in switches.items() if on)])

    def patch_loss(self) -> AbstractContextManager:
        """Return a context manager that makes the model use the loss of this case."""
        return mock.patch("model.linear_cross_entropy", plain_cross_entropy) if self.plain_loss else nullcontext()


def plain_cross_entropy(x: Any, weight: Any, targets: Any, vocab_size: int) -> Any:
    """Compute the loss from the full logits. Takes the arguments of linear_cross_entropy."""
    import torch.nn.functional as F

    logits = F.linear(x, weight).float()[:, :vocab_size]
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


# in order of importance
CASES = [
    Case("gpt2", 64),
    Case("gpt2", 64, bf16_activations=True),
    Case("modern", 64, bf16_activations=True),
    Case("gpt2", 64, bf16_activations=True, plain_loss=True),
    Case("modern", 64),
    Case("modern", 64, bf16_activations=True, n_head=6),
    Case("gpt2", 16),
    Case("gpt2", 64, bf16_activations=True, deterministic=True),
]
MEASURED_ONLY = [
    Case("gpt2", 64, bf16_activations=True, cudnn=True),
    Case("gpt2", 32, bf16_activations=True),
    Case("gpt2", 128, bf16_activations=True),
    Case("modern", 32, bf16_activations=True),
    Case("gpt2", 64, bf16_activations=True, activation_checkpointing=True),
    Case("gpt2", 16, compiled=False),
]
