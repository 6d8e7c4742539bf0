"""Filters of documents: by length, by scores in columns of the source, and by the score of a quality model.

    python fineweb.py fineweb-edu-100BT --min-score 3.5 --min-chars 200
    python fineweb.py fineweb2-pl --min-language-score 0.95
    python fineweb.py fineweb2-pl --tokenizer data/pl.json --quality data/pl-quality --min-quality 0.5

The decision on a document depends on no other document.
"""

from dataclasses import dataclass

import numpy as np

from babygpt.data.tasks import UNDECODABLE, Batch

KEPT, EMPTY, DUPLICATE = 0, 1, 2  # decisions on a document; plan.py finds the duplicates
FILTERS = ("min_chars", "min_score", "min_language_score", "min_quality", "undecodable")
FILTERED = {name: 3 + i for i, name in enumerate(FILTERS)}  # decisions: the first filter that a document fails


@dataclass(frozen=True)
class Filters:
    """The minimum values of a document that is kept; None: off."""

    min_chars: int | None = None  # characters of the text
    min_score: float | None = None  # column `score` of FineWeb-Edu, 0 to 5
    min_language_score: float | None = None  # column `language_score` of FineWeb and FineWeb-2, 0 to 1
    min_quality: float | None = None  # score of the quality model, 0 to 1

    @property
    def columns(self) -> dict[str, float]:
        """Return the minimum value of each numeric column that is filtered by."""
        minimums = {"score": self.min_score, "language_score": self.min_language_score}
        return {column: minimum for column, minimum in minimums.items() if minimum is not None}

    def decide(self, batch: Batch) -> np.ndarray:
        """Return the decision on each document, (documents,) uint8, by all filters except for min_quality."""
        decisions = np.full(len(batch.texts), KEPT, np.uint8)
        for column, minimum in self.columns.items():
            is_low = ~(batch.numbers[column] >= minimum)  # also if the number is missing, which is NaN
            decisions[is_low & (decisions == KEPT)] = FILTERED[f"min_{column}"]
        for i, text in enumerate(batch.texts):
            if text == UNDECODABLE:
                decisions[i] = FILTERED["undecodable"]
            elif is_blank(text):
                decisions[i] = EMPTY
            elif self.min_chars is not None and decisions[i] == KEPT and is_shorter(text, self.min_chars):
                decisions[i] = FILTERED["min_chars"]
        return decisions


def is_blank(text: bytes) -> bool:
    """Return whether a UTF-8 text is empty or only whitespace."""
    if text and 32 < text[0] < 128:
        return False
    return not text.decode().strip()


def is_shorter(text: bytes, chars: int) -> bool:
    """Return whether a UTF-8 text has fewer than `chars` characters."""
    return len(text) < 4 * chars and len(text.decode()) < chars  # a character has at most four bytes
