"""The optimizer: who decays, how the rate moves, and a guard that the device alone works."""

import math
import statistics

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from babygpt.training.guard import UpdateGuard
from babygpt.training.optim import (
    Muon,
    adamw,
    load_optimizer_state,
    muon,
    optimizer_state,
    orthogonalize,
    set_learning_rates,
)
from babygpt.training.schedule import LRSchedule
from model import GPT, GPTConfig, ModernConfig, ModernGPT

CPU = torch.device("cpu")


def tiny() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=8))


def test_matrices_decay_and_the_rest_does_not():
    model = tiny()
    (optimizer,) = adamw(model, max_lr=1.0, weight_decay=0.1)
    decay, rest = optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)].split(".")[-1] for p in rest["params"]} == {"bias", "weight"}
    assert all("ln_" in names[id(p)] or names[id(p)].endswith("bias") for p in rest["params"])
    assert sorted(map(id, decay["params"] + rest["params"])) == sorted(map(id, model.parameters())), "each once"


def test_learning_rate_has_warmup_and_cosine_decay():
    """The cosine covers the steps after the warmup."""

    def rate(step):
        return LRSchedule(max_steps=110, warmup_steps=10, min_lr_ratio=0.1).learning_rate(step, max_lr=1.0)

    assert [rate(0), rate(4), rate(9)] == pytest.approx([0.1, 0.5, 1.0])
    assert rate(10) == 1.0
    assert rate(60) == pytest.approx(0.55), "half way between warm-up and end, not between 0 and end"
    assert rate(110) == pytest.approx(0.1)
    assert rate(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert LRSchedule(max_steps=1, min_lr_ratio=0.1).learning_rate(0, max_lr=1.0) == 1.0


def test_a_step_equals_adamw_written_out():
    model = tiny()
    (optimizer,) = adamw(model, max_lr=0.01, weight_decay=0.1)
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
    (optimizer,) = optimizers = adamw(model, max_lr=0.01, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for guard in (0.0, 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        state = optimizer_state(optimizers, model)
        optimizer.zero_grad()
        (model(torch.arange(16)[None], torch.arange(16)[None]) * (1.0 if guard == 0 else math.nan)).backward()
        optimizer.found_inf = torch.tensor(guard)
        optimizer.step()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == (guard == 1)
    after = optimizer_state(optimizers, model)
    assert all(torch.equal(after[name][key], state[name][key]) for name in state for key in state[name])
    assert after["wte.weight"]["step"] == 1


def test_state_by_name_comes_back_whatever_the_groups():
    model, other = tiny(), tiny()
    (optimizer,) = optimizers = adamw(model, 0.01, 0.1)
    another = [torch.optim.AdamW(other.parameters(), lr=0.01, fused=True)]
    model(torch.arange(16)[None], torch.arange(16)[None]).backward()
    optimizer.step()
    state = optimizer_state(optimizers, model)
    assert set(state) == {name for name, _ in model.named_parameters()}
    load_optimizer_state(another, other, state)
    again = optimizer_state(another, other)
    assert all(torch.equal(state[name][key], again[name][key]) for name in state for key in state[name])


# ---------------------------------------------------------------------------------------------------------
# Muon


def tall_and_wide() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (8, 24), (16, 16), (24, 8))]


def steps(optimizers, parameters, count: int = 3, seed: int = 5) -> None:
    """Some updates with the same random gradients every time."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def test_orthogonalize_brings_singular_values_near_one():
    for shape in ((3, 32, 8), (2, 8, 32), (1, 16, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert values.min() > 0.3
        assert values.max() < 1.3
        assert abs(values.median() - 0.95) < 0.25


def test_muon_equals_pytorchs_on_plain_matrices():
    ours, theirs = tall_and_wide(), tall_and_wide()
    mine = Muon({p: [p.size(0)] for p in ours}, max_lr=0.02, weight_decay=0.1)
    mine.param_groups[0]["lr"] = 0.02
    steps([mine], ours)
    steps([torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)], theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)  # of updates of 0.02: bfloat16's rounding


def test_muon_runs_few_operations_whatever_the_depth():
    """Matrices of one shape are updated in one batch, and tall ones join the wide; a foreach call counts once."""

    class Shapes(TorchDispatchMode):
        """Counts operations that launch kernels, and notes the batches that are orthogonalized."""

        def __init__(self):
            super().__init__()
            self.count, self.batches = 0, set()

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.count += not operation.is_view
            if operation.overloadpacket is torch.ops.aten.baddbmm:
                self.batches.add(tuple(args[0].shape))
            return operation(*args, **(kwargs or {}))

    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=12, n_head=2, n_embd=8))
    optimizer, _ = muon(model, 0.04, 0.6, 0.008, 0.03)
    model(torch.arange(16)[None], torch.arange(16)[None]).backward()
    for _ in range(2):
        with Shapes() as shapes:
            optimizer.step()
    assert shapes.batches == {(48, 8, 8), (24, 8, 8), (24, 8, 32)}  # the Gram matrices are (8, 8)
    assert shapes.count < 150  # 574 when each matrix was updated by itself


def test_queries_keys_and_values_are_orthogonalised_apart():
    torch.manual_seed(0)
    together = torch.nn.Parameter(torch.randn(16, 8))
    start = together.detach().clone()
    apart = [torch.nn.Parameter(piece.clone()) for piece in start.split([8, 4, 4])]
    one, three = Muon({together: [8, 4, 4]}, 0.02), Muon({p: [p.size(0)] for p in apart}, 0.02)
    for optimizer in (one, three):
        optimizer.param_groups[0]["lr"] = 0.02
    grad = torch.randn(16, 8)
    together.grad = grad
    for p, piece in zip(apart, grad.split([8, 4, 4]), strict=True):
        p.grad = piece.clone()
    one.step()
    three.step()
    torch.testing.assert_close(together.detach(), torch.cat([p.detach() for p in apart]))
    fused = torch.nn.Parameter(start.clone())
    fused.grad = grad
    whole = Muon({fused: [16]}, 0.02)
    whole.param_groups[0]["lr"] = 0.02
    whole.step()
    assert not torch.allclose(fused, together, atol=1e-3), "as one matrix it would be another update"


def test_each_modern_parameter_has_one_optimizer_and_its_rate():
    torch.manual_seed(0)
    fields = {"tie_head": False, "value_embeddings": 1, "x0_shortcut": True, "unet": True, "n_kv_head": 1}
    model = ModernGPT(ModernConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=8, **fields))
    optimizers = muon(model, 0.04, 0.6, 0.008, 0.03)
    names = {p: name for name, p in model.named_parameters()}
    rates = {names[p]: g["max_lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
    assert len(rates) == sum(len(g["params"]) for o in optimizers for g in o.param_groups) == len(names)
    assert {name for name, rate in rates.items() if rate == 0.04} == {
        f"h.{i}.{part}.weight" for i in (0, 1) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert (rates["wte.weight"], rates["vte.0.weight"], rates["lm_head.weight"]) == (0.6, 0.6, 0.008)
    scalars = ("skip_lambdas", "h.1.attn.value_lambdas", "h.0.x0_lambdas", "ln_f.bias")
    assert {rates[name] for name in scalars} == {0.03}
    assert optimizers[0].splits[model.h[0].attn.c_attn.weight] == [8, 4, 4]


def test_cautious_decay_skips_weights_that_the_update_enlarges():
    def moved(decay: float, cautious: bool) -> torch.Tensor:
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(8, 8))
        optimizer = Muon({p: [8]}, 0.1, decay, cautious=cautious)
        optimizer.param_groups[0]["lr"] = 0.1
        steps([optimizer], [p], 1)
        return p.detach()

    torch.manual_seed(0)
    before = torch.randn(8, 8)
    update = before - moved(0.0, False)
    expected = before - update - 0.1 * 0.5 * before * (update * before > 0)
    torch.testing.assert_close(moved(0.5, True), expected)
    torch.testing.assert_close(moved(0.5, False), before - update - 0.1 * 0.5 * before)


def test_a_shut_gate_leaves_muon_alone_too():
    parameters = tall_and_wide()
    optimizer = Muon({p: [p.size(0)] for p in parameters}, 0.02, 0.1, cautious=True)
    optimizer.param_groups[0]["lr"] = 0.02
    steps([optimizer], parameters, 1)
    before = [p.detach().clone() for p in parameters]
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in parameters]
    optimizer.found_inf = torch.tensor(1.0)
    for p in parameters:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    after = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    assert all(torch.equal(a, b) for a, b in zip(momentum, after, strict=True))
    optimizer.found_inf = torch.tensor(0.0)
    steps([optimizer], parameters, 1)
    assert not torch.equal(before[0], parameters[0])


def test_a_constant_rate_cools_down_linearly():
    def rate(step):
        return LRSchedule(max_steps=100, cooldown=0.4).learning_rate(step, max_lr=1.0)

    assert [rate(0), rate(30), rate(60)] == [1.0, 1.0, 1.0]
    assert [rate(70), rate(80), rate(99), rate(100)] == pytest.approx([0.75, 0.5, 0.025, 0.0])


def test_momentum_warms_up_and_every_group_gets_its_own_rate():
    model = tiny()
    optimizers = muon(model, 0.04, 0.6, 0.008, 0.03)
    schedule = LRSchedule(max_steps=100, warmup_steps=2, cooldown=0.4, momentum_warmup_steps=10)
    assert set_learning_rates(optimizers, schedule, 0) == 0.02
    assert optimizers[0].param_groups[0]["momentum"] == 0.85
    set_learning_rates(optimizers, schedule, 5)
    assert optimizers[0].param_groups[0]["momentum"] == pytest.approx(0.90)
    set_learning_rates(optimizers, schedule, 80)
    assert optimizers[0].param_groups[0]["momentum"] == pytest.approx(0.95)
    assert [g["lr"] for o in optimizers for g in o.param_groups] == pytest.approx([0.02, 0.3, 0.004, 0.015])
    assert optimizers[1].param_groups[1]["params"] == [model.wte.weight], "a tied table is a head"
    set_learning_rates(optimizers, LRSchedule(max_steps=100), 0)
    assert optimizers[0].param_groups[0]["momentum"] == pytest.approx(0.95)


# ---------------------------------------------------------------------------------------------------------
# the guard


def judged(guard: UpdateGuard, losses: list[float]) -> list[tuple[float, float]]:
    return [tuple(t.item() for t in guard.judge(torch.tensor(loss), torch.tensor(1.0))) for loss in losses]


def test_spike_is_skipped_and_barely_changes_the_statistics():
    generator = torch.Generator().manual_seed(0)
    usual = (3 + 0.1 * torch.randn(UpdateGuard.WINDOW, generator=generator)).tolist()
    guard = UpdateGuard(CPU, skip_spikes=6.0)
    assert all(held == 0 and z == 0 for held, z in judged(guard, usual)), "nothing is known yet"
    [(held, z)] = judged(guard, [5.0])
    assert held == 1
    assert z == pytest.approx((5.0 - statistics.mean(usual)) / statistics.stdev(usual), rel=1e-4)
    [(held, z), (held_again, _)] = judged(guard, [3.1, 5.0])
    assert (held, held_again) == (0, 1)
    assert abs(z) < 2
    assert judged(UpdateGuard(CPU, None, usual), [5.0])[0][0] == 0, "only where it is asked for"
    assert judged(UpdateGuard(CPU, 6.0, guard.losses()), [5.0])[0] == judged(guard, [5.0])[0], "goes on as it was"


def test_a_rise_that_lasts_is_not_held_back_for_ever():
    guard = UpdateGuard(CPU, skip_spikes=3.0)
    judged(guard, [3.0 + 0.01 * (i % 5) for i in range(UpdateGuard.WINDOW)])
    held = [held for held, _ in judged(guard, [4.0] * 200)]
    assert held[0] == 1
    assert held[-1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_holds_back_all_that_follows(bad):
    for guard in (UpdateGuard(CPU), UpdateGuard(CPU, 6.0)):
        assert judged(guard, [3.0, bad, 3.0])[0][0] == 0
        assert [held for held, _ in judged(guard, [3.0, 3.0])] == [1, 1]
    guard = UpdateGuard(CPU)
    assert guard.judge(torch.tensor(3.0), torch.tensor(bad))[0] == 1


def test_zero_gradient_norm_halts_all_updates():
    """A norm of exactly zero is an error of the model or a kernel: no update is applied from there on."""
    guard = UpdateGuard(CPU)
    loss = torch.tensor(3.0)
    assert [guard.judge(loss, torch.tensor(norm))[0] for norm in (1e-30, 0.0, 1.0)] == [0, 1, 1]
