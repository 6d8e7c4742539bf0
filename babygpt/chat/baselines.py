"""Baselines of preference accuracy that do not use a model: the length of an answer, and its n-grams."""

import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

Preferences = list[dict[str, Any]]  # with chosen and rejected


def accuracy(score: Callable[[str], float], preferences: Preferences) -> float:
    """Return the fraction of pairs whose chosen answer has the higher score; a tie counts as half."""
    margins = [score(pair["chosen"]) - score(pair["rejected"]) for pair in preferences]
    return sum(0.5 if margin == 0 else float(margin > 0) for margin in margins) / len(margins)


def length_score(train: Preferences) -> Callable[[str], float]:
    """Return a score that prefers longer or shorter answers, whichever is more often chosen in `train`."""
    sign = 1 if accuracy(len, train) >= 0.5 else -1
    return lambda answer: sign * len(answer)


def ngram_score(train: Preferences) -> Callable[[str], float]:
    """Return a naive Bayes score of the words and pairs of words of an answer, with add-one smoothing."""
    chosen = Counter(ngram for pair in train for ngram in ngrams(pair["chosen"]))
    rejected = Counter(ngram for pair in train for ngram in ngrams(pair["rejected"]))
    return lambda answer: sum(math.log((chosen[n] + 1) / (rejected[n] + 1)) for n in ngrams(answer))


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = ["<start>", *re.findall(r"\w+|[^\w\s]", text.casefold()), "<end>"]
    return {(word,) for word in words} | set(pairwise(words))
