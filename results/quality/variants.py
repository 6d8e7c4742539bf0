"""Which features, scale and strength of the quality classifier tell documents apart best: a Markdown table of AUCs.

    python results/quality/variants.py GOOD OTHER [--tokenizer gpt2] [--test GOOD OTHER]

The four are files, folders or patterns. Without --test one document in ten of each side is held out, by its hash.
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
from tools.train_quality_filter import BLOCK, HASH_SEED, HELD_OUT, frequencies

SCALES = {  # of a column, from how many of n documents have it and its mean square and mean
    "none": lambda n, seen, square, mean: np.ones(len(seen)),
    "idf": lambda n, seen, square, mean: np.log((1 + n) / (1 + seen)) + 1,
    "1 / sqrt(mean)": lambda n, seen, square, mean: 1 / np.sqrt(mean),
    "1 / root mean square": lambda n, seen, square, mean: 1 / np.sqrt(square),
}
STRENGTHS = (1, 10, 100, 1000, 10000)


def read(path: str, tokenizer: Tokenizer) -> csr_matrix:
    """The documents' frequencies, (documents, features), in the order of their hashes read backwards."""
    texts = {text.encode() for text in read_documents(find("files", (path,))) if text.strip()}
    texts = sorted(texts, key=lambda text: xxh3_128_digest(text, HASH_SEED)[::-1])
    tokenizer.use_gigatoken(texts, 100_000)
    ids = tokenizer.encode_batch(texts)
    blocks = [frequencies(ids[i : i + BLOCK], tokenizer.vocab_size) for i in range(0, len(ids), BLOCK)]
    return vstack(blocks, format="csr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sides", nargs=2, metavar="PATH")
    parser.add_argument("--test", nargs=2, metavar="PATH")
    parser.add_argument("--tokenizer", default="gpt2")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    learnt = [read(path, tokenizer) for path in options.sides]
    if options.test:
        held_out = [read(path, tokenizer) for path in options.test]
    else:
        cuts = [side.shape[0] // HELD_OUT for side in learnt]
        held_out = [side[:cut] for side, cut in zip(learnt, cuts, strict=True)]
        learnt = [side[cut:] for side, cut in zip(learnt, cuts, strict=True)]
    labels, tested = (np.repeat([1, 0], [side.shape[0] for side in sides]) for sides in (learnt, held_out))
    print(f"learnt from {labels.sum()} and {(1 - labels).sum()}, AUC of {tested.sum()} and {(1 - tested).sum()}\n")
    print("| features | scale | " + " | ".join(f"C = {strength}" for strength in STRENGTHS) + " |")
    print("|---|---|" + "---:|" * len(STRENGTHS))
    for features, width in (("tokens", tokenizer.vocab_size), ("tokens and pairs", learnt[0].shape[1])):
        matrix, test = (vstack(sides, format="csr")[:, :width] for sides in (learnt, held_out))
        seen, n = matrix.getnnz(axis=0), matrix.shape[0]
        there = np.flatnonzero(seen)
        matrix, test = matrix[:, there], test[:, there]
        square, mean = (np.asarray(part.mean(axis=0)).ravel() for part in (matrix.power(2), matrix))
        for name, scale_of in SCALES.items():
            scale = scale_of(n, seen[there], square, mean).astype(np.float32)
            scale /= np.sqrt(square @ scale**2)  # rows are of length 1 on the average
            cells = []
            for strength in STRENGTHS:
                regression = LogisticRegression(C=strength, class_weight="balanced", tol=1e-6, max_iter=300)
                regression.fit(matrix.multiply(scale).tocsr(), labels)
                cells.append(f"{roc_auc_score(tested, test @ (regression.coef_[0] * scale)):.5f}")
            print(f"| {features} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
