"""readers.py: every text of jsonl, txt and parquet files is read, and invalid files are rejected with their names."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.helpers import save, save_jsonl
from support.preparation import prepare

from babygpt.data import sources
from babygpt.errors import UserError


def read_all(*inputs: Path, column="text") -> list[str]:
    return list(sources.read_documents(sources.find("files", tuple(map(str, inputs)), (column,))))


def test_only_a_line_feed_ends_a_line_of_jsonl(tmp_path):
    texts = ["line\u2028paragraph\u2029next\x85form\x0cfile\x1c", "carriage\rreturn", "a\nb"]
    assert read_all(save_jsonl(tmp_path / "a.jsonl", texts, ascii=False)) == texts
    save(tmp_path / "b.jsonl", b'\n{"text": "a"}\r\n\n  \n{"text": "b"}')
    assert read_all(tmp_path / "b.jsonl") == ["a", "b"]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_text_columns_of_any_string_type_are_read(tmp_path, kind):
    texts = ["one", "two", None, "one"]
    pq.write_table(pa.table({"text": pa.array(texts, kind)}), tmp_path / "a.parquet")
    assert read_all(tmp_path / "a.parquet") == ["one", "two", "", "one"]


BAD_LINES = {
    "not JSON": b'{"text": ',
    "not UTF-8": b'{"text": "\xff"}',
    "not an object": b'["text"]',
    "a number": b"7",
    "missing column": b'{"body": "b"}',
    "not a string": b'{"text": 7}',
    "a list of strings": b'{"text": ["b"]}',
    "deeply nested": b"[" * 100_000,
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_invalid_line_is_reported_with_file_and_number(tmp_path, bad):
    save(tmp_path / "a.jsonl", b'{"text": "a"}\n\n' + BAD_LINES[bad] + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 3"):
        read_all(tmp_path / "a.jsonl")


@pytest.mark.parametrize("column", [pa.array([1, 2]), pa.array([b"a", b"b"]), pa.array([["a"], ["b"]])])
def test_error_for_non_text_column_names_the_file(tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet.*must have type string"):
        read_all(tmp_path / "a.parquet")


def test_missing_parquet_column_is_rejected_with_known_columns(tmp_path):
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no column 'text': it has id, body"):
        read_all(tmp_path / "a.parquet")


def test_corrupted_parquet_file_is_named_in_the_error(tmp_path):
    texts = [f"text number {i}" for i in range(100)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="none", use_dictionary=False)
    data = (tmp_path / "a.parquet").read_bytes()
    not_utf8 = data.replace(b"text number 50", b"text \xff\xff\xff\xff\xff\xff 50")
    for corrupted in (data[:-100], b"", data[:4] + b"\xff" * 60 + data[64:], not_utf8):
        (tmp_path / "a.parquet").write_bytes(corrupted)
        with pytest.raises(UserError, match=r"a\.parquet"):
            read_all(tmp_path / "a.parquet")


@pytest.mark.parametrize("ending", ["gz", "xz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_corrupted_compressed_file_is_named_in_the_error(tmp_path, kind, ending):
    text = "".join(random.Random(0).choices("abcdefgh ", k=20_000))
    path = save(tmp_path / f"a.{kind}.{ending}", json.dumps({"text": text}).encode())
    data = path.read_bytes()
    half = len(data) // 2
    for corrupted in (data[:half], b"garbage", data[:half] + bytes(byte ^ 255 for byte in data[half:])):
        path.write_bytes(corrupted)
        with pytest.raises(UserError, match=path.name):
            read_all(path)


def test_all_members_of_a_compressed_file_are_read(tmp_path):
    """Compressed files may be concatenated."""
    for ending in ("gz", "xz", "zst"):
        path = save_jsonl(tmp_path / f"a.jsonl.{ending}", ["first"])
        path.write_bytes(path.read_bytes() + save_jsonl(tmp_path / f"b.jsonl.{ending}", ["second"]).read_bytes())
        assert read_all(path) == ["first", "second"]


@pytest.mark.parametrize("name", ["a.csv", "a", "a.json", "a.parquet.gz", "a.gz"])
def test_file_of_unknown_format_is_named_in_the_error(tmp_path, name):
    save(tmp_path / "b.txt", b"b")
    save(tmp_path / name, b"a")
    with pytest.raises(UserError, match=rf"unknown type, .*{name}"):
        read_all(tmp_path)


def test_pattern_without_a_match_is_named_in_the_error(tmp_path):
    save(tmp_path / "a.txt", b"a")
    with pytest.raises(UserError, match=r"\*\.jsonl matches no file"):
        read_all(tmp_path / "a.txt", tmp_path / "*.jsonl")


def test_source_without_text_is_rejected(tmp_path):
    pq.ParquetWriter(tmp_path / "rows.parquet", pa.schema([("text", pa.string())])).close()  # no row group
    for source in (tmp_path / "rows.parquet", save(tmp_path / "empty.jsonl", b""), save(tmp_path / "a.txt", b" \n")):
        with pytest.raises(UserError, match="no text"):
            prepare(tmp_path / "out" / source.name, source)
