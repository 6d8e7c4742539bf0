"""Hugging Face's GPT-2 format: equal logits and losses, import and export of weights, configurations, tokenizers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.helpers import call, save_hellaswag
from support.hub_server import HubServer, downloads, run_python
from support.runs import flags
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

import hellaswag
import sample
import train
from babygpt.data.shards import open_dataset
from babygpt.data.tokenizer import create_byte_level_bpe, is_gpt2, load_tokenizer
from babygpt.errors import UserError
from babygpt.evaluation.validation import mean_loss
from babygpt.nn.huggingface import export_config, export_tensors, import_tensors, read, read_config
from babygpt.pretrained import Pretrained
from babygpt.training.distributed import Ranks
from babygpt.training.log import read_log
from model import GPT, GPTConfig, ModernConfig, ModernGPT
from tools.train_tokenizer import train_tokenizer

TINY = GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=4, n_embd=32)


def make_reference_model(vocab_size: int = 300, **fields: object) -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=vocab_size, n_positions=32, n_embd=32, n_layer=2, n_head=4, **fields)
    return GPT2LMHeadModel(config).eval()


def imported(state: dict[str, torch.Tensor], vocab_size: int = 300) -> Pretrained:
    config = vars(TINY) | {"vocab_size": vocab_size}
    return Pretrained(config, import_tensors(state, config), load_tokenizer("gpt2"), "transformers")


def ours_from(theirs: GPT2LMHeadModel) -> GPT:
    found = imported(theirs.state_dict(), theirs.config.vocab_size)
    return found.build(lambda config: GPT(GPTConfig(**config))).eval()


@torch.no_grad()
def test_logits_equal_transformers_gpt2():
    theirs, idx = make_reference_model(), torch.randint(0, 300, (3, 32))
    for parameter in theirs.parameters():
        parameter.add_(
            0.05 * torch.randn_like(parameter)
        )  # also perturbs biases and norms, which are 0 and 1 initially
    torch.testing.assert_close(ours_from(theirs)(idx)[..., :300], theirs(idx).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_loss_equals_transformers_if_logits_are_negative():
    """The padding of the vocabulary has no share in the loss."""
    theirs, idx = make_reference_model(), torch.randint(0, 300, (3, 32))
    theirs.transformer.wte.weight.abs_()
    theirs.transformer.ln_f.weight.mul_(0.01)
    theirs.transformer.ln_f.bias.fill_(-20.0)  # as in the real GPT-2: far below the logit 0 of a padding row
    assert theirs(idx).logits.max() < -1
    loss = ours_from(theirs)(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(loss, theirs(idx, labels=idx).loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize("vocab_size", [256, 300])
def test_imported_and_exported_weights_are_bitwise_equal(vocab_size):
    theirs = make_reference_model(vocab_size)
    ours = ours_from(theirs)
    exported = export_tensors(ours.state_dict(), vars(ours.config))
    expected = theirs.state_dict()
    assert set(expected) - {"lm_head.weight"} == set(exported) - {"lm_head.weight"}
    assert all(torch.equal(exported[name], expected[name]) for name in exported)
    assert "lm_head.weight" not in exported, "it is tied"


def test_config_is_read_from_hugging_face_config(tmp_path):
    make_reference_model().config.save_pretrained(tmp_path)
    assert GPTConfig(**read_config(tmp_path / "config.json")) == TINY
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"is not a GPT-2 configuration: its model_type is 'llama'"):
        read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="its model_type is None"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_norm_epsilon", 0.1),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
    ],
)
def test_unsupported_hugging_face_config_is_rejected(name, value, tmp_path):
    """A field that changes what the model computes is rejected, not ignored."""
    config = make_reference_model().config
    setattr(config, name, value)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{name} is {value!r}, but only"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh"])
def test_activation_of_hugging_face_gpt2_is_kept(activation, tmp_path):
    """GELU is computed exactly or with the tanh approximation, and the export records which."""
    reference = make_reference_model(activation_function=activation, initializer_range=0.3)
    reference.save_pretrained(tmp_path)
    config, state = read(tmp_path)
    model = Pretrained(config, import_tensors(state, config), load_tokenizer("gpt2"), "transformers")
    idx = torch.randint(0, 300, (2, 16))
    with torch.no_grad():
        ours = model.build(lambda values: GPT(GPTConfig(**values))).eval()(idx)
        torch.testing.assert_close(ours[..., :300], reference(idx).logits, atol=1e-4, rtol=0)
    exported = export_config(config)["activation_function"]
    assert exported == ("gelu" if activation == "gelu" else "gelu_new")


def test_unknown_activation_is_rejected(tmp_path):
    make_reference_model(activation_function="relu").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="activation_function is 'relu', but must be one of gelu_new"):
        read_config(tmp_path / "config.json")


def test_weights_that_do_not_match_the_config_are_rejected():
    """The message names each tensor that is missing, unexpected, or has a wrong shape."""
    state = make_reference_model().state_dict()
    with pytest.raises(UserError, match=r"wte.weight has 300 rows, fewer than the vocabulary size of 301"):
        imported(state, 301)
    state["transformer.h.0.mlp.c_fc.bias"] = torch.zeros(9)
    del state["transformer.h.1.mlp.c_fc.bias"]
    state["transformer.surplus"] = torch.zeros(1)
    with pytest.raises(UserError) as caught:
        imported(state).build(lambda config: GPT(GPTConfig(**config)))
    for line in ("h.0.mlp.c_fc.bias: (9,)", "h.1.mlp.c_fc.bias: missing", "surplus: (1,) in the weights, missing"):
        assert line in str(caught.value)


@torch.no_grad()
def test_smaller_block_size_keeps_the_first_positions():
    theirs, idx = make_reference_model(), torch.randint(0, 300, (2, 16))
    found = imported(theirs.state_dict()).adapt(vars(TINY) | {"block_size": 16, "dropout": 0.1})
    ours = found.build(lambda config: GPT(GPTConfig(**config))).eval()
    torch.testing.assert_close(ours(idx)[..., :300], theirs(idx).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_gpt2_weights_fit_a_modern_model_with_all_switches_off():
    theirs, idx = make_reference_model(), torch.randint(0, 300, (2, 16))
    found = imported(theirs.state_dict()).adapt(vars(ModernConfig(**vars(TINY))))
    ours = found.build(lambda config: ModernGPT(ModernConfig(**config))).eval()
    torch.testing.assert_close(ours(idx)[..., :300], theirs(idx).logits, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A local GPT-2 directory with its own vocabulary, of 300 entries."""
    folder = tmp_path_factory.mktemp("hf") / "foreign"
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    theirs.save_pretrained(folder)
    texts = ["the model reads some tokens, it writes a small shard of data"] * 20
    train_tokenizer(texts, 300, folder / "tokenizer.json", progress=False)
    return folder


