"""Score the quality of documents, 0 to 1, with a linear classifier trained on a sample of good text and other text.

    >>> QualityModel.load("data/pl-quality.safetensors").score(tokenizer.encode_batch([b"A text."]))

As in fastText, which DCLM used for filtering, every token and every bigram has a weight, and the quality of a document
is the logistic function of their mean. Bigrams are hashed into 2^18 buckets. Scoring is a table lookup on the tokens
that the preparation encodes anyway, in any language. A model belongs to one tokenizer.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import UserError

BIGRAM_BITS = 18
FORMAT = 1  # increased when the features change


@dataclass(frozen=True)
class QualityModel:
    """The weights of a classifier, with its tokenizer, its metrics on held-out documents and the sha256 of its file."""

    path: Path
    token_weights: np.ndarray  # (vocab_size,) float32
    bigram_weights: np.ndarray  # (2^18,) float32
    bias: float
    tokenizer: str
    tokenizer_sha256: str
    metrics: dict
    sha256: str

    @classmethod
    def load(cls, path: str | Path) -> "QualityModel":
        """Read a file that tools.train_quality_filter wrote; UserError if it is not one or is corrupted."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            data = path.read_bytes()
            with safe_open(path, "numpy") as file:
                metadata = json.loads(file.metadata()["quality"])
                tokens, pairs, bias = (file.get_tensor(name) for name in ("tokens", "pairs", "bias"))
            if metadata["format"] != FORMAT:
                raise UserError(
                    f"The quality model {path} has format {metadata['format']}, but this version of BabyGPT reads "
                    f"format {FORMAT}. {_HINT}"
                )
            if metadata["weights_sha256"] != weights_sha256({"tokens": tokens, "pairs": pairs, "bias": bias}):
                raise ValueError("the sha256 of its weights is wrong")
            name, sha256 = metadata["tokenizer"]["name"], metadata["tokenizer"]["sha256"]
            file_sha256 = hashlib.sha256(data).hexdigest()
            return cls(path, tokens, pairs, float(bias[0]), name, sha256, metadata["figures"], file_sha256)
        except OSError as error:
            raise UserError(f"The quality model {path} cannot be read: {error.strerror}. {_HINT}") from None
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a quality model or is corrupted: {error!r}. {_HINT}") from None

    def score(self, ids: Sequence[np.ndarray]) -> np.ndarray:
        """Return the quality of each document, (documents,) float32, from its token ids without EOT, (tokens,) uint32.

        The score of a document does not depend on the others. A document without tokens gets sigmoid(bias).
        """
        sizes = np.fromiter(map(len, ids), np.int64, len(ids))
        logits = np.full(len(ids), self.bias)
        not_empty = sizes > 0
        if not_empty.any():
            joined, ends = np.concatenate(ids), np.cumsum(sizes[not_empty])
            weights = self.token_weights[joined]
            bigrams = self.bigram_weights[hash_bigrams(joined)]
            bigrams[ends[:-1] - 1] = 0  # the last token of a document and the first of the next are not a bigram
            weights[:-1] += bigrams
            logits[not_empty] += np.add.reduceat(weights, ends - sizes[not_empty]) / sizes[not_empty]
        return (0.5 + 0.5 * np.tanh(logits / 2)).astype(np.float32)  # sigmoid(logits), without overflow


_HINT = "To train a new model, see python -m tools.train_quality_filter --help."


def weights_sha256(weights: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(weights[name].tobytes() for name in ("tokens", "pairs", "bias"))).hexdigest()


def hash_bigrams(ids: np.ndarray) -> np.ndarray:
    """Return the bucket of each bigram, (n - 1,) uint32 below 2^18, of n token ids.

    The hash is linear modulo 2^32, and the bucket is its highest bits.
    """
    ids = ids.astype(np.uint32, copy=False)
    mixed: np.ndarray = ids[:-1] * np.uint32(0x9E3779B1) + ids[1:] * np.uint32(0x85EBCA6B)
    return mixed >> np.uint32(32 - BIGRAM_BITS)


def check_tokenizer(model: QualityModel, tokenizer: Tokenizer) -> None:
    """Raise a UserError if the model was trained with a different tokenizer: its weights belong to other tokens."""
    if model.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"The quality model {model.path} was trained with the tokenizer {model.tokenizer} (sha256 "
            f"{model.tokenizer_sha256[:12]}), but the dataset uses {tokenizer.file} (sha256 {tokenizer.sha256[:12]}). "
            "Train a quality model with this tokenizer: python -m tools.train_quality_filter --tokenizer "
            f"{'gpt2' if tokenizer.name == 'gpt2' else tokenizer.file}"
        )
