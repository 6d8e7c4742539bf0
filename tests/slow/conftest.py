"""Fixtures of the slow tests."""

import shutil

import pytest


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window: that of the system, or of `playwright install chromium`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
