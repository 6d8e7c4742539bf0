"""Performance properties of a GPU step that a CPU can check: no synchronization, one graph, few saved bytes."""

import csv
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arguments import with_momentum_defaults
from babygpt.evaluation.validation import mean_loss
from babygpt.nn import cross_entropy
from babygpt.training.distributed import Ranks
from babygpt.training.guard import StepStatus, UpdateGuard
from babygpt.training.optim import Optimizers, make_optimizers, set_learning_rates
from babygpt.training.schedule import LRSchedule
from dataloader import Batch, Position
from model import GPT, build_model
from train import TrainState, next_token_loss, train_step
from train_config import Config, preset, variant

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MICRO_BATCHES = 3
BACKEND = os.environ.get("TEST_BACKEND", "aot_eager_decomp_partition")  # runs/test.sh --slow: inductor
PRESETS_OF_BOTH_KINDS = pytest.mark.parametrize("preset", ["gpt2", "modern"])


def small(name: str) -> Config:
    """Return a preset with a model of two layers, in bfloat16."""
    shape = {"vocab_size": 300, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}
    shape |= {"value_embeddings": 1} if name == "modern" else {}
    return variant(preset(name), model=shape, training={"dtype": "bfloat16", "bf16_activations": True})


def model_and_step(
    config: Config, device: torch.device = CPU
) -> tuple[GPT, Callable[[torch.nn.Module, int], torch.Tensor]]:
    """Return a model, and a function that runs one training step with it or its compiled version."""
    torch.manual_seed(0)
    with device if device != CPU else nullcontext():
        model = build_model(config.model)
    model.bf16_activations = config.training.bf16_activations
    optimizers: Optimizers = make_optimizers(model, asdict(with_momentum_defaults(config).optimizer))
    guard, ranks = UpdateGuard(device, skip_spikes=6.0), Ranks(0, 0, 1, device)
    state = TrainState(model, optimizers, guard, ranks, config.training.dtype, config.optimizer.grad_clip)
    batches = list(torch.randint(300, (MICRO_BATCHES, 4, config.model.block_size + 1)))

    def step(compiled: torch.nn.Module, number: int) -> torch.Tensor:
        set_learning_rates(optimizers, LRSchedule(100, min_lr_ratio=0.1), number)
        batch = Batch(Position(), Position(), batches, *[MICRO_BATCHES * 4 * config.model.block_size] * 2)
        return train_step(replace(state, model=compiled), batch, next_token_loss, seed=0, compare=True)

    return model, step


@PRESETS_OF_BOTH_KINDS
def test_step_reads_nothing_back_to_the_host(preset):
    """A fake tensor cannot be read, so `.item()` in forward, backward, UpdateGuard or optimizers raises an error."""
    with FakeTensorMode():
        model, step = model_and_step(small(preset))
        for number in range(2):
            assert step(model, number).shape == (7,)


class NoTransfers(TorchDispatchMode):
    """Raise an error for operations between the device `meta` and the host, except for non-blocking transfers."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors}) > 1 and not (kwargs or {}).get("non_blocking"):
            raise AssertionError(f"{operation} copies between the host and the device")
        return result


@PRESETS_OF_BOTH_KINDS
def test_step_copies_nothing_except_batches(preset, monkeypatch):
    """Not even a number is copied, as an assignment to an element of a tensor does: CUDA would synchronize."""
    optimizers = sys.modules["torch.optim.optimizer"]  # torch.optim deletes its attribute of that name
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    model, step = model_and_step(variant(small(preset), training={"dtype": "float32"}), torch.device("meta"))
    step(model, 0)
    with NoTransfers():
        step(model, 1)


def test_validation_reads_losses_once_at_the_end(monkeypatch):
    """The host does not wait for a batch before it launches the next one."""
    model = build_model(small("gpt2").model)
    idx, calls = torch.randint(300, (5, 2, 32)), []
    forward, stack = model.forward, torch.stack
    monkeypatch.setattr(model, "forward", lambda *batch, **kind: calls.append("forward") or forward(*batch, **kind))
    monkeypatch.setattr(torch, "stack", lambda losses: calls.append("read") or stack(losses))
    item = torch.Tensor.item

    def item_of_integers(tensor: torch.Tensor) -> object:
        assert not tensor.is_floating_point(), "the host read a loss and waited for the device"
        return item(tensor)

    def raise_error(tensor: torch.Tensor) -> None:
        raise AssertionError("the host read a loss and waited for the device")

    monkeypatch.setattr(torch.Tensor, "item", item_of_integers)
    monkeypatch.setattr(torch.Tensor, "__float__", item_of_integers)
    monkeypatch.setattr(torch.Tensor, "cpu", raise_error)
    mean_loss(model, [(batch, batch) for batch in idx], torch.ones(384, dtype=torch.int64), Ranks(0, 0, 1, CPU))
    assert calls == ["forward"] * 5 + ["read"]


@PRESETS_OF_BOTH_KINDS
def test_compiled_step_is_one_graph_and_updates_all_weights(preset):
    """Three steps of three micro-batches compile once, the gradient norm is positive, and every parameter changes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(BACKEND)
    model, step = model_and_step(small(preset))
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(3):
            status = StepStatus.unpack(step(compiled, number))
            assert status.grad_norm > 0
            assert status.skip_update == 0
    assert counter.frame_count == 1
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


