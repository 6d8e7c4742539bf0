"""Train a quality filter: a classifier that separates documents like a sample of good text from other documents.

    python -m tools.train_quality_filter --good wikipedia-pl/ books.jsonl.gz --other pages.jsonl.gz \\
        --tokenizer data/pl.json --out data/pl-quality.safetensors
    python fineweb.py fineweb2-pl --tokenizer data/pl.json --quality data/pl-quality.safetensors --min-quality 0.5

It works for any language. One tenth of the documents is held out, and the scores on these are printed. Requires
scikit-learn.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge
from xxhash import xxh3_128_digest

from babygpt import files
from babygpt.constraints import Name, metavar, parse_arguments
from babygpt.data.quality import BIGRAM_BITS, FORMAT, QualityModel, hash_bigrams, weights_sha256
from babygpt.data.sources import find, read_documents
from babygpt.data.tokenizer import Tokenizer, load_tokenizer
from babygpt.errors import UserError, run

LEAST_DOCUMENTS = 20  # a side
BLOCK = 256  # documents made into rows at once
HELD_OUT = 10  # one document in so many, of each side
HASH_SEED = 1  # with the preparation's own hash the sample would be the documents that validate
GIGATOKEN_SAMPLE = 100_000  # bytes that gigatoken must encode as the tokenizer itself
# With the scale below, first or second of what was tried on unseen documents (results/quality/variants.md)
STRENGTH = 1000.0


def frequencies(ids: Sequence[np.ndarray], vocab_size: int):
    """How often each token and, behind them, each bucket of pairs stands in a document, over its number of tokens:
    a sparse matrix (documents, vocab_size + 2^18) float32. A row times the weights is a document's mean."""
    from scipy.sparse import csr_matrix

    rows = [np.concatenate([document, hash_bigrams(document) + np.uint32(vocab_size)]) for document in ids]
    sizes = [len(row) for row in rows]
    values = np.repeat(np.array([1 / len(document) for document in ids], np.float32), sizes)
    columns = np.concatenate(rows).astype(np.int32)
    shape = (len(rows), vocab_size + (1 << BIGRAM_BITS))
    matrix = csr_matrix((values, columns, np.cumsum([0, *sizes])), shape=shape)
    matrix.sum_duplicates()
    return matrix


def learn(good: Sequence[np.ndarray], other: Sequence[np.ndarray], vocab_size: int) -> dict[str, np.ndarray]:
    """The weights `tokens`, `pairs` and `bias`, float32, that tell the documents of one side from the other's, by
    logistic regression; both sides count the same, however many they are.

    Columns are scaled by their inverse document frequency, ln((1 + n) / (1 + df)) + 1, so that rare words may speak,
    and all by one number, so that the strength means the same for any text. Both are folded into the weights.
    """
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    sides = [*good, *other]
    blocks = (frequencies(sides[i : i + BLOCK], vocab_size) for i in range(0, len(sides), BLOCK))
    matrix = vstack(list(blocks), format="csr")
    seen = matrix.getnnz(axis=0)
    scale = np.where(seen > 0, np.log((1 + len(sides)) / (1 + seen)) + 1, 0).astype(np.float32)
    matrix.data *= scale[matrix.indices]
    length = np.float32(np.sqrt(np.square(matrix.data).sum() / len(sides)))  # of a row, on the average
    matrix.data /= length
    labels = np.repeat([1, 0], [len(good), len(other)])
    regression = LogisticRegression(C=STRENGTH, class_weight="balanced", tol=1e-6, max_iter=300)
    with threadpool_limits(1):  # sums by several threads end in other bits: the file would tell the number of cores
        regression.fit(matrix, labels)
    weights = (regression.coef_[0] * (scale / length)).astype(np.float32)
    bias = regression.intercept_.astype(np.float32)
    return {"tokens": weights[:vocab_size], "pairs": weights[vocab_size:], "bias": bias}


def measure(good: np.ndarray, other: np.ndarray) -> dict:
    """What the scores of held-out documents, (n,) and (m,) float32, say of a model: the AUC, and for each threshold the
    shares kept and the precision, as if both sides were equally many."""
    from sklearn.metrics import roc_auc_score

    rows = []
    for threshold in np.arange(1, 10) / 10:
        kept, wrong = float(np.mean(good >= threshold)), float(np.mean(other >= threshold))
        precision = kept / (kept + wrong) if kept else None
        rows.append({"quality": float(threshold), "precision": precision, "good_kept": kept, "other_kept": wrong})
    labels = np.repeat([1, 0], [len(good), len(other)])
    return {"auc": float(roc_auc_score(labels, np.concatenate([good, other]))), "thresholds": rows}


def heaviest(weights: np.ndarray, ids: dict[str, list[np.ndarray]], tokenizer: Tokenizer) -> dict[str, list[str]]:
    """For each side the twenty tokens that set its documents apart the most: by weight times how much more often they
    stand in them than in the other side's."""
    often = {}
    for name, side in ids.items():
        often[name] = np.zeros(len(weights))
        for document in side:
            often[name] += np.bincount(document, minlength=len(weights)) / len(document) / len(side)
    apart = weights * (often["good"] - often["other"])
    found = {}
    for name, sign in (("good", 1), ("other", -1)):
        order = np.argsort(np.where(sign * weights > 0, -apart, 0), kind="stable")
        found[name] = [tokenizer.decode([i]) for i in order[:20].tolist()]
    return found


