"""HellaSwag: losses and predictions compared with a plain implementation, packing, ranks, and downloads."""

import json
import re
from pathlib import Path

import pytest
import torch
from support.helpers import call, save_hellaswag

import hellaswag
from babygpt.data.tokenizer import load_tokenizer
from babygpt.errors import UserError
from babygpt.evaluation import scoring
from babygpt.evaluation.packing import make_segments, pack
from babygpt.training.checkpoint import model_tensors
from babygpt.training.checkpoint import save as save_checkpoint
from babygpt.training.distributed import Ranks
from hellaswag import Score, evaluate, load_examples, losses, predictions, render_example
from model import GPT, build_model, config_from_dict

CPU = torch.device("cpu")
ALONE = Ranks(0, 0, 1, CPU)
ROW = {
    "activity_label": "Cooking [step]", "ctx_a": "[header] How to cook [title] Boil water.", "ctx_b": "THEN add",
    "ctx": "How to cook. Then add", "label": 1,
    "endings": ["salt.", "a [substep] pinch  of salt.", "nothing at all.", "everything."],
}  # fmt: skip


def make_model(block_size: int = 64, **fields: object) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": block_size, "vocab_size": 300, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return build_model(config_from_dict(shape | fields)).eval()


@pytest.fixture
def questions(tmp_path) -> Path:
    return save_hellaswag(tmp_path / "questions.jsonl", 23)


@torch.no_grad()
def plain_losses(model: GPT, example: hellaswag.Example) -> list[float]:
    """Return the loss of each ending, one sequence at a time, without padding, summed in Python."""
    sums = []
    for ending in example.endings:
        tokens = (example.context + ending)[-(model.config.block_size + 1) :]
        logits = model(torch.tensor([tokens[:-1]]))[0, :, : model.config.vocab_size].double()
        log_probabilities = logits.log_softmax(-1)
        start = len(tokens) - len(ending)
        sums.append(-sum(log_probabilities[t - 1, tokens[t]].item() for t in range(start, len(tokens))))
    return sums


MODERN = {
    "rope": True,
    "qk_norm": True,
    "value_embeddings": 1,
    "bigram_tables": 2,
    "partial_key_offset": True,
    "document_mask": True,
    "eot_id": 299,
}


@pytest.mark.parametrize("fields", [{}, MODERN, MODERN | {"window": 6}], ids=["gpt2", "modern", "window"])
@pytest.mark.parametrize("style", ["karpathy", "lm-eval"])
@pytest.mark.parametrize("block_size", [64, 24])
def test_packed_losses_equal_unpacked_losses(style, block_size, fields, dataset, questions, monkeypatch):
    """Losses and predictions are those of a plain implementation, whatever the row length and the batch size."""
    model = make_model(block_size, **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    examples = load_examples(questions, load_tokenizer(dataset), style)
    assert max(len(e.context) + max(map(len, e.endings)) for e in examples) > 24, (
        "with block size 24, some contexts are truncated"
    )
    expected = torch.tensor([plain_losses(model, e) for e in examples])
    means = expected / torch.tensor([e.lengths for e in examples])
    for row_tokens, batch_size in ((512, 16), (256, 1), (256, 3), (32, 2)):  # no segment fits into 32
        monkeypatch.setattr(scoring, "ROW_TOKENS", {"cpu": row_tokens})
        found = losses(model, examples, CPU, "float32", batch_size)
        assert (found - expected).abs().max() < 1e-4
        assert predictions(found, examples) == (expected.argmin(1).tolist(), means.argmin(1).tolist())


def test_packed_rows_are_full_and_have_one_shape(dataset, questions, monkeypatch):
    """Rows are at least 90% full, except for the last one, and a context is in them once, not four times."""
    examples, shapes = load_examples(questions, load_tokenizer(dataset), "karpathy"), []
    rows = pack(make_segments(examples, 64), 512)
    assert sorted(segment.example for row in rows for segment in row) == list(range(23))
    sizes = [sum(segment.size for segment in row) for row in rows]
    assert max(sizes) <= 512
    assert sum(sizes[:-1]) > 0.9 * 512 * len(sizes[:-1])
    unpacked = sum(len(e.context) + len(ending) - 1 for e in examples for ending in e.endings)
    assert sum(sizes) < 0.6 * unpacked
    model = make_model()
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, idx, **rest: shapes.append(idx.shape) or hidden(self, idx, **rest))
    losses(model, examples, CPU, batch_size=1)
    assert set(shapes) == {(1, 256)}