# ---------------------------------------------------------------------------------------------------------
# the graphs that the compiler receives, traced at full width with fake tensors

ROWS, T, LAYERS = 64, 1024, 2  # the micro-batch of GPT-2 124M on a large GPU
PADDED_VOCAB = 50_304


@pytest.fixture(scope="module", params=["gpt2", "modern"])
def graphs(request) -> tuple[str, list[torch.fx.GraphModule]]:
    """A preset and its forward and backward graphs, with the loss chunks of CUDA."""
    torch._dynamo.reset()
    found: list[torch.fx.GraphModule] = []
    chunk_rows = cross_entropy.chunk_rows

    def chunk_rows_of_cuda(rows: int, row_bytes: int, _: str, compiled: bool) -> int:
        return chunk_rows(rows, row_bytes, "cuda", compiled)

    def record(graph: torch.fx.GraphModule, _: list) -> Callable:
        found.append(graph)
        return graph.forward

    backend = aot_autograd(
        fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )  # fmt: skip
    shape = {"vocab_size": 50257, "n_layer": LAYERS}
    shape |= {"value_embeddings": 1} if request.param == "modern" else {}
    with (
        mock.patch.object(cross_entropy, "chunk_rows", chunk_rows_of_cuda),
        FakeTensorMode(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        model = build_model(variant(preset(request.param), model=shape).model)
        model.bf16_activations = True
        idx = torch.zeros(ROWS, T, dtype=torch.int64)
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(idx, idx, reduction="sum").backward()
    assert len(found) == 2
    return request.param, found


def shape_of(node: torch.fx.Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def test_activations_saved_for_backward_are_within_budget(graphs):
    """The forward pass of two layers saves at most the bytes per token in results/speed/saved-bytes.csv."""
    preset, (forward, _) = graphs
    (outputs,) = forward.graph.output_node().args
    inputs = set(forward.graph.find_nodes(op="placeholder"))
    values = [node.meta["val"] for node in outputs[1:] if node not in inputs]
    saved = sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))
    with open(ROOT / "results" / "speed" / "saved-bytes.csv", newline="") as file:
        budget = {row["preset"]: float(row["saved_bytes_per_token"]) for row in csv.DictReader(file)}
    assert 0.9 * budget[preset] < saved / (ROWS * T) <= budget[preset]


def test_compiled_loss_has_no_scatter_and_few_large_chunks(graphs):
    """Logits are computed in chunks of 16,384 rows, and no scatter writes to a tensor of their size."""
    _, (forward, backward) = graphs
    logits = [node for node in forward.graph.nodes if shape_of(node)[1:] == (PADDED_VOCAB,)]
    products = [shape_of(node)[0] for node in logits if "mm" in str(node.target)]
    assert products == [16_384] * (ROWS * T // 16_384)
    nodes = logits + [node for node in backward.graph.nodes if shape_of(node)[1:] == (PADDED_VOCAB,)]
    assert [node for node in nodes if re.search(r"aten\.(scatter|index_put)", str(node.target))] == []
