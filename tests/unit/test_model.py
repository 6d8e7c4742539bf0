"""GPT-2: attention, loss, initialization and parameter counts. The modern GPT: each switch separately."""

import math

import pytest
import torch

import model as model_script
from babygpt.nn.attention import apply_rotary_emb, attention, plain_attention, rotary_cos_sin, training_backend
from babygpt.nn.shift import Shift
from model import GPT, GPTConfig, ModernConfig, ModernGPT, SharedInputs, build_model, config_from_dict, norm
from train_config import preset

TINY = GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=4, n_embd=32)


def tiny(**fields: object) -> GPT:
    torch.manual_seed(0)
    return build_model(config_from_dict(vars(TINY) | fields)).eval()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("T", "S"), [(9, 9), (1, 9), (4, 9)])
def test_attention_equals_plain_attention(kv_heads, T, S):
    torch.manual_seed(0)
    q = torch.randn(2, 4, T, 8)
    k, v = torch.randn(2, kv_heads, S, 8), torch.randn(2, kv_heads, S, 8)
    torch.testing.assert_close(attention(q, k, v), plain_attention(q, k, v), atol=1e-6, rtol=1e-5)
    mask = torch.rand(2, 1, T, S) < 0.5
    mask[..., 0] = True
    found, expected = attention(q, k, v, mask, 0.3), plain_attention(q, k, v, mask, 0.3)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(expected, plain_attention(q, k, v, mask))


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"rope": True, "partial_key_offset": True, "bigram_tables": 2}])
def test_logits_do_not_depend_on_later_tokens(fields):
    model, idx = tiny(n_kv_head=2, **fields), torch.randint(0, 300, (1, 32))
    changed = idx.clone()
    changed[0, 20] = (idx[0, 20] + 1) % 300
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20], after[:, 20])


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[32], [1] * 32, [5, 7, 1, 19]])
def test_logits_with_and_without_cache_are_equal(pieces):
    model, idx = tiny(n_kv_head=2, dropout=0.1), torch.randint(0, 300, (2, 32))
    cache = model.make_cache(2, torch.float32)
    parts = [model(part, cache=cache) for part in idx.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1)[..., :300], model(idx)[..., :300], atol=1e-5, rtol=1e-5)


def test_vocabulary_padding_has_no_probability_and_no_gradient():
    model, idx = tiny(), torch.randint(0, 300, (2, 32))
    assert model.config.padded_vocab_size == model.wte.weight.size(0) == 384
    assert (model(idx)[..., 300:] == float("-inf")).all()
    model(idx, idx).backward()
    assert model.wte.weight.grad.isfinite().all()
    assert (model.wte.weight.grad[300:] == 0).all()


def test_loss_counts_only_targets_that_are_not_ignored():
    model, idx = tiny(), torch.randint(0, 300, (2, 32))
    targets = torch.randint(0, 300, (2, 32))
    targets[0, 5:] = -100
    logits = model(idx)
    expected = sum(
        -logits[b, t, :300].log_softmax(-1)[targets[b, t]] for b in range(2) for t in range(32) if targets[b, t] >= 0
    )
    torch.testing.assert_close(model(idx, targets, reduction="sum"), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(model(idx, targets), expected / 37, rtol=1e-5, atol=0)


@torch.no_grad()
def test_initial_loss_is_that_of_uniform_probabilities():
    model = GPT(GPTConfig(block_size=64, vocab_size=5000, n_layer=2, n_head=4, n_embd=128))
    idx = torch.randint(0, 5000, (4, 64))
    assert abs(model(idx, torch.randint(0, 5000, (4, 64))) - math.log(5000)) < 0.1


def test_initial_weights_have_gpt2_standard_deviations():
    model = GPT(GPTConfig(block_size=64, vocab_size=1000, n_layer=8, n_head=4, n_embd=128))
    assert abs(model.wte.weight.std() - 0.02) < 0.001
    assert abs(model.h[3].mlp.c_fc.weight.std() - 0.02) < 0.001
    for projection in (model.h[3].mlp.c_proj.weight, model.h[5].attn.c_proj.weight):
        assert abs(projection.std() - 0.02 / math.sqrt(16)) < 0.0005
    assert (model.h[0].attn.c_attn.bias == 0).all()
    assert (model.ln_f.weight == 1).all()


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [  # transformers' counts of OpenAI's four models
        ({}, 124_439_808),
        ({"n_layer": 24, "n_head": 16, "n_embd": 1024}, 354_823_168),
        ({"n_layer": 36, "n_head": 20, "n_embd": 1280}, 774_030_080),
        ({"n_layer": 48, "n_head": 25, "n_embd": 1600}, 1_557_611_200),
    ],
)
def test_num_params_equals_the_published_counts(fields, parameters):
    with torch.device("meta"):
        assert GPT(GPTConfig(**fields)).num_params() == parameters


