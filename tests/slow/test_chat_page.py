"""The chat server with OpenAI's client, and its page in headless Chromium: send, stream, stop, settings, errors.

It uses the Chromium of the system, or that of `playwright install chromium`.
"""

import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest
import torch
from openai import OpenAI
from playwright.sync_api import Page, expect
from support.chat_server import MESSAGES, TIMEOUT, FakeModel, chat_server

from babygpt.chat.template import ChatTemplate, chat_tokenizer
from babygpt.data.tokenizer import load_tokenizer
from babygpt.training.checkpoint import model_tensors, save
from model import build_model, config_from_dict

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(chat_tokenizer(load_tokenizer("gpt2")))


@pytest.fixture
def model():
    return FakeModel()


@pytest.fixture
def client(template, model):
    with chat_server(template, model, block_size=1024) as client:
        yield client


# ---------------------------------------------------------------------------------------------------------
# OpenAI's client


@pytest.fixture
def api(client):
    with OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as api:
        yield api.chat.completions


def test_openai_client_gets_an_answer(api, template):
    answer = api.create(model="fake", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(template.prompt(MESSAGES))


def test_openai_client_streams(api, model):
    """The first text arrives while the model generates; the last chunk has the usage."""
    model.gate = threading.Event()
    stream = iter(api.create(model="fake", messages=MESSAGES, stream=True, stream_options={"include_usage": True}))
    first = next(stream).choices[0].delta
    assert (first.role, first.content) == ("assistant", "Hel")
    model.gate.set()
    *chunks, last = stream
    assert "Hel" + "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello world"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (last.choices, last.usage.completion_tokens) == ([], 4)


def test_openai_client_can_stop_a_stream(api, model):
    model.gate = threading.Event()
    with api.create(model="fake", messages=MESSAGES, stream=True) as stream:
        next(iter(stream))
    assert model.is_stopped.wait(TIMEOUT)


def test_openai_client_raises_its_errors(api, model, capsys):
    with pytest.raises(openai.BadRequestError, match="temperature -1 is out of range") as caught:
        api.create(model="fake", messages=MESSAGES, temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="The prompt has") as caught:
        api.create(model="fake", messages=[{"role": "user", "content": " a" * 2000}])
    assert caught.value.code == "context_length_exceeded"
    model.error = RuntimeError("out of memory")
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        api.create(model="fake", messages=MESSAGES)
    model.gate = threading.Event()
    stream = iter(api.create(model="fake", messages=MESSAGES, stream=True))
    next(stream)
    model.gate.set()
    with pytest.raises(openai.APIError, match="out of memory"):
        list(stream)
    capsys.readouterr()


def test_openai_client_lists_the_model(client):
    with OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none") as api:
        assert [model.id for model in api.models.list()] == ["fake"]


def test_script_serves_a_model_until_ctrl_c(template, tmp_path):
    """A greedy answer is reproducible, Ctrl-C ends the process with code 0, and nothing is written to stderr."""
    torch.manual_seed(0)
    shape = {"block_size": 64, "vocab_size": template.tokenizer.vocab_size, "n_layer": 1, "n_head": 2, "n_embd": 16}
    network = build_model(config_from_dict(shape))
    state = {"step": 1, "model": vars(network.config), "tokenizer": {"name": "tokenizer.json"}}
    save(tmp_path / "run", 1, model_tensors(network), {}, state, keep=0)
    (tmp_path / "run" / "tokenizer.json").write_bytes(template.tokenizer.data)
    command = [sys.executable, "chat.py", tmp_path / "run", "--serve", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = int(re.fullmatch(r"Chat page: http://127\.0\.0\.1:(\d+)\n", process.stdout.readline())[1])
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60) as api:
            answers = [
                api.chat.completions.create(model="run", messages=MESSAGES, temperature=0, max_tokens=10).choices[0]
                for _ in range(2)
            ]
        assert answers[0].message.content == answers[1].message.content != ""
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


# ---------------------------------------------------------------------------------------------------------
# the page


@pytest.fixture
def page(browser, client):
    """The page at the width of a phone. After the test, the console must be empty, except for failed requests."""
    page = browser.new_page(viewport={"width": 360, "height": 640})
    problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.set_default_timeout(TIMEOUT * 1000)
    page.goto(f"http://127.0.0.1:{client.port}/")
    yield page
    assert [text for text in problems if not text.startswith("Failed to load resource")] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    page.close()


def send(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Page):
    return page.locator(".assistant")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_answer_is_streamed_and_continues_the_history(page, model):
    model.gate = threading.Event()
    send(page, "First")
    expect(answers(page)).to_have_text("Hel")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("button", name="Send")).to_be_hidden()
    model.gate.set()
    expect(answers(page)).to_have_text("Hello world")
    send(page, "Second")
    expect(answers(page).nth(1)).to_have_text("Hello world")
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    assert model.calls[0][0] == [user("First")]
    assert model.calls[1][0] == [user("First"), assistant("Hello world"), user("Second")]
    assert page.locator(".user").all_inner_texts() == ["First", "Second"]


