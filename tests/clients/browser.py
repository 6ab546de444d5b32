"""Chromium on the web page: opening it, filling in its form, and what it may not do meanwhile."""

import os
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import expect

# The last four keep Chromium from contacting Google's hosts, which a closed network rejects.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
DESKTOP = {"viewport": {"width": 1200, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "color_scheme": "dark"}

# Chromium itself logs every error response, and every connection that fails.
LOGGED = "Failed to load resource"


@contextmanager
def opened(browser, url, status="demo", **device):
    """The page, ready to generate. It may contact no other host and raise no script error."""
    context = browser.new_context(**(device or DESKTOP))
    page = context.new_page()
    page.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)
    errors, foreign = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("request", lambda sent: sent.url.startswith((url, "blob:", "data:")) or foreign.append(sent.url))
    page.goto(url)
    expect(page.locator("#model")).to_contain_text(status)
    yield page
    context.close()
    assert not foreign
    assert not [error for error in errors if LOGGED not in error]


def shoot(page, name):
    """Saves a screenshot if SCREENSHOTS is set."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")


def generate(page, prompt, steps=2, **fields):
    """Fills in the form and presses Generate."""
    page.fill("#prompt", prompt)
    page.locator("#steps").fill(str(steps))
    for field, value in fields.items():
        page.fill(f"#{field}", str(value))
    page.click("#draw")


def generated(page, count):
    """Waits for this number of images in the history, and the end of the queue."""
    expect(page.locator("#history li")).to_have_count(count)
    expect(page.locator("#cancel")).to_be_hidden()


def sent(page, act, path="v1/invocations"):
    """The body of the request that an act makes the page send."""
    with page.expect_request(f"**/{path}") as request:
        act()
    return request.value.post_data_json


def is_as_wide_as_its_window(page):
    """Whether nothing reaches beyond the window."""
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")
