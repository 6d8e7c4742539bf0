"""Compare features, scaling and regularization strength of the quality classifier: a Markdown table of AUCs.

    python results/quality/variants.py GOOD OTHER [--tokenizer gpt2] [--test GOOD OTHER]

GOOD and OTHER are files, directories or glob patterns. Without --test, one document in ten of each class is held out,
selected by hash.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix, vstack
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from xxhash import xxh3_128_digest

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from babygpt.data.sources import find, read_documents
from babygpt.data.tokenizer import Tokenizer, load_tokenizer
from tools.train_quality_filter import BATCH_DOCUMENTS, HASH_SEED, HELD_OUT, compute_frequencies

SCALES = {  # scale of a feature from n documents, the number with the feature, its mean square and its mean
    "none": lambda n, count, mean_square, mean: np.ones(len(count)),
    "idf": lambda n, count, mean_square, mean: np.log((1 + n) / (1 + count)) + 1,
    "1 / sqrt(mean)": lambda n, count, mean_square, mean: 1 / np.sqrt(mean),
    "1 / root mean square": lambda n, count, mean_square, mean: 1 / np.sqrt(mean_square),
}
C_VALUES = (1, 10, 100, 1000, 10000)


def read(path: str, tokenizer: Tokenizer) -> csr_matrix:
    """Return the feature frequencies, (documents, features), sorted by the reversed bytes of the document hashes."""
    texts = {text.encode() for text in read_documents(find("files", (path,))) if text.strip()}
    texts = sorted(texts, key=lambda text: xxh3_128_digest(text, HASH_SEED)[::-1])
    tokenizer.use_gigatoken(texts, 100_000)
    ids = tokenizer.encode_batch(texts)
    batches = [ids[i : i + BATCH_DOCUMENTS] for i in range(0, len(ids), BATCH_DOCUMENTS)]
    return vstack([compute_frequencies(batch, tokenizer.vocab_size) for batch in batches], format="csr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("good", metavar="GOOD", help="good training documents")
    parser.add_argument("other", metavar="OTHER", help="other training documents")
    parser.add_argument("--test", nargs=2, metavar=("GOOD", "OTHER"), help="test documents")
    parser.add_argument("--tokenizer", default="gpt2", help="name or file (default: %(default)s)")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    train = [read(path, tokenizer) for path in (options.good, options.other)]
    if options.test:
        test = [read(path, tokenizer) for path in options.test]
    else:
        counts = [rows.shape[0] // HELD_OUT for rows in train]
        test = [rows[:count] for rows, count in zip(train, counts, strict=True)]
        train = [rows[count:] for rows, count in zip(train, counts, strict=True)]
    train_labels, test_labels = (np.repeat([1, 0], [rows.shape[0] for rows in split]) for split in (train, test))
    sizes = [count for labels in (train_labels, test_labels) for count in (labels.sum(), (1 - labels).sum())]
    print("trained on {} good and {} other documents, tested on {} and {}\n".format(*sizes))
    print("| features | scale | " + " | ".join(f"C = {c}" for c in C_VALUES) + " |")
    print("|---|---|" + "---:|" * len(C_VALUES))
    for features, width in (("tokens", tokenizer.vocab_size), ("tokens and bigrams", train[0].shape[1])):
        train_matrix, test_matrix = (vstack(split, format="csr")[:, :width] for split in (train, test))
        count, n = train_matrix.getnnz(axis=0), train_matrix.shape[0]
        used = np.flatnonzero(count)
        train_matrix, test_matrix = train_matrix[:, used], test_matrix[:, used]
        mean_square, mean = (
            np.asarray(matrix.mean(axis=0)).ravel() for matrix in (train_matrix.power(2), train_matrix)
        )
        for name, compute_scale in SCALES.items():
            scale = compute_scale(n, count[used], mean_square, mean).astype(np.float32)
            scale /= np.sqrt(mean_square @ scale**2)  # rows have unit length on average
            cells = []
            for c in C_VALUES:
                regression = LogisticRegression(C=c, class_weight="balanced", tol=1e-6, max_iter=300)
                regression.fit(train_matrix.multiply(scale).tocsr(), train_labels)
                cells.append(f"{roc_auc_score(test_labels, test_matrix @ (regression.coef_[0] * scale)):.5f}")
            print(f"| {features} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
