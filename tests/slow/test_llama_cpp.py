"""GGUF files in llama.cpp: equal greedy tokens, and an equal perplexity."""

import math

import pytest
import torch
from support.helpers import call
from support.runs import flags
from xllamacpp import CommonParams, Server, ggml_type

import train
from babygpt.nn.generation import SamplingParams, generate
from model import GPT
from tools import export

CONFIGS = {
    "classic": {},
    "without biases, grouped heads, untied": {"model__n_kv_head": 1, "model__no_bias": [], "model__no_tie_head": []},
}
GREEDY = {"temperature": 0, "cache_prompt": False}
TEXT = "the model reads a shard of data and writes another, "


@pytest.fixture(scope="module", params=CONFIGS)
def run(request, dataset, tmp_path_factory):
    """The directory of a run that has learned to write whole words, since llama.cpp reports only whole characters."""
    out = tmp_path_factory.mktemp("runs") / "run"
    changes = {
        "model__block_size": 64, "model__n_embd": 64, "model__dropout": 0.0, "training__max_steps": 150,
        "training__batch_tokens": 1024, "saving__every_n_steps": 150, "general__mode": ["train"],
    }  # fmt: skip
    call(train.main, *flags(dataset, out, **changes, **CONFIGS[request.param]))
    return out


@pytest.fixture(scope="module", params=["float32", "float16"])
def models(request, run, tmp_path_factory):
    """Our model, and llama.cpp's server of its GGUF file."""
    out = tmp_path_factory.mktemp("exported") / "model"
    call(export.main, run, out, "--gguf", request.param)
    params = CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers = str(out / "model.gguf"), 64, 0
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32  # the default is float16
    return GPT.from_pretrained(run), Server(params)


@torch.no_grad()
def test_greedy_tokens_are_equal(models):
    """llama.cpp encodes the prompt, so this compares the tokenizers too.

    A token may differ only if the next one is as probable: ggml rounds GELU to float16.
    """
    ours, server = models
    ids, num_equal = ours.tokenizer.encode(TEXT * 10), 0
    for start in range(12):
        prompt = ours.tokenizer.decode(ids[start : start + 32])
        encoded, params = ours.tokenizer.encode(prompt), SamplingParams(max_new_tokens=24, temperature=0)
        generated = generate(ours, [encoded], params, ours.tokenizer.eot_id)
        expected = [token for (token,) in generated if token is not None]
        reply = server.handle_completions({"prompt": prompt, "n_predict": 24, "n_probs": 1, **GREEDY})
        found = [token["id"] for token in reply["choices"][0]["logprobs"]["content"]][: len(expected)]
        num_equal += found == expected
        if found != expected:
            i = next(i for i, pair in enumerate(zip(found, expected, strict=False)) if len(set(pair)) > 1)
            logits = ours(torch.tensor([encoded + expected[:i]]))[0, -1]
            assert logits[expected[i]] - logits[found[i]] < 1e-3
    assert num_equal >= 11


@torch.no_grad()
def test_perplexity_is_equal(models):
    """Within 1%, on a text of which llama.cpp predicts each token from those before it."""
    ours, server = models
    ids = ours.tokenizer.encode(TEXT * 10)[:60]
    log_probs = ours(torch.tensor([ids]))[0, :, : ours.config.vocab_size].log_softmax(-1)
    expected = math.exp(-sum(log_probs[i - 1, ids[i]].item() for i in range(1, 60)) / 59)
    total = 0.0
    for i in range(1, 60):
        reply = server.handle_completions({"prompt": ids[:i], "n_predict": 1, "n_probs": 1000, **GREEDY})
        [position] = reply["choices"][0]["logprobs"]["content"]
        total += {entry["id"]: entry["logprob"] for entry in position["top_logprobs"]}[ids[i]]
    assert math.exp(-total / 59) == pytest.approx(expected, rel=0.01)
