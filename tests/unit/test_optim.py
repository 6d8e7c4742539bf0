"""AdamW, Muon, the learning-rate schedule, and the guard that skips updates on the device."""

import copy
import math
import statistics

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from babygpt.training import optim
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


def tiny_model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=2, n_embd=8))


def test_weight_decay_applies_to_matrices_only():
    model = tiny_model()
    (optimizer,) = adamw(model, max_lr=1.0, weight_decay=0.1)
    decay, no_decay = optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)].split(".")[-1] for p in no_decay["params"]} == {"bias", "weight"}
    assert all("ln_" in names[id(p)] or names[id(p)].endswith("bias") for p in no_decay["params"])
    assert sorted(map(id, decay["params"] + no_decay["params"])) == sorted(map(id, model.parameters()))


def test_learning_rate_has_warmup_and_cosine_decay():
    """The cosine covers the steps after warmup, not all steps."""

    def learning_rate(step):
        return LRSchedule(max_steps=110, warmup_steps=10, min_lr_ratio=0.1).learning_rate(step, max_lr=1.0)

    assert [learning_rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(10) == 1.0
    assert learning_rate(60) == pytest.approx(0.55), "step 60 is halfway between the end of warmup and the last step"
    assert learning_rate(110) == pytest.approx(0.1)
    assert learning_rate(35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert LRSchedule(max_steps=1, min_lr_ratio=0.1).learning_rate(0, max_lr=1.0) == 1.0


def test_adamw_equals_its_formula_in_float64():
    model = tiny_model()
    (optimizer,) = adamw(model, max_lr=0.01, weight_decay=0.1)
    w = model.h[0].mlp.c_fc.weight
    expected, m, v = w.detach().clone().double(), 0.0, 0.0
    for step in range(1, 4):
        optimizer.zero_grad()
        model(torch.arange(16)[None], torch.arange(16)[None]).backward()
        g = w.grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
        torch.testing.assert_close(w.detach().double(), expected, atol=1e-6, rtol=1e-5)


def test_found_inf_skips_the_update_of_adamw():
    """Weights, moments and step counts stay unchanged."""
    model = tiny_model()
    (optimizer,) = optimizers = adamw(model, max_lr=0.01, weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for found_inf in (0.0, 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        state = copy.deepcopy(optimizer_state(optimizers, model))  # optimizers update their tensors in place
        optimizer.zero_grad()
        (model(torch.arange(16)[None], torch.arange(16)[None]) * (1.0 if found_inf == 0 else math.nan)).backward()
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        unchanged = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert unchanged == (found_inf == 1)
    after = optimizer_state(optimizers, model)
    assert all(torch.equal(after[name][key], state[name][key]) for name in state for key in state[name])
    assert after["wte.weight"]["step"] == 1


def test_optimizer_state_loads_into_other_parameter_groups():
    """The state is stored by parameter name, so it does not depend on the groups."""
    model, other_model = tiny_model(), tiny_model()
    (optimizer,) = optimizers = adamw(model, 0.01, 0.1)
    other_optimizers = [torch.optim.AdamW(other_model.parameters(), lr=0.01, fused=True)]
    model(torch.arange(16)[None], torch.arange(16)[None]).backward()
    optimizer.step()
    state = optimizer_state(optimizers, model)
    assert set(state) == {name for name, _ in model.named_parameters()}
    load_optimizer_state(other_optimizers, other_model, state)
    loaded = optimizer_state(other_optimizers, other_model)
    assert all(torch.equal(state[name][key], loaded[name][key]) for name in state for key in state[name])


# ---------------------------------------------------------------------------------------------------------
# Muon


def make_matrices() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (8, 24), (16, 16), (24, 8))]


def run_steps(optimizers, parameters, num_steps: int = 3, seed: int = 5) -> None:
    """Update parameters with random gradients, which depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def test_orthogonalize_moves_singular_values_close_to_one():
    """Singular values that span a factor of 200 are mapped to within 16% of 1, also that of a matrix of rank 1."""
    torch.manual_seed(0)
    for rows, columns in ((8, 32), (16, 16)):
        u, _, v = torch.linalg.svd(torch.randn(4, rows, columns), full_matrices=False)
        for values in (torch.logspace(0, math.log10(0.005), rows), torch.ones(rows), torch.eye(rows)[0]):
            orthogonal = orthogonalize(u * values @ v).float()
            kept = values > 0
            result = (u.mT @ orthogonal @ v.mT).diagonal(dim1=-2, dim2=-1)[:, kept]
            assert (result - 1).abs().max() < 0.16, values


def test_muon_equals_torch_optim_muon(monkeypatch):
    """With the coefficients of the original Muon, and without normalization."""
    monkeypatch.setattr(optim, "POLAR_EXPRESS", 5 * [(3.4445, -4.7750, 2.0315)])
    monkeypatch.setattr(optim, "SAFETY_FACTOR", 1.0)
    ours, theirs = make_matrices(), make_matrices()
    optimizer = Muon({p: [p.size(0)] for p in ours}, max_lr=0.02, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 0.02
    run_steps([optimizer], ours)
    run_steps([torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)], theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)  # bfloat16 rounding of updates of 0.02


def test_normuon_equals_its_formula_in_float64():
    """Each row of a tall matrix, and each column of a wide one, is divided by its root mean square.

    It cannot tell rows from columns for a square matrix, whose rows and columns have equal norms after Polar Express.
    """
    parameters = make_matrices()
    expected = [p.detach().double() for p in parameters]
    second_moments = [torch.zeros(max(p.shape), dtype=torch.float64) for p in parameters]
    momenta = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    optimizer = Muon({p: [p.size(0)] for p in parameters}, max_lr=0.02, normuon=True)
    optimizer.param_groups[0]["lr"] = 0.02
    for seed in range(3):
        run_steps([optimizer], parameters, 1, seed)
        for p, w, m, v in zip(parameters, expected, momenta, second_moments, strict=True):
            m.lerp_(p.grad.double(), 0.05)
            u, values, vh = torch.linalg.svd(0.05 * p.grad.double() + 0.95 * m, full_matrices=False)
            values /= optim.SAFETY_FACTOR * values.norm()
            for a, b, c in optim.POLAR_EXPRESS:
                values = a * values + b * values**3 + c * values**5
            rows, columns = p.shape
            update = u * values @ vh
            v.lerp_(update.square().mean(dim=1 if rows >= columns else 0), 0.1)
            update /= v.sqrt()[:, None] if rows >= columns else v.sqrt()
            update *= math.sqrt(min(rows, columns)) / update.norm()
            w -= 0.02 * math.sqrt(max(1, rows / columns)) * update
    for p, start, w in zip(parameters, make_matrices(), expected, strict=True):
        assert (p - w).norm() < 0.05 * (start - w).norm()  # bfloat16 rounding


@pytest.mark.parametrize(("rows", "dim"), [(4, -2), (8, -1)])
def test_normuon_equalizes_neurons(rows, dim):
    """In a batch, neurons are the columns of matrices with more columns than rows, and the rows of square ones."""
    torch.manual_seed(0)
    change = torch.randn(3, rows, 8) * torch.rand(3, rows, 1) * torch.rand(3, 1, 8)
    second_moments = [torch.zeros(8) for _ in range(3)]
    optimizer = Muon({torch.nn.Parameter(torch.zeros(8, 8)): [8]}, 0.02, normuon=True)
    result = optimizer._normalize_neurons(change, second_moments)
    torch.testing.assert_close(torch.stack(second_moments), 0.1 * change.square().mean(dim=dim))
    torch.testing.assert_close(result.square().mean(dim=dim), torch.full((3, 8), 1 / 8))


def test_muon_batches_matrices_of_the_same_shape():
    """Tall matrices are transposed into the batch of the wide ones. A foreach call counts as one operation."""

    class OperationCounter(TorchDispatchMode):
        """Count operations that launch kernels, and record the shapes of the batches that are orthogonalized."""

        def __init__(self):
            super().__init__()
            self.count, self.batch_shapes = 0, set()

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.count += not operation.is_view
            if operation.overloadpacket is torch.ops.aten.baddbmm:
                self.batch_shapes.add(tuple(args[0].shape))
            return operation(*args, **(kwargs or {}))

    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=12, n_head=2, n_embd=8))
    optimizer, _ = muon(model, 0.04, 0.6, 0.008, 0.03)
    model(torch.arange(16)[None], torch.arange(16)[None]).backward()
    for _ in range(2):
        with OperationCounter() as counter:
            optimizer.step()
    assert counter.batch_shapes == {(48, 8, 8), (24, 8, 8), (24, 8, 32)}  # the Gram matrices are (8, 8)
    assert counter.count < 150  # 574 if each matrix is updated separately


def test_queries_keys_values_are_orthogonalized_separately():
    torch.manual_seed(0)
    stacked = torch.nn.Parameter(torch.randn(16, 8))
    start = stacked.detach().clone()
    separate = [torch.nn.Parameter(piece.clone()) for piece in start.split([8, 4, 4])]
    stacked_muon = Muon({stacked: [8, 4, 4]}, 0.02, normuon=True)
    separate_muon = Muon({p: [p.size(0)] for p in separate}, 0.02, normuon=True)
    for optimizer in (stacked_muon, separate_muon):
        optimizer.param_groups[0]["lr"] = 0.02
    grad = torch.randn(16, 8)
    stacked.grad = grad
    for p, piece in zip(separate, grad.split([8, 4, 4]), strict=True):
        p.grad = piece.clone()
    stacked_muon.step()
    separate_muon.step()
    torch.testing.assert_close(stacked.detach(), torch.cat([p.detach() for p in separate]))
    unsplit = torch.nn.Parameter(start.clone())
    unsplit.grad = grad
    unsplit_muon = Muon({unsplit: [16]}, 0.02, normuon=True)
    unsplit_muon.param_groups[0]["lr"] = 0.02
    unsplit_muon.step()
    assert not torch.allclose(unsplit, stacked, atol=1e-3), "the update of an unsplit matrix must differ"


def test_modern_parameters_have_the_learning_rate_of_their_kind():
    """Every parameter belongs to exactly one group of one optimizer."""
    torch.manual_seed(0)
    fields = {
        "tie_head": False, "value_embeddings": 1, "bigram_tables": 1, "x0_shortcut": True, "n_kv_head": 1,
    }  # fmt: skip
    model = ModernGPT(ModernConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=8, **fields))
    optimizers = muon(model, 0.04, 0.6, 0.008, 0.03)
    names = {p: name for name, p in model.named_parameters()}
    peak_lrs = {names[p]: g["max_lr"] for o in optimizers for g in o.param_groups for p in g["params"]}
    assert len(peak_lrs) == sum(len(g["params"]) for o in optimizers for g in o.param_groups) == len(names)
    assert {name for name, lr in peak_lrs.items() if lr == 0.04} == {
        f"h.{i}.{part}.weight" for i in (0, 1) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert {peak_lrs[f"{name}.weight"] for name in ("wte", "vte.0", "bte")} == {0.6}
    assert peak_lrs["lm_head.weight"] == 0.008
    scalars = ("bigram_lambdas", "h.1.attn.value_lambdas", "h.0.x0_lambdas", "h.0.ln_1.weight", "ln_f.bias")
    assert {peak_lrs[name] for name in scalars} == {0.03}
    assert optimizers[0].splits[model.h[0].attn.c_attn.weight] == [8, 4, 4]


def test_cautious_decay_skips_weights_that_the_update_enlarges():
    def updated_weights(decay: float, cautious: bool) -> torch.Tensor:
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(8, 8))
        optimizer = Muon({p: [8]}, 0.1, decay, cautious=cautious)
        optimizer.param_groups[0]["lr"] = 0.1
        run_steps([optimizer], [p], 1)
        return p.detach()

    torch.manual_seed(0)
    before = torch.randn(8, 8)
    update = before - updated_weights(0.0, False)
    expected = before - update - 0.1 * 0.5 * before * (update * before > 0)
    torch.testing.assert_close(updated_weights(0.5, True), expected)
    torch.testing.assert_close(updated_weights(0.5, False), before - update - 0.1 * 0.5 * before)


def test_found_inf_skips_the_update_of_muon():
    """Weights and state stay unchanged, and the next update is applied."""
    parameters = make_matrices()
    optimizer = Muon({p: [p.size(0)] for p in parameters}, 0.02, 0.1, normuon=True, cautious=True)
    optimizer.param_groups[0]["lr"] = 0.02
    run_steps([optimizer], parameters, 1)
    before = [p.detach().clone() for p in parameters]
    states = [{name: t.clone() for name, t in optimizer.state[p].items()} for p in parameters]
    assert all(state.keys() == {"momentum_buffer", "second_moment"} for state in states)
    optimizer.found_inf = torch.tensor(1.0)
    for p in parameters:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    for p, state in zip(parameters, states, strict=True):
        assert all(torch.equal(optimizer.state[p][name], t) for name, t in state.items())
    optimizer.found_inf = torch.tensor(0.0)
    run_steps([optimizer], parameters, 1)
    assert not torch.equal(before[0], parameters[0])


def test_cooldown_decays_linearly_after_a_constant_rate():
    def learning_rate(step):
        return LRSchedule(max_steps=100, cooldown=0.4).learning_rate(step, max_lr=1.0)

    assert [learning_rate(step) for step in (0, 30, 60)] == [1.0, 1.0, 1.0]
    assert [learning_rate(step) for step in (70, 80, 99, 100)] == pytest.approx([0.75, 0.5, 0.025, 0.0])


def test_momentum_warms_up_and_each_group_scales_its_peak_lr():
    """The schedule scales each group's peak learning rate, and Muon's momentum rises from 0.85 unless it is smaller."""
    model = tiny_model()
    optimizers = muon(model, 0.04, 0.6, 0.008, 0.03)
    schedule = LRSchedule(max_steps=100, warmup_steps=2, cooldown=0.4, momentum_warmup_steps=10)
    assert set_learning_rates(optimizers, schedule, 0) == 0.02
    assert optimizers[0].param_groups[0]["momentum"] == 0.85
    set_learning_rates(optimizers, schedule, 5)
    assert optimizers[0].param_groups[0]["momentum"] == pytest.approx(0.90)
    set_learning_rates(optimizers, schedule, 80)
    assert optimizers[0].param_groups[0]["momentum"] == pytest.approx(0.95)
    assert [g["lr"] for o in optimizers for g in o.param_groups] == pytest.approx([0.02, 0.3, 0.004, 0.015])
    assert optimizers[1].param_groups[1]["params"] == [model.wte.weight], "a tied wte is in the head's group"
    for schedule, momentum in ((LRSchedule(100), 0.95), (LRSchedule(100, momentum=0.8, momentum_warmup_steps=10), 0.8)):
        set_learning_rates(optimizers, schedule, 0)
        assert optimizers[0].param_groups[0]["momentum"] == pytest.approx(momentum)


# ---------------------------------------------------------------------------------------------------------
# the update guard


def judge(guard: UpdateGuard, losses: list[float]) -> list[tuple[float, float]]:
    """Return (skip_update, z_score) of each loss, with a gradient norm of 1."""
    return [tuple(t.item() for t in guard.judge(torch.tensor(loss), torch.tensor(1.0))) for loss in losses]


def test_spike_is_skipped_and_barely_changes_the_statistics():
    """A second spike is skipped, too, also by a guard restored from `losses()`; without `skip_spikes`, none is."""
    generator = torch.Generator().manual_seed(0)
    losses = (3 + 0.1 * torch.randn(UpdateGuard.WINDOW, generator=generator)).tolist()
    guard = UpdateGuard(CPU, skip_spikes=6.0)
    assert all(skipped == 0 and z == 0 for skipped, z in judge(guard, losses)), "the window is not full yet"
    [(skipped, z)] = judge(guard, [5.0])
    assert skipped == 1
    assert z == pytest.approx((5.0 - statistics.mean(losses)) / statistics.stdev(losses), rel=1e-4)
    [(skipped, z), (second_spike_skipped, _)] = judge(guard, [3.1, 5.0])
    assert (skipped, second_spike_skipped) == (0, 1)
    assert abs(z) < 2
    assert judge(UpdateGuard(CPU, None, losses), [5.0])[0][0] == 0, "skip_spikes is off"
    assert judge(UpdateGuard(CPU, 6.0, guard.losses()), [5.0])[0] == judge(guard, [5.0])[0], "resumed"


def test_persistent_rise_of_the_loss_is_not_skipped_forever():
    guard = UpdateGuard(CPU, skip_spikes=3.0)
    judge(guard, [3.0 + 0.01 * (i % 5) for i in range(UpdateGuard.WINDOW)])
    skipped = [skip_update for skip_update, _ in judge(guard, [4.0] * 200)]
    assert skipped[0] == 1
    assert skipped[-1] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_loss_or_norm_halts_all_updates(value):
    """This update and all later ones are skipped."""
    for guard in (UpdateGuard(CPU), UpdateGuard(CPU, 6.0)):
        assert judge(guard, [3.0, value, 3.0])[0][0] == 0
        assert [skip_update for skip_update, _ in judge(guard, [3.0, 3.0])] == [1, 1]
    guard = UpdateGuard(CPU)
    assert guard.judge(torch.tensor(3.0), torch.tensor(value))[0] == 1


def test_zero_gradient_norm_halts_all_updates():
    """A norm of exactly zero is an error of the model or a kernel: this update and all later ones are skipped."""
    guard = UpdateGuard(CPU)
    loss = torch.tensor(3.0)
    assert [guard.judge(loss, torch.tensor(norm))[0] for norm in (1e-30, 0.0, 1.0)] == [0, 1, 1]
