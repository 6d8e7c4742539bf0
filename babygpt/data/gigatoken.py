"""Encode large datasets with the library gigatoken, ten times faster than with tiktoken and `tokenizers`.

gigatoken is used if it is installed and encodes a sample of each task exactly as the tokenizer's own library does. That
library also encodes the texts that may be split differently, so the ids do not depend on gigatoken.
"""

import operator
from abc import ABC, abstractmethod
from itertools import accumulate
from typing import Any

import numpy as np

MAX_ENCODED_BYTES = 4 << 30  # gigatoken caches every word, so it is created again after this much text
# Characters that are letters or numbers since Unicode 17: gigatoken treats them so, tiktoken and tokenizers do not, and
# words may end elsewhere. First byte -> byte sequences; a text with such a character contains one. So do a few others.
UNICODE_17 = {
    b"\xe0": (b"\xe0\xa2\x8f", b"\xe0\xb1\x9c", b"\xe0\xb3\x9c"),
    b"\xea": (b"\xea\x9f\x8e", b"\xea\x9f\x8f", b"\xea\x9f\x92", b"\xea\x9f\x94", b"\xea\x9f\xb1"),
    b"\xf0": (
        b"\xf0\x90\xa5", b"\xf0\x90\xbb", b"\xf0\x91\xb6", b"\xf0\x91\xb7", b"\xf0\x96\xba", b"\xf0\x96\xbb",
        b"\xf0\x96\xbf", b"\xf0\x98\x9f", b"\xf0\x98\xb4", b"\xf0\x98\xb6", b"\xf0\x98\xb7", b"\xf0\x9e\x9b",
        b"\xf0\xab\x9c", b"\xf0\xac\xba", b"\xf0\xb2", b"\xf0\xb3",
    ),
}  # fmt: skip


def may_split_differently(text: bytes) -> bool:
    """Return whether a UTF-8 text may contain characters that only gigatoken treats as letters or numbers."""
    if b"\xf0" not in text and b"\xe0" not in text and b"\xea" not in text:
        return False
    return any(first in text and any(map(text.__contains__, sequences)) for first, sequences in UNICODE_17.items())


class BatchEncoder(ABC):
    """A base class of tokenizers that encodes batches of texts, with gigatoken after `use_gigatoken` succeeds."""

    fast_encoder: Any = None  # gigatoken's tokenizer, if it is used
    encoded_bytes = 0  # of text that gigatoken has encoded since it was created

    @property
    @abstractmethod
    def _gigatoken(self) -> Any:
        """gigatoken's version of this tokenizer, cached. Raises any exception if gigatoken does not support it."""

    @abstractmethod
    def _encode_bytes(self, data: bytes) -> np.ndarray:
        """Encode a UTF-8 text with the tokenizer's own library; return the ids, (n,) uint32."""

    def use_gigatoken(self, texts: list[bytes], sample_bytes: int) -> str | None:
        """Encode the following batches with gigatoken, if it encodes the first `sample_bytes` of `texts` as expected.

        Returns None, or a message that says why gigatoken is not used.
        """
        self.fast_encoder = None
        if self.encoded_bytes > MAX_ENCODED_BYTES:
            self.__dict__.pop("_gigatoken", None)
            self.encoded_bytes = 0
        try:
            fast_encoder = self._gigatoken
        except ImportError:
            return "gigatoken is not installed, so encoding is about ten times slower. Run `pip install gigatoken`."
        except Exception as error:  # gigatoken raises many types for a tokenizer that it does not support
            return f"gigatoken does not support this tokenizer ({error}), so encoding is slower."
        starts = accumulate(map(len, texts), initial=0)
        sample = [text for text, start in zip(texts, starts, strict=False) if start < sample_bytes]
        expected = [self._encode_bytes(text) for text in sample]
        self.fast_encoder = fast_encoder
        differing = sum(map(operator.not_, map(np.array_equal, expected, self.encode_batch(sample))))
        if differing:
            self.fast_encoder = None
            return f"gigatoken encodes {differing} of {len(sample)} sampled documents differently, so it is not used."
        return None

    def encode_batch(self, texts: list[bytes]) -> list[np.ndarray]:
        """Encode UTF-8 texts, (n,) uint32 each, in one thread: data preparation runs one process per core."""
        if self.fast_encoder is None:
            return list(map(self._encode_bytes, texts))
        self.encoded_bytes += sum(map(len, texts))
        encode = self.fast_encoder.encode
        return [self._encode_bytes(text) if may_split_differently(text) else encode(text) for text in texts]
