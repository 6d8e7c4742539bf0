"""Inductor's code for a CPU must compute bitwise equal gradients in every pass, so that a resumed run is exact."""

import pytest
import torch

from babygpt.training import compilation
from babygpt.training.device import make_deterministic
from babygpt.training.distributed import Ranks
from model import build_model
from train_config import preset, variant


@pytest.mark.skipif(not compilation.can_compile_for_cpu(), reason="needs Linux and a C++ compiler")
@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_compiled_gradients_are_equal_in_every_pass(name):
    """On two threads, which both add to the gradients of the same embeddings."""
    changes = {"vocab_size": 64, "n_layer": 1, "n_head": 1, "n_embd": 64, "block_size": 256}
    changes |= {"value_embeddings": 1} if name == "modern" else {}
    config = variant(preset(name), model=changes, training={"compile": "on"})
    torch.manual_seed(0)
    model, rows = build_model(config.model), torch.randint(4, (32, 257))
    threads, gradients = torch.get_num_threads(), set[bytes]()
    torch.set_num_threads(2)
    try:
        compilation.resolve(config, model, Ranks(0, 0, 1, torch.device("cpu")))
        compiled = torch.compile(model, dynamic=False)
        for _ in range(8):
            model.zero_grad(set_to_none=True)
            compiled(rows[:, :-1], rows[:, 1:], reduction="sum").backward()
            gradients.add(b"".join(p.grad.numpy().tobytes() for p in model.parameters() if p.grad is not None))
    finally:
        torch.set_num_threads(threads)
        torch._dynamo.reset()
        make_deterministic(False)
    assert len(gradients) == 1