def test_flops_per_token_follow_the_formula():
    with torch.device("meta"):
        matrices = 12 * 12 * 768**2 + 50304 * 768
        assert GPT(GPTConfig()).flops_per_token() == 6 * matrices + 12 * 12 * 1024 * 768 == 854_654_976


def test_head_is_tied_unless_tie_head_is_off():
    model = tiny()
    assert model.lm_head.weight is model.wte.weight
    untied = tiny(tie_head=False)
    assert untied.lm_head.weight is not untied.wte.weight
    assert untied.num_params() - model.num_params() == 300 * 32


@pytest.mark.parametrize(("tie_head", "deviation"), [(True, 0.02), (False, 1.0)])
def test_normalized_embedding_starts_larger_without_a_tied_head(tie_head, deviation):
    model = tiny(embedding_norm=True, tie_head=tie_head)
    assert model.wte.weight.std().item() == pytest.approx(deviation, rel=0.05)


def test_bias_and_n_kv_head_change_the_parameters():
    assert not [name for name, _ in tiny(bias=False).named_parameters() if name.endswith("bias")]
    assert tiny(n_kv_head=1).h[0].attn.c_attn.weight.shape == (32 + 2 * 8, 32)


def test_dropout_is_active_only_in_training():
    model, idx = tiny(dropout=0.5), torch.randint(0, 300, (2, 32))
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.allclose(model(idx)[..., :300], model(idx)[..., :300])


