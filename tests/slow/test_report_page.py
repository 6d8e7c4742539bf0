"""report.html in headless Chromium: curves, values on hover, log scale, zoom, other runs, samples.

It uses the Chromium of the system, or that of `playwright install chromium`.
"""

import json
import math
import re

import pytest
from playwright.sync_api import Page
from support.report import make_run

from babygpt.training import report
from babygpt.training.plots import read_runs
from babygpt.training.report import write_report

TEXTS = ("The first sample", "The <b>second</b> sample")


@pytest.fixture
def page(browser, tmp_path):
    """The report of a run of 400 steps. After the test, there must be no error in the console."""
    run = make_run(tmp_path / "run", 400, TEXTS)
    write_report(read_runs([run]), run / "report.html")
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((run / "report.html").as_uri())
    yield page
    assert not problems
    page.close()


def canvas(page: Page, title: str):
    return page.locator(f"canvas[aria-label='{title}']")


def hover(page: Page, title: str, fraction: float) -> str:
    """Move the pointer to a fraction of the x-axis of a chart, and return the text of the tooltip."""
    canvas(page, title).scroll_into_view_if_needed()
    box = canvas(page, title).bounding_box()
    left, right = box["x"] + 62, box["x"] + box["width"] - 12  # MARGIN of the page
    page.mouse.move(left + fraction * (right - left), box["y"] + 100)
    return page.locator("#tooltip").inner_text()


def has_curve(page: Page, title: str) -> bool:
    """Return whether a chart has more than 20 pixels that are similar to the color of the run, #2a6fbb."""
    blue = canvas(page, title).evaluate("""c => {
        const rgba = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        return rgba.filter((_, i) => i % 4 === 0 && rgba[i + 3] && rgba[i + 2] - rgba[i] > 80).length;
    }""")
    return blue > 20


def test_each_logged_column_has_a_curve(page):
    titles = ["loss", "validation loss", "HellaSwag", "learning rate", "epoch", "tokens", "elapsed time"]
    assert [chart.get_attribute("aria-label") for chart in page.locator("figure:not([hidden]) canvas").all()] == titles
    assert all(has_curve(page, title) for title in titles)
    assert page.title() == "run: training report"


def test_hover_shows_the_measured_values(page):
    text = hover(page, "loss", 0.5)
    assert "step 200: loss 0.024876" in text
    assert "step 200: val_loss 0.029851" in text
    assert "step 400: hellaswag 0.25 ± 0.043" in hover(page, "HellaSwag", 1.0)
    page.mouse.move(1, 1)
    assert not page.locator("#tooltip").is_visible()


def test_x_axis_can_show_tokens_and_hours(page):
    assert page.evaluate("charts[0].x.high") == 400
    page.locator("[name=x]").select_option("tokens")
    assert page.evaluate("charts[0].x.high") == 400_000
    assert "step 100: val_loss" in hover(page, "loss", 0.25)
    page.locator("[name=x]").select_option("hours")
    assert 0 < page.evaluate("charts[0].x.high") < 0.01


def test_log_scale_zoom_and_reset(page):
    linear = canvas(page, "loss").get_attribute("data-limits")
    page.locator("[name=logY]").check()
    low, high = map(float, canvas(page, "loss").get_attribute("data-limits").split())
    middle = page.evaluate(f"charts[0].y.toPixel({(low * high) ** 0.5})")
    assert middle == pytest.approx((340 - 22 + 8) / 2), "the geometric mean is in the middle of the axis"
    assert canvas(page, "epoch").get_attribute("data-limits") == "0.1 1", "no value is positive"
    page.locator("[name=logX]").check()
    assert "step 20: val_loss" in hover(page, "loss", 0.5), "the middle between 1 and 400 is 20"
    page.locator("[name=logX]").uncheck()
    page.locator("[name=logY]").uncheck()
    zoom(page, "loss", 0.5, 0.75)
    assert "step 250: val_loss" in hover(page, "loss", 0.5), "the chart shows steps 200 to 300"
    page.locator("#reset").click()
    assert canvas(page, "loss").get_attribute("data-limits") == linear


def test_other_runs_can_be_added(page, tmp_path):
    other = make_run(tmp_path / "other", 200)
    write_report(read_runs([other]), other / "report.html")
    page.locator("#add").set_input_files(other / "report.html")
    page.locator("#legend label").nth(1).wait_for()
    assert page.locator("#legend label").all_inner_texts() == ["run", "other"]
    text = hover(page, "loss", 0.25)
    assert "run, step 100: val_loss" in text
    assert "other, step 100: val_loss" in text
    assert "other" not in hover(page, "loss", 0.9)
    assert page.locator("#facts").inner_text().split() == ["run", "other", "training.max_steps", "400", "200"]
    page.locator("#legend input").first.uncheck()
    text = hover(page, "loss", 0.25)
    assert "run, step" not in text
    assert text.count("other, step") == 2