def test_foreign_vocabulary_uses_its_own_tokenizer(foreign, tmp_path, capsys):
    """hellaswag.py and sample.py use the tokenizer.json of the model directory, not GPT-2's tokenizer."""
    own = load_tokenizer(foreign)
    assert GPT.from_pretrained(foreign).tokenizer.sha256 == own.sha256
    theirs = GPT2LMHeadModel.from_pretrained(foreign).eval()
    call(sample.main, foreign, "--prompt", "the model", "--temperature", 0, "--max-new-tokens", 20)
    ids = torch.tensor([[own.eot_id, *own.encode("the model")]])
    expected = theirs.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=own.eot_id)[0, 1:]
    expected = [token for token in expected.tolist() if token != own.eot_id]
    assert capsys.readouterr().out == own.decode(expected) + "\n"

    path = save_hellaswag(tmp_path / "questions.jsonl", 8)
    call(hellaswag.main, foreign, "--file", path, "--dtype", "float32")
    correct = 0
    for question in map(json.loads, path.read_text().splitlines()):
        context = own.encode(question["ctx"])
        losses = []
        for ending in question["endings"]:
            ids = torch.tensor([context + own.encode(" " + ending)])
            logits = theirs(ids).logits[0, len(context) - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, len(context) :]).item())
        correct += losses.index(min(losses)) == question["label"]
    assert f"acc_norm {correct}/8=" in capsys.readouterr().out


