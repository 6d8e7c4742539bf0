"""Sampling: the KV cache, batches of prompts, top-k and top-p, seeds, and the script."""

import pytest
import torch
from support.helpers import call
from torch._dynamo.testing import CompileCounter

import sample as sample_script
from babygpt.data.tokenizer import character_tokenizer, load_tokenizer
from babygpt.errors import UserError
from babygpt.nn import generation
from babygpt.nn.generation import SamplingParams, decode_step, generate, sample_token
from babygpt.training.checkpoint import model_tensors, save
from model import GPT, build_model, config_from_dict
from sample import sample


def make_model(**fields: object) -> GPT:
    torch.manual_seed(0)
    config = {"block_size": 256, "vocab_size": 300, "n_layer": 2, "n_head": 4, "n_embd": 32, "dropout": 0.2}
    model = build_model(config_from_dict(config | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # larger weights, so that one token is clearly the most probable
            if not parameter.any():
                parameter.normal_(0, 0.1)  # biases and bigram embeddings are initialized to zero
    return model.eval()


MODERN = {
    "rope": True,
    "qk_norm": True,
    "document_mask": True,
    "eot_id": 299,
    "window": 40,
    "value_embeddings": 1,
    "bigram_tables": 2,
    "partial_key_offset": True,
}


def greedy(max_new_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens, temperature=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
@torch.no_grad()
def test_greedy_tokens_with_cache_equal_those_without(kv_heads):
    model = make_model(n_kv_head=kv_heads)
    tokens = torch.randint(0, 300, (2, 10))
    cached = torch.tensor(list(generate(model, tokens.tolist(), greedy(200)))).T
    for _ in range(200):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, tokens[:, 10:])


def test_decode_step_computes_one_token(monkeypatch):
    model = make_model()
    lengths = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, cache: (lengths.append(idx.size(1)), hidden(idx, cache))[1])
    list(generate(model, [[0] * 10], SamplingParams(50)))
    assert lengths == [10] + [1] * 49


@pytest.mark.parametrize("fields", [{}, MODERN], ids=["gpt2", "modern"])
@torch.no_grad()
def test_full_context_drops_its_older_half(fields):
    """Prompts longer than the block size keep their last tokens."""
    model = make_model(**fields | {"block_size": 16})
    context = torch.randint(0, 300, (10,)).tolist()
    for (token,) in generate(model, [context[:]], greedy(60)):
        assert token == model(torch.tensor([context]))[0, -1].argmax()
        context.append(token)
        if len(context) > 16:
            context = context[-8:]
    torch.manual_seed(1)
    prompt = torch.randint(0, 300, (1, 40))
    (first,) = next(generate(model, prompt.tolist(), greedy(1)))
    assert first == model(prompt[:, -16:])[:, -1].argmax()


@pytest.mark.parametrize("fields", [{}, MODERN], ids=["gpt2", "modern"])
@torch.no_grad()
def test_batched_prompts_get_the_texts_of_each_alone(fields, dataset):
    model, tokenizer = make_model(block_size=64, **fields), load_tokenizer(dataset)
    long = "the model reads the data and writes a shard"
    while len(tokenizer.encode(long)) < 55:
        long += " of data"
    prompts = ["the", long, "a shard"]
    assert len(tokenizer.encode(long)) < 64, "the context becomes full while all three are generated"
    together = sample(model, tokenizer, prompts, greedy(25))
    assert together == [sample(model, tokenizer, [prompt], greedy(25))[0] for prompt in prompts]
    assert len(set(together)) == 3


def test_padding_is_never_sampled_if_all_logits_are_negative():
    model = make_model(block_size=16)
    with torch.no_grad():
        model.wte.weight.abs_()
        model.ln_f.weight.mul_(0.01)
        model.ln_f.bias.fill_(-5.0)
    for temperature in (0.0, 5.0):
        params = SamplingParams(15, temperature, top_k=None)
        assert torch.tensor(list(generate(model, [[0]] * 64, params))).max() < 300


def test_top_k_and_top_p_keep_the_most_probable_tokens():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]])).expand(2000, 5)
    generator = torch.Generator().manual_seed(0)

    def frequencies(top_k=None, top_p=None, temperature=1.0):
        params = SamplingParams(1, temperature, top_k, top_p)
        return torch.bincount(sample_token(logits, params, generator), minlength=5) / 2000

    torch.testing.assert_close(frequencies(), torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]), atol=0.04, rtol=0)
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7, 0]), atol=0.04, rtol=0)
    torch.testing.assert_close(frequencies(top_p=0.8), torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85, atol=0.04, rtol=0)
    assert frequencies(top_p=0.01)[1] == frequencies(top_k=1)[1] == frequencies(temperature=0)[1] == 1
    assert frequencies(temperature=0.2)[1] > 0.7


