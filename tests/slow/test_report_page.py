"""report.html in headless Chromium: curves, values on hover, log scale, zoom, other runs, samples.

It uses the Chromium of the system, or that of `playwright install chromium`.
"""

import shutil

import pytest
from playwright.sync_api import Page, sync_playwright
from support.report import make_run

from babygpt.training.report import write_report

TEXTS = ("The first sample", "The <b>second</b> sample")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, tmp_path):
    """The report of a run of 400 steps. After the test, there must be no error in the console."""
    run = make_run(tmp_path / "run", 400, TEXTS)
    write_report([run], run / "report.html")
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
    left, right = box["x"] + 58, box["x"] + box["width"] - 12  # MARGIN of the page
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
    assert [chart.get_attribute("aria-label") for chart in page.locator("canvas").all()] == titles
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
    hover(page, "loss", 0.5)
    page.mouse.down()
    hover(page, "loss", 0.75)
    page.mouse.up()
    assert "step 250: val_loss" in hover(page, "loss", 0.5), "the chart shows steps 200 to 300"
    page.locator("#reset").click()
    assert canvas(page, "loss").get_attribute("data-limits") == linear


def test_other_runs_can_be_added(page, tmp_path):
    other = make_run(tmp_path / "other", 200)
    write_report([other], other / "report.html")
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
