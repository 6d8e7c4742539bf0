"""A compiled model in DistributedDataParallel has the gradients of the eager model, averaged over ranks."""

from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from babygpt.errors import exit_now
from babygpt.training import distributed
from babygpt.training.distributed import Ranks
from babygpt.training.guard import UpdateGuard
from dataloader import Batch, Position
from model import GPT, build_model
from train import TrainState, next_token_loss, train_step
from train_config import preset, variant

WORLD_SIZE, MICRO_BATCHES, ROWS, T = 2, 3, 2, 64
CASES = {
    "gpt2": ("gpt2", {}, False),
    "modern": ("modern", {"value_embeddings": 1}, False),
    "activation checkpointing": ("gpt2", {}, True),
    "FlexAttention": ("modern", {"window": 40, "document_mask": True, "eot_id": 0, "value_embeddings": 0}, False),
}


class GradientRecorder(torch.optim.Optimizer):
    """An optimizer that stores the gradients of a step and updates nothing."""

    def __init__(self, model: nn.Module):
        super().__init__(model.parameters(), {})
        self.grads: list[torch.Tensor] = []

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.grads = [p.grad.clone() for p in self.param_groups[0]["params"]]


def compute_gradients(model: GPT, wrapped: nn.Module, batches: list[torch.Tensor], ranks: Ranks) -> list[torch.Tensor]:
    """Return the gradients that a training step passes to the optimizer."""
    recorder = GradientRecorder(model)
    state = TrainState(wrapped, [recorder], UpdateGuard(ranks.device), ranks, "float32")
    batch = Batch(Position(), Position(), batches, *[WORLD_SIZE * MICRO_BATCHES * ROWS * T] * 2)
    for _ in range(2):  # DDP rebuilds its buckets after the first step
        train_step(state, batch, next_token_loss, seed=0)
    return recorder.grads


def compare_compiled_with_eager(rank: int, case: str, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD_SIZE)
    name, fields, activation_checkpointing = CASES[case]
    shape = {"vocab_size": 300, "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": T}
    torch.manual_seed(0)
    model = build_model(variant(preset(name), model=shape | fields).model)
    model.activation_checkpointing = activation_checkpointing
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))  # parameters that are initialized to zero would hide errors
    batches = list(torch.randint(300, (WORLD_SIZE, MICRO_BATCHES, ROWS, T + 1)))
    all_batches = [batch for rank_batches in batches for batch in rank_batches]

    single_rank = Ranks(0, 0, 1, torch.device("cpu"))
    expected = compute_gradients(model, model, all_batches, single_rank)

    ranks, graphs = Ranks(rank, rank, WORLD_SIZE, torch.device("cpu")), []
    ddp_with_small_buckets = partial(DistributedDataParallel, bucket_cap_mb=0.05)
    dist._DEFAULT_FIRST_BUCKET_BYTES = 50_000
    if case == "FlexAttention":
        mock.patch("babygpt.nn.attention.FLEX_DEVICES", ("cpu",)).start()
        # this check rejects a backward pass on the CPU
        mock.patch("torch.nn.attention.flex_attention._validate_device").start()

    def aot_eager(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for bf16 in (False, True) if case == "gpt2" else (False,):
        torch._dynamo.reset()
        with mock.patch.object(distributed, "DistributedDataParallel", ddp_with_small_buckets):
            wrapped = ranks.data_parallel(torch.compile(model, backend=aot_eager, dynamic=False), bf16)
        actual = compute_gradients(model, wrapped, list(batches[rank]), ranks)
        for (name, _), a, b in zip(model.named_parameters(), actual, expected, strict=True):
            error = ((a - b).norm() / b.norm()).item()
            assert error < (2e-2 if bf16 else 1e-4), f"{name}: {error}"
    # DDP does not split a graph with higher-order operators
    if not activation_checkpointing and case != "FlexAttention":
        assert len(graphs) > 2, "one graph per bucket: the all-reduce of a bucket overlaps with the backward pass"
    Path(directory, f"passed-{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()
    exit_now(0)


@pytest.mark.parametrize("case", CASES)
def test_compiled_ranks_match_eager_gradients(case, tmp_path):
    """Two ranks of three micro-batches, synchronized in the last one, match one eager rank of all six.

    With bfloat16 gradients, they match to the precision of bfloat16.
    """
    method = "spawn" if torch.accelerator.is_available() else "fork"
    torch.multiprocessing.start_processes(
        compare_compiled_with_eager, (case, str(tmp_path)), WORLD_SIZE, start_method=method
    )
    assert len(list(tmp_path.glob("passed-*"))) == WORLD_SIZE
