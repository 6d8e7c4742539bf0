"""The optimizer: who decays, how the rate moves, and a gate that the device alone works."""

import math

import pytest
import torch

from model import GPT, GPTConfig
from optim import adamw, learning_rate, load_optimizer_state, optimizer_state, parameter_groups


def tiny() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=8))


def test_matrices_decay_and_the_rest_does_not():
    model = tiny()
    decay, rest = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)].split(".")[-1] for p in rest["params"]} == {"bias", "weight"}
    assert all("ln_" in names[id(p)] or names[id(p)].endswith("bias") for p in rest["params"])
    assert sorted(map(id, decay["params"] + rest["params"])) == sorted(map(id, model.parameters())), "each once"


def test_the_rate_warms_up_and_falls_by_a_cosine_over_what_is_left():
    def rate(step):
        return learning_rate(step, max_lr=1.0, min_lr_ratio=0.1, warmup_steps=10, max_steps=110)

    assert [rate(0), rate(4), rate(9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(10) == 1.0
    assert rate(60) == pytest.approx(0.55), "half way between warm-up and end, not between 0 and end"
    assert rate(110) == pytest.approx(0.1)
    assert rate(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(0, 1.0, 0.1, warmup_steps=0, max_steps=1) == 1.0


def test_a_step_equals_adamw_written_out():
    model = tiny()
    optimizer = adamw(model, weight_decay=0.1)
    w = model.h[0].mlp.c_fc.weight
    before, m, v = w.detach().clone().double(), 0.0, 0.0
    for step in range(1, 4):
        optimizer.zero_grad()
        model(torch.arange(16)[None], torch.arange(16)[None]).backward()
        g = w.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        before = before * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
        torch.testing.assert_close(w.detach().double(), before, atol=1e-6, rtol=1e-5)


def test_a_shut_gate_leaves_weights_and_moments_alone():
    model = tiny()
    optimizer = adamw(model, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for gate in (0.0, 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        state = optimizer_state(optimizer, model)
        optimizer.zero_grad()
        (model(torch.arange(16)[None], torch.arange(16)[None]) * (1.0 if gate == 0 else math.nan)).backward()
        optimizer.found_inf = torch.tensor(gate)
        optimizer.step()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == (gate == 1)
    after = optimizer_state(optimizer, model)
    assert all(torch.equal(after[name][key], state[name][key]) for name in state for key in state[name])
    assert after["wte.weight"]["step"] == 1


def test_state_by_name_comes_back_whatever_the_groups():
    model, other = tiny(), tiny()
    optimizer, another = adamw(model, 0.1), torch.optim.AdamW(other.parameters(), lr=0.01, fused=True)
    model(torch.arange(16)[None], torch.arange(16)[None]).backward()
    optimizer.step()
    state = optimizer_state(optimizer, model)
    assert set(state) == {name for name, _ in model.named_parameters()}
    load_optimizer_state(another, other, state)
    again = optimizer_state(another, other)
    assert all(torch.equal(state[name][key], again[name][key]) for name in state for key in state[name])