def test_shift_enter_starts_a_new_line(page, model):
    """The input grows with its text, and an empty message is not sent."""
    page.keyboard.press("Enter")
    field = page.get_by_label("Message", exact=True)
    height = field.bounding_box()["height"]
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    assert field.bounding_box()["height"] > height + 10
    page.get_by_role("button", name="Send").click()
    expect(answers(page)).to_have_text("Hello world")
    assert model.calls[0][0] == [user("One\nTwo")]
    assert field.bounding_box()["height"] == height


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_the_partial_answer(page, model, how):
    model.gate = threading.Event()
    send(page, "First")
    expect(answers(page)).to_have_text("Hel")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press(how)
    assert model.is_stopped.wait(TIMEOUT)
    expect(page.locator("#log .note")).to_have_text("Stopped.")
    model.gate.set()
    send(page, "Second")
    expect(answers(page).nth(1)).to_have_text("Hello world")
    assert model.calls[1][0] == [user("First"), assistant("Hel"), user("Second")]


def test_stop_before_any_text_restores_the_message(page, model):
    model.gate, model.pieces = threading.Event(), ("", "Hello")
    send(page, "First")
    assert model.is_started.wait(TIMEOUT)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_label("Message", exact=True)).to_have_value("First")
    expect(page.locator("#log > *")).to_have_count(0)
    model.gate.set()
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Hello")
    assert model.calls[1][0] == [user("First")]


def test_new_chat_stops_the_answer_and_forgets_all(page, model):
    model.gate = threading.Event()
    send(page, "First")
    expect(answers(page)).to_have_text("Hel")
    page.get_by_role("button", name="New chat").click()
    assert model.is_stopped.wait(TIMEOUT)
    expect(page.locator("#welcome")).to_contain_text("Chat with fake")
    expect(answers(page)).to_have_count(0)
    model.gate.set()
    send(page, "Second")
    expect(answers(page)).to_have_text("Hello world")
    assert model.calls[1][0] == [user("Second")]


def test_settings_apply_to_the_next_message(page, model):
    page.get_by_role("button", name="Settings").click()
    for label, value in {"System message": "Be brief.", "Temperature": "0.25", "Max tokens": "3", "Top-k": "7"}.items():
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Done").click()
    send(page, "First")
    expect(page.locator("#log .note").last).to_contain_text("Cut off")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Defaults").click()
    page.get_by_label("Top-k").fill("")
    page.keyboard.press("Escape")
    send(page, "Second")
    expect(answers(page).nth(1)).to_have_text("Hello world")
    (first, one), (second, two) = model.calls
    assert first == [{"role": "system", "content": "Be brief."}, user("First")]
    assert (one.temperature, one.max_new_tokens, one.top_k) == (0.25, 3, 7)
    assert second == [user("First"), assistant("Hello wor"), user("Second")]
    assert (two.temperature, two.max_new_tokens, two.top_k) == (0.8, 20, 50)