def test_long_segments_have_batches_of_their_own():
    """They do not extend the other rows, and no row is lost."""
    lengths = [30, 5, 70, 8, 20, 6, 66, 7, 9]
    examples = [hellaswag.Example([1] * length, [[2]], 0, [1]) for length in lengths]
    rows = pack(make_segments(examples, 128), 32)
    batches = list(scoring.batched(rows, 3, 32))
    assert [row for batch in batches for row in batch] == rows
    assert [segment.size for row in batches[0] for segment in row] == [70, 66]
    assert max(sum(segment.size for segment in row) for batch in batches[1:] for row in batch) <= 32


def test_long_context_is_truncated_on_the_left(dataset):
    model = make_model(16)
    long = hellaswag.Example(list(range(200)), [[1] * 16, [2] * 10, [3], [4] * 5], 0, [16, 10, 1, 5])
    torch.testing.assert_close(
        losses(model, [long], CPU, "float32")[0], torch.tensor(plain_losses(model, long)).double(), atol=1e-4, rtol=0
    )


def test_long_endings_are_truncated_on_the_left_and_counted():
    """As in lm-evaluation-harness, the last block_size + 1 tokens of the text remain, and all but the first count."""
    model, ending = make_model(16), list(range(5, 25))
    example = hellaswag.Example([1, 2], [ending, ending[:16], [3], [4] * 5], 0, [20, 16, 1, 5])
    cut = hellaswag.Example(ending[3:4], [ending[4:]] * 4, 0, [16] * 4)
    shifted = hellaswag.Example([2], [ending[:16]] * 4, 0, [16] * 4)
    loss_sums = losses(model, [example], CPU, "float32")[0]
    assert loss_sums[0] == pytest.approx(plain_losses(model, cut)[0], abs=1e-4)
    assert loss_sums[1] == pytest.approx(plain_losses(model, shifted)[0], abs=1e-4)
    scores = evaluate(model, [example], "karpathy", ALONE, "float32")
    assert str(scores["acc"]).endswith(" (1 ending truncated to the block size)")


def test_mean_loss_of_a_truncated_ending_uses_scored_tokens(monkeypatch):
    example = hellaswag.Example([1], [[1] * 32, [1] * 8, [1], [1]], 1, [32, 8, 1, 1])
    monkeypatch.setattr(hellaswag, "losses", lambda *_: torch.tensor([[32.0, 12.0, 9.0, 9.0]]))  # means 2, 1.5, 9, 9
    assert evaluate(make_model(16), [example], "karpathy", ALONE)["acc_norm"].correct == 1


def test_ranks_together_score_every_example_once(dataset, questions, monkeypatch):
    model, examples = make_model(), load_examples(questions, load_tokenizer(dataset), "karpathy")
    expected = evaluate(model, examples, "karpathy", ALONE, "float32")
    assert expected["acc"].total == 23
    for world_size in (2, 3, 4):
        sums: list[list[float]] = []
        monkeypatch.setattr(Ranks, "sum", lambda self, values, sums=sums: sums.append(values) or [0, 0, 23, 0])
        for rank in range(world_size):
            evaluate(model, examples, "karpathy", Ranks(rank, rank, world_size, CPU), "float32", batch_size=3)
        assert [sum(column) for column in zip(*sums, strict=True)] == [*(s.correct for s in expected.values()), 23, 0]


def test_vocabulary_padding_does_not_change_losses(dataset, questions):
    model = make_model()
    examples = load_examples(questions, load_tokenizer(dataset), "karpathy")
    before = losses(model, examples, CPU)
    with torch.no_grad():
        model.wte.weight[300:] = 100.0
    assert torch.equal(losses(model, examples, CPU), before)


def test_label_may_be_a_string(dataset, questions):
    questions.write_text(questions.read_text().replace('"label": 1', '"label": "1"'))
    assert load_examples(questions, load_tokenizer(dataset), "karpathy")[1].label == 1


def test_karpathy_style_uses_the_texts_unchanged(dataset):
    tokenizer = load_tokenizer(dataset)
    example = render_example(ROW, tokenizer, "karpathy")
    assert tokenizer.decode(example.context) == "How to cook. Then add"
    assert [tokenizer.decode(e) for e in example.endings] == [" " + ending for ending in ROW["endings"]]
    assert example.lengths == [len(e) for e in example.endings]


def test_lm_eval_style_preprocesses_like_the_harness(dataset):
    # expected values derived by hand from lm_eval/tasks/hellaswag/utils.py: strip, replace " [title]" by ". ", remove
    # brackets, replace two spaces by one
    tokenizer = load_tokenizer(dataset)
    example = render_example(ROW, tokenizer, "lm-eval")
    assert tokenizer.decode(example.context) == "Cooking : How to cook. Boil water. Then add"
    assert [tokenizer.decode(e) for e in example.endings] == [
        " salt.", " a pinch of salt.", " nothing at all.", " everything.",
    ]  # fmt: skip
    assert example.lengths == [len("salt."), len("a pinch of salt."), len("nothing at all."), len("everything.")]


