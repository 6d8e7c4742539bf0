"""Records of finetuning, their splits, and the packing of conversations into rows."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from support.chat import make_base_model, save_instructions, save_preferences
from support.helpers import save

from babygpt import hub
from babygpt.chat import conversations
from babygpt.chat import template as template_module
from babygpt.chat.conversations import DataSource, prepare, read_manifest, read_split, to_conversation, to_preference
from babygpt.chat.packing import best_fit_decreasing, collate, tokenize
from babygpt.chat.template import ChatTemplate, chat_tokenizer
from babygpt.data.tokenizer import load_tokenizer
from babygpt.errors import ConfigError, UserError
from babygpt.nn.cross_entropy import IGNORE_INDEX

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


# ---------------------------------------------------------------------------------------------------------
# records


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"instruction": " Q ", "output": "A"}, [USER, ANSWER]),
        ({"instruction": "Q", "input": "", "output": "A"}, [USER, ANSWER]),
        ({"instruction": "Q", "input": "x", "output": "A"}, [{"role": "user", "content": "Q\n\nx"}, ANSWER]),
        ({"instruction": "Q", "output": "A", "chosen": "B", "rejected": "C"}, [USER, ANSWER]),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, [USER, ANSWER]),
    ],
)
def test_records_become_conversations(record, messages):
    assert to_conversation(record) == {"messages": messages}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"instruction": "Q", "input": "", "output": "x", "chosen": "A", "rejected": "B"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER | {"content": "B"}]},
        {"prompt": "Q", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "B"}]},
    ],
)
def test_records_become_preferences(record):
    assert to_preference(record) == {"prompt": [USER], "chosen": "A", "rejected": "B"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("text", "not an object"), ({"text": "x"}, "it needs messages"), ({"messages": []}, "non-empty list"),
        ({"messages": [USER]}, "no assistant message"), ({"instruction": 1, "output": "A"}, "must be strings"),
        ({"instruction": "Q", "output": None}, "must have a role and a content"),
        ({"prompt": None, "chosen": "A", "rejected": "B"}, "non-empty list"),
        ({"prompt": "Q", "chosen": [USER], "rejected": "B"}, "must end with a message of the assistant"),
        ({"prompt": "Q", "chosen": [ANSWER, USER, ANSWER], "rejected": "B"}, "must have the same prompt"),
    ],
)  # fmt: skip
def test_invalid_records_are_reported_by_line(record, reason, tmp_path):
    path = save(
        tmp_path / "data.jsonl", (json.dumps({"messages": [USER, ANSWER]}) + "\n" + json.dumps(record)).encode()
    )
    with pytest.raises(UserError, match=rf"data\.jsonl, line 2 cannot be used for conversations: .*{reason}"):
        prepare(DataSource(str(path)), "conversations", 0.0, tmp_path)
    with pytest.raises(UserError, match=r"line 1 cannot be used for preferences: it needs chosen and rejected"):
        prepare(DataSource(str(path)), "preferences", 0.0, tmp_path)


def test_equal_prompts_are_in_the_same_split(tmp_path):
    """Also if case, whitespace, answers and format differ; the splits do not depend on the other records."""
    instructions = save_instructions(tmp_path / "a.jsonl", 300)
    records = [json.loads(line) for line in instructions.read_text().splitlines()]
    others = [{"prompt": f" {r['instruction'].upper()}\n", "chosen": "A", "rejected": "B"} for r in records[::-1][:200]]
    preferences = save(tmp_path / "b.json", json.dumps(others).encode())
    directories = [
        prepare(DataSource(str(instructions)), "conversations", 0.2, tmp_path / "chat"),
        prepare(DataSource(str(preferences)), "preferences", 0.2, tmp_path / "chat"),
    ]
    splits: list[dict[str, str]] = [{}, {}]
    for found, directory in zip(splits, directories, strict=True):
        for split in conversations.SPLITS:
            for record in read_split(directory, split):
                prompt = (record.get("prompt") or record["messages"])[0]["content"]
                found[" ".join(prompt.split()).casefold()] = split
    assert len(splits[1]) == 200
    assert splits[1].items() <= splits[0].items()
    counts = [list(splits[0].values()).count(split) for split in conversations.SPLITS]
    assert all(40 <= count <= 80 for count in counts[1:]), "about a fifth each"
    smaller = prepare(DataSource(str(instructions)), "conversations", 0.1, tmp_path / "chat")
    test = {record["messages"][0]["content"] for record in read_split(directories[0], "test")}
    assert {record["messages"][0]["content"] for record in read_split(smaller, "test")} < test


def test_data_is_prepared_once_and_verified(tmp_path, monkeypatch):
    source = DataSource(str(save_preferences(tmp_path / "data.jsonl", 40)))
    directory = prepare(source, "preferences", 0.1, tmp_path / "chat")
    manifest = read_manifest(directory)
    assert sum(split["records"] for split in manifest["splits"].values()) == manifest["records"] == 40
    with monkeypatch.context() as patch:
        patch.setattr(conversations, "read_objects", lambda path: pytest.fail("the data is read again"))
        assert prepare(source, "preferences", 0.1, tmp_path / "chat") == directory
        assert prepare(DataSource(str(directory)), "preferences", 0.3, tmp_path / "chat") == directory
    with pytest.raises(ConfigError, match="contains preferences, but conversations are needed"):
        prepare(DataSource(str(directory)), "conversations", 0.1, tmp_path / "chat")
    (directory / "val.jsonl").write_text("")
    with pytest.raises(UserError, match=r"val\.jsonl is missing or corrupted"):
        prepare(source, "preferences", 0.1, tmp_path / "chat")


def test_equal_answers_are_dropped_and_counted(tmp_path):
    records = [{"prompt": "Q", "chosen": "A", "rejected": " A"}, {"prompt": "Q", "chosen": "A", "rejected": "B"}]
    path = save(tmp_path / "data.json", json.dumps(records).encode())
    directory = prepare(DataSource(str(path)), "preferences", 0.0, tmp_path)
    assert (len(list(read_split(directory, "train"))), read_manifest(directory)["equal_answers"]) == (1, 1)


def test_dataset_of_the_hub_is_streamed(tmp_path, monkeypatch):
    rows = [{"messages": [USER, ANSWER]}] * 3
    asked = []
    monkeypatch.setattr(hub, "resolve_revision", lambda repo: "abc")
    monkeypatch.setattr(hub, "stream", lambda *arguments: asked.append(arguments) or rows)
    directory = prepare(DataSource("user/chats", "all", "train_sft"), "conversations", 0.0, tmp_path)
    assert asked == [("user/chats", "all", "train_sft", "abc")]
    assert list(read_split(directory, "train")) == rows


def test_invalid_rows_of_the_hub_are_skipped_and_counted(tmp_path, monkeypatch, capsys):
    """A user cannot edit them. If the first row is invalid, the dataset has another format."""
    rows = [{"messages": [USER, ANSWER]}, {"messages": []}, {"messages": [USER]}, {"messages": [USER, ANSWER]}]
    monkeypatch.setattr(hub, "resolve_revision", lambda repo: "abc")
    monkeypatch.setattr(hub, "stream", lambda *arguments: rows)
    directory = prepare(DataSource("user/chats"), "conversations", 0.0, tmp_path)
    assert (len(list(read_split(directory, "train"))), read_manifest(directory)["invalid"]) == (2, 2)
    warning = "warning: 2 of 4 records are invalid and were skipped. The first one is user/chats, row 1: a conversation"
    assert warning in capsys.readouterr().err
    rows.reverse()
    rows.insert(0, {"text": "no conversation"})
    with pytest.raises(UserError, match=r"user/chats, row 0 cannot be used for .* messages.* Use another dataset\."):
        prepare(DataSource("user/chats", split="other"), "conversations", 0.0, tmp_path)
    assert [*tmp_path.glob("*/*.jsonl"), *tmp_path.glob("*/*.tmp")] == list(directory.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("location", "message"),
    [("nothing.jsonl", "There is no file at nothing.jsonl"), ("./a/b", "There is no file"),
     ("data.txt", "is neither a jsonl nor a json file")],
)  # fmt: skip
def test_missing_and_other_files_are_rejected(location, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text("x")
    with pytest.raises(ConfigError, match=message):
        prepare(DataSource(location), "conversations", 0.1, tmp_path)


# ---------------------------------------------------------------------------------------------------------
# tokens and rows


@pytest.fixture(scope="module")
def template(dataset) -> ChatTemplate:
    return ChatTemplate(chat_tokenizer(load_tokenizer(dataset)))


def test_tokens_of_another_template_are_not_used(template, tmp_path, monkeypatch):
    source = DataSource(str(save_instructions(tmp_path / "data.jsonl", 4)))
    directory = prepare(source, "conversations", 0.0, tmp_path)
    encoded: list[list] = []

    def encode(template, messages):
        encoded.append(messages)
        return [1, 2], [False, True]

    monkeypatch.setattr(ChatTemplate, "encode", encode)
    for jinja, count in (("a template", 4), ("a template", 4), ("another template", 8)):
        monkeypatch.setattr(template_module, "JINJA", jinja)
        tokenize(directory, "train", ChatTemplate(template.tokenizer), "conversations")
        assert len(encoded) == count


def test_tokens_end_with_the_last_supervised_one(template, tmp_path):
    messages = [USER, ANSWER, USER, ANSWER | {"content": "B"}, USER]
    path = save(tmp_path / "data.json", json.dumps([{"messages": messages}]).encode())
    directory = prepare(DataSource(str(path)), "conversations", 0.0, tmp_path)
    for when in ("computed", "loaded", "truncated", "loaded"):
        if when == "truncated":
            [path] = directory.glob("train-*.npz")
            path.write_bytes(path.read_bytes()[:-50])
        sequences = tokenize(directory, "train", template, "conversations")
        ids, supervised = sequences.get(0, 1000)
        assert template.tokenizer.decode(ids[supervised]) == "A<|im_end|>B<|im_end|>"
        assert ids[-1] == template.im_end_id
    length = len(ids)
    assert sequences.lengths(1000).tolist() == [length - 1]
    assert sequences.num_supervised(1000).tolist() == [4]
    assert len(sequences.get(0, length - 2)[0]) == length - 1, "truncated at the end"
    assert sequences.num_supervised(length - 2).tolist() == [3]
    assert len(tokenize(directory, "val", template, "conversations")) == 0


def test_packing_is_best_fit_decreasing():
    lengths = [5, 3, 7, 2, 6, 1, 4]
    assert best_fit_decreasing(lengths, 8) == [[2, 5], [4, 3], [0, 1], [6]]
    assert best_fit_decreasing([2, 2, 2], 4, [2, 0, 1]) == [[2, 0], [1]], "the order decides among equal lengths"
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 200))]
        order = rng.sample(range(len(lengths)), len(lengths))
        rows, others = best_fit_decreasing(lengths, 40), best_fit_decreasing(lengths, 40, order)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths))), "each exactly once"
        assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
        assert len(rows) <= max(1, 1.5 * sum(lengths) / 40 + 1)
        assert sorted(sorted(lengths[i] for i in row) for row in rows) == sorted(
            sorted(lengths[i] for i in row) for row in others
        )


@pytest.mark.parametrize("modern", [False, True])
@torch.no_grad()
def test_packed_loss_equals_that_of_each_conversation(modern, template, dataset, tmp_path):
    """Attention, positions and shifts stay inside a conversation, and padding has no effect."""
    directory = prepare(
        DataSource(str(save_instructions(tmp_path / "data.jsonl", 12))), "conversations", 0.0, tmp_path
    )  # fmt: skip
    sequences = tokenize(directory, "train", template, "conversations")
    model = make_base_model(dataset, tmp_path / "run", modern, vocab_size=template.tokenizer.vocab_size)
    rows = best_fit_decreasing(sequences.lengths(96).tolist(), 96)
    batch = collate([[sequences.get(i, 96) for i in row] for row in rows] + [[]], 96, pad_id=0)
    assert max(map(len, rows)) > 1
    losses = model(batch.idx, batch.targets, packed=batch.packed(), reduction="none")
    packed = torch.zeros(13).index_add(0, batch.sequences.flatten(), losses.flatten())
    order = [i for row in rows for i in row]
    for number, i in enumerate(order):
        ids, supervised = sequences.get(i, 96)
        idx = torch.from_numpy(ids.astype(np.int64))[None]
        targets = idx[:, 1:].masked_fill(~torch.from_numpy(supervised)[1:], IGNORE_INDEX)
        alone = model(idx[:, :-1], targets, reduction="sum")
        torch.testing.assert_close(packed[number], alone, atol=1e-5, rtol=0)
    assert packed[12] == 0, "padding"
    total = model(batch.idx, batch.targets, packed=batch.packed(), reduction="sum")
    torch.testing.assert_close(total, packed.sum(), atol=1e-4, rtol=0)