def test_invalid_setting_is_explained(page, model):
    """By the browser, and by the server if the dialog is closed with Escape. The message is not lost."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("5")
    page.get_by_role("button", name="Done").click()
    expect(page.locator("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    send(page, "First")
    expect(page.locator(".error")).to_have_text("temperature 5 is out of range. Use at most 2.")
    expect(page.get_by_label("Message", exact=True)).to_have_value("First")
    expect(page.locator(".user")).to_have_count(0)
    assert not model.calls


def test_error_is_shown_and_the_message_can_be_sent_again(page, model, capsys):
    pieces, model.pieces, model.error = model.pieces, (), RuntimeError("out of memory")
    send(page, "First")
    expect(page.get_by_role("alert")).to_contain_text("out of memory")
    expect(page.get_by_label("Message", exact=True)).to_have_value("First")
    model.pieces, model.error = pieces, None
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_text("Hello world")
    expect(page.locator(".error")).to_have_count(0)
    capsys.readouterr()


def test_error_after_some_text_keeps_the_text(page, model, capsys):
    model.gate, model.error = threading.Event(), RuntimeError("out of memory")
    send(page, "First")
    expect(answers(page)).to_have_text("Hel")
    model.gate.set()
    expect(page.get_by_role("alert")).to_contain_text("out of memory")
    model.error = None
    send(page, "Second")
    expect(answers(page).nth(1)).to_have_text("Hello world")
    assert model.calls[1][0] == [user("First"), assistant("Hello world"), user("Second")]
    capsys.readouterr()


def test_page_explains_that_the_server_is_gone(browser, template, model):
    """Before an answer, and in the middle of one."""
    page = browser.new_page()
    with chat_server(template, model) as client:
        page.goto(f"http://localhost:{client.port}/")
        model.gate = threading.Event()
        send(page, "First")
        expect(answers(page)).to_have_text("Hel")
    expect(page.get_by_role("alert")).to_have_text(re.compile("shutting down|ended before|does not respond"))
    send(page, "Second")
    expect(page.get_by_role("alert")).to_have_text(re.compile("The server does not respond"))
    expect(page.get_by_label("Message", exact=True)).to_have_value("Second")
    page.close()


def test_text_of_the_model_is_never_html(page, model):
    text = "<img src=x onerror=\"document.title='attacked'\"><script>document.title='attacked'</script>&lt;b&gt;"
    model.pieces = (text,)
    send(page, text)
    expect(answers(page)).to_have_text(text)
    assert page.locator(".user").inner_text() == text
    assert page.locator("#log img, #log script, #log b").count() == 0
    assert page.title() == "fake: BabyGPT chat"


def test_dropped_turns_are_reported_once(page, model):
    """The context of 1,024 tokens has room for one of the long messages."""
    model.pieces = ("ok",)
    for i, text in enumerate([" a" * 600, " b" * 600, "c"]):
        send(page, f"{text}.")
        expect(answers(page)).to_have_count(i + 1)
        expect(answers(page).nth(i)).to_have_text("ok")
    assert len(model.calls[1][0]) == 1
    notes = page.locator("#log .note").all_inner_texts()
    assert notes == ["The context is full. Dropped from the prompt: the oldest 2 messages."]


@pytest.mark.parametrize("size", [(360, 640), (1280, 800)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_the_window(page, model, size, scheme):
    """Also with a long word and a long conversation: the page does not scroll, the log does, and it shows the end."""
    width, height = size
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme=scheme)
    model.pieces = ("Donaudampfschifffahrt" * 20, "\n" * 100, "the end")
    send(page, "x" * 300)
    expect(answers(page)).to_contain_text("the end")
    scrolled = "(e => [e.scrollWidth, e.scrollHeight])(document.documentElement)"
    assert page.evaluate(scrolled) == [width, height]
    assert page.evaluate("log.scrollWidth <= log.clientWidth && log.scrollHeight > 2 * log.clientHeight")
    assert page.evaluate("Math.abs(log.getBoundingClientRect().width - innerWidth) < 1")
    assert page.evaluate("log.scrollTop + log.clientHeight > log.scrollHeight - 5")
    for name in ("New chat", "Settings", "Send"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["y"] + box["height"] <= height
        assert box["height"] >= 38
    red = int(re.match(r"rgb\((\d+)", page.evaluate("getComputedStyle(document.body).backgroundColor"))[1])
    assert (red < 128) == (scheme == "dark")
    page.get_by_role("button", name="Settings").click()
    box = page.locator("dialog").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_scrolled_up_log_stays_where_it_is(page, model):
    model.gate, model.pieces = threading.Event(), ("\n" * 100, "the end")
    send(page, "First")
    expect(answers(page)).to_have_text(re.compile(r"^\n+$"), use_inner_text=True)
    page.evaluate("log.scrollTop = 0")
    model.gate.set()
    expect(answers(page)).to_contain_text("the end")
    assert page.evaluate("log.scrollTop") == 0
