"""tools.export: transformers loads exported models and tokenizers, which compute what ours compute."""

import json
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from support.helpers import call, random_text
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache, pipeline

from babygpt.data.tokenizer import character_tokenizer, load_tokenizer
from babygpt.errors import UserError
from babygpt.export.directory import write_model
from babygpt.export.gguf import check_gguf
from babygpt.nn.generation import SamplingParams, generate
from babygpt.nn.huggingface import read_config
from babygpt.pretrained import Pretrained, read_architecture, read_pretrained
from babygpt.training.checkpoint import model_tensors
from model import GPT, GPTConfig, ModernConfig, build_model
from tools import export
from train_config import MODERN_MODEL

SHAPE = {"block_size": 64, "vocab_size": 300, "n_layer": 3, "n_head": 4, "n_embd": 32}
CONFIGS = {
    "classic": GPTConfig(**SHAPE),
    "classic without biases, grouped heads": GPTConfig(**SHAPE, n_kv_head=2, bias=False),
    "classic, untied": GPTConfig(**SHAPE, tie_head=False),
    "classic, exact GELU": GPTConfig(**SHAPE, exact_gelu=True),
    "modern": ModernConfig(**SHAPE, **MODERN_MODEL),
    "modern, all other switches": ModernConfig(
        **SHAPE, **{**MODERN_MODEL, "rope": False, "bias": True}, n_kv_head=2, tie_head=False, document_mask=True,
        eot_id=299, window=8,
    ),
    "modern, every switch off": ModernConfig(**SHAPE),
    "modern, exact GELU": ModernConfig(**SHAPE, exact_gelu=True),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", CONFIGS)


def make_model(config: GPTConfig) -> GPT:
    """Return a model whose biases, norms and mixing weights are not those of the initialization."""
    torch.manual_seed(1)
    model = build_model(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def exported(dataset, tmp_path_factory):
    """Return a function that exports the model of a name in CONFIGS, and returns ours, its directory, and theirs."""
    directory, found = tmp_path_factory.mktemp("exported"), {}

    def get(name: str) -> tuple[GPT, Path, torch.nn.Module]:
        if name not in found:
            ours, out = make_model(CONFIGS[name]), directory / name.replace(" ", "_").replace(",", "")
            out.mkdir()
            tokenizer = load_tokenizer(dataset / "tokenizer.json")
            write_model(Pretrained(asdict(CONFIGS[name]), model_tensors(ours), tokenizer, name), out)
            found[name] = ours, out, AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
        return found[name]

    return get


@EACH
@torch.no_grad()
def test_logits_and_loss_equal_ours(name, exported):
    ours, _, theirs = exported(name)
    idx = torch.randint(0, 300, (3, 40))
    idx[1, 7] = 299  # EOT within a row
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[..., :300], atol=1e-4, rtol=0)
    torch.testing.assert_close(theirs(idx, labels=idx).loss, ours(idx[:, :-1], idx[:, 1:]), atol=1e-4, rtol=0)


@EACH
@torch.no_grad()
def test_greedy_decoding_equals_ours(name, exported):
    """With the KV cache, and in a batch with padding on the left."""
    ours, _, theirs = exported(name)
    prompts = torch.randint(0, 299, (2, 12)).tolist()
    prompts[0] = prompts[0][:7]
    params = SamplingParams(max_new_tokens=40, temperature=0)
    expected = [list(tokens) for tokens in zip(*generate(ours, prompts, params), strict=True)]
    padded = torch.tensor([[299] * 5 + prompts[0], prompts[1]])
    mask = torch.ones_like(padded)
    mask[0, :5] = 0
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    found = theirs.generate(padded, attention_mask=mask, **settings)
    assert found[:, 12:].tolist() == expected
    alone = theirs.generate(torch.tensor([prompts[0]]), use_cache=False, **settings)
    assert alone[0, 7:].tolist() == expected[0]


@torch.no_grad()
def test_beam_search_of_a_modern_model_can_use_the_cache(exported):
    """Beams are reordered, and each needs the previous token of its own text."""
    _, _, theirs = exported("modern")
    prompt = torch.randint(0, 299, (1, 5))
    found = [theirs.generate(prompt, num_beams=4, max_new_tokens=20, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*found)


@torch.no_grad()
def test_modern_model_continues_a_cache_of_its_own(exported):
    _, _, theirs = exported("modern")
    idx = torch.randint(0, 299, (2, 20))
    first = theirs(idx[:, :11], use_cache=True)
    cache = first["cache"] if "cache" in first else first["past_key_values"]
    second = theirs(idx[:, 11:], **{"cache" if "cache" in first else "past_key_values": cache})
    torch.testing.assert_close(second.logits, theirs(idx).logits[:, 11:], atol=1e-4, rtol=0)


@EACH
def test_exported_models_can_be_read_again(name, exported, tmp_path):
    """The logits are the same, and if the format has all fields, configuration and weights are equal to the bit."""
    ours, out, _ = exported(name)
    again = read_pretrained(out)
    model = again.build(lambda values: build_model(type(CONFIGS[name])(**values))).eval()
    idx = torch.randint(0, 300, (2, 30))
    torch.testing.assert_close(model(idx)[..., :300], ours(idx)[..., :300], atol=1e-4, rtol=0)
    if name != "classic without biases, grouped heads":
        assert read_config(out / "config.json") == asdict(CONFIGS[name])
        for key, tensor in model_tensors(ours).items():
            rows = len(tensor) if key.split(".")[0] not in ("wte", "vte", "lm_head") else 300
            assert torch.equal(again.tensors[key][:rows], tensor[:rows]), key


@pytest.mark.parametrize("damage", [{"vocab_size": "300"}, {"vocab_size": 0}, {"num_bigrams": None}, {"window": ...}])
def test_damaged_configuration_of_a_modern_model_is_an_error(damage, exported, tmp_path):
    """A value of another type, or (...) a missing field."""
    values = json.loads((exported("modern")[1] / "config.json").read_text()) | damage
    values = {name: value for name, value in values.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="Copy it again"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["gpt2", "trained"])
def test_exported_tokenizer_equals_ours(kind, dataset, tmp_path):
    ours = load_tokenizer("gpt2" if kind == "gpt2" else dataset / "tokenizer.json")
    config = GPTConfig(**{**SHAPE, "vocab_size": ours.vocab_size})
    model = build_model(config)
    write_model(Pretrained(asdict(config), model_tensors(model), ours, kind), tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.eot_id, ours.eot_id, ours.vocab_size)
    for seed in range(200):
        text = random_text(seed)
        assert theirs(text).input_ids == ours.encode(text), repr(text)
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text)), repr(text)