def test_more_tokens_than_the_block_size_are_rejected():
    with pytest.raises(ValueError, match="33 tokens"):
        tiny()(torch.zeros(1, 33, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------------------
# the modern GPT: each switch separately

MODERN = {name: value for name, value in vars(preset("modern").model).items() if value != vars(ModernConfig())[name]}
MODERN = {name: value for name, value in MODERN.items() if name != "vocab_size"}


@pytest.mark.parametrize("fields", [{}, {"dropout": 0.2}, {"bias": False, "tie_head": False, "n_kv_head": 2}])
def test_modern_gpt_with_all_switches_off_is_gpt2(fields):
    """Weights, logits, losses and gradients are bitwise equal, also with dropout."""
    models, found = [], []
    for build, config in ((GPT, GPTConfig), (ModernGPT, ModernConfig)):
        torch.manual_seed(0)
        models.append(build(config(**vars(TINY) | fields)).train())
    gpt2, modern = models
    assert gpt2.state_dict().keys() == modern.state_dict().keys()
    assert all(map(torch.equal, gpt2.parameters(), modern.parameters()))
    for model in models:
        torch.manual_seed(1)
        loss = model(rows(), rows(seed=4))
        loss.backward()
        found.append([model(rows()), loss, *(parameter.grad for parameter in model.parameters())])
    assert all(map(torch.equal, *found))


LONG_ROWS = {"document_mask": True, "eot_id": 299, "window": 9, "tie_head": False}


def perturbed(**fields: object) -> GPT:
    """Return a tiny model with perturbed parameters, so that no part of it is an identity or zero."""
    model = tiny(n_layer=fields.pop("n_layer", 3), **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def rows(length: int = 32, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 299, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("name", [*sorted({*MODERN} - {"bias"}), "window", "document_mask"])
def test_every_switch_changes_the_logits(name):
    value = (MODERN | {"window": 3, "document_mask": True})[name]
    idx = rows()
    idx[:, 7] = 299
    plain, changed = tiny(), tiny(**{name: value, "eot_id": 299})
    changed.load_state_dict(plain.state_dict(), strict=False)  # the parameters that both have
    for part, parameter in changed.named_parameters():
        if part.endswith("_lambdas") or part == "bte.weight":  # which have no effect at first
            parameter.add_(torch.linspace(0.3, 0.9, parameter.size(-1)))
    assert not torch.allclose(plain(idx)[..., :300], changed(idx)[..., :300], atol=1e-5)


@torch.no_grad()
def test_rope_depends_only_on_relative_positions():
    """Half of the pairs are not rotated, and a model with rotary embeddings has no wpe."""
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i: int, j: int) -> torch.Tensor:
        rotated = [apply_rotary_emb(x, rotary_cos_sin(torch.tensor([[p]]), 16)) for x, p in ((q, i), (k, j))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(900, 880), score(20, 0), atol=1e-4, rtol=1e-4)
    assert abs(score(20, 0) - score(3, 0)) > 1e-3
    cos, sin = rotary_cos_sin(torch.tensor([[1]]), 16)
    torch.testing.assert_close(torch.atan2(sin, cos)[0, 0, 0, [0, 3]], torch.tensor([1.0, 1 / 1024]))
    assert (cos[..., 4:] == 1).all()
    assert (sin[..., 4:] == 0).all()
    assert not hasattr(tiny(rope=True), "wpe")


@torch.no_grad()
def test_qk_norm_removes_the_scale_of_queries_and_keys():
    model, idx = perturbed(qk_norm=True, bias=False), rows()
    before = model(idx)
    model.h[0].attn.c_attn.weight[:64] *= 7  # queries and keys, not values
    torch.testing.assert_close(model(idx), before, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(norm(torch.randn(5, 8)).norm(dim=-1), torch.full((5,), math.sqrt(8)))


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_score_factor_multiplies_scores(qk_norm):
    """They are also divided by the square root of the head size."""
    model, x = perturbed(attention_score_factor=2.0, qk_norm=qk_norm), torch.randn(2, 32, 32)
    attn = model.h[0].attn
    q, k, v = attn.qkv(x)
    q, k = (norm(q), norm(k)) if qk_norm else (q, k)
    expected = attn.c_proj(
        plain_attention(q, k, v, scale=2 / math.sqrt(model.config.head_size)).transpose(1, 2).flatten(2)
    )
    shared = SharedInputs(None, None, Shift(torch.arange(32)[None] == 0), x, None, [])
    torch.testing.assert_close(attn(x, shared), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_relu2_is_the_square_of_relu():
    mlp, x = perturbed(relu2=True).h[0].mlp, torch.randn(4, 32)
    torch.testing.assert_close(mlp(x), mlp.c_proj(mlp.c_fc(x).clamp(min=0) ** 2))


@torch.no_grad()
def test_embedding_norm_removes_the_scale_of_embeddings():
    model, idx = perturbed(embedding_norm=True, rope=True, tie_head=False), rows()
    before = model(idx)
    model.wte.weight.mul_(9)
    torch.testing.assert_close(model(idx), before, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_first_and_last_blocks_share_value_embeddings():
    model, idx = perturbed(value_embeddings=2, n_layer=5, bias=False), rows()
    assert [block.attn.table_index for block in model.h] == [0, 1, -1, 0, 1]
    for block in (*model.h[:2], *model.h[3:]):
        block.attn.value_lambdas.copy_(torch.tensor([0.0, 1.0]))
    before = model(idx)
    model.h[0].attn.c_attn.weight[64:].normal_()  # its own values, which have weight 0
    assert torch.equal(model(idx), before)
    model.vte[1].weight[int(idx[0, 0])] += 1.0
    assert not torch.allclose(model(idx), before)
    rest = model.num_params() - sum(table.weight[:300].numel() + 2 * 2 for table in model.vte)
    assert rest == tiny(n_layer=5, bias=False).num_params()


@torch.no_grad()
def test_x0_shortcut_can_replace_the_residual_stream():
    model, idx = perturbed(x0_shortcut=True), rows()
    model.h[2].x0_lambdas.copy_(torch.tensor([0.0, 1.0]))
    before = model(idx)
    model.h[0].mlp.c_fc.weight.normal_()
    model.h[1].attn.c_attn.weight.normal_()
    assert torch.equal(model(idx), before), "the input of the last block is only the embedding"


@torch.no_grad()
def test_document_mask_separates_documents():
    """The logits of a document do not depend on the one before it."""
    model = perturbed(document_mask=True, eot_id=299, rope=True, bigram_tables=2, partial_key_offset=True)
    first, second = rows(12), rows(20, seed=9)
    first[:, 0] = second[:, 0] = 299
    alone = model(second)
    torch.testing.assert_close(model(torch.cat([first, second], dim=1))[:, 12:], alone, atol=1e-4, rtol=1e-4)
    unmasked = perturbed(rope=True)(torch.cat([first, second], dim=1))[:, 12:]
    assert not torch.allclose(unmasked, alone, atol=1e-3)


@torch.no_grad()
def test_window_limits_attention_to_its_number_of_tokens():
    model, idx = perturbed(window=5, n_layer=1), rows()
    changed = idx.clone()
    changed[0, 10] = (idx[0, 10] + 1) % 299
    same = (model(idx)[0, :, :300] == model(changed)[0, :, :300]).all(dim=-1)
    assert same.nonzero().flatten().tolist() == [i for i in range(32) if not 10 <= i < 15]
    assert model.flops_per_token() < perturbed(n_layer=1).flops_per_token()


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * 32, [5, 7, 1, 19]])
@pytest.mark.parametrize("fields", [MODERN, MODERN | LONG_ROWS, LONG_ROWS], ids=["modern", "modern, long", "long"])
def test_modern_logits_with_and_without_cache_are_equal(fields, pieces):
    model, idx = perturbed(**{"n_kv_head": 2} | fields), rows()
    idx[0, [0, 11]] = idx[1, [4, 20]] = 299  # documents start at different positions
    cache = model.make_cache(2, torch.float32)
    parts = [model(part, cache=cache) for part in idx.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1)[..., :300], model(idx)[..., :300], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, MODERN, MODERN | LONG_ROWS], ids=["gpt2", "modern", "modern, long"])
def test_left_padded_sequences_have_the_logits_of_each_alone(fields):
    model, idx = perturbed(**fields), rows()
    idx[:, 20] = 299
    starts = torch.tensor([0, 9])
    cache = model.make_cache(2, torch.float32, starts)
    parts = [model(part, cache=cache) for part in idx.split([15, 1, 1, 15], dim=1)]
    together = torch.cat(parts, dim=1)[..., :300]
    torch.testing.assert_close(together[0], model(idx[:1])[0, :, :300], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[1, 9:], model(idx[1:, 9:])[0, :, :300], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_shifted_keys_are_initialized_like_the_queries(kv_heads):
    """Each key head equals the first query head of its group, so a token matches tokens like itself."""
    model = tiny(partial_key_offset=True, n_kv_head=kv_heads)
    C, D = model.config.n_embd, model.config.head_size
    for block in model.h:
        q, k, v = block.attn.c_attn.weight.split([C, kv_heads * D, kv_heads * D])
        for head in range(kv_heads):
            query_head = head * (model.config.n_head // kv_heads)
            assert torch.equal(k[head * D : (head + 1) * D], q[query_head * D : (query_head + 1) * D])
        assert not torch.equal(v, k)


def test_document_mask_without_eot_id_is_rejected():
    with pytest.raises(ValueError, match="eot_id"):
        tiny(document_mask=True)


@pytest.mark.parametrize("fields", [{}, MODERN, MODERN | LONG_ROWS], ids=["gpt2", "modern", "modern, long"])
def test_compiled_model_is_one_graph_with_equal_gradients(fields):
    torch._dynamo.reset()
    model, idx, targets = perturbed(**fields), rows(), rows(seed=4)
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)):
        model.zero_grad()
        run(idx, targets).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [
    LONG_ROWS, {"window": 150, "n_kv_head": 1, "attention_score_factor": 0.9}, LONG_ROWS | MODERN | {"window": None},
])  # fmt: skip
def test_flex_attention_equals_the_dense_mask(fields, monkeypatch):
    torch._dynamo.reset()
    idx, targets = rows(256), rows(256, seed=4)
    idx[0, [0, 128]] = idx[1, [4, 200]] = 299
    model, results, masks = perturbed(n_head=2, block_size=256, **fields), [], []

    def recording_attention(q, k, v, mask, *rest):
        masks.append((type(mask).__name__, mask.shape[0]))
        return attention(q, k, v, mask, *rest)

    monkeypatch.setattr(model_script, "attention", recording_attention)
    for run in (model, torch.compile(model, backend="eager", fullgraph=True, dynamic=False)):
        model.zero_grad()
        loss = run(idx, targets)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        monkeypatch.setattr("babygpt.nn.attention.FLEX_DEVICES", ("cpu",))
        monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # no CPU backward
    batch_size = 2 if model.config.document_mask else 1  # one mask per row, or one for both
    assert masks == [("Tensor", batch_size)] * 3 + [("BlockMask", batch_size)] * 3
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "compiled", "expected"),
    [
        ({}, True, "flash"),
        ({"dropout": 0.1}, True, "math"),  # the flash kernel of the CPU does not support dropout
        ({"n_head": 2, "window": 9}, False, "flash"),
        ({"n_head": 2, "window": 9}, True, "flex"),
        ({"n_head": 2, "window": 9, "dropout": 0.1}, True, "math"),  # FlexAttention does not support dropout
        ({"n_head": 4, "window": 9}, True, "flash"),  # nor a head size of 8
    ],
)
def test_attention_kernel_is_named(fields, compiled, expected, monkeypatch):
    """The name is that of the kernel PyTorch chooses, or flex for a compiled mask."""
    monkeypatch.setattr("babygpt.nn.attention.FLEX_DEVICES", ("cpu",))
    config = config_from_dict(vars(TINY) | fields)
    assert training_backend(config, config.mask_rule, torch.device("cpu"), True, compiled) == expected
