"""A compiled model under DistributedDataParallel: the gradients of the eager model, averaged over ranks."""

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

WORLD, MICRO_BATCHES, ROWS, T = 2, 3, 2, 64
CASES = {
    "gpt2": ("gpt2", {}, False),
    "modern": ("modern", {"value_embeddings": 1}, False),
    "activation checkpointing": ("gpt2", {}, True),
    "FlexAttention": ("modern", {"window": 40, "document_mask": True, "eot_id": 0, "value_embeddings": 0}, False),
}


class Keep(torch.optim.Optimizer):
    """Keeps the gradients of a step instead of using them."""

    def __init__(self, model: nn.Module):
        super().__init__(model.parameters(), {})
        self.grads: list[torch.Tensor] = []

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.grads = [p.grad.clone() for p in self.param_groups[0]["params"]]


def gradients(model: GPT, wrapped: nn.Module, batches: list[torch.Tensor], ranks: Ranks) -> list[torch.Tensor]:
    """The gradients that one step of training hands to the optimizer."""
    keep = Keep(model)
    state = TrainState(wrapped, [keep], UpdateGuard(ranks.device), ranks, "float32")
    batch = Batch(Position(), Position(), batches, num_targets=WORLD * MICRO_BATCHES * ROWS * T)
    for _ in range(2):  # DDP may only reorder its buckets after the first step
        train_step(state, batch, next_token_loss, seed=0)
    return keep.grads


def both_ways(rank: int, case: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    name, fields, activation_checkpointing = CASES[case]
    shape = {"vocab_size": 300, "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": T}
    torch.manual_seed(0)
    model = build_model(variant(preset(name), model=shape | fields).model)
    model.activation_checkpointing = activation_checkpointing
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))  # what starts at zero hides mistakes
    batches = list(torch.randint(300, (WORLD, MICRO_BATCHES, ROWS, T + 1)))
    everything = [batch for of_rank in batches for batch in of_rank]

    alone = Ranks(0, 0, 1, torch.device("cpu"))
    expected = gradients(model, model, everything, alone)

    ranks, graphs = Ranks(rank, rank, WORLD, torch.device("cpu")), []
    several_buckets = partial(DistributedDataParallel, bucket_cap_mb=0.05)
    dist._DEFAULT_FIRST_BUCKET_BYTES = 50_000
    if case == "FlexAttention":
        mock.patch("babygpt.nn.attention.FLEX_DEVICES", ("cpu",)).start()
        mock.patch("torch.nn.attention.flex_attention._validate_device").start()  # has no backward pass on a CPU

    def aot_eager(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for bf16 in (False, True) if case == "gpt2" else (False,):
        torch._dynamo.reset()
        with mock.patch.object(distributed, "DistributedDataParallel", several_buckets):
            wrapped = ranks.data_parallel(torch.compile(model, backend=aot_eager, dynamic=False), bf16)
        found = gradients(model, wrapped, list(batches[rank]), ranks)
        for (name, _), a, b in zip(model.named_parameters(), found, expected, strict=True):
            off = ((a - b).norm() / b.norm()).item()
            assert off < (2e-2 if bf16 else 1e-4), f"{name}: {off}"
    if not activation_checkpointing and case != "FlexAttention":  # higher-order operators stay in one graph
        assert len(graphs) > 2, "one graph per bucket: the all-reduce of a bucket overlaps with the backward pass"
    Path(folder, f"passed-{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()
    exit_now(0)


@pytest.mark.parametrize("case", CASES)
def test_compiled_ranks_have_the_gradients_of_eager(case, tmp_path):
    """Two ranks of three micro-batches, synchronized in the last one, equal one eager rank of all six; in bfloat16 to
    its precision."""
    method = "spawn" if torch.accelerator.is_available() else "fork"
    torch.multiprocessing.start_processes(both_ways, (case, str(tmp_path)), WORLD, start_method=method)
    assert len(list(tmp_path.glob("passed-*"))) == WORLD
