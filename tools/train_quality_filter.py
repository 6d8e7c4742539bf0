"""Train a quality model: a classifier of documents, trained on samples of good and of ordinary text.

    python -m tools.train_quality_filter --good wikipedia-pl/ books.jsonl.gz --other pages.jsonl.gz \\
        --tokenizer data/pl.json --out data/pl-quality.safetensors
    python fineweb.py fineweb2-pl --tokenizer data/pl.json --quality data/pl-quality.safetensors --min-quality 0.5

It works for any language. One tenth of the documents are held out, and the metrics on these documents are printed.
Requires scikit-learn.
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
from babygpt.data.sources import Source, find, read_documents
from babygpt.data.tokenizer import Tokenizer, load_tokenizer
from babygpt.errors import UserError, run

MIN_DOCUMENTS = 20  # per class
BATCH_DOCUMENTS = 256  # converted to features at once
HOLD_OUT_ONE_IN = 10  # one document in 10 of each class is held out
HASH_SEED = 1  # not that of fineweb.py, whose validation documents have the smallest hashes: the sample would be these
GIGATOKEN_SAMPLE = 100_000  # bytes for which gigatoken must give the same tokens as the tokenizer
# scikit-learn's C; with idf scaling, the best or second best on unseen documents (results/quality/variants.md)
INVERSE_REGULARIZATION = 1000.0


def compute_frequencies(ids: Sequence[np.ndarray], vocab_size: int):
    """Return the counts of tokens and of hashed bigrams per document, divided by its number of tokens.

    They are a sparse matrix, (documents, vocab_size + 2^18) float32, whose product with the weights is the mean weight
    of each document.
    """
    from scipy.sparse import csr_matrix

    rows = [np.concatenate([document, hash_bigrams(document) + np.uint32(vocab_size)]) for document in ids]
    sizes = [len(row) for row in rows]
    values = np.repeat(np.array([1 / len(document) for document in ids], np.float32), sizes)
    columns = np.concatenate(rows).astype(np.int32)
    shape = (len(rows), vocab_size + (1 << BIGRAM_BITS))
    matrix = csr_matrix((values, columns, np.cumsum([0, *sizes])), shape=shape)
    matrix.sum_duplicates()
    return matrix


def train_classifier(good: Sequence[np.ndarray], other: Sequence[np.ndarray], vocab_size: int) -> dict[str, np.ndarray]:
    """Return the weights `tokens`, `pairs` (of bigrams) and `bias`, float32, of a logistic regression.

    Both classes have the same total weight. Columns are scaled by their inverse document frequency,
    ln((1 + n) / (1 + df)) + 1, so that regularization does not suppress rare words. The matrix is then scaled to a mean
    squared row length of 1, so that the regularization does not depend on the text. Both scales are folded into the
    weights.
    """
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    ids = [*good, *other]
    batches = (
        compute_frequencies(ids[i : i + BATCH_DOCUMENTS], vocab_size) for i in range(0, len(ids), BATCH_DOCUMENTS)
    )
    matrix = vstack(list(batches), format="csr")
    document_frequency = matrix.getnnz(axis=0)
    idf = np.log((1 + len(ids)) / (1 + document_frequency)) + 1
    scale = np.where(document_frequency > 0, idf, 0).astype(np.float32)
    matrix.data *= scale[matrix.indices]
    rms_row_norm = np.float32(np.sqrt(np.square(matrix.data).sum() / len(ids)))
    matrix.data /= rms_row_norm
    labels = np.repeat([1, 0], [len(good), len(other)])
    regression = LogisticRegression(C=INVERSE_REGULARIZATION, class_weight="balanced", tol=1e-6, max_iter=300)
    with threadpool_limits(
        1
    ):  # the sums of several threads are rounded differently: the file would depend on the cores
        regression.fit(matrix, labels)
    weights = (regression.coef_[0] * (scale / rms_row_norm)).astype(np.float32)
    bias = regression.intercept_.astype(np.float32)
    return {"tokens": weights[:vocab_size], "pairs": weights[vocab_size:], "bias": bias}


def compute_metrics(good: np.ndarray, other: np.ndarray) -> dict:
    """Return the AUC of the scores of held-out documents, (n,) and (m,) float32, and the metrics of each threshold.

    The metrics are the fractions of documents kept, and the precision for equally many good and other documents.
    """
    from sklearn.metrics import roc_auc_score

    metrics_by_threshold = []
    for threshold in np.arange(1, 10) / 10:
        good_kept, other_kept = float(np.mean(good >= threshold)), float(np.mean(other >= threshold))
        precision = good_kept / (good_kept + other_kept) if good_kept else None
        metrics_by_threshold.append(
            {"quality": float(threshold), "precision": precision, "good_kept": good_kept, "other_kept": other_kept}
        )
    labels = np.repeat([1, 0], [len(good), len(other)])
    return {"auc": float(roc_auc_score(labels, np.concatenate([good, other]))), "thresholds": metrics_by_threshold}


def find_top_tokens(
    weights: np.ndarray, ids: dict[str, list[np.ndarray]], tokenizer: Tokenizer
) -> dict[str, list[str]]:
    """Return the twenty tokens of each class that contribute most: weight times difference of the mean frequencies."""
    frequency = {}
    for name, documents in ids.items():
        frequency[name] = np.zeros(len(weights))
        for document in documents:
            frequency[name] += np.bincount(document, minlength=len(weights)) / len(document) / len(documents)
    contribution = weights * (frequency["good"] - frequency["other"])
    tokens = {}
    for name, sign in (("good", 1), ("other", -1)):
        order = np.argsort(np.where(sign * weights > 0, -contribution, 0), kind="stable")
        tokens[name] = [tokenizer.decode([i]) for i in order[:20].tolist()]
    return tokens


def train_quality_filter(
    good: dict[bytes, bytes], other: dict[bytes, bytes], tokenizer: Tokenizer, out: Path
) -> QualityModel:
    """Train a quality model on UTF-8 texts, which are given by their hashes, and write it to `out`.

    Texts of both classes are dropped. The documents with the smallest hashes, whose bytes are reversed, are held out.
    The result does not depend on the order of the texts.
    """
    from safetensors.numpy import save

    shared = good.keys() & other.keys()
    classes = {}
    for name, texts in {"good": good, "other": other}.items():
        hashes = sorted(texts.keys() - shared, key=lambda hash: hash[::-1])
        if len(hashes) < MIN_DOCUMENTS:
            raise UserError(
                f"--{name} has {len(hashes)} documents{' that are not also in the other sample' if shared else ''}, "
                "but "
                f"at least {MIN_DOCUMENTS} are required, and thousands are better. Use more text (a .txt file is one "
                "document)."
            )
        classes[name] = [texts[hash] for hash in hashes]
    message = tokenizer.use_gigatoken(
        [text for pair in zip(*classes.values(), strict=False) for text in pair], GIGATOKEN_SAMPLE
    )
    if message:
        print(message, file=sys.stderr)
    ids = {name: [d for d in tokenizer.encode_batch(texts) if len(d)] for name, texts in classes.items()}
    held_out = {name: documents[: len(documents) // HOLD_OUT_ONE_IN] for name, documents in ids.items()}
    training = {name: documents[len(documents) // HOLD_OUT_ONE_IN :] for name, documents in ids.items()}
    weights = train_classifier(training["good"], training["other"], tokenizer.vocab_size)

    model = QualityModel(out, weights["tokens"], weights["pairs"], float(weights["bias"][0]), "", "", {}, "")
    metrics = {
        "learnt_from": {name: len(documents) for name, documents in training.items()},
        "held_out": {name: len(documents) for name, documents in held_out.items()},
        "on_both_sides": len(shared),
        **compute_metrics(model.score(held_out["good"]), model.score(held_out["other"])),
        "heaviest_tokens": find_top_tokens(model.token_weights, training, tokenizer),
    }
    metadata = {
        "format": FORMAT,
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.sha256},
        "weights_sha256": weights_sha256(weights),
        "figures": metrics,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    # a single metadata key, since safetensors writes several in random order
    files.write(out, save(weights, {"quality": json.dumps(metadata, ensure_ascii=False)}))
    return QualityModel.load(out)


def format_report(metrics: dict) -> str:
    """Return the metrics of a quality model as text."""
    training, held_out = metrics["learnt_from"], metrics["held_out"]
    lines = [
        f"trained on {training['good']:,} good and {training['other']:,} other documents; "
        f"{metrics['on_both_sides']:,} documents of both classes were dropped",
        f"held out {held_out['good']:,} good and {held_out['other']:,} other documents: AUC {metrics['auc']:.5f}",
        "",
        "quality at least   good kept (recall)   other kept   precision at equal numbers",
    ]
    for row in metrics["thresholds"]:
        precision = "-" if row["precision"] is None else f"{row['precision']:.1%}"
        lines.append(f"{row['quality']:>16} {row['good_kept']:>20.1%} {row['other_kept']:>12.1%} {precision:>28}")
    for name, tokens in metrics["heaviest_tokens"].items():
        lines += ["", f"tokens that contribute most to {name}: {' '.join(map(repr, tokens))}"]
    return "\n".join(lines)


def find_source(paths: tuple[str, ...], flag: str, column: str):
    """Return the files of a class as a source. A UserError names `flag`."""
    try:
        return find("files", paths, (column,))
    except UserError as error:
        raise UserError(str(error).replace("--input", flag)) from None


def sample_documents(source: Source, count: int) -> dict[bytes, bytes]:
    """Return the `count` UTF-8 texts of a source with the smallest hashes, by hash."""
    texts: dict[bytes, bytes] = {}

    def smallest() -> dict[bytes, bytes]:
        return {hash: texts[hash] for hash in sorted(texts)[:count]}

    for text in read_documents(source):
        if text.strip():
            data = text.encode()
            texts[xxh3_128_digest(data, HASH_SEED)] = data
        if len(texts) >= 2 * count:
            texts = smallest()
    return smallest()


@dataclass(frozen=True, kw_only=True)
class FilterArgs:
    """The command line: each field is a flag, and its comment is the help."""

    # good text, such as an encyclopedia or textbooks: files, directories, glob patterns or URLs (.parquet, .jsonl or
    # .txt; .jsonl and .txt may be compressed: .gz, .xz, .zst)
    good: Annotated[tuple[str, ...], metavar("PATH [PATH ...]")]
    # ordinary text, preferably a sample of the documents to be filtered; in the same formats
    other: Annotated[tuple[str, ...], metavar("PATH [PATH ...]")]
    out: Path  # .safetensors file to write
    # tokenizer of the dataset to be filtered: gpt2, or the path to a tokenizer.json
    tokenizer: Annotated[str, metavar("gpt2|PATH")] = "gpt2"
    text_column: Name = "text"  # column of a parquet file, or key of a JSON object, that contains the text
    # maximum number of documents from each of --good and --other, chosen by hash
    max_documents: Annotated[int, Ge(MIN_DOCUMENTS), metavar("N")] = 20_000


def main() -> None:
    args = parse_arguments(FilterArgs, "python -m tools.train_quality_filter", __doc__)
    if find_spec("sklearn") is None:
        raise UserError("python -m tools.train_quality_filter requires scikit-learn: pip install scikit-learn")
    paths = {"--good": args.good, "--other": args.other}
    sources = [find_source(patterns, flag, args.text_column) for flag, patterns in paths.items()]
    if shared := set.intersection(*(set(map(os.path.realpath, source.paths)) for source in sources)):
        raise UserError(f"--good and --other both contain {min(shared)}. Use it in one of them only.")
    tokenizer = load_tokenizer(args.tokenizer)
    good, other = (sample_documents(source, args.max_documents) for source in sources)
    model = train_quality_filter(good, other, tokenizer, args.out)
    print(
        f"Wrote {args.out} (sha256 {model.sha256[:12]}) for the tokenizer {model.tokenizer} "
        f"(sha256 {model.tokenizer_sha256[:12]})."
    )
    print(format_report(model.metrics))


if __name__ == "__main__":
    run(main)
