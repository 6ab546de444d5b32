"""The web page: generating, the history, seeds, keys, models, phones."""

import re
from pathlib import Path

from playwright.sync_api import expect

from browser import DESKTOP, PHONE, generate, generated, is_as_wide_as_its_window, opened, sent, shoot
from server import serving


def test_an_image_is_previewed_stored_and_repeated(browser, server):
    with opened(browser, server) as page:
        shoot(page, "empty")
        generate(page, "a red house by the sea at night", steps=60)
        page.wait_for_selector("img.forming")
        expect(page.locator("#queue .told")).to_contain_text(re.compile(r"step \d+ of \d+, .+ left"))
        shoot(page, "forming")
        generated(page, 1)
        shoot(page, "generated")
        assert page.inner_text("#said") == "a red house by the sea at night"
        parameters = page.inner_text("#parameters")
        assert parameters.startswith("128×128 · 60 steps · PLMS · guidance 7.5 · seed ")
        seed = parameters.rsplit(" ", 1)[1]
        generate(page, "a blue car", steps=2, count=2)
        generated(page, 3)
        assert page.locator("#views img").count() == 2
        page.locator("#views img").last.click()
        expect(page.locator("#views img")).to_have_count(1)
        page.reload()
        expect(page.locator("#history li")).to_have_count(3)
        expect(page.locator("#prompt")).to_have_value("a blue car")
        expect(page.locator("#model")).to_contain_text("demo")
        page.locator("#history button").last.click()
        page.click("#reuse")
        assert page.input_value("#prompt") == "a red house by the sea at night"
        assert (page.input_value("#seed"), page.input_value("#steps")) == (seed, "60")
        assert page.input_value("#sampler") == "pndm", "the default of then may not be that of now"
        page.click("#delete")
        expect(page.locator("#history li")).to_have_count(2)


def test_blank_fields_leave_the_defaults_to_the_server(browser, furnished):
    with opened(browser, furnished) as page:
        page.fill("#prompt", "a cat")
        page.fill("#seed", "7")
        body = sent(page, lambda: page.click("#draw"))
        assert body == {
            "prompt": "a cat", "seed": "7", "prompt_syntax": "plain",
            "stream": True, "preview": True, "output_format": "png",
        }
        placeholders = {name: page.get_attribute(f"#{name}", "placeholder") for name in ["width", "steps", "guidance"]}
        assert placeholders == {"width": "128", "steps": "50", "guidance": "7.5"}
        generated(page, 1)
        # A LoRA that was distilled to few steps brings its own.
        page.fill("#lora", "lcm")
        page.press("#lora", "Enter")
        page.click("#draw")
        generated(page, 2)
        assert page.inner_text("#parameters").startswith("128×128 · 4 steps · LCM")
        expect(page.locator("#warnings")).to_contain_text("its defaults were taken")