def limits(page: Page, title: str) -> tuple[float, ...]:
    return tuple(map(float, canvas(page, title).get_attribute("data-limits").split()))


def zoom(page: Page, title: str, first: float, last: float) -> None:
    hover(page, title, first)
    page.mouse.down()
    hover(page, title, last)
    page.mouse.up()


def test_start_is_visible_on_a_logarithmic_x_axis(page):
    """On a linear one, the first tenth does not determine the scale."""
    assert limits(page, "loss")[1] < 0.2
    page.locator("[name=logX]").check()
    assert limits(page, "loss")[1] > 2


def test_zoom_shows_the_line_between_two_points(page):
    """The validations are at steps 200 and 210."""
    zoom(page, "loss", 0.5, 0.55)
    zoom(page, "validation loss", 0.1, 0.4)
    low, high = limits(page, "validation loss")
    assert 0.009 < low < 2 / 211 < 2 / 201 < high < 0.0101
    page.mouse.dblclick(*[canvas(page, "loss").bounding_box()[k] + 100 for k in "xy"])
    assert page.evaluate("range") is None


def test_drag_may_leave_the_chart(page):
    box = canvas(page, "loss").bounding_box()
    hover(page, "loss", 0.75)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] + 200, box["y"] + 500, steps=4)
    page.mouse.up()
    assert page.evaluate("range") == pytest.approx([300, 400], abs=1)


def test_unusual_runs_are_shown(browser, tmp_path, monkeypatch):
    """Settings and scores that are not finite, a long name, a diverged loss, and bins."""
    monkeypatch.setattr(report, "BINS", 50)
    run = make_run(tmp_path / ("a-long-name-" * 12), 400, TEXTS)
    config = json.loads((run / "config.json").read_text())
    config["optimizer"] = {"grad_clip": math.inf}
    (run / "config.json").write_text(json.dumps(config))
    rows = (run / "log.csv").read_text().splitlines(keepends=True)
    rows[351:] = [re.sub(r"^(\d+,\d+,0),[^,]*,[^,]*", r"\1,nan,nan", row) for row in rows[351:]]
    (run / "log.csv").write_text("".join(rows))
    write_report(read_runs([run, make_run(tmp_path / "other", 400)]), tmp_path / "compare.html")
    page, problems = browser.new_page(viewport={"width": 390, "height": 800}), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((tmp_path / "compare.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert "optimizer.grad_clip\tinf" in page.locator("#facts").inner_text()
    assert "nan" in page.locator("#scores tr").nth(1).inner_text()
    assert "non-finite loss in 51 steps, first in step 350" in page.locator("#run-summary").inner_text()
    text = hover(page, "loss", 0.005)
    assert "steps 0 to 6: loss" in text or "steps 0 to 7: loss" in text
    assert not problems
    page.close()


def test_other_files_are_refused_with_a_message(page, tmp_path):
    messages = []
    page.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.accept()))
    for name, content in {
        "a.html": "<p>",
        "b.html": '<script id="data" type="application/json">{"x": 1</script>',
    }.items():
        (tmp_path / name).write_text(content)
    other = make_run(tmp_path / "other", 20)
    write_report(read_runs([other]), other / "report.html")
    page.locator("#add").set_input_files([tmp_path / "a.html", tmp_path / "b.html", other / "report.html"])
    page.locator("#legend label").nth(1).wait_for()
    assert [message.split(" is not")[0] for message in messages] == ["a.html", "b.html"]


def test_samples_scores_and_settings_are_shown(page):
    assert page.locator("#sample-label").inner_text() == "step 400"
    assert page.locator("#samples pre").all_inner_texts() == list(TEXTS)
    page.locator("#sample-step").fill("0")
    assert page.locator("#samples pre").all_inner_texts() == ["Before training"]
    assert page.locator("#scores tr").nth(1).inner_text().split() == [
        "400", "400,000", "0.0150", "0.0050", "0.2500", "±", "0.0433",
    ]  # fmt: skip
    assert "training.max_steps\t400" in page.locator("#facts").inner_text()


@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_the_width_of_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == width
    box = canvas(page, "loss").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width  # noqa: PT018
