"""chat.py: the terminal session with a tiny chat model, its replies, and the start of the server."""

import json
import re
import threading

import pytest
import torch
from support.chat_server import Client, wait_until
from support.helpers import call

import chat as chat_script
from babygpt.chat.reply import fit_context, limit_to_context, reply
from babygpt.chat.server import ChatServer
from babygpt.chat.template import ChatTemplate, chat_tokenizer, check_conversation
from babygpt.data.tokenizer import load_tokenizer
from babygpt.errors import ConfigError, UserError
from babygpt.export.directory import write_model
from babygpt.nn import generation
from babygpt.nn.generation import SamplingParams
from babygpt.pretrained import read_pretrained
from babygpt.training.checkpoint import model_tensors, save
from model import GPT, build_model, config_from_dict


@pytest.fixture(scope="module")
def template(dataset):
    return ChatTemplate(chat_tokenizer(load_tokenizer(dataset)))


@pytest.fixture(scope="module")
def model(template) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": 128, "vocab_size": template.tokenizer.vocab_size, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = build_model(config_from_dict(shape)).eval()
    with torch.no_grad():
        model.wte.weight[[template.im_start_id, template.im_end_id, template.tokenizer.eot_id]] = 0.0
        for parameter in model.parameters():
            parameter.mul_(3.0)  # larger weights, so that one token is clearly the most probable
    return model


def save_run(model: GPT, tokenizer, directory):
    state = {"step": 1, "model": vars(model.config), "tokenizer": {"name": "tokenizer.json"}}
    save(directory, 1, model_tensors(model), {}, state, keep=0)
    (directory / "tokenizer.json").write_bytes(tokenizer.data)
    return directory


@pytest.fixture(scope="module")
def run(model, template, tmp_path_factory):
    return save_run(model, template.tokenizer, tmp_path_factory.mktemp("chat") / "run")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# ---------------------------------------------------------------------------------------------------------
# replies


def scripted(monkeypatch, tokens: list[int]) -> None:
    """Make the model sample these tokens."""
    iterator = iter(tokens)
    monkeypatch.setattr(generation, "sample_token", lambda *_: torch.tensor([next(iterator)]))


def test_reply_yields_one_text_per_token(model, template):
    messages = [user("the model")]
    texts = list(reply(model, template, messages, SamplingParams(20)))
    steps = generation.generate(model, [template.prompt(messages)], SamplingParams(20), template.im_end_id)
    tokens = [token for (token,) in steps]
    assert None not in tokens
    assert "".join(texts) == template.tokenizer.decode(tokens)
    assert len(texts) - 20 in (0, 1), "one more if the last character is incomplete"


@pytest.mark.parametrize("end", ["im_end", "im_start", "eot"])
def test_reply_ends_at_any_special_token(model, template, monkeypatch, end):
    """A model with little training may begin another message or document instead of ending its message."""
    ids = {"im_end": template.im_end_id, "im_start": template.im_start_id, "eot": template.tokenizer.eot_id}
    word = template.tokenizer.encode("the")
    scripted(monkeypatch, [*word, ids[end], *word])
    assert "".join(reply(model, template, [user("Hi")], SamplingParams(20))) == "the"


def test_reply_stops_when_it_is_asked_to(model, template):
    texts = []
    for text in reply(model, template, [user("the model")], SamplingParams(20), lambda: len(texts) == 2):
        texts.append(text)
    assert len(texts) == 3, "the token that is computed when stop() becomes true is the last one"


def test_new_tokens_are_limited_to_the_context():
    params = SamplingParams(100, 0.5, seed=3)
    assert limit_to_context(params, 20, 64) == SamplingParams(44, 0.5, seed=3)
    assert limit_to_context(params, 20, 256) == params


def test_fit_encodes_each_message_once(template, monkeypatch):
    """A long history takes linear time."""
    encoded = []
    encode = template.tokenizer.encode
    monkeypatch.setattr(template.tokenizer, "encode", lambda text: encoded.append(text) or encode(text))
    messages = [user("a b c"), assistant("c d")] * 500 + [user("the end")]
    kept, num_dropped = fit_context(template, messages, 64, 10)
    assert num_dropped + len(kept) == 1001
    assert kept[-1] == user("the end")
    assert len(encoded) == 1001


def test_length_in_the_message_is_that_of_the_last_turn(template):
    """Also if the last message is the assistant's."""
    messages = [user("the"), assistant("a"), user("the model " * 50), assistant("a")]
    total = len(template.prompt(messages[2:]))
    with pytest.raises(UserError, match=f"the prompt has {total} tokens, but can have 54"):
        fit_context(template, messages, 64, 10)


# ---------------------------------------------------------------------------------------------------------
# the session


@pytest.fixture
def converse(run, capsys, monkeypatch):
    """Return a function that enters lines and returns what each one prints, and the prompts that were answered."""

    def enter(*lines: str | type[BaseException], flags: tuple = (), directory=run, answer=reply) -> tuple[list, list]:
        entered, printed, calls = iter([*lines, EOFError]), [], []

        def read(_: str) -> str:
            printed.append(capsys.readouterr().out)
            line = next(entered)
            if not isinstance(line, str):
                raise line
            return line

        def record(model, template, messages, params, stop):
            calls.append((messages, params))
            return answer(model, template, messages, params, stop)

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(chat_script, "reply", record)
        call(chat_script.main, directory, "--max-new-tokens", 5, *flags)
        return printed[1:], calls

    return enter


