"""A headless browser that must not complain, for the tests of pages."""

import re
import shutil
from contextlib import contextmanager

import databases
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")  # of a session there could be but one in a process, and two folders take it up
def browser():
    if CHROMIUM is None:
        databases.missing("chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield launched
        launched.close()


@contextmanager
def page_of(browser, address, *, allowed=(), **options):
    """A page in a browser of its own, which may ask for nothing but our server or its file, and must log no error but
    the allowed.
    """
    context = browser.new_context(viewport={"width": 1200, "height": 800}, **options)
    page = context.new_page()
    told, asked = [], []
    page.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("dialog", lambda dialog: (told.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    origin = address if address.startswith("file:") else re.match(r"https?://[^/]+/", address)[0]
    elsewhere = [url for url in asked if not url.startswith(origin)]
    complaints = [text for text in told if not any(each in text for each in allowed)]
    assert not elsewhere + complaints, elsewhere + complaints
    context.close()


def assert_accessible(page):
    """Fails for what an accessibility checker finds serious, and for a page that scrolls sideways."""
    found = [
        (each["id"], each["impact"], [node["html"] for node in each["nodes"]])
        for each in Axe().run(page).response["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert found == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
