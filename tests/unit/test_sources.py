"""sources.py, local files: documents, their order and their tasks depend on the source alone."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.helpers import save, save_jsonl
from support.preparation import prepare

from babygpt.data import tasks as tasks_module
from babygpt.data.sources import find, read_documents, read_first_documents
from babygpt.errors import UserError


def local_files(*patterns, column="text"):
    return find("files", tuple(map(str, patterns)), (column,))


def open_files(*patterns):
    source = local_files(*patterns)
    source.open()
    return source


def tasks(source, directory=Path("unused")):
    return [task for unit in range(len(source.units)) for task in source.fetch(unit, directory)]


def file_names(source):
    """Return the file names of each task, in order."""
    return [[os.path.basename(path) for path in task.location] for task in tasks(source)]


def test_documents_are_in_the_order_of_sorted_paths(tmp_path):
    """The order does not depend on how --input names the files."""
    for name in ("b/2.txt", "b/10.txt", "a/z.txt", "c.txt"):
        save(tmp_path / name, name.encode())
    expected = ["a/z.txt", "b/10.txt", "b/2.txt", "c.txt"]
    for patterns in (["c.txt", "b/*", "a"], ["."], ["b", "*/*.txt", "*.txt", "a/z.txt"], ["**/*.txt"]):
        assert list(read_documents(local_files(*(tmp_path / pattern for pattern in patterns)))) == expected


def test_tasks_depend_on_the_files_alone(tmp_path, monkeypatch):
    """Neither the directory nor the pattern changes them."""
    monkeypatch.setattr(tasks_module, "TASK_BYTES", 40)
    for directory in ("a", "b"):
        for i in range(20):
            save(tmp_path / directory / f"{i:02d}.txt", b"page " * i)
    a, a_by_pattern, b = open_files(tmp_path / "a"), open_files(tmp_path / "a" / "*"), open_files(tmp_path / "b")
    assert tasks(a) == tasks(a_by_pattern)
    assert file_names(a) == file_names(b)
    assert a.revision == a_by_pattern.revision == b.revision
    assert [name for task in file_names(a) for name in task] == [f"{i:02d}.txt" for i in range(20)]
    assert 3 < len(file_names(a)) < 20


@pytest.mark.parametrize("change", ["first byte", "last byte", "length", "name", "added file"])
def test_changed_source_has_another_revision(tmp_path, change):
    path = save(tmp_path / "a.txt", b"x" * 200_000)
    before = open_files(tmp_path).revision
    if change == "name":
        path.rename(tmp_path / "b.txt")
    elif change == "added file":
        save(tmp_path / "b.txt", b"")
    else:
        new = {"first byte": b"y" + b"x" * 199_999, "last byte": b"x" * 199_999 + b"y", "length": b"x" * 199_999}
        path.write_bytes(new[change])
    assert open_files(tmp_path).revision != before


def test_small_files_share_a_task_and_large_ones_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks_module, "TASK_BYTES", 100)
    for name, size in (("a", 10), ("b", 20), ("c", 500), ("d", 500), ("e", 10), ("f", 10)):
        save(tmp_path / f"{name}.txt", b"x" * size)
    assert file_names(open_files(tmp_path)) == [["a.txt", "b.txt"], ["c.txt"], ["d.txt"], ["e.txt", "f.txt"]]


def test_opening_small_files_reads_each_size_only_a_few_times(tmp_path, monkeypatch):
    for i in range(200):
        save(tmp_path / f"{i:03d}.txt", b"x")
    calls, getsize = [], os.path.getsize
    monkeypatch.setattr(os.path, "getsize", lambda path: calls.append(path) or getsize(path))
    open_files(tmp_path)
    assert len(calls) <= 4 * 200


def test_each_row_group_of_a_parquet_file_is_in_one_task(tmp_path, monkeypatch):
    """The tasks of a parquet file are consecutive ranges of row groups."""
    monkeypatch.setattr(tasks_module, "TASK_BYTES", 400)
    texts = [f"row {i} " + "x" * (i * 7 % 50) for i in range(100)]
    pq.write_table(pa.table({"id": range(100), "text": texts}), tmp_path / "b.parquet", row_group_size=6)
    save_jsonl(tmp_path / "a.jsonl", ["before"])
    save_jsonl(tmp_path / "c.jsonl", ["after"])
    source = open_files(tmp_path)
    ranges = [task.range for task in tasks(source) if task.kind == "parquet"]
    assert [group for first, stop in ranges for group in range(first, stop)] == list(range(17))
    assert 3 < len(ranges) < 17
    assert list(read_documents(local_files(tmp_path))) == ["before", *texts, "after"]
    assert [task.kind for task in tasks(source)] == ["files", *["parquet"] * len(ranges), "files"]


@pytest.mark.parametrize("ending", ["\n", ""])
def test_each_line_of_a_large_jsonl_file_is_in_one_task(tmp_path, monkeypatch, ending):
    texts = [f"line {i} " + "ł" * (i * 7 % 50) for i in range(60)]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + ending
    save(tmp_path / "a.jsonl", lines.encode())
    for size in (1, 2, 30, 31, 32, 33, 100, 1000):
        monkeypatch.setattr(tasks_module, "TASK_BYTES", size)
        assert len(tasks(open_files(tmp_path))) == -(-len(lines.encode()) // size)
        assert list(read_documents(local_files(tmp_path))) == texts


def test_bad_line_of_a_later_task_is_reported_by_offset(tmp_path, monkeypatch):
    save(tmp_path / "a.jsonl", b'{"text": "a"}\n' * 10 + b"{\n")
    monkeypatch.setattr(tasks_module, "TASK_BYTES", 50)
    with pytest.raises(UserError, match=r"a\.jsonl, the line at byte 140 is not valid JSON"):
        list(read_documents(local_files(tmp_path)))


def test_text_column_can_have_another_name(tmp_path):
    pq.write_table(pa.table({"text": [1], "body": ["from parquet"]}), tmp_path / "a.parquet")
    save(tmp_path / "b.jsonl", b'{"body": "from jsonl", "text": 1}\n')
    assert list(read_documents(local_files(tmp_path, column="body"))) == ["from parquet", "from jsonl"]


@pytest.mark.parametrize("name", ["page[1].txt", "pages [old]/1.txt", b"\xff.txt"])
def test_files_with_unusual_names_are_read(tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    save(path, b"hello")
    for pattern in (path, path.parent):
        assert list(read_documents(local_files(pattern))) == ["hello"]


def test_hidden_files_and_broken_links_are_skipped(tmp_path):
    for name in ("1.txt", ".DS_Store", ".cache/huggingface/1.txt", "below/.2.txt"):
        save(tmp_path / name, name.encode())
    os.symlink(tmp_path / "gone.txt", tmp_path / "broken.txt")
    assert list(read_documents(local_files(tmp_path))) == ["1.txt"]


def test_tilde_in_input_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "pages" / "1.txt", b"hello")
    assert list(read_documents(local_files("~/pages"))) == ["hello"]
    assert list(read_documents(local_files("~/pages/*.txt"))) == ["hello"]


def test_stdlib_source_excludes_tests_and_packages():
    paths = find("stdlib").paths
    relative = [Path(path).relative_to(os.path.dirname(os.__file__)) for path in paths]
    assert {Path("os.py"), Path("json/decoder.py")} <= set(relative)
    assert relative == sorted(relative, key=str)
    excluded = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert not [path for path in relative if excluded & set(path.parts)]


def test_first_documents_stop_after_reaching_max_bytes(tmp_path):
    save_jsonl(tmp_path / "a.jsonl", ["aaaa", "žž", "cccc", "dddd"])
    for max_bytes, expected in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (1000, 4)):
        assert len(list(read_first_documents(local_files(tmp_path), max_bytes))) == expected


def test_unknown_source_is_rejected_with_the_nearest_name():
    with pytest.raises(UserError, match="Did you mean 'stdlib'"):
        find("stdlb")
    with pytest.raises(UserError, match="only for the source `files`"):
        find("stdlib", ("a.txt",))
    with pytest.raises(UserError, match="--input"):
        find("files")


def test_hidden_files_and_link_cycles_are_skipped(tmp_path):
    save(tmp_path / "in" / "a.txt", b"a")
    save(tmp_path / "in" / ".cache" / "b.lock", b"")
    os.symlink(".", tmp_path / "in" / "loop")
    os.symlink("nowhere.txt", tmp_path / "in" / "broken.txt")
    assert list(read_documents(local_files(tmp_path / "in"))) == ["a"]


def test_text_file_that_is_not_utf8_is_named_in_the_error(tmp_path):
    save(tmp_path / "a.txt", "zażółć".encode("iso-8859-2"))
    with pytest.raises(UserError, match=r"a\.txt is not valid UTF-8"):
        list(read_documents(local_files(tmp_path)))


def test_input_may_have_names_that_are_not_utf8(tmp_path):
    """A shell expands patterns to names in any encoding; Python decodes them with surrogates."""
    name = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(name, "wb") as file:
        file.write(b"some text")
    manifest = prepare(tmp_path / "d", os.fsdecode(name))
    assert manifest["counts"]["documents"]["kept"] == 1
