"""Compare hellaswag.py --style lm-eval and tools.evaluate with lm-evaluation-harness: equal losses and scores."""

import json
from pathlib import Path

import pytest
import torch
from lm_eval import evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.hellaswag.utils import process_docs
from support.helpers import save
from support.tasks import ROWS
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import hellaswag
from babygpt.export.directory import write_model
from babygpt.pretrained import read_pretrained
from babygpt.training.distributed import Ranks
from benchmarks.harness import compare
from model import GPT
from tools.train_tokenizer import train_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Questions in the style of ActivityNet and WikiHow, with titles, brackets, double spaces and capitals."""
    rows = []
    for i in range(40):
        wikihow = i % 2 == 1
        ctx_a = (
            f"[header] How to move {i} eggs [title] Begin slowly. [step] Lift  them." if wikihow else f"He {i} lifts."
        )
        ctx_b = "" if wikihow else "the other MAN"
        actions = ("moves on", "sits down [substeps] and rests", "runs away [title] Stop", "sees a café  at night")
        rows.append({
            "ind": i, "activity_label": "Moving Eggs", "ctx_a": ctx_a, "ctx_b": ctx_b, "split": "val",
            "ctx": f"{ctx_a} {ctx_b}".strip(), "split_type": "indomain", "label": i % 4,
            "source_id": "wikihow~1" if wikihow else "activitynet~v",
            "endings": [f"{action}{', again' * (i % (k + 2))}." for k, action in enumerate(actions)],
        })  # fmt: skip
    path = tmp_path_factory.mktemp("hellaswag") / "questions.jsonl"
    return save(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.fixture(scope="module")
def model_directory(questions, tmp_path_factory) -> Path:
    """A small Hugging Face GPT-2 with its own vocabulary."""
    directory = tmp_path_factory.mktemp("model")
    texts = [text for line in questions.read_text().splitlines() for text in json.loads(line)["endings"]]
    train_tokenizer(texts, 300, directory / "tokenizer.json", progress=False)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=256, n_embd=32, n_layer=2, n_head=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # so that the endings differ clearly
    model.save_pretrained(directory)
    return directory


def test_log_likelihoods_and_scores_equal_the_harness(model_directory, questions):
    """Each ending has the log-likelihood that the harness computes, and acc and acc_norm are equal."""
    task = ConfigurableTask(
        config={
            "task": "local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(questions)}},
            "validation_split": "validation", "output_type": "multiple_choice", "process_docs": process_docs,
            "doc_to_text": "{{query}}", "doc_to_target": "{{label}}", "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(model_directory / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    harness = HFLM(
        pretrained=GPT2LMHeadModel.from_pretrained(model_directory).eval(), tokenizer=tokenizer, batch_size=8
    )
    harness_results = evaluate(harness, {"local": task})
    samples = sorted(harness_results["samples"]["local"], key=lambda sample: sample["doc_id"])
    theirs = torch.tensor([[float(resps[0][0]) for resps in sample["resps"]] for sample in samples])

    model = GPT.from_pretrained(model_directory)
    examples = hellaswag.load_examples(questions, model.tokenizer, "lm-eval")
    ours = -hellaswag.losses(model, examples, CPU, "float32")
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-3)
    scores = hellaswag.evaluate(model, examples, "lm-eval", Ranks(0, 0, 1, CPU), "float32")
    assert scores["acc"].value == pytest.approx(harness_results["results"]["local"]["acc,none"])
    assert scores["acc_norm"].value == pytest.approx(harness_results["results"]["local"]["acc_norm,none"])


@pytest.mark.parametrize("name", ROWS)
def test_tasks_equal_those_of_the_harness(name, model_directory, tmp_path):
    """On an exported model, with the harness's own configuration of each task: equal predictions and losses."""
    exported = tmp_path / "exported"
    exported.mkdir()
    write_model(read_pretrained(model_directory), exported)
    theirs = HFLM(str(exported), device="cpu", dtype="float32", batch_size=4)
    found = compare(name, GPT.from_pretrained(model_directory), theirs, ROWS[name], tmp_path)
    equal, largest, *_ = found.split(" | ")
    assert equal == f"{len(ROWS[name])} of {len(ROWS[name])}"
    assert float(largest) < 1e-3
