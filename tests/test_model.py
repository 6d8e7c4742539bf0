"""GPT-2, exactly: held against transformers, against a plain attention, and against published counts."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from errors import UserError
from model import GPT, GPTConfig, KVCache, attention, from_gpt2, gpt2_config, plain_attention, to_gpt2

TINY = GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=4, n_embd=32)


def tiny(**fields: object) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(TINY), **fields})).eval()


def reference(vocab_size: int = 300, **fields: object) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=vocab_size, n_positions=32, n_embd=32, n_layer=2, n_head=4, **fields)
    return GPT2LMHeadModel(config).eval()


def ours_from(theirs: GPT2LMHeadModel) -> GPT:
    return from_gpt2(theirs.state_dict(), GPTConfig(**{**vars(TINY), "vocab_size": theirs.config.vocab_size})).eval()


@torch.no_grad()
def test_logits_equal_transformers_gpt2():
    theirs, idx = reference(), torch.randint(0, 300, (3, 32))
    for parameter in theirs.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))  # biases and norms too are not what they began as
    torch.testing.assert_close(ours_from(theirs)(idx)[..., :300], theirs(idx).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_loss_equals_transformers_where_all_logits_are_negative():
    theirs, idx = reference(), torch.randint(0, 300, (3, 32))
    theirs.transformer.wte.weight.abs_()
    theirs.transformer.ln_f.weight.mul_(0.01)
    theirs.transformer.ln_f.bias.fill_(-20.0)  # as in real GPT-2: far below the 0 of an empty row
    assert theirs(idx).logits.max() < -1
    loss = ours_from(theirs)(idx[:, :-1], idx[:, 1:]) / idx[:, 1:].numel()
    torch.testing.assert_close(loss, theirs(idx, labels=idx).loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize("vocab_size", [256, 300])
def test_weights_come_back_from_us_to_transformers_equal_to_the_bit(vocab_size):
    theirs = reference(vocab_size)
    back = to_gpt2(ours_from(theirs))
    expected = theirs.state_dict()
    assert set(expected) - {"lm_head.weight"} == set(back) - {"lm_head.weight"}
    assert all(torch.equal(back[name], expected[name]) for name in back)
    again = reference(vocab_size)
    again.load_state_dict(back)


def test_a_hugging_face_config_tells_the_architecture(tmp_path):
    reference().config.save_pretrained(tmp_path)
    assert gpt2_config(tmp_path / "config.json") == TINY
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"no GPT-2"):
        gpt2_config(tmp_path / "config.json")


def test_weights_of_another_shape_or_with_tensors_missing_are_refused_by_name():
    state = reference().state_dict()
    with pytest.raises(UserError, match=r"wte.weight is \(300, 32\) in the weights, \(200, 32\) in the model"):
        from_gpt2(state, GPTConfig(**{**vars(TINY), "vocab_size": 200}))
    del state["transformer.h.1.mlp.c_fc.bias"]
    with pytest.raises(UserError, match=r"lack h\.1\.mlp\.c_fc\.bias"):
        from_gpt2(state, TINY)


@torch.no_grad()
def test_a_smaller_block_size_keeps_the_first_positions():
    theirs, idx = reference(), torch.randint(0, 300, (2, 16))
    ours = from_gpt2(theirs.state_dict(), GPTConfig(**{**vars(TINY), "block_size": 16})).eval()
    torch.testing.assert_close(ours(idx)[..., :300], theirs(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("T", "S"), [(9, 9), (1, 9), (4, 9)])
def test_the_fast_attention_equals_the_plain_one(kv_heads, T, S):
    torch.manual_seed(0)
    q = torch.randn(2, 4, T, 8)
    k, v = torch.randn(2, kv_heads, S, 8), torch.randn(2, kv_heads, S, 8)
    torch.testing.assert_close(attention(q, k, v), plain_attention(q, k, v), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_no_token_sees_a_later_one():
    model, idx = tiny(n_kv_head=2), torch.randint(0, 300, (1, 32))
    changed = idx.clone()
    changed[0, 20] = (idx[0, 20] + 1) % 300
    before, after = model(idx), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20], after[:, 20])


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[32], [1] * 32, [5, 7, 1, 19]])
def test_logits_with_a_cache_equal_those_without(pieces):
    model, idx = tiny(n_kv_head=2, dropout=0.1), torch.randint(0, 300, (2, 32))
    cache = KVCache(model.config, 2, idx.device, torch.float32)
    parts = [model(part, cache=cache) for part in idx.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1)[..., :300], model(idx)[..., :300], atol=1e-5, rtol=1e-5)


def test_padding_of_the_vocabulary_gets_no_probability_and_no_gradient():
    model, idx = tiny(), torch.randint(0, 300, (2, 32))
    assert model.config.padded_vocab_size == model.wte.weight.size(0) == 384
    assert (model(idx)[..., 300:] == float("-inf")).all()
    model(idx, idx).backward()
    assert model.wte.weight.grad.isfinite().all()
    assert (model.wte.weight.grad[300:] == 0).all()


def test_the_loss_is_the_sum_over_the_targets_that_count():
    model, idx = tiny(), torch.randint(0, 300, (2, 32))
    targets = torch.randint(0, 300, (2, 32))
    targets[0, 5:] = -100
    logits = model(idx)
    expected = sum(
        -logits[b, t, :300].log_softmax(-1)[targets[b, t]] for b in range(2) for t in range(32) if targets[b, t] >= 0
    )
    torch.testing.assert_close(model(idx, targets), expected, rtol=1e-5, atol=0)


@torch.no_grad()
def test_a_new_model_believes_in_nothing():
    model = GPT(GPTConfig(block_size=64, vocab_size=5000, n_layer=2, n_head=4, n_embd=128))
    idx = torch.randint(0, 5000, (4, 64))
    assert abs(model(idx, torch.randint(0, 5000, (4, 64))) / 256 - math.log(5000)) < 0.1


def test_initial_weights_have_gpt2s_deviations():
    model = GPT(GPTConfig(block_size=64, vocab_size=1000, n_layer=8, n_head=4, n_embd=128))
    assert abs(model.wte.weight.std() - 0.02) < 0.001
    assert abs(model.h[3].mlp.c_fc.weight.std() - 0.02) < 0.001
    for residual in (model.h[3].mlp.c_proj.weight, model.h[5].attn.c_proj.weight):
        assert abs(residual.std() - 0.02 / math.sqrt(16)) < 0.0005
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
def test_parameters_are_counted_as_published(fields, parameters):
    with torch.device("meta"):
        assert GPT(GPTConfig(**fields)).num_params() == parameters


def test_operations_a_token_follow_the_formula():
    with torch.device("meta"):
        matrices = 12 * 12 * 768**2 + 50304 * 768
        assert GPT(GPTConfig()).flops_per_token() == 6 * matrices + 12 * 12 * 1024 * 768 == 854_654_976


def test_the_head_is_the_embedding_or_a_matrix_of_its_own():
    model = tiny()
    assert model.lm_head.weight is model.wte.weight
    untied = tiny(tie_head=False)
    assert untied.lm_head.weight is not untied.wte.weight
    assert untied.num_params() - model.num_params() == 300 * 32


def test_bias_off_leaves_no_bias_and_kv_heads_shrink_the_projection():
    assert not [name for name, _ in tiny(bias=False).named_parameters() if name.endswith("bias")]
    assert tiny(n_kv_head=1).h[0].attn.c_attn.weight.shape == (32 + 2 * 8, 32)


def test_dropout_acts_in_training_alone():
    model, idx = tiny(dropout=0.5), torch.randint(0, 300, (2, 32))
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.allclose(model(idx)[..., :300], model(idx)[..., :300])


def test_more_tokens_than_the_block_size_are_refused():
    with pytest.raises(ValueError, match="33 tokens"):
        tiny()(torch.zeros(1, 33, dtype=torch.int64))
