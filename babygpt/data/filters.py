"""Which documents are worth keeping: by their length, by scores that the source gives them, by their quality.

    python fineweb.py fineweb-edu-100BT --min-score 3.5 --min-chars 200
    python fineweb.py fineweb2-pl --min-language-score 0.95
    python fineweb.py fineweb2-pl --tokenizer data/pl.json --quality data/pl-quality --min-quality 0.5

A filter looks at one document alone, so what it decides depends on nothing else.
"""

from dataclasses import dataclass

import numpy as np

from babygpt.data.readers import Batch

KEPT, EMPTY, DUPLICATE = 0, 1, 2  # what becomes of a document; only the plan knows the duplicates
FILTERS = ("min_chars", "min_score", "min_language_score", "min_quality")
FILTERED = {name: 3 + i for i, name in enumerate(FILTERS)}  # the first filter that a document fails


@dataclass(frozen=True)
class Filters:
    """The smallest values that a document may have; None where it doesn't matter."""

    min_chars: int | None = None  # characters of the text
    min_score: float | None = None  # the column `score`: FineWeb-Edu's, 0 to 5
    min_language_score: float | None = None  # the column `language_score`: FineWeb's and FineWeb-2's, 0 to 1
    min_quality: float | None = None  # of the classifier, 0 to 1

    @property
    def columns(self) -> dict[str, float]:
        """The columns of numbers that are looked at, and their smallest values."""
        wanted = {"score": self.min_score, "language_score": self.min_language_score}
        return {column: value for column, value in wanted.items() if value is not None}

    def decide(self, batch: Batch) -> np.ndarray:
        """What becomes of each document by its text and numbers, (n,) uint8."""
        decisions = np.full(len(batch.texts), KEPT, np.uint8)
        for column, least in self.columns.items():
            low = ~(batch.numbers[column] >= least)  # a missing number is NaN, and too low
            decisions[low & (decisions == KEPT)] = FILTERED[f"min_{column}"]
        for i, text in enumerate(batch.texts):
            if is_blank(text):
                decisions[i] = EMPTY
            elif self.min_chars is not None and decisions[i] == KEPT and is_shorter(text, self.min_chars):
                decisions[i] = FILTERED["min_chars"]
        return decisions


def is_blank(text: bytes) -> bool:
    """Whether a text, in UTF-8, has nothing but white space."""
    if text and 32 < text[0] < 128:
        return False
    return not text.decode().strip()


def is_shorter(text: bytes, chars: int) -> bool:
    """Whether a text, in UTF-8, has fewer characters than that."""
    return len(text) < 4 * chars and len(text.decode()) < chars  # a character is four bytes at the most