def test_the_keyboard(browser, server):
    with opened(browser, server) as page:
        page.fill("#prompt", "a boat")
        page.locator("#steps").fill("150")
        page.press("#prompt", "Control+Enter")
        expect(page.locator("#cancel")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#cancel")).to_be_hidden()
        expect(page.locator("#error")).to_be_hidden()
        assert page.locator("#history li").count() == page.locator("#queue li").count() == 0
        # A question mark is text where text is typed.
        page.press("#prompt", "?")
        expect(page.locator("#help-dialog")).to_be_hidden()
        page.focus("#open-help")
        page.keyboard.press("?")
        expect(page.locator("#help-dialog")).to_contain_text("cancel the generation")
        shoot(page, "help")
        page.keyboard.press("Escape")
        expect(page.locator("#help-dialog")).to_be_hidden()
        for seed in ["1", "2"]:
            generate(page, "a boat", seed=seed)
            generated(page, int(seed))
        page.focus("#reuse")
        for key, seed in [("ArrowRight", "1"), ("ArrowRight", "1"), ("ArrowLeft", "2")]:
            page.keyboard.press(key)
            assert page.inner_text("#parameters").endswith(f"seed {seed}")


def test_every_control_has_a_name_and_none_is_in_another_order_than_it_looks(browser, server):
    with opened(browser, server) as page:
        page.click("#more summary")
        page.check("#hires")
        nameless = page.evaluate(
            """[...document.querySelectorAll("input, select, textarea, button, canvas")]
            .filter(e => e.offsetParent && e.getAttribute("aria-hidden") !== "true")
            .filter(e => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim()))
            .map(e => e.outerHTML)"""
        )
        assert nameless == []
        orders = "[...document.querySelectorAll('[tabindex]')].filter(e => e.tabIndex > 0).length"
        assert page.evaluate(orders) == 0
        for size in [PHONE["viewport"], {"width": 360, "height": 740}]:
            page.set_viewport_size(size)
            assert is_as_wide_as_its_window(page)


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
        page.click("#reuse-seed")
        assert page.inner_text("#parameters").endswith(f"seed {page.input_value('#seed')}")
        assert page.get_attribute("#lock", "aria-pressed") == "true"


def test_errors_are_beside_the_pictures_and_at_their_field(browser, server):
    with opened(browser, server) as page:
        page.evaluate("document.getElementById('form').noValidate = true")
        generate(page, "a cat", width=100)
        failed = page.locator("#queue .failed")
        expect(failed.locator("[role=alert]")).to_have_text("Width must be a multiple of 8, not 100")
        assert page.get_attribute("#width", "aria-invalid") == "true"
        shoot(page, "error")
        page.fill("#width", "104")
        assert page.get_attribute("#width", "aria-invalid") is None
        failed.get_by_text("Try again").click()
        expect(failed).to_have_count(1)
        failed.get_by_text("Dismiss").click()
        expect(failed).to_have_count(0)
        page.click("#draw")
        generated(page, 1)


def test_a_field_that_is_out_of_sight_is_shown_where_it_is_wrong(browser, server):
    with opened(browser, server) as page:
        page.click("#more summary")
        page.fill("#eta", "5")
        page.click("#more summary")
        expect(page.locator("#more summary span")).to_have_text("eta 5")
        page.click("#draw")
        expect(page.locator("#eta")).to_be_focused()


def test_warnings_are_beside_their_picture(browser, server):
    with opened(browser, server) as page:
        page.click("#more summary")
        generate(page, "a (red:1.3) house", eta="0.5")
        generated(page, 1)
        warnings = page.locator("#warnings li")
        expect(warnings).to_have_count(2)
        expect(warnings.first).to_contain_text("(red:1.3)")
        shoot(page, "warnings")
        generate(page, "a house", eta="")
        generated(page, 2)
        expect(warnings).to_have_count(0)
        page.reload()
        page.locator("#history button").last.click()
        expect(warnings).to_have_count(2)


def test_a_phone_in_the_dark(browser, server):
    with opened(browser, server, **PHONE) as page:
        shoot(page, "phone")
        assert is_as_wide_as_its_window(page)
        generate(page, "a red house by the sea", steps=40)
        expect(page.locator("#queue")).to_be_in_viewport()
        page.wait_for_selector("img.forming")
        assert is_as_wide_as_its_window(page)
        shoot(page, "phone-forming")
        generated(page, 1)
        page.locator("#stage").scroll_into_view_if_needed()
        shoot(page, "phone-generated")
        generate(page, "a cat", count=8)
        generated(page, 9)
        assert is_as_wide_as_its_window(page)


def test_a_key_is_asked_for_once(browser, locked):
    with opened(browser, locked) as page:
        expect(page.locator("#open-key")).to_be_visible()
        generate(page, "a cat")
        expect(page.locator("#key-dialog")).to_be_visible()
        page.fill("#key", "sesame")
        shoot(page, "key")
        page.click("#key-dialog button[value=save]")
        page.locator("#queue").get_by_text("Try again").click()
        generated(page, 1)
        page.reload()
        expect(page.locator("#model")).to_contain_text("demo")
        generate(page, "a cat")
        generated(page, 2)


def test_no_key_is_offered_where_none_is_wanted(browser, server):
    with opened(browser, server) as page:
        expect(page.locator("#open-key")).to_be_hidden()


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
            body = sent(page, lambda: generate(page, "a boat"), "models/red")
            # Blank fields are omitted: the model's defaults apply.
            assert not {"width", "height", "scheduler", "model"} & set(body)
            generated(page, 1)
            assert page.inner_text("#parameters").startswith("red · 128×128 · 2 steps · PLMS · guidance 7.5 · seed ")
            # The page does not know the size of a model that is not loaded.
            page.check("#hires")
            page.click("#draw")
            expect(page.locator("#width")).to_be_focused()
            page.fill("#width", "128")
            page.fill("#height", "128")
            expect(page.locator("#hires-size")).to_have_text("256×256")
            page.reload()
            expect(page.locator("#which")).to_have_value("red")
            page.click("text=API")
            page.wait_for_selector("text=POST /v1/images/generations")
    both = ("--model", "demo", *folder)
    with serving(binary, tmp_path / "log", model=both) as url, opened(browser, url, **DESKTOP) as page:
        expect(page.locator("#which option")).to_have_text(["demo", "blue", "red"])
        expect(page.locator("#steps")).to_have_attribute("placeholder", "50")
        page.select_option("#which", "blue")
        # Nothing is known of a model that is not loaded.
        expect(page.locator("#steps")).to_have_attribute("placeholder", "default")
        expect(page.locator("#sampler option").first).to_have_text("Default")
        sent(page, lambda: generate(page, "a boat"), "models/blue")
        generated(page, 1)
        page.select_option("#which", "demo")
        sent(page, lambda: generate(page, "a boat"))
        generated(page, 2)
