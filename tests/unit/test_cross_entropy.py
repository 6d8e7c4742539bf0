"""linear_cross_entropy: equal to F.cross_entropy of the full logits, without materializing them."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from babygpt.nn import cross_entropy
from babygpt.nn.cross_entropy import linear_cross_entropy

N, C, V, PADDED = 37, 16, 90, 128


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=generator).requires_grad_()
    weight = torch.randn(PADDED, C, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[3:9] = -100
    return x, weight, targets


def plain(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, weight).float()[:, :V]
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


@pytest.fixture(params=["one chunk", "many chunks", "many slices"])
def chunked(request, monkeypatch):
    """Use one chunk, chunks of 5 rows, or slices of 3 rows; neither 5 nor 3 divides the number of rows."""
    if request.param != "one chunk":
        monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 5 * 4 * PADDED)
    if request.param == "many slices":
        monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 13 * 4 * PADDED)
        monkeypatch.setattr(cross_entropy, "SLICE_BYTES", 3 * 4 * PADDED)


@pytest.mark.usefixtures("chunked")
def test_loss_and_gradients_equal_those_of_full_logits():
    x, weight, targets = inputs()
    expected = plain(x, weight, targets)
    expected_gradients = torch.autograd.grad(expected * 0.25, (x, weight))
    found = linear_cross_entropy(x, weight, targets, V)
    gradients = torch.autograd.grad(found * 0.25, (x, weight))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
    assert (gradients[1][V:] == 0).all()
    unneeded = mock.patch.object(torch.Tensor, "exp_", side_effect=AssertionError("computes an unneeded gradient"))
    with torch.no_grad(), unneeded:
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets, V), expected, rtol=1e-6, atol=0)


def test_large_logits_do_not_overflow():
    """The exponential of a logit of 1,000 is infinite in float32."""
    x, weight, targets = inputs()
    expected = torch.autograd.grad(plain(x * 300, weight, targets), (x, weight))
    found = torch.autograd.grad(linear_cross_entropy(x * 300, weight, targets, V), (x, weight))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_gradients_are_close_to_float32():
    x, weight, targets = inputs()
    expected = torch.autograd.grad(plain(x, weight, targets), (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(linear_cross_entropy(x, weight, targets, V), (x, weight))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_ignored_targets_give_no_loss_and_no_gradient():
    x, weight, _ = inputs()
    found = linear_cross_entropy(x, weight, torch.full((N,), -100), V)
    gradients = torch.autograd.grad(found, (x, weight))
    assert found == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_non_finite_input_gives_a_non_finite_loss():
    x, weight, targets = inputs()
    with torch.no_grad():
        x[20] = float("nan")
    assert not linear_cross_entropy(x, weight, targets, V).isfinite()


def test_full_logits_are_never_materialized(monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 5 * 4 * PADDED)
    x, weight, targets = inputs()
    buffers, new_empty = [], torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *shape: buffers.append(shape) or new_empty(self, *shape)
    )
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **out: products.append(len(out["out"])) or mm(*a, **out))
    linear_cross_entropy(x, weight, targets, V).backward()
    assert buffers == [(5, PADDED)]
    assert sum(products) == N
    assert max(products) == 5


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (16 * 1024, 16 * 1024),  # one chunk
        (64 * 1024, 16 * 1024),
        (60 * 1024, 20 * 1024),
        (64 * 1000, 16_000),
        (179 * 128, 21_248),  # a prime number of tiles: the last chunk is shorter
    ],
)
def test_compiled_chunks_are_equal_multiples_of_tiles(rows, expected):
    """Chunks compiled for CUDA have up to 2 GiB of logits, a multiple of 128 rows, and equal sizes if possible."""
    found = cross_entropy.chunk_rows(rows, 50_304 * 2, "cuda", compiled=True)
    assert found == expected
    assert found % 128 == 0
    assert found * 50_304 * 2 <= 2 << 30


def test_compiled_gradients_equal_eager():
    """Compiled code computes the same loss and the same gradients, which are not zero."""
    torch._dynamo.reset()
    results = []
    for function in (linear_cross_entropy, torch.compile(linear_cross_entropy, backend="eager", fullgraph=True)):
        x, weight, targets = inputs()
        loss = function(x, weight, targets, V)
        results.append([loss.detach(), *torch.autograd.grad(loss, (x, weight))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert results[1][1].abs().sum() > 0