def train_quality_filter(
    good: dict[bytes, bytes], other: dict[bytes, bytes], tokenizer: Tokenizer, out: Path
) -> QualityModel:
    """Learns from texts by their hash, in UTF-8, and writes `out`.

    What stands on both sides is left out. The documents held out are those with the smallest hashes, read backwards;
    the order of the texts changes nothing.
    """
    from safetensors.numpy import save

    doubles = good.keys() & other.keys()
    sides = {}
    for name, texts in {"good": good, "other": other}.items():
        hashes = sorted(texts.keys() - doubles, key=lambda hash: hash[::-1])
        if len(hashes) < LEAST_DOCUMENTS:
            raise UserError(
                f"--{name} has {len(hashes)} documents{' that are not on the other side too' if doubles else ''}, at "
                f"least {LEAST_DOCUMENTS} are needed, and thousands are better. Give more text (a .txt file is one)."
            )
        sides[name] = [texts[hash] for hash in hashes]
    message = tokenizer.use_gigatoken(
        [text for pair in zip(*sides.values(), strict=False) for text in pair], GIGATOKEN_SAMPLE
    )
    if message:
        print(message, file=sys.stderr)
    ids = {name: [d for d in tokenizer.encode_batch(texts) if len(d)] for name, texts in sides.items()}
    held_out = {name: side[: len(side) // HELD_OUT] for name, side in ids.items()}
    learnt = {name: side[len(side) // HELD_OUT :] for name, side in ids.items()}
    weights = learn(learnt["good"], learnt["other"], tokenizer.vocab_size)

    draft = QualityModel(out, weights["tokens"], weights["pairs"], float(weights["bias"][0]), "", "", {}, "")
    figures = {
        "learnt_from": {name: len(side) for name, side in learnt.items()},
        "held_out": {name: len(side) for name, side in held_out.items()},
        "on_both_sides": len(doubles),
        **measure(draft.score(held_out["good"]), draft.score(held_out["other"])),
        "heaviest_tokens": heaviest(draft.token_weights, learnt, tokenizer),
    }
    about = {
        "format": FORMAT,
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
        "weights_sha256": weights_sha256(weights),
        "figures": figures,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    # one key of metadata: safetensors writes several in any order
    files.write(out, save(weights, {"quality": json.dumps(about, ensure_ascii=False)}))
    return QualityModel.load(out)


def report(figures: dict) -> str:
    """The figures of a model, for a person."""
    learnt, held_out = figures["learnt_from"], figures["held_out"]
    lines = [
        f"learnt from {learnt['good']:,} good and {learnt['other']:,} other documents; "
        f"{figures['on_both_sides']:,} that stand on both sides were left out",
        f"held out {held_out['good']:,} and {held_out['other']:,}: AUC {figures['auc']:.5f}",
        "",
        "quality at least   good kept (recall)   other kept   precision, of equally many",
    ]
    for row in figures["thresholds"]:
        precision = "-" if row["precision"] is None else f"{row['precision']:.1%}"
        lines.append(f"{row['quality']:>16} {row['good_kept']:>20.1%} {row['other_kept']:>12.1%} {precision:>28}")
    for name, tokens in figures["heaviest_tokens"].items():
        lines += ["", f"tokens that speak most for {name}: {' '.join(map(repr, tokens))}"]
    return "\n".join(lines)


def _find(paths: tuple[str, ...], flag: str, column: str):
    try:
        return find("files", paths, (column,))
    except UserError as error:
        raise UserError(str(error).replace("--input", flag)) from None


def _sample(source, count: int) -> dict[bytes, bytes]:
    """The `count` documents of the smallest hashes, wherever in the source they are: text in UTF-8 by its hash."""
    found: dict[bytes, bytes] = {}

    def smallest() -> dict[bytes, bytes]:
        return {hash: found[hash] for hash in sorted(found)[:count]}

    for text in read_documents(source):
        if text.strip():
            data = text.encode()
            found[xxh3_128_digest(data, HASH_SEED)] = data
        if len(found) >= 2 * count:
            found = smallest()
    return smallest()


@dataclass(frozen=True, kw_only=True)
class FilterArgs:
    """The command line: each field is a flag, and its comment is the help."""

    # good text, such as an encyclopedia or textbooks: files, directories, glob patterns or URLs of .parquet, .jsonl or
    # txt files (also .gz, .xz, .zst)
    good: Annotated[tuple[str, ...], metavar("PATH [PATH ...]")]
    # ordinary text, preferably a sample of the documents to be filtered; in the same formats
    other: Annotated[tuple[str, ...], metavar("PATH [PATH ...]")]
    out: Path  # .safetensors file to write
    # tokenizer of the data set to be filtered: gpt2, or the path of a tokenizer.json
    tokenizer: Annotated[str, metavar("gpt2|PATH")] = "gpt2"
    text_column: Name = "text"  # column of a parquet file, or key of a JSON object, that contains the text
    # maximum number of documents from each of --good and --other, chosen by hash
    max_documents: Annotated[int, Ge(LEAST_DOCUMENTS), metavar("N")] = 20_000


def main() -> None:
    args = parse_arguments(FilterArgs, "python -m tools.train_quality_filter", __doc__)
    if find_spec("sklearn") is None:
        raise UserError("python -m tools.train_quality_filter needs scikit-learn: pip install scikit-learn")
    sources = [_find(paths, flag, args.text_column) for flag, paths in (("--good", args.good), ("--other", args.other))]
    if shared := set.intersection(*(set(map(os.path.realpath, source.paths)) for source in sources)):
        raise UserError(f"--good and --other both name {min(shared)}: a document can't be both. Give it to one.")
    tokenizer = load_tokenizer(args.tokenizer)
    good, other = (_sample(source, args.max_documents) for source in sources)
    model = train_quality_filter(good, other, tokenizer, args.out)
    print(f"{args.out}: for {model.tokenizer} (sha256 {model.tokenizer_sha256[:12]}), sha256 {model.sha256[:12]}")
    print(report(model.metrics))


if __name__ == "__main__":
    run(main)