def test_seed_determines_the_texts(dataset):
    """The training mode and the global random state are unchanged."""
    model, tokenizer = make_model(), load_tokenizer(dataset)
    model.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    texts = [sample(model, tokenizer, ["the model"] * 3, SamplingParams(20, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


def test_text_ends_at_its_end_of_text_token(dataset, monkeypatch):
    model, tokenizer = make_model(), load_tokenizer(dataset)
    next_tokens = iter([[10, 11], [12, tokenizer.eot_id], [13, 14], [tokenizer.eot_id, 15], [16, 17]])
    monkeypatch.setattr(generation, "sample_token", lambda *_: torch.tensor(next(next_tokens)))
    shown = []
    texts = sample(model, tokenizer, ["the"] * 2, SamplingParams(5), shown.append)
    assert texts == [tokenizer.decode([10, 12, 13]), tokenizer.decode([11])]
    assert "".join(shown) == texts[0]
    assert next(next_tokens) == [16, 17], "no token is sampled after all texts have ended"


@pytest.fixture
def run(dataset, tmp_path):
    state = {"step": 1, "model": vars(make_model().config), "tokenizer": {"name": "tokenizer.json"}}
    save(tmp_path / "run", 1, model_tensors(make_model()), {}, state, keep=0)
    (tmp_path / "run" / "tokenizer.json").write_bytes((dataset / "tokenizer.json").read_bytes())
    return tmp_path / "run"


def test_end_of_text_precedes_the_prompt(dataset, monkeypatch):
    model, tokenizer, inputs = make_model(), load_tokenizer(dataset), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, cache: (inputs.append(idx.tolist()), hidden(idx, cache))[1])
    sample(model, tokenizer, ["the model"] * 2, SamplingParams(1))
    assert inputs == [[[tokenizer.eot_id, *tokenizer.encode("the model")]] * 2]


@pytest.mark.parametrize("fields", [{}, MODERN], ids=["gpt2", "modern"])
def test_sampling_works_under_bfloat16(fields, dataset):
    model, tokenizer = make_model(**fields), load_tokenizer(dataset)
    with torch.autocast("cpu", torch.bfloat16):
        assert len(sample(model, tokenizer, ["the model"] * 2, SamplingParams(20, top_p=0.9))) == 2


def test_generate_returns_prompt_and_continuation(run):
    """GPT.generate writes the same text as sample.py."""
    model = GPT.from_pretrained(run)
    text = model.generate("the model", max_new_tokens=20, seed=3)
    params = SamplingParams(20, seed=3)
    assert text == "the model" + sample(model, model.tokenizer, ["the model"], params)[0]
    assert text != model.generate("the model", max_new_tokens=20, seed=4)
    with pytest.raises(ValueError, match=r"^top_k 0 is out of range\. Use at least 1\.$"):
        model.generate("the model", top_k=0)


def test_script_prints_all_samples_of_all_prompts(run, capsys):
    call(sample_script.main, run, "--prompt", "the model", "--num-samples", 3, "--max-new-tokens", 5)
    assert capsys.readouterr().out.count("the model") == 3
    prompts = ("--prompt", "the model", "--prompt", "a shard")
    call(sample_script.main, run, *prompts, "--num-samples", 2, "--max-new-tokens", 5)
    out = capsys.readouterr().out
    assert (out.count("the model"), out.count("a shard")) == (2, 2)


@pytest.fixture
def converse(run, capsys, monkeypatch):
    """Return a function that enters lines in a session and returns what each one prints, and the texts it continued."""

    def enter(*lines: str | type[BaseException], flags: tuple = ()) -> tuple[list[str], list[tuple[str, int]]]:
        entered, printed, calls = iter([*lines, EOFError]), [], []

        def read(_: str) -> str:
            printed.append(capsys.readouterr().out)
            line = next(entered)
            if not isinstance(line, str):
                raise line
            return line

        def record(model, tokenizer, prompts, params, on_text):
            calls.append((prompts[0], params.seed))
            return sample(model, tokenizer, prompts, params, on_text)

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sample_script, "sample", record)
        call(sample_script.main, run, "--max-new-tokens", 5, *flags)
        return printed[1:], calls

    return enter


def test_session_continues_the_text_with_another_seed(converse):
    """The answer is printed without the prompt, which the terminal shows already."""
    printed, calls = converse("the model", "a shard", "", "/new", "the model")
    first, second, third = (text.removesuffix("\n") for text in printed[:3])
    continued = f"the model{first}\na shard"
    expected = ["the model", continued, continued + second, "the model"]
    assert calls == [(text, 1337 + i) for i, text in enumerate(expected)]
    assert third != second != first
    assert printed[4].removesuffix("\n") != first


def test_prompt_of_a_session_can_start_with_a_slash(converse):
    _, calls = converse("//usr/bin", "//")
    assert calls[0][0] == "/usr/bin"
    assert calls[1][0].endswith("\n/")


def test_session_continues_without_line_breaks(run, converse):
    """If a character-level tokenizer has no token for a line break, a prompt is appended directly."""
    (run / "tokenizer.json").write_bytes(character_tokenizer(["the model a shard"]).data)
    printed, calls = converse("the model", "a shard")
    assert calls[1][0] == "the model" + printed[0].removesuffix("\n") + "a shard"


def test_several_samples_start_a_new_text(converse):
    printed, calls = converse("the model", "a shard", "", flags=("--num-samples", 2))
    first = printed[1].split("\n\n---\n")[0]
    assert [text for text, _ in calls] == ["the model", "a shard", "a shard" + first]
    assert printed[0].count("\n---\n") == 1


def test_session_settings_change_the_next_answer(converse):
    printed, _ = converse("/tokens 1", "/temperature 0", "/top-k off", "the model", "/new", "the model")
    assert printed[:3] == ["tokens: 1\n", "temperature: 0.0\n", "top-k: off\n"]
    assert printed[3] == printed[5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/tokens many", "/tokens many is invalid. Use an integer."),
        ("/tokens 0", "/tokens 0 is out of range. Use at least 1."),
        ("/temperature off", "/temperature off is invalid. Use a number."),
        ("/top-k  off ", "top-k: off"),
        ("/tokens", "tokens: 5"),
        ("/help", sample_script.Session.HELP),
        ("/top_k 5", "/top_k is not a command. Use /new, /help, /temperature, /tokens, /top-k, /top-p, /seed."),
        (KeyboardInterrupt, "\nPress Ctrl-D to exit."),
    ],
)
def test_session_explains_what_it_cannot_do(line, message, converse):
    printed, calls = converse(line)
    assert printed == [message + "\n"]
    assert not calls


