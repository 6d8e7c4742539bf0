"""Encoding of whole data sets by the library `gigatoken`, ten times faster than tiktoken and `tokenizers`.

gigatoken is used if it is installed and encodes a sample of each task exactly as the tokenizer does. Texts that Unicode
versions split differently go to the tokenizer itself, so the ids do not depend on the encoder.
"""

import operator
from abc import ABC, abstractmethod
from itertools import accumulate
from typing import Any

import numpy as np

CACHED = 4 << 30  # bytes of text after which gigatoken, which keeps every word it met, is made anew
# Characters that Unicode 17 made letters or numbers. gigatoken knows them as such, tiktoken and tokenizers don't, so
# a word may end elsewhere. By the first byte, what a text with one of them must hold; a few older ones match too.
UNICODE_17 = {
    b"\xe0": (b"\xe0\xa2\x8f", b"\xe0\xb1\x9c", b"\xe0\xb3\x9c"),
    b"\xea": (b"\xea\x9f\x8e", b"\xea\x9f\x8f", b"\xea\x9f\x92", b"\xea\x9f\x94", b"\xea\x9f\xb1"),
    b"\xf0": (
        b"\xf0\x90\xa5", b"\xf0\x90\xbb", b"\xf0\x91\xb6", b"\xf0\x91\xb7", b"\xf0\x96\xba", b"\xf0\x96\xbb",
        b"\xf0\x96\xbf", b"\xf0\x98\x9f", b"\xf0\x98\xb4", b"\xf0\x98\xb6", b"\xf0\x98\xb7", b"\xf0\x9e\x9b",
        b"\xf0\xab\x9c", b"\xf0\xac\xba", b"\xf0\xb2", b"\xf0\xb3",
    ),
}  # fmt: skip


def splits_alike(text: bytes) -> bool:
    """Whether all libraries take the same characters of a text, in UTF-8, for letters and numbers."""
    if b"\xf0" not in text and b"\xe0" not in text and b"\xea" not in text:
        return True
    return not any(first in text and any(map(text.__contains__, wholes)) for first, wholes in UNICODE_17.items())


class BatchEncoder(ABC):
    """Encodes whole data sets: by gigatoken, once it was found to do it alike."""

    fast: Any = None  # gigatoken's tokenizer, where it is used
    encoded = 0  # bytes that it has encoded; it never forgets a word

    @property
    @abstractmethod
    def _gigatoken(self) -> Any:
        """gigatoken's version of this tokenizer, cached. Raises any exception if gigatoken does not support it."""

    @abstractmethod
    def _plain_ids(self, text: bytes) -> np.ndarray:
        """Encode one text with the tokenizer's own library, (n,) uint32."""

    def use_gigatoken(self, texts: list[bytes], sample_bytes: int) -> str | None:
        """From here on batches are encoded by gigatoken, if it encodes the first `sample_bytes` of these texts as
        this tokenizer does; else says why not."""
        self.fast = None
        if self.encoded > CACHED:
            self.__dict__.pop("_gigatoken", None)
            self.encoded = 0
        try:
            fast = self._gigatoken
        except ImportError:
            return "gigatoken is not installed (pip install gigatoken): encoding is some ten times slower."
        except Exception as error:  # its loaders raise many kinds for a tokenizer that they don't know
            return f"gigatoken can't take this tokenizer ({error}): encoding is slower."
        sizes = accumulate(map(len, texts), initial=0)
        sample = [text for text, before in zip(texts, sizes, strict=False) if before < sample_bytes]
        plain = [self._plain_ids(text) for text in sample]
        self.fast = fast
        differing = sum(map(operator.not_, map(np.array_equal, plain, self.encode_batch(sample))))
        if differing:
            self.fast = None
            return f"gigatoken encodes {differing} of {len(sample)} documents differently: there it is not used."
        return None

    def encode_batch(self, texts: list[bytes]) -> list[np.ndarray]:
        """Ids of each text, (n,) uint32, on one thread (preparing data runs one process a core)."""
        if self.fast is None:
            return list(map(self._plain_ids, texts))
        self.encoded += sum(map(len, texts))
        return [self.fast.encode(text) if splits_alike(text) else self._plain_ids(text) for text in texts]
