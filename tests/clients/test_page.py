"""Chromium on the web page."""

import base64
import io
import os
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from server import serving

# The last four keep Chromium from contacting Google's hosts, which a closed network rejects.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
DESKTOP = {"viewport": {"width": 1200, "height": 860}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "color_scheme": "dark"}


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests; each test has its own profile."""
    with sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


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
    # The browser itself logs every error response.
    assert not [error for error in errors if "Failed to load resource" not in error]


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
    """Waits for this number of images in the history."""
    expect(page.locator("#history li")).to_have_count(count)
    expect(page.locator("#cancel")).to_be_hidden()


def test_an_image_is_previewed_stored_and_repeated(browser, server):
    with opened(browser, server) as page:
        shoot(page, "empty")
        generate(page, "a red house by the sea at night", steps=60)
        page.wait_for_selector("img.forming")
        expect(page.locator("#told")).to_contain_text(re.compile(r"step \d+ of \d+, .+ left"))
        shoot(page, "forming")
        generated(page, 1)
        shoot(page, "generated")
        parameters = page.inner_text("#parameters")
        assert parameters.startswith("a red house by the sea at night · 128×128 · 60 steps")
        seed = parameters.rsplit(" ", 1)[1]
        generate(page, "a blue car", steps=2, count=2)
        generated(page, 3)
        assert page.locator("#views img").count() == 2
        page.reload()
        expect(page.locator("#history li")).to_have_count(3)
        expect(page.locator("#prompt")).to_have_value("a blue car")
        expect(page.locator("#model")).to_contain_text("demo")
        page.locator("#history button").last.click()
        page.click("#reuse")
        assert page.input_value("#prompt") == "a red house by the sea at night"
        assert (page.input_value("#seed"), page.input_value("#steps")) == (seed, "60")
        page.click("#delete")
        expect(page.locator("#history li")).to_have_count(2)


def test_the_keyboard_generates_and_cancels(browser, server):
    with opened(browser, server) as page:
        page.fill("#prompt", "a boat")
        page.locator("#steps").fill("150")
        page.press("#prompt", "Control+Enter")
        expect(page.locator("#cancel")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#cancel")).to_be_hidden()
        expect(page.locator("#error")).to_be_hidden()
        assert page.locator("#history li").count() == 0


def test_seeds(browser, server):
    with opened(browser, server) as page:
        # More than a JavaScript number holds.
        generate(page, "a cat", seed="18446744073709551615", count=2, width=64, height=64)
        generated(page, 2)
        assert page.inner_text("#parameters").endswith("seed 18446744073709551615")
        page.locator("#history button").first.click()
        assert page.inner_text("#parameters").endswith("seed 0")
        page.click("#dice")
        locked = page.input_value("#seed")
        generate(page, "a cat", width=64, height=64, count=1)
        generated(page, 3)
        assert page.input_value("#seed") == locked
        page.click("#lock")
        generate(page, "a cat")
        generated(page, 4)
        assert page.input_value("#seed") != locked


def test_an_input_image_and_a_mask(browser, server, tmp_path):
    Image.new("RGB", (96, 64), "orange").save(tmp_path / "orange.png")
    with opened(browser, server) as page:
        page.set_input_files("#file", tmp_path / "orange.png")
        expect(page.locator("#chosen")).to_be_visible()
        # The current area in the aspect ratio of the image.
        assert (page.input_value("#width"), page.input_value("#height")) == ("152", "104")
        page.click("#paint")
        box = page.locator("#mask").bounding_box()
        page.mouse.move(box["x"] + box["width"] / 4, box["y"])
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"], steps=5)
        page.mouse.up()
        page.mouse.click(box["x"] + box["width"] * 88 / 96, box["y"] + box["height"] / 8)
        shoot(page, "mask")
        page.click("#done")
        expect(page.locator("#paint")).to_have_text("Edit mask")
        page.locator("#strength").fill("0.9")
        with page.expect_request("**/v1/invocations") as sent:
            generate(page, "a blue lake", steps=6)
        body = sent.value.post_data_json
        mask = Image.open(io.BytesIO(base64.b64decode(body["mask"]))).convert("L")
        assert mask.size == (96, 64) and body["strength"] == 0.9
        assert mask.getpixel((24, 32)) == 255 and mask.getpixel((72, 32)) == 0
        assert mask.getpixel((88, 8)) == 255, "a tap draws a dot"
        generated(page, 1)
        shoot(page, "masked")
        page.click("#remove")
        page.click("#begin")
        expect(page.locator("#chosen")).to_be_visible()


def test_errors_are_clear(browser, server):
    with opened(browser, server) as page:
        page.fill("#width", "100")
        page.evaluate("document.getElementById('form').noValidate = true")
        generate(page, "a cat")
        expect(page.locator("#error")).to_have_text("Width must be a multiple of 8, not 100")
        shoot(page, "error")


def test_a_phone_in_the_dark(browser, server):
    with opened(browser, server, **PHONE) as page:
        shoot(page, "phone")
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= PHONE["viewport"]["width"], "the page is no wider than the phone"
        generate(page, "a red house by the sea", steps=10)
        generated(page, 1)
        page.locator("#stage").scroll_into_view_if_needed()
        shoot(page, "phone-generated")


def test_a_key_is_asked_for_once(browser, locked):
    with opened(browser, locked) as page:
        generate(page, "a cat")
        expect(page.locator("#key-dialog")).to_be_visible()
        page.fill("#key", "sesame")
        shoot(page, "key")
        page.click("#key-dialog button[value=save]")
        page.click("#draw")
        generated(page, 1)


def test_the_documentation(browser, server):
    with opened(browser, server) as page:
        page.click("text=API")
        page.wait_for_selector("text=POST /v1/images/generations")
        assert page.locator("details").count() > 25
        page.click("text=POST /v1/invocations")
        expect(page.locator("details[open]")).to_contain_text("num_inference_steps")
        shoot(page, "docs")


def test_a_model_is_selected(browser, binary, tmp_path):
    demo = Path(__file__).parents[2] / "models" / "demo"
    for name in ["red", "blue"]:
        (tmp_path / "models" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "models" / name).symlink_to(demo)
    folder = ("--models-dir", str(tmp_path / "models"))
    with serving(binary, tmp_path / "log", "--api-key", "sesame", model=folder) as url:
        with opened(browser, url, status="select a model") as page:
            # Listing the models requires the key.
            page.fill("#key", "sesame")
            page.click("#key-dialog button[value=save]")
            expect(page.locator("#which option")).to_have_text(["blue", "red"])
            page.select_option("#which", "red")
            shoot(page, "models")
            with page.expect_request("**/models/red") as sent:
                generate(page, "a boat")
            # Blank fields are omitted: the model's defaults apply.
            assert not {"width", "height", "scheduler", "model"} & set(sent.value.post_data_json)
            generated(page, 1)
            assert page.inner_text("#parameters").startswith("a boat · red · 128×128 · 2 steps · guidance 7.5 · seed ")
            page.reload()
            expect(page.locator("#which")).to_have_value("red")
            page.click("text=API")
            page.wait_for_selector("text=POST /v1/images/generations")
    both = ("--model", "demo", *folder)
    with serving(binary, tmp_path / "log", model=both) as url, opened(browser, url) as page:
        expect(page.locator("#which option")).to_have_text(["demo", "blue", "red"])
        page.select_option("#which", "blue")
        with page.expect_request("**/models/blue"):
            generate(page, "a boat")
        generated(page, 1)
        page.select_option("#which", "demo")
        with page.expect_request("**/v1/invocations"):
            generate(page, "a boat")
        generated(page, 2)