def answer_in(printed: str) -> str:
    """Return the answer in what a message prints."""
    text = printed.split("assistant> ", 1)[1]
    return text.rsplit("\n", 2)[0] if text.endswith(")\n") else text.removesuffix("\n")


def test_conversation_continues_with_its_history(converse):
    """The next answer has another seed."""
    printed, calls = converse("the model", "a shard")
    first = answer_in(printed[0])
    assert [messages for messages, _ in calls] == [
        [user("the model")],
        [user("the model"), assistant(first), user("a shard")],
    ]
    assert [params.seed for _, params in calls] == [1337, 1338]
    assert first


def test_answer_is_that_of_the_model(converse, model, template):
    printed, _ = converse("the model", flags=("--temperature", 0))
    expected = "".join(reply(model, template, [user("the model")], SamplingParams(5, temperature=0)))
    assert answer_in(printed[0]) == expected
    assert printed[0].endswith("\n(The answer is cut off after 5 tokens: /tokens changes this limit.)\n")


def test_settings_change_the_next_answer(converse):
    printed, calls = converse("/tokens 2", "/temperature 0", "/top-k off", "/top-p 0.5", "/seed 9", "the", "/tokens")
    assert printed[:5] == ["tokens: 2\n", "temperature: 0.0\n", "top-k: off\n", "top-p: 0.5\n", "seed: 9\n"]
    [(_, params)] = calls
    assert (params.max_new_tokens, params.temperature, params.top_k) == (2, 0, None)
    assert (params.top_p, params.seed) == (0.5, 9)
    assert printed[6] == "tokens: 2\n"


def test_system_message_starts_a_new_conversation(converse):
    lines = ("the", "/system", "/system a shard", "the", "/system", "/system off", "the")
    printed, calls = converse(*lines, flags=("--system", "the data"))
    data, shard = ({"role": "system", "content": text} for text in ("the data", "a shard"))
    assert [messages for messages, _ in calls] == [[data, user("the")], [shard, user("the")], [user("the")]]
    assert [printed[i] for i in (1, 2, 4, 5)] == [
        "system: the data\n", "system: a shard\n", "system: a shard\n", "system: off\n",
    ]  # fmt: skip


def test_new_starts_a_new_conversation(converse):
    _, calls = converse("the model", "/new", "a shard", flags=("--system", "the data"))
    assert calls[1][0] == [{"role": "system", "content": "the data"}, user("a shard")]


def test_message_can_start_with_a_slash(converse):
    _, calls = converse("//usr/bin")
    assert calls[0][0] == [user("/usr/bin")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/tokens many", "/tokens many is invalid. Use an integer."),
        ("/tokens 0", "/tokens 0 is out of range. Use at least 1."),
        ("/temperature -1", "/temperature -1.0 is out of range. Use at least 0."),
        ("/help", chat_script.Session.HELP),
        ("/save", "/save needs a path. Use, for instance, /save chats.jsonl."),
        ("/save chats.jsonl", "There is no conversation to save. Enter a message first."),
        (
            "/new x",
            "/new is not a command. Use /new, /system, /save, /help, /temperature, /tokens, /top-k, /top-p, /seed.",
        ),
        (KeyboardInterrupt, "\nPress Ctrl-D to exit."),
    ],
)  # fmt: skip
def test_session_explains_what_it_cannot_do(line, message, converse):
    printed, calls = converse(line, "", "  ")
    assert printed == [message + "\n", "", ""]
    assert not calls


def test_save_appends_conversations_as_lines(converse, tmp_path):
    """Also to a file whose last line has no line break. Each line is a valid conversation."""
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": []}')
    printed, _ = converse(
        "the ü \udcff", f"/save {path}", "/system a shard", "the", "a", f"/save {path}", f"/save {tmp_path}"
    )
    lines = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert "ü" in path.read_text(encoding="utf-8"), "the file is readable"
    assert lines[0] == []
    assert [[m["role"] for m in check_conversation(line)] for line in lines[1:]] == [
        ["user", "assistant"], ["system", "user", "assistant", "user", "assistant"],
    ]  # fmt: skip
    assert lines[1] == [user("the ü \ufffd"), assistant(answer_in(printed[0]))]
    assert printed[1] == f"{path}: appended a conversation of 2 messages\n"
    assert printed[6].startswith(f"{tmp_path} cannot be written (")