def test_export_of_a_run_has_a_card_and_works_in_a_pipeline(uninterrupted_run, tmp_path):
    out = tmp_path / "exported"
    call(export.main, uninterrupted_run, out, "--license", "mit")
    card = (out / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "mit"
    assert header["pipeline_tag"] == "text-generation"
    state = json.loads(sorted(uninterrupted_run.glob("checkpoints/*/state.json"))[-1].read_text())
    model = GPT.from_pretrained(uninterrupted_run)
    for text in (f"{model.num_params():,} parameters", state["data"]["fingerprint"], "bits per byte", "(plot.png)"):
        assert text in card
    assert (out / "plot.png").exists()
    generator = pipeline("text-generation", model=str(out), trust_remote_code=True)
    prompt = "the model"
    text = generator(prompt, max_new_tokens=4, do_sample=False)[0]["generated_text"]
    ids = model.tokenizer.encode(prompt)
    params = SamplingParams(max_new_tokens=4, temperature=0)
    tokens = [token for (token,) in generate(model, [ids], params, model.tokenizer.eot_id) if token is not None]
    assert text == prompt + model.tokenizer.decode(tokens)


def test_export_never_overwrites(uninterrupted_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"is not an empty directory|cannot be created"):
            call(export.main, uninterrupted_run, out)


def test_checkpoint_of_a_run_without_a_log_is_exported(uninterrupted_run, tmp_path, monkeypatch):
    """By its name in the current directory. The code in the card refers to a path, not to a model on the hub."""
    run = shutil.copytree(uninterrupted_run, tmp_path / "run")
    (run / "log.csv").unlink()
    (run / "scores.csv").write_text(
        "step,task,metric,value,stderr,examples\n3,piqa,acc,0.5,0.1,20\n99,piqa,acc,1,0,20\n"
    )
    monkeypatch.chdir(run / "checkpoints")
    call(export.main, "step_00000004", tmp_path / "gpt2")
    card = (tmp_path / "gpt2" / "README.md").read_text()
    assert "| piqa acc | 0.5 ± 0.1 | 3 | as in lm-evaluation-harness, on 20 examples |" in card
    assert 'path = "path/to/gpt2"' in card
    call(export.main, tmp_path / "gpt2", tmp_path / "again")
    assert "In training" not in (tmp_path / "again" / "README.md").read_text(), "this is not known"


def test_post_processor_is_not_exported(dataset, tmp_path):
    """It could add tokens that the model has never seen at these positions."""
    settings = json.loads((dataset / "tokenizer.json").read_text())
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [299], "tokens": ["<|endoftext|>"]}}
    pieces = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    settings["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": special,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    ours, config = load_tokenizer(tmp_path / "tokenizer.json"), CONFIGS["classic"]
    (tmp_path / "out").mkdir()
    write_model(Pretrained(asdict(config), model_tensors(make_model(config)), ours, "run"), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the model").input_ids == ours.encode("the model")


@torch.no_grad()
def test_unsupported_arguments_are_errors(exported):
    _, _, theirs = exported("modern")
    idx = torch.randint(0, 299, (1, 6))
    for arguments in (
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, {"output_hidden_states": True},
        {"attention_mask": torch.ones(1, 1, 6, 6)}, {"cache": StaticCache(theirs.config, max_cache_len=8)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"BabyGPT's model supports|does not support"):
            theirs(idx, **arguments)
    with pytest.raises(ValueError, match="cannot be resized"):
        theirs.resize_token_embeddings(310)
    assert torch.equal(theirs(idx, position_ids=torch.arange(6)[None]).logits, theirs(idx).logits)


def test_exported_modern_model_can_be_saved_and_trained(exported, tmp_path):
    """By Trainer too, which does not divide the loss by the number of accumulation steps if the model does it."""
    _, _, theirs = exported("modern")
    assert theirs.accepts_loss_kwargs is False
    theirs.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.lm_head.weight is again.wte.weight
    idx = torch.randint(0, 299, (2, 12))
    assert torch.equal(again.eval()(idx).logits, theirs(idx).logits)
    again.train()(idx, labels=idx).loss.backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


@pytest.mark.parametrize(
    ("config", "kind", "reason"),
    [
        (CONFIGS["modern"], "trained", "the architecture of the modern recipe"),
        (CONFIGS["classic"], "characters", "only byte-level BPE"),
    ],
)
def test_gguf_is_refused_with_the_reason(config, kind, reason, dataset):
    tokenizer = character_tokenizer(["abc"]) if kind == "characters" else load_tokenizer(dataset / "tokenizer.json")
    with pytest.raises(UserError, match=reason):
        check_gguf(Pretrained(asdict(config), {}, tokenizer, "out/run"))


def nanogpt_checkpoint(model: GPT, path: Path, prefix: str = "") -> None:
    """Save a model in the format of nanoGPT's train.py."""
    config = model.config
    state = {f"{prefix}transformer.{name}": tensor[:300] if name == "wte.weight" else tensor
             for name, tensor in model_tensors(model).items()}  # fmt: skip
    state[f"{prefix}lm_head.weight"] = state[f"{prefix}transformer.wte.weight"]
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    arguments = {name: getattr(config, name) for name in names} | {"dropout": 0.0}
    torch.save({"model": state, "model_args": arguments, "iter_num": 5, "config": {"dataset": "x"}}, path)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt_checkpoint_is_read(prefix, dataset, tmp_path):
    """With the names of a compiled model too; the tokenizer.json is the one next to the checkpoint. GELU is exact."""
    ours = make_model(GPTConfig(**SHAPE, bias=False, exact_gelu=True))
    nanogpt_checkpoint(ours, tmp_path / "ckpt.pt", prefix)
    shutil.copy(dataset / "tokenizer.json", tmp_path)
    model = GPT.from_pretrained(tmp_path / "ckpt.pt")
    idx = torch.randint(0, 300, (2, 30))
    assert torch.equal(model(idx)[..., :300], ours(idx)[..., :300])
    assert model.tokenizer.vocab_size == 300
    assert read_architecture(tmp_path / "ckpt.pt") == asdict(ours.config)


def test_nanogpt_checkpoint_that_could_run_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"model": {}, "model_args": Code()}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="could execute code"):
        read_pretrained(tmp_path / "ckpt.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps([1, 2]))
    arguments = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size"), 1)
    models = [{"model": model, "model_args": arguments} for model in (torch.zeros(2), [1], {"a": 1}, None)]
    for i, content in enumerate([torch.zeros(2), {"weights": 1}, *models]):
        torch.save(content, tmp_path / f"{i}.pt")
    for path in (tmp_path / "pickle.pt", *tmp_path.glob("[0-9].pt")):
        with pytest.raises(UserError, match="not a checkpoint of nanoGPT"):
            read_pretrained(path)


def test_character_level_nanogpt_model_is_read_not_exported(tmp_path):
    """It has no end-of-text token, which the tokenizer of the same characters has."""
    characters = "".join(map(chr, range(33, 333)))
    ours = make_model(GPTConfig(**SHAPE))
    nanogpt_checkpoint(ours, tmp_path / "ckpt.pt")
    (tmp_path / "tokenizer.json").write_bytes(character_tokenizer([characters]).data)
    model = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert (model.tokenizer.vocab_size, model.config.vocab_size) == (301, 300)
    assert model.generate("abc", max_new_tokens=5).startswith("abc")
    with pytest.raises(UserError, match="has no end-of-text token"):
        call(export.main, tmp_path / "ckpt.pt", tmp_path / "out")
