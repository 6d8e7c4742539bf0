"""quality.py: the score is what it says, and is learnt from nothing but the documents that are not held out."""

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
from tools.train_quality_filter import frequencies, learn, measure
from tools.train_tokenizer import train_tokenizer

VOCABULARY = 500


def made_up(kind: str, count: int, seed: int = 0) -> list[str]:
    """Documents of words that both kinds have and a few that are the kind's."""
    rng = random.Random(f"{kind} {seed}")
    words = "the of and in to is was that for with on as by at from it an be this are or".split()  # noqa: SIM905
    own = {"good": ["theorem", "century", "species"], "other": ["click", "subscribe", "cheap"]}[kind]
    return [" ".join(rng.choices(words * 2 + own, k=rng.randint(20, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sides")
    return {kind: save_jsonl(folder / f"{kind}.jsonl", made_up(kind, 60)) for kind in ("good", "other")}


def train(sides: dict[str, Path], out: Path, *options) -> QualityModel:
    call(train_quality_filter.main, "--good", sides["good"], "--other", sides["other"], "--out", out, *options)
    return QualityModel.load(out)


@pytest.fixture(scope="module")
def learnt(sides, tmp_path_factory) -> QualityModel:
    return train(sides, tmp_path_factory.mktemp("model") / "m.safetensors")


@pytest.fixture(scope="module")
def made() -> QualityModel:
    """A model of random weights."""
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=VOCABULARY).astype(np.float32)
    pairs = rng.normal(size=1 << BIGRAM_BITS).astype(np.float32)
    return QualityModel(Path("m"), tokens, pairs, 0.3, "gpt2", "0" * 64, {}, "")


def ids(sizes: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, size).astype(np.uint32) for size in sizes]


# ---------------------------------------------------------------------------------------------------------
# the score


def plainly(model: QualityModel, document: list[int]) -> float:
    """The score in its plainest form: a document, a token at a time."""
    total = sum(float(model.token_weights[token]) for token in document)
    for left, right in itertools.pairwise(document):
        bucket = (left * 0x9E3779B1 + right * 0x85EBCA6B) % 2**32 // 2 ** (32 - BIGRAM_BITS)
        total += float(model.bigram_weights[bucket])
    return 1 / (1 + math.exp(-(model.bias + total / max(len(document), 1))))


@pytest.mark.parametrize("sizes", [[], [0], [1], [0, 0, 5, 0, 1, 300, 2, 0], [7] * 40, [20_000, 3]])
def test_a_score_is_that_of_the_plain_sum_over_tokens_and_pairs(made, sizes):
    documents = ids(sizes)
    scores = made.score(documents)
    assert (scores.dtype, scores.shape) == (np.float32, (len(sizes),))
    np.testing.assert_allclose(scores, [plainly(made, d.tolist()) for d in documents], rtol=0, atol=1e-5)


def test_a_document_scores_the_same_to_the_bit_whatever_stands_beside_it(made):
    documents = ids([3, 0, 900, 1, 0, 17])
    alone = np.concatenate([made.score([document]) for document in documents])
    assert made.score(documents).tolist() == alone.tolist()
    assert made.score(documents[::-1]).tolist() == alone[::-1].tolist()


def test_any_weights_give_a_score_from_0_to_1(made):
    for bias in (-1e4, 1e4):
        with np.errstate(all="raise", under="ignore"):
            assert replace(made, bias=bias).score(ids([3])).tolist() == [float(bias > 0)]


def test_a_token_outside_the_vocabulary_is_no_score(made):
    with pytest.raises(IndexError):
        made.score([np.array([VOCABULARY], np.uint32)])


def test_pairs_spread_over_all_buckets_and_know_their_order():
    left, right = (grid.ravel().astype(np.uint32) for grid in np.meshgrid(range(1024), range(1024)))
    buckets = hash_bigrams(np.stack([left, right], axis=1).ravel())[::2]  # of the pairs, not of what lies between them
    counts = np.bincount(buckets, minlength=1 << BIGRAM_BITS)  # 2^20 pairs of neighbouring ids, the hardest case
    assert len(counts) == 1 << BIGRAM_BITS
    assert np.count_nonzero(counts) > 0.97 * len(counts)  # of random numbers 1 - exp(-4) = 0.982
    assert counts.max() <= 20  # 4 on the average
    assert hash_bigrams(np.array([1, 2], np.uint32)) != hash_bigrams(np.array([2, 1], np.uint32))


def test_what_is_learnt_from_is_what_is_scored(made):
    documents = ids([30, 1, 200])
    rows = frequencies(documents, VOCABULARY)
    logits = rows @ np.concatenate([made.token_weights, made.bigram_weights]) + made.bias
    np.testing.assert_allclose(made.score(documents), 1 / (1 + np.exp(-logits)), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# learning


def test_documents_it_has_never_seen_are_told_apart(learnt):
    encoder = load_tokenizer("gpt2")
    good, other = (
        learnt.score(encoder.encode_batch([text.encode() for text in made_up(kind, 40, seed=1)]))
        for kind in ("good", "other")
    )
    assert np.mean(good > 0.5) > 0.9
    assert np.mean(other < 0.5) > 0.9
    assert learnt.score(encoder.encode_batch([b"the theorem of the century"])) > 0.9


def of_weights(weights: dict[str, np.ndarray]) -> QualityModel:
    return QualityModel(Path("m"), weights["tokens"], weights["pairs"], float(weights["bias"][0]), "", "", {}, "")


def test_the_order_of_words_counts():
    one, two = np.array([1, 2, 3] * 5, np.uint32), np.array([3, 2, 1] * 5, np.uint32)
    good, other = of_weights(learn([one] * 20, [two] * 20, 10)).score([one, two])
    assert good > 0.9 > 0.1 > other


def test_scores_are_the_chances_of_being_good_were_both_sides_equally_many():
    """The likeliest weights are those for which no feature says more: on the balance it stands as often in good text
    as the scores expect."""
    rng = np.random.default_rng(0)
    good = [rng.choice(2, 20, p=[0.2, 0.8]).astype(np.uint32) for _ in range(300)]
    other = [rng.choice(2, 20, p=[0.3, 0.7]).astype(np.uint32) for _ in range(3000)]
    model = of_weights(learn(good, other, 2))
    of_good, of_other = model.score(good), model.score(other)
    assert of_good.mean() + of_other.mean() == pytest.approx(1, abs=0.01)
    missed = np.mean([(1 - score) * d.mean() for score, d in zip(of_good, good, strict=True)])
    wrong = np.mean([score * d.mean() for score, d in zip(of_other, other, strict=True)])
    assert missed == pytest.approx(wrong, abs=0.003)
    assert of_good.mean() > of_other.mean() + 0.1


def test_learning_again_from_files_in_another_order_gives_the_same_bytes(sides, learnt, tmp_path):
    rng = random.Random(1)
    mixed = {}
    for kind, path in sides.items():
        lines = path.read_bytes().splitlines(keepends=True)
        rng.shuffle(lines)
        save(tmp_path / kind / "a.jsonl", b"".join(lines[:25]))
        save(tmp_path / kind / "b.jsonl.gz", b"".join(lines[25:] + lines[20:30]))  # some twice
        mixed[kind] = tmp_path / kind
    assert train(mixed, tmp_path / "m").sha256 == learnt.sha256
    fewer = ("--max-documents", 40)
    assert train(mixed, tmp_path / "m", *fewer).sha256 == train(sides, tmp_path / "m", *fewer).sha256 != learnt.sha256


def test_a_sample_comes_from_the_whole_source_and_not_from_its_beginning(sides):
    texts = made_up("good", 60)
    source = find("files", (str(sides["good"]),))
    places = [texts.index(text.decode()) for text in train_quality_filter._sample(source, 20).values()]
    assert len(places) == 20
    assert sum(place < 20 for place in places) < 15


def test_held_out_documents_are_never_learnt_from(sides, learnt, tmp_path, monkeypatch):
    learning, scored = {}, []

    def watched_learn(good, other, vocab_size):
        learning.update(good=good, other=other)
        return learn(good, other, vocab_size)

    def watched_score(model, documents):
        scored.append(documents)
        return score(model, documents)

    score = QualityModel.score
    monkeypatch.setattr(train_quality_filter, "learn", watched_learn)
    monkeypatch.setattr(QualityModel, "score", watched_score)
    assert train(sides, tmp_path / "m").sha256 == learnt.sha256
    held_out = dict(zip(("good", "other"), scored, strict=True))
    for kind in ("good", "other"):
        inside, outside = ({tuple(d.tolist()) for d in found[kind]} for found in (learning, held_out))
        assert (len(inside), len(outside)) == (54, 6)
        assert not inside & outside


def test_the_figures_in_the_file_are_those_of_the_held_out_documents_and_are_printed(sides, learnt, capsys, tmp_path):
    train(sides, tmp_path / "m")
    out = capsys.readouterr().out
    figures = learnt.metrics
    assert figures["learnt_from"] == {"good": 54, "other": 54}
    assert f"AUC {figures['auc']:.5f}" in out
    assert [row["quality"] for row in figures["thresholds"]] == [i / 10 for i in range(1, 10)]
    tops = figures["heaviest_tokens"]
    assert any("theorem" in token for token in tops["good"])
    assert " click" in tops["other"]
    assert repr(" click") in out


def test_precision_is_that_of_equally_many_documents():
    figures = measure(np.float32([0.95, 0.55, 0.15]), np.float32([0.35, 0.05, 0.05, 0.05, 0.05, 0.05]))
    rows = {row["quality"]: row for row in figures["thresholds"]}
    assert rows[0.1]["good_kept"] == 1
    assert rows[0.1]["other_kept"] == pytest.approx(1 / 6)
    assert rows[0.1]["precision"] == pytest.approx(6 / 7)
    assert rows[0.6] == {"quality": 0.6, "precision": 1, "good_kept": pytest.approx(1 / 3), "other_kept": 0}
    assert figures["auc"] == pytest.approx(17 / 18)
    assert measure(np.float32([0.05]), np.float32([0.05]))["thresholds"][0]["precision"] is None


# ---------------------------------------------------------------------------------------------------------
# what is refused


def test_documents_on_both_sides_teach_nothing(sides, tmp_path):
    both = made_up("good", 5, seed=7)
    mixed = {k: save_jsonl(tmp_path / f"{k}.jsonl", [*made_up(k, 60), *both]) for k in ("good", "other")}
    model = train(mixed, tmp_path / "m")
    assert model.metrics["on_both_sides"] == 5
    assert np.array_equal(model.bigram_weights, train(sides, tmp_path / "n").bigram_weights)


def test_a_file_on_both_sides_is_refused_by_name(sides, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(sides["good"])
    with pytest.raises(UserError, match=r"both name .*good\.jsonl"):
        train({"good": sides["good"].parent, "other": tmp_path / "link.jsonl"}, tmp_path / "m")


def test_too_few_documents_are_refused(sides, tmp_path):
    few = save_jsonl(tmp_path / "few.jsonl", [*made_up("good", 19), "", "  "])
    with pytest.raises(UserError, match="--good has 19 documents, at least 20"):
        train(sides | {"good": few}, tmp_path / "m")
    copy = save(tmp_path / "copy.jsonl", sides["good"].read_bytes())
    with pytest.raises(UserError, match="--good has 0 documents that are not on the other side too"):
        train({"good": sides["good"], "other": copy}, tmp_path / "m")
    with pytest.raises(UserError, match="--max-documents 19 is out of range"):
        train(sides, tmp_path / "m", "--max-documents", 19)
    assert not (tmp_path / "m").exists()


def test_a_mistake_in_the_paths_names_the_flag(sides, tmp_path):
    with pytest.raises(UserError, match=r"--other .*none\.txt matches no file"):
        train(sides | {"other": tmp_path / "none.txt"}, tmp_path / "m")


def test_a_model_of_another_tokenizer_is_refused_and_both_are_named(sides, learnt, tmp_path):
    trained = train_tokenizer(made_up("good", 60), 300, tmp_path / "own.json", progress=False)
    check_tokenizer(learnt, load_tokenizer("gpt2"))
    with pytest.raises(UserError, match=rf"of gpt2 \(sha256 306cd27f03c1\).*own\.json \(sha256 {trained.sha256[:12]}"):
        check_tokenizer(learnt, trained)
    own = train(sides, tmp_path / "m", "--tokenizer", tmp_path / "own.json")
    assert own.token_weights.shape == (300,)
    check_tokenizer(own, trained)
    with pytest.raises(UserError, match=r"of tokenizer\.json .* the tokenizer is .*more\.json"):
        check_tokenizer(own, train_tokenizer(made_up("good", 60), 310, tmp_path / "more.json", progress=False))
    with pytest.raises(UserError, match="--tokenizer gpt2"):
        check_tokenizer(own, load_tokenizer("gpt2"))


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 100])
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path, content):
    with pytest.raises(UserError, match=r"odd is not a quality model.*tools\.train_quality_filter"):
        QualityModel.load(save(tmp_path / "odd", content))


def test_other_weights_and_missing_files_are_refused_by_name(learnt, tmp_path):
    for about in (None, {"quality": "{}"}, {"quality": "[]"}, {"quality": json.dumps({"format": 2})}):
        save_file(load_file(learnt.path), tmp_path / "odd", about)
        with pytest.raises(UserError, match="odd is not a quality model"):
            QualityModel.load(tmp_path / "odd")
    with safe_open(learnt.path, "numpy") as file:
        about = json.loads(file.metadata()["quality"])
    save_file(load_file(learnt.path), tmp_path / "odd", {"quality": json.dumps(about | {"format": 2})})
    with pytest.raises(UserError, match="its format is 2"):
        QualityModel.load(tmp_path / "odd")
    save_file({"wte.weight": np.zeros(3, np.float32)}, tmp_path / "odd", {"quality": json.dumps({"format": 1})})
    with pytest.raises(UserError, match="odd is not a quality model"):
        QualityModel.load(tmp_path / "odd")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            QualityModel.load(path)


def test_a_damaged_model_is_refused(learnt, tmp_path):
    data = bytearray(learnt.path.read_bytes())
    data[-5] ^= 1
    with pytest.raises(UserError, match="the sha256 of its weights is wrong"):
        QualityModel.load(save(tmp_path / "m", bytes(data)))
    with pytest.raises(UserError, match="is not a quality model"):
        QualityModel.load(save(tmp_path / "m", bytes(data[:-100])))


def test_a_model_goes_to_another_process_whole(learnt):
    there, documents = pickle.loads(pickle.dumps(learnt)), ids([5, 50])
    assert there.sha256 == learnt.sha256
    assert there.score(documents).tolist() == learnt.score(documents).tolist()