def test_ctrl_c_stops_the_answer_and_not_the_session(converse, monkeypatch):
    shown = []

    def print_and_interrupt(text: str) -> None:
        shown.append(text)
        if len(shown) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sample_script, "print_piece", print_and_interrupt)
    _, calls = converse("the model", "a shard")
    assert calls[1][0] == f"the model{shown[0]}{shown[1]}\na shard"
    assert len(shown) > 2


def test_prompt_may_precede_the_model_and_be_repeated(run, capsys):
    call(sample_script.main, "--prompt", "the model", run, "--prompt", "a shard", "--max-new-tokens", 5)
    out = capsys.readouterr().out
    assert out.startswith("the model")
    assert "\n---\n\na shard" in out


def test_decode_step_compiles_once_and_gives_equal_tokens(monkeypatch):
    torch._dynamo.reset()
    model, counter = make_model(**MODERN | {"window": 9}), CompileCounter()
    prompts = torch.randint(0, 300, (2, 10)).tolist()
    prompts[1] = prompts[1][4:]
    plain = list(generate(model, prompts, SamplingParams(60)))
    compiled_decode_step = torch.compile(decode_step, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr(generation, "compile_decode_step", lambda: compiled_decode_step)
    assert list(generate(model, prompts, SamplingParams(60, compile=True))) == plain
    assert counter.frame_count == 1


@pytest.mark.parametrize("flag", [("--top-p", 0), ("--temperature", -1), ("--num-samples", 0), ("--compile",)])
def test_values_out_of_range_are_rejected(run, flag):
    with pytest.raises(UserError, match=flag[0]):
        call(sample_script.main, run, "--prompt", "x", *flag)
