"""Parameter groups, AdamW, and the learning rate of a step.

>>> optimizer = adamw(model, weight_decay=0.1)
>>> learning_rate(step=0, max_lr=6e-4, min_lr_ratio=0.1, warmup_steps=715, max_steps=19_073)
"""

import math

import torch
import torch.nn as nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices and embedding tables decay; biases and layer norms (one dimension) don't."""
    parameters = [p for p in model.parameters() if p.requires_grad]  # a tied head is one parameter
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module, weight_decay: float, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8
) -> torch.optim.AdamW:
    """PyTorch's AdamW with its fused kernel; the learning rate is set at each step.

    The kernel leaves parameters, moments and step count alone where `optimizer.found_inf`, a float32 tensor
    on the device, is 1: the gate of the training step, without a word between device and host.
    """
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=0.0, betas=(beta1, beta2), eps=eps, fused=True)


def learning_rate(step: int, max_lr: float, min_lr_ratio: float, warmup_steps: int, max_steps: int) -> float:
    """Of update `step`, counted from 0: linear warm-up to max_lr, then half a cosine down to its ratio.

    The cosine runs over what the warm-up leaves, so that it ends at max_steps.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return max_lr * (min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * done)))


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """The optimizer's tensors by parameter name, on the CPU: the same whatever the number of ranks or groups."""
    return {
        name: {key: value.detach().cpu() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, state: dict[str, dict]) -> None:
    """Puts back what `optimizer_state` gave. KeyError where a name is not the model's."""
    parameters = dict(model.named_parameters())
    for name, values in state.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in values.items()}
