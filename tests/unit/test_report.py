"""report.html: the data in the page, and what the page needs. tests/slow/test_report_page.py opens it in a browser."""

import json
import re
import shutil

import pytest
from support.helpers import call
from support.report import make_run

from babygpt.training import report
from babygpt.training.log import Log, read_log
from babygpt.training.plots import read_runs
from babygpt.training.report import write_report
from tools import plot


def read_data(page) -> list[dict]:
    """Return the runs in a page, with the data read as a browser does: up to the first </script>."""
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])["runs"]


def test_page_has_every_logged_value(tmp_path):
    run = make_run(tmp_path / "run", 50)
    write_report(read_runs([run]), tmp_path / "report.html")
    [data] = read_data(tmp_path / "report.html")
    rows = read_log(run / "log.csv")
    for name in ("loss", "val_loss", "val_bpb", "lr", "tokens", "elapsed_s"):
        column = data["columns"][name]
        logged = {row["step"]: row[name] for row in rows if row[name] is not None}
        assert data["axes"][column["axis"]] == {"steps": list(logged)}
        assert column["values"] == pytest.approx(list(logged.values()), rel=1e-5)
    assert "grad_norm" not in data["columns"], "it has no finite value"
    assert data["columns"]["hellaswag"]["error"] == pytest.approx([(0.25 * 0.75 / 100) ** 0.5] * 6)
    assert data["scores"][1] == [10, 10_000, 6 / 11, 2 / 11, 0.25, pytest.approx(0.0433, abs=1e-4)]
    assert data["facts"]["training.max_steps"] == 50
    assert data["summary"].startswith("step 50 of 50 · 50,000 tokens · a note · written at ")


def test_bins_keep_the_mean_and_the_extremes(monkeypatch):
    monkeypatch.setattr(report, "BINS", 10)
    values = [float(i % 7) for i in range(95)]
    axis, bins = report.bin_values(list(range(95)), values, is_noisy=True)
    assert bins["size"] == 10
    assert axis == {"first": list(range(0, 95, 10)), "last": [*range(9, 90, 10), 94]}
    groups = [values[i : i + 10] for i in range(0, 95, 10)]
    assert bins["values"] == pytest.approx([sum(group) / len(group) for group in groups])
    assert (bins["low"], bins["high"]) == ([min(group) for group in groups], [max(group) for group in groups])


def test_page_of_a_long_run_shows_its_spikes(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "BINS", 5)
    write_report(read_runs([make_run(tmp_path / "run", 50)]), tmp_path / "report.html")
    assert read_data(tmp_path / "report.html")[0]["columns"]["loss"]["high"][0] == 99.0


def test_samples_cannot_end_the_data(tmp_path):
    """The text of a sample reaches the page unchanged, whatever it contains."""
    texts = ["</script><script>alert(1)</script>", "<!-- <script> DATA", 'a "quote", \\ and a\nline', "zażółć 🙂 \x00"]
    write_report(read_runs([make_run(tmp_path / "run", 20, tuple(texts))]), tmp_path / "report.html")
    assert read_data(tmp_path / "report.html")[0]["samples"][1:] == [[20, text] for text in texts]


def test_page_is_small_and_loads_nothing(tmp_path):
    page = report.TEMPLATE.read_text(encoding="utf-8")
    assert len(page.encode()) < 60_000
    assert page.count("DATA") == 1
    assert not re.search(r"https?:|//[a-z]|\bsrc=|\bhref=|@import|url\(|\bfetch\(|\bimport\b", page)


def test_facts_come_from_the_newest_checkpoint(uninterrupted_run, tmp_path):
    run = shutil.copytree(uninterrupted_run, tmp_path / "run")
    state = json.loads(sorted(run.glob("checkpoints/*/state.json"))[-1].read_text())
    facts = report.facts(run)
    assert facts["versions.torch"] == state["launches"][-1]["provenance"]["torch"]
    assert facts["dataset.fingerprint"] == state["data"]["fingerprint"]
    assert facts["launches.first_steps"] == "0"
    for damaged in run.glob("checkpoints/*/state.json"):
        damaged.write_text("{")
    facts = report.facts(run)
    assert facts["model.n_embd"] == 16
    assert "versions.torch" not in facts


def test_report_of_several_runs(tmp_path):
    runs = [make_run(tmp_path / "a" / "run", 20), make_run(tmp_path / "b" / "run", 10)]
    call(plot.main, *runs, "--out", tmp_path / "compare.html", "--x", "tokens")
    data = read_data(tmp_path / "compare.html")
    assert [run["name"] for run in data] == [str(run) for run in runs]
    assert [len(run["columns"]["loss"]["values"]) for run in data] == [20, 10]


def test_report_of_a_run_without_a_finished_step(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    Log(run / "log.csv").close()
    write_report(read_runs([run]), run / "report.html")
    assert read_data(run / "report.html")[0]["summary"] == "no steps logged"
