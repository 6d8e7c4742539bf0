"""filters.py: which documents are dropped, and how they are counted."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.helpers import call, save

import fineweb
from babygpt.data.filters import is_blank, is_shorter
from babygpt.data.shards import open_dataset, read_manifest
from babygpt.data.tokenizer import load_tokenizer
from babygpt.errors import UserError

ROWS = [
    {"text": "All filters keep it.", "score": 4, "language_score": 0.99},
    {"text": "Its score is too low.", "score": 2.9, "language_score": 0.99},
    {"text": "Its language score is too low.", "score": 5.0, "language_score": 0.5},
    {"text": "short", "score": 3.0, "language_score": 1},
    {"text": "łłłłłłłłł", "score": 3.0, "language_score": 1},  # 9 characters, 18 bytes
    {"text": "łłłłłłłłłł", "score": 3.0, "language_score": 1},
    {"text": "It has no score at all.", "score": None, "language_score": 1},
    {"text": "  ", "score": 1, "language_score": 1},
    {"text": "All filters keep it.", "score": 3.0, "language_score": 0.99},
    {"text": "Its score is too low.", "score": 3.0, "language_score": 0.99},  # the first of these was filtered
]
OPTIONS = ("--min-score", 3, "--min-language-score", 0.95, "--min-chars", 10)


def write(directory, kind, rows=ROWS):
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), directory / "a.parquet", row_group_size=3)
        return directory / "a.parquet"
    return save(directory / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_filters_drop_documents_below_each_threshold(tmp_path, kind):
    """dataset.json counts each document once: kept, empty, duplicate, or by the first filter that dropped it."""
    source = write(tmp_path, kind)
    call(fineweb.main, "files", "--input", source, "--out-dir", tmp_path / "d", "--val-tokens", 0, *OPTIONS)
    dataset = open_dataset(tmp_path / "d")
    text = load_tokenizer("gpt2").decode(dataset.train.read(0, len(dataset.train)))
    end = "<|endoftext|>"
    assert text == end + end.join(["All filters keep it.", "łłłłłłłłłł", "Its score is too low."])
    counts = dataset.manifest["counts"]
    documents = {"seen": 10, "kept": 3, "empty": 1, "filtered": 5, "duplicate": 1, "train": 3, "val": 0}
    assert counts["documents"] == documents
    assert counts["filtered_by"] == {"min_chars": 2, "min_score": 2, "min_language_score": 1}


def test_filters_are_settings_of_a_dataset(tmp_path):
    source = write(tmp_path, "jsonl")
    arguments = ("files", "--input", source, "--out-dir", tmp_path / "d", "--val-tokens", 0)
    call(fineweb.main, *arguments, *OPTIONS)
    assert read_manifest(tmp_path / "d")["settings"]["min_score"] == 3
    with pytest.raises(UserError, match=r"min_chars: 10 before, 11 now"):
        call(fineweb.main, *arguments, *OPTIONS[:-1], 11)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_missing_or_non_numeric_score_is_an_error(tmp_path, kind):
    """The error names the file."""
    arguments = ("--out-dir", tmp_path / "d", "--min-score", 3)
    for rows, reason in (
        ([{"text": "a"}], "no column 'score'"),
        ([{"text": "a", "score": "high"}], "which is not numeric" if kind == "parquet" else "not a number between"),
    ):
        source = write(tmp_path, kind, rows)
        with pytest.raises(UserError, match=rf"a\.{kind}.*{reason}"):
            call(fineweb.main, "files", "--input", source, *arguments)
    source = save(tmp_path / "a.txt", b"a")
    with pytest.raises(UserError, match=r"a\.txt is a text file, so it cannot be filtered by 'score'"):
        call(fineweb.main, "files", "--input", source, *arguments)


def test_filters_that_drop_everything_are_an_error(tmp_path):
    with pytest.raises(UserError, match="no text that passes the filters"):
        call(fineweb.main, "files", "--input", write(tmp_path, "jsonl"), "--out-dir", tmp_path / "d", "--min-chars", 99)


def test_lengths_are_characters_and_blanks_unicode():
    """Lengths count characters, not bytes, and all of Unicode's whitespace is blank."""
    assert is_shorter(("ł" * 9 + "x").encode(), 11)
    assert not is_shorter(("ł" * 9 + "x").encode(), 10)
    assert all(map(is_blank, (b"", b" \n\t", "\u3000\xa0\u2003".encode())))
    assert not any(map(is_blank, (b"a", b" a", "\u3000x".encode(), "ł".encode())))
