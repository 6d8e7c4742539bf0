"""How good a document is, 0 to 1, in any language: a classifier learnt from a sample of good text and one of other.

    >>> QualityModel.load("data/pl-quality.safetensors").score(tokenizer.encode_batch([b"A text."]))

It is linear, in the manner of fastText, which DCLM took: every token and every pair of neighbours has a weight, and a
document's quality is the logistic function of their mean. Pairs are hashed into 2^18 buckets. So scoring is a few
look-ups for tokens that the preparation has anyhow, and a model belongs to one tokenizer.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from babygpt.data.tokenizer import Tokenizer
from babygpt.errors import UserError

PAIR_BITS = 18
FORMAT = 1  # another one where the features change


@dataclass(frozen=True)
class QualityModel:
    """The weights of tokens (vocab_size,) float32 and of pairs (2^18,) float32, and the bias; what it was learnt with,
    what it scored on documents held out, and the sha256 of its file."""

    path: Path
    tokens: np.ndarray
    pairs: np.ndarray
    bias: float
    tokenizer: str
    tokenizer_sha256: str
    figures: dict
    sha256: str

    @classmethod
    def load(cls, path: str | Path) -> "QualityModel":
        """Reads a file that `train` wrote; UserError where it is none."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            data = path.read_bytes()
            with safe_open(path, "numpy") as file:
                about = json.loads(file.metadata()["quality"])
                tokens, pairs, bias = (file.get_tensor(name) for name in ("tokens", "pairs", "bias"))
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']}, this program's {FORMAT}")
            if about["weights_sha256"] != weights_sha256({"tokens": tokens, "pairs": pairs, "bias": bias}):
                raise ValueError("its weights are not those that were written")
            name, sha256 = about["tokenizer"]["name"], about["tokenizer"]["sha256"]
            return cls(
                path, tokens, pairs, float(bias[0]), name, sha256, about["figures"], hashlib.sha256(data).hexdigest()
            )
        except OSError as error:
            raise UserError(f"the quality model {path} can't be read: {error.strerror}. {_MEND}") from None
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no quality model, or damaged ({error!r}). {_MEND}") from None

    def score(self, ids: Sequence[np.ndarray]) -> np.ndarray:
        """The quality of documents, (n,) float32 in 0 ... 1, from the token ids of each, (tokens,) uint32, without
        EOT. A document's score doesn't depend on the others; one without tokens has what the bias gives."""
        sizes = np.fromiter(map(len, ids), np.int64, len(ids))
        logits = np.full(len(ids), self.bias)
        full = sizes > 0
        if full.any():
            joined, ends = np.concatenate(ids), np.cumsum(sizes[full])
            weights = self.tokens[joined]
            of_pairs = self.pairs[pairs_of(joined)]
            of_pairs[ends[:-1] - 1] = 0  # the last of a document and the first of the next are no pair
            weights[:-1] += of_pairs
            logits[full] += np.add.reduceat(weights, ends - sizes[full]) / sizes[full]
        return (0.5 + 0.5 * np.tanh(logits / 2)).astype(np.float32)  # the logistic function, without overflow


_MEND = "Train one: python -m tools.train_quality_filter --help"


def weights_sha256(weights: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(weights[name].tobytes() for name in ("tokens", "pairs", "bias"))).hexdigest()


def pairs_of(ids: np.ndarray) -> np.ndarray:
    """The bucket of each pair of neighbours, (n - 1,) uint32 below 2^18, of (n,) uint32 ids: the highest bits of a
    linear hash modulo 2^32."""
    ids = ids.astype(np.uint32, copy=False)
    mixed: np.ndarray = ids[:-1] * np.uint32(0x9E3779B1) + ids[1:] * np.uint32(0x85EBCA6B)
    return mixed >> np.uint32(32 - PAIR_BITS)


def check(model: QualityModel, tokenizer: Tokenizer) -> None:
    """UserError where the model knows another tokenizer than that: its weights would be other tokens'."""
    if model.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"the quality model {model.path} scores tokens of {model.tokenizer} (sha256 {model.tokenizer_sha256[:12]}"
            f"), but the tokenizer is {tokenizer.file} (sha256 {tokenizer.sha256[:12]}). Train one for that: python "
            f"-m tools.train_quality_filter --tokenizer {'gpt2' if tokenizer.name == 'gpt2' else tokenizer.file}"
        )