def test_training_starts_from_a_hugging_face_directory(dataset, tmp_path):
    """With --general.init-from, the first validation loss is that of the Hugging Face weights."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "hf")
    shutil.copy(dataset / "tokenizer.json", tmp_path / "hf")
    run = tmp_path / "run"
    call(train.main, *flags(dataset, run, general__init_from=tmp_path / "hf", training__max_steps=1))
    tokens = torch.from_numpy(open_dataset(dataset).val.read(0, 16 * 16 + 1))
    rows = torch.stack([tokens[i : i + 17] for i in range(0, 16 * 16, 16)])
    batches = [(rows[:, :-1], rows[:, 1:])]
    ranks, sizes = Ranks(0, 0, 1, torch.device("cpu")), torch.ones(384, dtype=torch.int64)
    expected, _ = mean_loss(GPT.from_pretrained(tmp_path / "hf"), batches, sizes, ranks, "float32")
    found = train.GPT.from_pretrained(run)
    assert found.config.block_size == 16
    loss = read_log(run / "log.csv")[0]["val_loss"]
    assert loss == pytest.approx(expected, abs=0.05)  # train.py validates on a few more rows


def test_weights_with_another_tokenizer_are_rejected(dataset, tmp_path):
    """The message is about the tokenizer, since another vocab_size would not help."""
    GPT2LMHeadModel(GPT2Config(vocab_size=270, n_positions=32, n_embd=16, n_layer=2, n_head=2)).save_pretrained(
        tmp_path / "hf"
    )
    train_tokenizer(["some other text, with other words " * 20], 270, tmp_path / "hf" / "tokenizer.json", False)
    with pytest.raises(UserError, match=r"have different tokenizers, .* of 270 and 300 entries"):
        call(train.main, *flags(dataset, tmp_path / "run", general__init_from=tmp_path / "hf"))


def test_tokenizer_json_of_gpt2_is_recognized(tmp_path):
    """A directory with GPT-2's tokenizer.json has the tokenizer that datasets call "gpt2"; a modified one does not."""
    gpt2 = load_tokenizer("gpt2")
    character = bytes_to_unicode()
    ranks = sorted(gpt2.ranks, key=gpt2.ranks.get)
    merges = []
    for token in ranks[256:]:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: gpt2.ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append(tuple("".join(character[byte] for byte in part) for part in parts))
    vocab = {"".join(character[byte] for byte in token): rank for rank, token in enumerate(ranks)}
    bpe = create_byte_level_bpe()
    swapped = [merges[1], merges[0], *merges[2:]]
    for name, found in {"same": merges, "other merges": swapped, "dropout": merges, "no regex": merges}.items():
        bpe.model = BPE(vocab=vocab, merges=found, dropout=0.5 if name == "dropout" else None)
        bpe.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=name != "no regex")
        bpe.add_special_tokens(["<|endoftext|>"])
        (tmp_path / name).mkdir()
        bpe.save(str(tmp_path / name / "tokenizer.json"))
        assert is_gpt2(load_tokenizer(tmp_path / name)) == (name == "same")
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=2))
    theirs.save_pretrained(tmp_path / "same")
    assert GPT.from_pretrained(tmp_path / "same").tokenizer.sha256 == gpt2.sha256


def test_directories_without_a_known_tokenizer_are_rejected(foreign, tmp_path):
    """A vocabulary of another size than GPT-2's needs a tokenizer.json, which may not have more entries than it."""
    shutil.copytree(foreign, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer.json"))
    with pytest.raises(UserError, match=r"bare has no tokenizer\.json, and its vocabulary size, 300, is not GPT-2's"):
        GPT.from_pretrained(tmp_path / "bare")
    shutil.copytree(foreign, tmp_path / "large")
    texts = ["the model reads some tokens, it writes a small shard of data"] * 20
    train_tokenizer(texts, 301, tmp_path / "large" / "tokenizer.json", progress=False)
    with pytest.raises(UserError, match=r"has 301 entries, but the model of .*large has only 300"):
        GPT.from_pretrained(tmp_path / "large")


def test_gpt2_weights_are_downloaded_once(tmp_path):
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=8, n_layer=1, n_head=2))
    theirs.save_pretrained(tmp_path / "hf-gpt2")
    files = {name: tmp_path / "hf-gpt2" / name for name in ("config.json", "model.safetensors")}
    flags = ["gpt2", "--general.mode", "sample", "--general.init-from", "gpt2", "--sampling.num-samples", "2"]
    flags += ["--sampling.max-new-tokens", "4", "--general.device", "cpu"]
    code = f"import sys, train; sys.argv = ['train.py', *{flags}]; train.main()"
    with HubServer(models={"openai-community/gpt2": files}) as hub:
        for _ in range(2):
            done = run_python(code, hub, tmp_path)
            assert done.stdout.count("Hello, I'm a language model,") == 2, done.stderr
        assert len(downloads(hub)) == 2, "the second run reuses the files"
    assert not (tmp_path / "out").exists()


def test_padded_vocabulary_rows_are_never_sampled(foreign, tmp_path):
    """Rows of the tables beyond the tokenizer's vocabulary are padding and get no probability."""
    shutil.copytree(foreign, tmp_path / "padded")
    theirs = GPT2LMHeadModel.from_pretrained(foreign)
    theirs.resize_token_embeddings(384, mean_resizing=False)
    theirs.save_pretrained(tmp_path / "padded")
    model = GPT.from_pretrained(tmp_path / "padded")
    assert model.config.vocab_size == 300
    idx = torch.randint(0, 300, (2, 9))
    torch.testing.assert_close(model(idx), GPT.from_pretrained(foreign)(idx))


def test_corrupted_config_is_rejected(foreign, tmp_path):
    """A config.json that is not JSON or has no block size gives a message that names the file."""
    shutil.copytree(foreign, tmp_path / "bad")
    for text, message in (
        ("{", "config.json is not JSON"),
        ('{"model_type": "gpt2"}', "config.json lacks an integer value for n_positions"),
    ):
        (tmp_path / "bad" / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            GPT.from_pretrained(tmp_path / "bad")
