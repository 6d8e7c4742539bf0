"""quality.py and tools.train_quality_filter: scores, training on all documents but the held-out ones, and errors."""

import itertools
import json
import math
import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.helpers import call, save, save_jsonl

from babygpt.data.quality import BIGRAM_BITS, QualityModel, check_tokenizer, hash_bigrams
from babygpt.data.sources import find
from babygpt.data.tokenizer import load_tokenizer
from babygpt.errors import UserError
from tools import train_quality_filter
from tools.train_quality_filter import compute_frequencies, compute_metrics, train_classifier
from tools.train_tokenizer import train_tokenizer

VOCAB_SIZE = 500


def make_texts(kind: str, count: int, seed: int = 0) -> list[str]:
    """Return texts of words that both classes use and a few that only one class uses."""
    rng = random.Random(f"{kind} {seed}")
    words = "the of and in to is was that for with on as by at from it an be this are or".split()  # noqa: SIM905
    own = {"good": ["theorem", "century", "species"], "other": ["click", "subscribe", "cheap"]}[kind]
    return [" ".join(rng.choices(words * 2 + own, k=rng.randint(20, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """Files of good and other texts."""
    directory = tmp_path_factory.mktemp("inputs")
    return {kind: save_jsonl(directory / f"{kind}.jsonl", make_texts(kind, 60)) for kind in ("good", "other")}


def train(inputs: dict[str, Path], out: Path, *options) -> QualityModel:
    call(train_quality_filter.main, "--good", inputs["good"], "--other", inputs["other"], "--out", out, *options)
    return QualityModel.load(out)


@pytest.fixture(scope="module")
def trained_model(inputs, tmp_path_factory) -> QualityModel:
    return train(inputs, tmp_path_factory.mktemp("model") / "m.safetensors")


@pytest.fixture(scope="module")
def random_model() -> QualityModel:
    """A model of random weights."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=VOCAB_SIZE).astype(np.float32)
    bigram_weights = rng.normal(size=1 << BIGRAM_BITS).astype(np.float32)
    return QualityModel(Path("m"), tokens, bigram_weights, 0.3, "gpt2", "0" * 64, {}, "")


def make_ids(sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB_SIZE, size).astype(np.uint32) for size in sizes]


# ---------------------------------------------------------------------------------------------------------
# scores


def reference_score(model: QualityModel, document: list[int]) -> float:
    """Return the score of a document, computed one token at a time."""
    total = sum(float(model.token_weights[token]) for token in document)
    for left, right in itertools.pairwise(document):
        bucket = (left * 0x9E3779B1 + right * 0x85EBCA6B) % 2**32 // 2 ** (32 - BIGRAM_BITS)
        total += float(model.bigram_weights[bucket])
    return 1 / (1 + math.exp(-(model.bias + total / max(len(document), 1))))


@pytest.mark.parametrize("sizes", [[], [0], [1], [0, 0, 5, 0, 1, 300, 2, 0], [7] * 40, [20_000, 3]])
def test_score_equals_the_reference(random_model, sizes):
    documents = make_ids(sizes)
    scores = random_model.score(documents)
    assert (scores.dtype, scores.shape) == (np.float32, (len(sizes),))
    expected = [reference_score(random_model, document.tolist()) for document in documents]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def test_score_does_not_depend_on_other_documents(random_model):
    """A document has bitwise the same score alone and in a batch of any order."""
    documents = make_ids([3, 0, 900, 1, 0, 17])
    alone = np.concatenate([random_model.score([document]) for document in documents])
    assert random_model.score(documents).tolist() == alone.tolist()
    assert random_model.score(documents[::-1]).tolist() == alone[::-1].tolist()


def test_extreme_weights_score_0_or_1(random_model):
    for bias in (-1e4, 1e4):
        with np.errstate(all="raise", under="ignore"):
            assert replace(random_model, bias=bias).score(make_ids([3])).tolist() == [float(bias > 0)]


def test_token_outside_the_vocabulary_raises_index_error(random_model):
    with pytest.raises(IndexError):
        random_model.score([np.array([VOCAB_SIZE], np.uint32)])


def test_bigram_hash_is_uniform_and_depends_on_order():
    left, right = (grid.ravel().astype(np.uint32) for grid in np.meshgrid(range(1024), range(1024)))
    buckets = hash_bigrams(np.stack([left, right], axis=1).ravel())[::2]  # of the pairs, not of those between them
    counts = np.bincount(buckets, minlength=1 << BIGRAM_BITS)  # 2^20 bigrams of consecutive ids, the hardest case
    assert len(counts) == 1 << BIGRAM_BITS
    assert np.count_nonzero(counts) > 0.97 * len(counts)  # for random numbers 1 - exp(-4) = 0.982
    assert counts.max() <= 20  # the mean is 4
    assert hash_bigrams(np.array([1, 2], np.uint32)) != hash_bigrams(np.array([2, 1], np.uint32))


def test_training_features_agree_with_the_score(random_model):
    """The features that training uses, times the weights of a model, give its scores."""
    documents = make_ids([30, 1, 200])
    rows = compute_frequencies(documents, VOCAB_SIZE)
    logits = rows @ np.concatenate([random_model.token_weights, random_model.bigram_weights]) + random_model.bias
    np.testing.assert_allclose(random_model.score(documents), 1 / (1 + np.exp(-logits)), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# training


def test_unseen_documents_are_classified(trained_model):
    tokenizer = load_tokenizer("gpt2")
    good, other = (
        trained_model.score(tokenizer.encode_batch([text.encode() for text in make_texts(kind, 40, seed=1)]))
        for kind in ("good", "other")
    )
    assert np.mean(good > 0.5) > 0.9
    assert np.mean(other < 0.5) > 0.9
    assert trained_model.score(tokenizer.encode_batch([b"the theorem of the century"])) > 0.9


def make_model(weights: dict[str, np.ndarray]) -> QualityModel:
    return QualityModel(Path("m"), weights["tokens"], weights["pairs"], float(weights["bias"][0]), "", "", {}, "")


def test_word_order_is_a_feature():
    forward, backward = np.array([1, 2, 3] * 5, np.uint32), np.array([3, 2, 1] * 5, np.uint32)
    model = make_model(train_classifier([forward] * 20, [backward] * 20, 10))
    good, other = model.score([forward, backward])
    assert good > 0.9 > 0.1 > other


def test_scores_are_probabilities_for_balanced_classes():
    """At the maximum of the likelihood, each feature has the same weighted mean in the good documents as the scores
    predict, if both classes have the same total weight."""
    rng = np.random.default_rng(0)
    good = [rng.choice(2, 20, p=[0.2, 0.8]).astype(np.uint32) for _ in range(300)]
    other = [rng.choice(2, 20, p=[0.3, 0.7]).astype(np.uint32) for _ in range(3000)]
    model = make_model(train_classifier(good, other, 2))
    good_scores, other_scores = model.score(good), model.score(other)
    assert good_scores.mean() + other_scores.mean() == pytest.approx(1, abs=0.01)
    missed = np.mean([(1 - score) * d.mean() for score, d in zip(good_scores, good, strict=True)])
    wrong = np.mean([score * d.mean() for score, d in zip(other_scores, other, strict=True)])
    assert missed == pytest.approx(wrong, abs=0.003)
    assert good_scores.mean() > other_scores.mean() + 0.1


def test_model_does_not_depend_on_the_order_of_documents(inputs, trained_model, tmp_path):
    """Shuffled documents, in several files and with duplicates, give the same bytes."""
    rng = random.Random(1)
    shuffled = {}
    for kind, path in inputs.items():
        lines = path.read_bytes().splitlines(keepends=True)
        rng.shuffle(lines)
        save(tmp_path / kind / "a.jsonl", b"".join(lines[:25]))
        save(tmp_path / kind / "b.jsonl.gz", b"".join(lines[25:] + lines[20:30]))  # some twice
        shuffled[kind] = tmp_path / kind
    assert train(shuffled, tmp_path / "m").sha256 == trained_model.sha256
    fewer = ("--max-documents", 40)
    models = [train(files, tmp_path / "m", *fewer) for files in (shuffled, inputs)]
    assert models[0].sha256 == models[1].sha256 != trained_model.sha256


def test_sample_covers_the_complete_source(inputs):
    """--max-documents samples by hash, not from the start of the source."""
    texts = make_texts("good", 60)
    source = find("files", (str(inputs["good"]),))
    indices = [texts.index(text.decode()) for text in train_quality_filter.sample_documents(source, 20).values()]
    assert len(indices) == 20
    assert sum(index < 20 for index in indices) < 15


def test_held_out_documents_are_not_trained_on(inputs, trained_model, tmp_path, monkeypatch):
    training, scored = {}, []

    def recording_train_classifier(good, other, vocab_size):
        training.update(good=good, other=other)
        return train_classifier(good, other, vocab_size)

    def recording_score(model, documents):
        scored.append(documents)
        return score(model, documents)

    score = QualityModel.score
    monkeypatch.setattr(train_quality_filter, "train_classifier", recording_train_classifier)
    monkeypatch.setattr(QualityModel, "score", recording_score)
    assert train(inputs, tmp_path / "m").sha256 == trained_model.sha256
    held_out = dict(zip(("good", "other"), scored, strict=True))
    for kind in ("good", "other"):
        trained_on, tested_on = ({tuple(d.tolist()) for d in documents[kind]} for documents in (training, held_out))
        assert (len(trained_on), len(tested_on)) == (54, 6)
        assert not trained_on & tested_on


def test_metrics_are_stored_and_printed(inputs, trained_model, capsys, tmp_path):
    train(inputs, tmp_path / "m")
    out = capsys.readouterr().out
    metrics = trained_model.metrics
    assert metrics["learnt_from"] == {"good": 54, "other": 54}
    assert f"AUC {metrics['auc']:.5f}" in out
    assert [row["quality"] for row in metrics["thresholds"]] == [i / 10 for i in range(1, 10)]
    top_tokens = metrics["heaviest_tokens"]
    assert any("theorem" in token for token in top_tokens["good"])
    assert " click" in top_tokens["other"]
    assert repr(" click") in out


def test_precision_is_that_of_balanced_classes():
    metrics = compute_metrics(np.float32([0.95, 0.55, 0.15]), np.float32([0.35, 0.05, 0.05, 0.05, 0.05, 0.05]))
    rows = {row["quality"]: row for row in metrics["thresholds"]}
    assert rows[0.1]["good_kept"] == 1
    assert rows[0.1]["other_kept"] == pytest.approx(1 / 6)
    assert rows[0.1]["precision"] == pytest.approx(6 / 7)
    assert rows[0.6] == {"quality": 0.6, "precision": 1, "good_kept": pytest.approx(1 / 3), "other_kept": 0}
    assert metrics["auc"] == pytest.approx(17 / 18)
    assert compute_metrics(np.float32([0.05]), np.float32([0.05]))["thresholds"][0]["precision"] is None


# ---------------------------------------------------------------------------------------------------------
# errors


def test_documents_of_both_classes_are_dropped(inputs, tmp_path):
    shared = make_texts("good", 5, seed=7)
    overlapping = {k: save_jsonl(tmp_path / f"{k}.jsonl", [*make_texts(k, 60), *shared]) for k in ("good", "other")}
    model = train(overlapping, tmp_path / "m")
    assert model.metrics["on_both_sides"] == 5
    assert np.array_equal(model.bigram_weights, train(inputs, tmp_path / "n").bigram_weights)


def test_file_of_both_classes_is_a_user_error(inputs, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(inputs["good"])
    with pytest.raises(UserError, match=r"both contain .*good\.jsonl"):
        train({"good": inputs["good"].parent, "other": tmp_path / "link.jsonl"}, tmp_path / "m")


def test_too_few_documents_are_a_user_error(inputs, tmp_path):
    few = save_jsonl(tmp_path / "few.jsonl", [*make_texts("good", 19), "", "  "])
    with pytest.raises(UserError, match="--good has 19 documents, but at least 20"):
        train(inputs | {"good": few}, tmp_path / "m")
    copy = save(tmp_path / "copy.jsonl", inputs["good"].read_bytes())
    with pytest.raises(UserError, match="--good has 0 documents that are not also in the other sample"):
        train({"good": inputs["good"], "other": copy}, tmp_path / "m")
    with pytest.raises(UserError, match="--max-documents 19 is out of range"):
        train(inputs, tmp_path / "m", "--max-documents", 19)
    assert not (tmp_path / "m").exists()


def test_wrong_path_is_a_user_error_with_its_flag(inputs, tmp_path):
    with pytest.raises(UserError, match=r"--other .*none\.txt matches no file"):
        train(inputs | {"other": tmp_path / "none.txt"}, tmp_path / "m")


def test_model_trained_with_other_tokenizer_is_user_error(inputs, trained_model, tmp_path):
    """The message names both tokenizers."""
    tokenizer = train_tokenizer(make_texts("good", 60), 300, tmp_path / "own.json", progress=False)
    check_tokenizer(trained_model, load_tokenizer("gpt2"))
    names = rf"tokenizer gpt2 \(sha256 306cd27f03c1\).*own\.json \(sha256 {tokenizer.sha256[:12]}"
    with pytest.raises(UserError, match=names):
        check_tokenizer(trained_model, tokenizer)
    model = train(inputs, tmp_path / "m", "--tokenizer", tmp_path / "own.json")
    assert model.token_weights.shape == (300,)
    check_tokenizer(model, tokenizer)
    with pytest.raises(UserError, match=r"tokenizer tokenizer\.json .* the dataset uses .*more\.json"):
        check_tokenizer(model, train_tokenizer(make_texts("good", 60), 310, tmp_path / "more.json", progress=False))
    with pytest.raises(UserError, match="--tokenizer gpt2"):
        check_tokenizer(model, load_tokenizer("gpt2"))


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 100])
def test_other_file_is_a_user_error(tmp_path, content):
    with pytest.raises(UserError, match=r"odd is not a quality model.*tools\.train_quality_filter"):
        QualityModel.load(save(tmp_path / "odd", content))


def test_other_weights_and_missing_files_are_user_errors(trained_model, tmp_path):
    for metadata in (None, {"quality": "{}"}, {"quality": "[]"}, {"quality": json.dumps({"format": 1})}):
        save_file(load_file(trained_model.path), tmp_path / "odd", metadata)
        with pytest.raises(UserError, match="odd is not a quality model"):
            QualityModel.load(tmp_path / "odd")
    with safe_open(trained_model.path, "numpy") as file:
        metadata = json.loads(file.metadata()["quality"])
    save_file(load_file(trained_model.path), tmp_path / "odd", {"quality": json.dumps(metadata | {"format": 2})})
    with pytest.raises(UserError, match="has format 2, but"):
        QualityModel.load(tmp_path / "odd")
    save_file({"wte.weight": np.zeros(3, np.float32)}, tmp_path / "odd", {"quality": json.dumps({"format": 1})})
    with pytest.raises(UserError, match="odd is not a quality model"):
        QualityModel.load(tmp_path / "odd")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            QualityModel.load(path)


def test_corrupted_model_is_a_user_error(trained_model, tmp_path):
    data = bytearray(trained_model.path.read_bytes())
    data[-5] ^= 1
    with pytest.raises(UserError, match="the sha256 of its weights is wrong"):
        QualityModel.load(save(tmp_path / "m", bytes(data)))
    with pytest.raises(UserError, match="is not a quality model"):
        QualityModel.load(save(tmp_path / "m", bytes(data[:-100])))


def test_model_can_be_pickled(trained_model):
    """Worker processes receive the model by pickling."""
    loaded, documents = pickle.loads(pickle.dumps(trained_model)), make_ids([5, 50])
    assert loaded.sha256 == trained_model.sha256
    assert loaded.score(documents).tolist() == trained_model.score(documents).tolist()