def test_dropped_messages_are_reported_once_per_drop(converse, template, tmp_path):
    """The context has 128 tokens. The system message stays, and a saved conversation is complete."""
    path = tmp_path / "chats.jsonl"
    printed, calls = converse("the model " * 8, *["the"] * 8, f"/save {path}", flags=("--system", "a"))
    is_reported = ["The context is full" in part for part in printed[:9]]
    num_sent = [len(messages) for messages, _ in calls]
    num_dropped = [2 * i + 2 - count for i, count in enumerate(num_sent)]
    assert is_reported == [i > 0 and num_dropped[i] > num_dropped[i - 1] for i in range(9)]
    assert any(is_reported)
    assert not all(is_reported[is_reported.index(True) :])
    assert "Dropped from the prompt: the oldest 2 messages.)" in printed[is_reported.index(True)]
    for messages, params in calls:
        assert messages[0] == {"role": "system", "content": "a"}
        assert messages[1]["role"] == "user"
        assert len(template.prompt(messages)) + params.max_new_tokens <= 128
    assert len(json.loads(path.read_text())["messages"]) == 19


def test_too_long_message_is_refused_and_forgotten(converse):
    printed, calls = converse("the model", "the model " * 100, "a shard")
    assert printed[1].startswith("The message is too long: the prompt has ")
    assert [m["content"] for m in calls[1][0] if m["role"] == "user"] == ["the model", "a shard"]


def test_answer_ends_where_the_context_ends(converse, template):
    """Generation never forgets the beginning of the prompt."""
    printed, calls = converse("the model " * 4, flags=("--max-new-tokens", 1000))
    [(messages, params)] = calls
    assert params.max_new_tokens == 128 - len(template.prompt(messages))
    assert printed[0].endswith(f"(The answer is cut off after {params.max_new_tokens} tokens: the context is full.)\n")


@pytest.mark.parametrize("pieces", [[], ["", ""], ["a ", "shard"]])
def test_ctrl_c_stops_the_answer_and_not_the_session(converse, pieces):
    """The partial answer stays in the history. A message without any answer does not."""

    def answer(model, template, messages, params, stop):
        if messages == [user("the model")]:
            yield from pieces
            raise KeyboardInterrupt
        yield "the end"

    printed, calls = converse("the model", "the data", answer=answer)
    assert printed[0] == f"\nassistant> {''.join(pieces)}\n"
    history = [user("the model"), assistant("a shard")] if any(pieces) else []
    assert calls[1][0] == [*history, user("the data")]


@pytest.mark.parametrize("kind", ["checkpoint", "exported"])
def test_model_may_be_a_checkpoint_or_exported(kind, run, converse, tmp_path):
    """It gives the answer of the run directory."""
    directory = next((run / "checkpoints").iterdir())
    if kind == "exported":
        directory = tmp_path / "exported"
        directory.mkdir()
        write_model(read_pretrained(run), directory)
    assert converse("the model", directory=directory)[0] == converse("the model")[0]


def test_models_without_the_template_are_rejected(dataset, tmp_path):
    shape = {"block_size": 128, "vocab_size": 300, "n_layer": 1, "n_head": 2, "n_embd": 16}
    directory = save_run(build_model(config_from_dict(shape)), load_tokenizer(dataset), tmp_path / "base")
    with pytest.raises(ConfigError, match="not a chat model"):
        call(chat_script.main, directory)


@pytest.mark.parametrize("flag", [("--temperature", -1), ("--serve", 65536), ("--max-new-tokens", 0), ("--compile",)])
def test_invalid_flags_are_rejected(run, flag):
    with pytest.raises(UserError, match=flag[0]):
        call(chat_script.main, run, *flag)


# ---------------------------------------------------------------------------------------------------------
# the server


def test_serve_answers_until_ctrl_c(run, model, template, monkeypatch, capsys):
    """The answer is that of the model, in another thread, and all threads end."""
    before, answers = set(threading.enumerate()), []

    def serve_one_request(server: ChatServer) -> None:
        thread = threading.Thread(target=lambda: answers.append(Client(server.server_port).complete(temperature=0)))
        thread.start()
        server.handle_request()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(ChatServer, "serve_forever", serve_one_request)
    call(chat_script.main, run, "--serve", 0, "--max-new-tokens", 7, "--system", "the data")
    messages = [{"role": "system", "content": "the data"}, user("Hi")]
    expected = "".join(reply(model, template, messages, SamplingParams(7, temperature=0)))
    [(status, content)] = answers
    assert (status, content["model"], content["choices"][0]["message"]["content"]) == (200, "run", expected)
    out = capsys.readouterr().out
    assert re.match(r"Chat page: (http://127\.0\.0\.1:\d+)\nOpenAI-compatible API: \1/v1\nPress Ctrl-C", out)
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_cpu_autocast_applies_to_the_thread_of_the_server(run, monkeypatch):
    """--dtype bfloat16 is in effect where the answer is computed, and only there."""
    seen = []

    def answer(*_):
        seen.append(torch.is_autocast_enabled("cpu"))
        yield "the end"

    def start(model, port):
        thread = threading.Thread(target=lambda: list(model.generate([], SamplingParams(), lambda: False)))
        thread.start()
        thread.join()
        seen.append(torch.is_autocast_enabled("cpu"))

    monkeypatch.setattr(chat_script, "reply", answer)
    monkeypatch.setattr(chat_script, "serve", start)
    call(chat_script.main, run, "--serve", 0, "--dtype", "bfloat16")
    assert seen == [True, False]
