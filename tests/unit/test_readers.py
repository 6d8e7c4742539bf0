"""Readers: every text of tables and text files is read, and invalid files are rejected with their names."""

import codecs
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.helpers import save, save_jsonl
from support.preparation import prepare

from babygpt.data import sources, tasks, texts
from babygpt.data.tasks import TextOptions
from babygpt.errors import UserError


def read_all(*inputs: Path, column="text", split="train", **options) -> list[str]:
    source = sources.find("files", tuple(map(str, inputs)), (column,), split=split, options=TextOptions(**options))
    return list(sources.read_documents(source))


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


def test_files_of_unknown_types_are_counted_and_skipped(tmp_path, capsys):
    for name in ("a", "a.png", "b.png", "a.parquet.gz", "a.gz"):
        save(tmp_path / name, b"a")
    with pytest.raises(UserError, match=r"5 files of an unknown type, such as .*a\. Use parquet"):
        read_all(tmp_path)
    save(tmp_path / "b.txt", b"b")
    assert read_all(tmp_path) == ["b"]
    assert "5 files of an unknown type are skipped (2 .gz, 2 .png, 1 without a suffix)" in capsys.readouterr().out


def test_pattern_without_a_match_is_named_in_the_error(tmp_path):
    save(tmp_path / "a.txt", b"a")
    with pytest.raises(UserError, match=r"\*\.jsonl matches no file"):
        read_all(tmp_path / "a.txt", tmp_path / "*.jsonl")


def test_source_without_text_is_rejected(tmp_path):
    pq.ParquetWriter(tmp_path / "rows.parquet", pa.schema([("text", pa.string())])).close()  # no row group
    for source in (tmp_path / "rows.parquet", save(tmp_path / "empty.jsonl", b""), save(tmp_path / "a.txt", b" \n")):
        with pytest.raises(UserError, match="no text"):
            prepare(tmp_path / "out" / source.name, source)


# ---------------------------------------------------------------------------------------------------------
# formats and encodings

TEXTS = ["Zażółć", 'a "quoted", text\nin two lines', "", "naïve\r\nfaçade"]
TSV_TEXTS = ["Zażółć", '"quotes" are "text', "", "naïve"]  # one line each
WRITERS = {
    "a.json": lambda: json.dumps([{"text": text, "id": 1} for text in TEXTS], indent=1),
    "b.json": lambda: json.dumps(TEXTS),
    "c.json": lambda: "\n".join(json.dumps({"text": text}) for text in TEXTS),
    "d.NDJSON": lambda: "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS),
    "e.csv": lambda: "id,text\r\n" + "".join('1,"{}"\r\n'.format(text.replace('"', '""')) for text in TEXTS),
    "f.TSV": lambda: "id\ttext\n" + "".join(f"1\t{text}\n" for text in TSV_TEXTS),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_text_of_each_format_and_encoding_is_read(tmp_path, name, encoding):
    data = WRITERS[name]().encode(encoding)
    path = save(tmp_path / name, codecs.BOM_UTF16_BE + data if encoding == "utf-16-be" else data)
    assert read_all(path) == (TSV_TEXTS if name == "f.TSV" else TEXTS)


def test_utf_8_with_an_optional_mark_keeps_all_text(tmp_path):
    for name, data in (("a.txt", b"without"), ("b.txt", codecs.BOM_UTF8 + b"with")):
        save(tmp_path / name, data)
    assert read_all(tmp_path, encoding="utf-8-sig") == ["without", "with"]


def test_single_json_object_is_one_document(tmp_path):
    save(tmp_path / "a.json", b'{\n "text": "one",\n "more": {\n}}')
    assert read_all(tmp_path / "a.json") == ["one"]


@pytest.mark.parametrize("name", ["a.TXT", "b.Md", "c.txt.GZ"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-2"])
def test_text_files_are_decoded(tmp_path, monkeypatch, name, encoding):
    monkeypatch.setattr(texts, "BLOCK_BYTES", 7)  # so that characters lie across blocks
    save(tmp_path / name.lower(), "zażółć\r\n".encode(encoding)).rename(tmp_path / name)
    assert read_all(tmp_path, encoding=None if encoding == "utf-16" else encoding) == ["zażółć\r\n"]


def test_undecodable_file_is_named_or_skipped(tmp_path):
    save(tmp_path / "a.txt", b"before")
    save(tmp_path / "b.jsonl", '{"text": "first"}\n{"text": "zażółć"}'.encode("iso-8859-2"))
    save(tmp_path / "c.txt", b"after")
    with pytest.raises(UserError, match=r"b\.jsonl is not valid UTF-8.*line 2.*--encoding, or skip such files"):
        read_all(tmp_path)
    assert read_all(tmp_path, skip_bad=True) == ["before", "after"]


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n"])
def test_separator_divides_text_files(tmp_path, monkeypatch, separator):
    monkeypatch.setattr(texts, "BLOCK_BYTES", 7)  # so that separators lie across blocks
    pieces = ["one", "two\nlines", "", "<|end", "ż" * 30, "\n"]
    save(tmp_path / "a.txt", separator.join(pieces).encode())
    assert read_all(tmp_path / "a.txt", separator=separator) == separator.join(pieces).split(separator)


def test_byte_order_mark_of_a_large_jsonl_file_shifts_no_line(tmp_path, monkeypatch):
    lines = [f"line {i}" for i in range(50)]
    path = save_jsonl(tmp_path / "a.jsonl", lines)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    for size in range(1, 60):
        monkeypatch.setattr(tasks, "TASK_BYTES", size)
        assert read_all(path) == lines


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_files_are_read_in_tasks(tmp_path, monkeypatch, kind):
    table = pa.table({"id": range(1000), "text": [f"row {i}" for i in range(1000)]})
    create = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with create(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    monkeypatch.setattr(tasks, "TASK_BYTES", 4000)
    source = sources.find("files", (str(tmp_path),))
    source.open()
    assert len(source.fetch(0, "")) > 1
    assert read_all(tmp_path) == [f"row {i}" for i in range(1000)]


def test_saved_dataset_is_read_without_its_metadata(tmp_path):
    from datasets import Dataset, DatasetDict

    splits = {name: Dataset.from_dict({"text": [f"{name} {i}" for i in range(5)]}) for name in ("train", "test")}
    DatasetDict(splits).save_to_disk(tmp_path / "all")
    splits["test"].save_to_disk(tmp_path / "one", num_shards=2)
    splits["test"].save_to_disk(tmp_path / "cached")
    table = pa.table({"text": ["not a row"]})
    with pa.ipc.new_stream(str(tmp_path / "cached" / "cache-1.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert read_all(tmp_path / "cached") == read_all(tmp_path / "one")
    assert read_all(tmp_path / "all") == [f"train {i}" for i in range(5)]
    assert read_all(tmp_path / "all", split="test") == read_all(tmp_path / "one") == [f"test {i}" for i in range(5)]
    with pytest.raises(UserError, match=r"no split 'validation': it has test, train.*--split"):
        read_all(tmp_path / "all", split="validation")


@pytest.mark.parametrize("bad", ["id\n1\n", 'text\n"open\n', "text,score\na,high\n", "text\n1\n"])
def test_invalid_csv_is_reported_with_file_and_line(tmp_path, bad):
    save(tmp_path / "a.csv", bad.encode())
    source = sources.find("files", (str(tmp_path / "a.csv"),), ("text", *(["score"] if bad.startswith("text") else [])))
    with pytest.raises(UserError, match=r"a\.csv, line [123]"):
        list(sources.read_documents(source))
