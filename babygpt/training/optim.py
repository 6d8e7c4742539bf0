"""Parameter groups, AdamW, Muon, and the learning rate of a step.

>>> optimizers = adamw(model, max_lr=6e-4, weight_decay=0.1)
>>> optimizers = muon(model, max_lr=0.04, embedding_lr=0.6, head_lr=0.008, scalar_lr=0.04)
>>> set_learning_rates(optimizers, LRSchedule(max_steps=19_073, warmup_steps=715, min_lr_ratio=0.1), step=0)

Both functions return a list of PyTorch optimizers. Each parameter group has its peak learning rate as `max_lr`. If
`optimizer.found_inf`, a float32 tensor on the device, is 1, a step changes neither parameters nor optimizer state. The
training step skips updates this way without synchronizing host and device.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn

from babygpt.training.schedule import LRSchedule

Optimizers = list[torch.optim.Optimizer]


# ---------------------------------------------------------------------------------------------------------
# AdamW


def adamw(
    model: nn.Module, max_lr: float, weight_decay: float, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8
) -> Optimizers:
    """Build fused AdamW for all parameters. Weight decay applies only to matrices and embeddings."""
    parameters = list(model.parameters())  # a tied head is one parameter
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay, "max_lr": max_lr},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "max_lr": max_lr},
    ]
    return [torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(beta1, beta2), eps=eps, fused=True)]


# ---------------------------------------------------------------------------------------------------------
# Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)


# Coefficients (a, b, c) of the five iterations of Polar Express (Amsel et al., arXiv:2505.16932). The values are
# modded-nanogpt's, with a safety factor of 1.02 against bfloat16 rounding.
SAFETY_FACTOR = 1.02
POLAR_EXPRESS = (
    (8.156554, -22.483293, 15.878770),
    (4.042930, -2.808917, 0.500018),
    (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.464490),
    (2.346541, -1.709783, 0.423236),
)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return approximately the nearest matrices with orthonormal rows, in bfloat16.

    `matrices` are (N, rows, columns) with rows <= columns. Each iteration applies a polynomial a x + b x^3 + c x^5 to
    the singular values. The five polynomials together map values between 0.001 and 1 to 0.86 ... 1.14.
    """
    x = matrices.bfloat16()
    x = x / (SAFETY_FACTOR * x.norm(dim=(-2, -1), keepdim=True)).clamp(min=1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


MUON_BATCH = 64 << 20  # elements that are updated at once: 256 MiB in float32
NORMUON_BETA2 = 0.9  # decay rate of the moving average of squared updates, as in nanochat


@dataclass
class MatrixBatch:
    """Matrices of one shape that are updated together. All have rows <= columns: tall parameters are transposed."""

    weights: list[torch.Tensor]  # (rows, columns) each
    grads: list[torch.Tensor]
    momenta: list[torch.Tensor]
    second_moments: list[torch.Tensor]  # (columns,) each, or (rows,), which is as long, for square matrices
    lr_factors: list[float]


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose updates are orthogonalized, for the matrices of the blocks.

    `splits` maps each parameter to the numbers of rows of the matrices that are stacked in it (queries, keys, values).
    These are orthogonalized separately. Every rank stores the state of all matrices, orthogonalizes a share of the
    updates, and gathers the others.

    With `normuon` (Li et al., arXiv:2510.05491), the update of each neuron is divided by its root mean square, a moving
    average over steps. The matrix is then rescaled to the Frobenius norm of a matrix with orthonormal rows. A neuron is
    a row of the parameter, or a column if the matrix has more columns than rows.
    """

    def __init__(self, splits: dict[nn.Parameter, list[int]], max_lr: float, weight_decay: float = 0.0,
                 normuon: bool = False, cautious: bool = False):  # fmt: skip
        defaults = {"lr": 0.0, "max_lr": max_lr, "weight_decay": weight_decay, "momentum": 0.95}
        super().__init__(list(splits), defaults)
        self.splits, self.normuon, self.cautious = splits, normuon, cautious
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        (group,) = self.param_groups
        entries_by_shape = defaultdict(list)
        for p in group["params"]:
            state, row_counts = self.state[p], self.splits[p]
            lengths = [max(rows, p.size(1)) for rows in row_counts]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            if "second_moment" not in state:
                state["second_moment"] = p.new_zeros(sum(lengths))
            pieces = (t.split(row_counts) for t in (p, p.grad, state["momentum_buffer"]))
            for *matrices, second_moment in zip(*pieces, state["second_moment"].split(lengths), strict=True):
                rows, columns = matrices[0].shape
                if rows > columns:
                    matrices = [matrix.mT for matrix in matrices]
                entry = (*matrices, second_moment, math.sqrt(max(1.0, rows / columns)))
                entries_by_shape[matrices[0].shape].append(entry)
        for (rows, columns), entries in entries_by_shape.items():
            batch_size = max(1, MUON_BATCH // (rows * columns))
            for i in range(0, len(entries), batch_size):
                self._update(group, MatrixBatch(*map(list, zip(*entries[i : i + batch_size], strict=True))))

    def _update(self, group: dict, batch: MatrixBatch) -> None:
        lr, momentum, grad = group["lr"], torch.stack(batch.momenta), torch.stack(batch.grads)  # (N, rows, columns)
        if self.found_inf is not None:
            # to skip the update, replace the gradient by the momentum, which then does not change
            lr, grad = lr * (1 - self.found_inf), torch.where(self.found_inf.bool(), momentum, grad)
        momentum.lerp_(grad, 1 - group["momentum"])
        torch._foreach_copy_(batch.momenta, momentum.unbind())
        change = _orthogonalize_by_ranks(grad.lerp_(momentum, group["momentum"])).float()  # Nesterov momentum
        if self.normuon:
            change = self._normalize_neurons(change, batch.second_moments)
        change.mul_(lr)
        if max(batch.lr_factors) > 1:
            torch._foreach_mul_(list(change.unbind()), batch.lr_factors)
        if group["weight_decay"] > 0:
            weights = torch.stack(batch.weights)
            decay = lr * group["weight_decay"] * weights
            # cautious: only if decay and update have the same sign (arXiv:2411.16085 applies this to the update)
            change += decay * (change * weights > 0) if self.cautious else decay
        torch._foreach_sub_(batch.weights, change.unbind())

    def _normalize_neurons(self, change: torch.Tensor, second_moments: list[torch.Tensor]) -> torch.Tensor:
        """Return `change` (N, rows, columns), normalized by neuron; see the class. Updates `second_moments`."""
        dim = -1 if change.size(-2) == change.size(-1) else -2  # wide matrices: transposed ones, or more columns
        weight = (1 - NORMUON_BETA2) * (1.0 if self.found_inf is None else 1 - self.found_inf)
        second_moment = torch.stack(second_moments)  # (N, columns), or (N, rows) for square matrices
        second_moment.lerp_(change.square().mean(dim=dim), weight)
        torch._foreach_copy_(second_moments, second_moment.unbind())
        change = change * second_moment.clamp(min=1e-10).rsqrt().unsqueeze(dim)
        norm = change.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
        return change * (math.sqrt(change.size(-2)) / norm)


def _orthogonalize_by_ranks(updates: torch.Tensor) -> torch.Tensor:
    """Orthogonalize updates (N, rows, columns). Each rank computes a share of them, and all ranks gather the shares."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return orthogonalize(updates)
    share_size = math.ceil(len(updates) / world_size)
    start = dist.get_rank() * share_size
    share = updates[start : start + share_size]
    padded = updates.new_zeros(share_size, *updates.shape[1:])
    padded[: len(share)] = share
    result = orthogonalize(padded).contiguous()
    gathered = result.new_empty(world_size * share_size, *result.shape[1:])
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name until PyTorch 2.12
    all_gather(gathered, result)
    return gathered[: len(updates)]


def muon(
    model: nn.Module, max_lr: float, embedding_lr: float, head_lr: float, scalar_lr: float, weight_decay: float = 0.0,
    beta1: float = 0.8, beta2: float = 0.95, eps: float = 1e-10, normuon: bool = False, cautious: bool = False,
) -> Optimizers:  # fmt: skip
    """Build Muon for the matrices of the blocks, and Adam for embeddings, head, and all scalars and vectors.

    Each kind has its own learning rate. A tied embedding has that of the head. Weight decay applies only with Muon.
    """
    parameters_by_name = dict(model.named_parameters())
    matrices = {name: p for name, p in parameters_by_name.items() if name.startswith("h.") and p.dim() == 2}
    splits = {p: _qkv_rows(p) if name.endswith("attn.c_attn.weight") else [p.size(0)] for name, p in matrices.items()}
    embedding_prefixes: tuple[str, ...] = ("wte.", "wpe.", "vte.", "bte.")
    head_prefixes: tuple[str, ...] = ("lm_head.",)
    if "lm_head.weight" not in parameters_by_name:  # a tied head is the embedding
        embedding_prefixes, head_prefixes = ("wpe.", "vte.", "bte."), ("wte.",)
    groups = [
        ([p for name, p in parameters_by_name.items() if name.startswith(embedding_prefixes)], embedding_lr),
        ([p for name, p in parameters_by_name.items() if name.startswith(head_prefixes)], head_lr),
        ([p for p in parameters_by_name.values() if p.dim() < 2], scalar_lr),
    ]
    adam = [{"params": parameters, "max_lr": lr} for parameters, lr in groups if parameters]
    return [
        Muon(splits, max_lr, weight_decay, normuon=normuon, cautious=cautious),
        torch.optim.AdamW(adam, lr=0.0, betas=(beta1, beta2), eps=eps, weight_decay=0.0, fused=True),
    ]


def _qkv_rows(c_attn: nn.Parameter) -> list[int]:
    """Return the numbers of rows of queries, keys and values in c_attn.weight, (C + 2 K D, C)."""
    key_rows = (c_attn.size(0) - c_attn.size(1)) // 2
    return [c_attn.size(1), key_rows, key_rows]


MUON_SETTINGS = ("embedding_lr", "head_lr", "scalar_lr", "normuon", "cautious")


def make_optimizers(model: nn.Module, settings: dict) -> Optimizers:
    """Build the optimizers of a model. `settings` are the fields of train_config.Optimizer."""
    shared = {name: settings[name] for name in ("max_lr", "weight_decay", "beta1", "beta2", "eps")}
    if settings["name"] == "adamw":
        return adamw(model, **shared)
    return muon(model, **shared, **{n: settings[n] for n in MUON_SETTINGS})


# ---------------------------------------------------------------------------------------------------------
# learning rates


def parameters_of(optimizers: Optimizers) -> list[nn.Parameter]:
    """Return all parameters that the optimizers update."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def set_learning_rates(optimizers: Optimizers, schedule: LRSchedule, step: int) -> float:
    """Set the learning rate of each group and Muon's momentum for update `step`. Return the first learning rate."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = schedule.learning_rate(step, group["max_lr"])
        if "momentum" in group:
            group["momentum"] = schedule.momentum_at(step)
    return optimizers[0].param_groups[0]["lr"]


# ---------------------------------------------------------------------------------------------------------
# state


def optimizer_state(optimizers: Optimizers, model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Return the state of the optimizers by parameter name, independent of the numbers of ranks and groups."""
    states = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
    return {name: dict(states[parameter]) for name, parameter in model.named_parameters() if parameter in states}


def load_optimizer_state(optimizers: Optimizers, model: nn.Module, state: dict[str, dict]) -> None:
    """Restore a state that `optimizer_state` returned. KeyError if the model lacks one of its parameters."""
    parameters = dict(model.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, values in state.items():
        parameter = parameters[name]
        owner[parameter].state[parameter] = {
            key: value.to(parameter.device, copy=True) for key, value in values.items()
        }