def test_predictions_by_sum_and_by_mean_may_differ():
    example = hellaswag.Example([1], [[1], [1, 1], [1] * 4, [1]], 0, [1, 2, 4, 1])
    assert predictions(torch.tensor([[3.0, 5.0, 6.0, 3.5]]).double(), [example]) == ([0], [2])


def test_rank_without_examples_contributes_zero(dataset, questions):
    examples = load_examples(questions, load_tokenizer(dataset), "karpathy", limit=1)
    sums: list[list[float]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ranks, "sum", lambda self, values: sums.append(values) or [0, 0, 1, 0])
        evaluate(make_model(), examples, "karpathy", Ranks(1, 1, 2, CPU))
    assert sums == [[0, 0, 0, 0]]


def test_score_shows_method_and_standard_error():
    assert str(Score("karpathy acc_norm", 2957, 10042)) == "hellaswag karpathy acc_norm 2957/10042=0.2945 +-0.0045"


def test_evaluation_restores_mode_and_keeps_no_gradient(dataset, questions):
    model = make_model(dropout=0.5)
    examples = load_examples(questions, load_tokenizer(dataset), "karpathy", limit=4)
    model.train()
    scores = [evaluate(model, examples, "karpathy", ALONE)["acc_norm"] for _ in range(3)]
    assert model.training
    assert len(set(scores)) == 1, "evaluation runs without dropout"
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "line",
    ["{", '{"ctx": "a"}', '{"ctx": "a", "label": 4, "endings": ["a", "b", "c", "d"]}',
     '{"ctx": "a", "label": 0, "endings": ["a", "b"]}', '{"ctx": "a", "label": 0, "endings": ["a", "b", "c", ""]}',
     "[]"],
)  # fmt: skip
def test_invalid_line_is_reported_by_number(line, dataset, questions):
    questions.write_text(questions.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"questions.jsonl, line 24 is not a HellaSwag example"):
        load_examples(questions, load_tokenizer(dataset), "karpathy")


# ---------------------------------------------------------------------------------------------------------
# downloading


def test_english_file_with_wrong_sha256_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(hellaswag, "DATA_DIRECTORY", tmp_path)
    save_hellaswag(tmp_path / "hellaswag_val.jsonl", 3)
    with pytest.raises(UserError, match=r"hellaswag_val.jsonl is not HellaSwag's validation set"):
        hellaswag.fetch(None, "en")


def test_hub_rows_are_converted_to_the_authors_format():
    rows = [
        {"ind": 24, "activity_label": "Roof", "ctx_a": "A man.", "ctx_b": "he", "ctx": "A man. he",
         "endings": list("abcd"), "source_id": "activitynet~v_1", "split": "val", "split_type": "indomain",
         "label": "3"},
        {"ind": 1, "activity_label": "Style", "ctx_a": "x", "ctx_b": "", "ctx": "x", "endings": list("abcd"),
         "source_id": "wikihow~1", "split": "val", "split_type": "zeroshot", "label": "0"},
    ]  # fmt: skip
    lines = [json.dumps(row) for row in hellaswag._restore_format(rows)]
    assert lines[0].startswith(
        '{"ind": 24, "activity_label": "Roof", "ctx_a": "A man.", "ctx_b": "he", "ctx": "A man. he",'
    )
    assert lines[0].endswith('"label": 3, "endings": ["a", "b", "c", "d"], "source_id": "activitynet~v_1"}')
    assert lines[1].startswith('{"ind": 1, "ctx": "x", "activity_label": "Style", "ctx_a": "x", "ctx_b": "", "split"')


def test_script_prints_one_line_per_metric(dataset, questions, tmp_path, capsys):
    model = make_model()
    state = {"step": 1, "model": vars(model.config), "tokenizer": {"name": "tokenizer.json"}}
    save_checkpoint(tmp_path / "run", 1, model_tensors(model), {}, state, keep=0)
    (tmp_path / "run" / "tokenizer.json").write_bytes((dataset / "tokenizer.json").read_bytes())
    call(hellaswag.main, tmp_path / "run", "--file", questions, "--style", "lm-eval", "--limit", 7)
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\d+/7=.*", "", line) for line in lines] == [
        "hellaswag lm-eval acc ",
        "hellaswag lm-eval acc_norm ",
    ]
