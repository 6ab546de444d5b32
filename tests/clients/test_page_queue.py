"""The queue of the web page: several generations at once, their places, ends and failures."""

import re

from playwright.sync_api import expect

from browser import generate, generated, is_as_wide_as_its_window, opened, shoot


def test_generations_queue_and_each_can_be_cancelled(browser, server):
    with opened(browser, server) as page:
        for prompt in ["a red house", "a blue car", "a cat", "a boat", "a tree"]:
            generate(page, prompt, steps=120)
        cards = page.locator("#queue li")
        expect(cards).to_have_count(5)
        # The server has two of them; the others know how many are ahead.
        expect(cards.nth(2).locator(".told")).to_have_text("waiting, 2 generations ahead")
        expect(cards.nth(3).locator(".told")).to_have_text("waiting, 3 generations ahead")
        expect(cards.nth(4).locator(".told")).to_have_text("waiting, 4 generations ahead")
        expect(cards.first.locator(".look img")).to_be_visible()
        shoot(page, "queue")
        cards.nth(3).get_by_text("Cancel").click()
        expect(cards.nth(3)).to_contain_text("a tree")
        # The keyboard goes on at the next card.
        assert page.evaluate("document.activeElement.closest('#queue') !== null")
        cards.nth(1).get_by_text("Cancel").click()
        begun = re.compile("sent|starting|step")
        cat = cards.filter(has_text="a cat")
        expect(cat.locator(".told")).to_contain_text(begun)
        # What is looked at is what Esc ends.
        cat.locator(".look").click()
        page.keyboard.press("Escape")
        expect(cat).to_have_count(0)
        expect(cards.filter(has_text="a tree").locator(".told")).to_contain_text(begun)
        generated(page, 2)
        prompts = page.locator("#history img").evaluate_all("images => images.map(image => image.alt)")
        assert sorted(prompts) == ["a red house", "a tree"]
        assert cards.count() == 0


def test_a_picture_that_is_looked_at_stays(browser, server):
    with opened(browser, server) as page:
        generate(page, "a cat", width=64, height=64)
        generated(page, 1)
        generate(page, "a boat", steps=80, width=64, height=64)
        page.wait_for_selector("img.forming")
        page.locator("#history button").first.click()
        expect(page.locator("#said")).to_have_text("a cat")
        generated(page, 2)
        expect(page.locator("#said")).to_have_text("a cat")


def test_a_busy_server_is_asked_again(browser, server):
    with opened(browser, server) as page:
        error = {"error": {"code": "overloaded", "message": "the queue is full", "param": None}}
        page.route("**/v1/invocations", lambda route: route.fulfill(status=429, json=error, headers={"retry-after": "1"}), times=1)
        generate(page, "a cat")
        expect(page.locator("#queue .told")).to_have_text("the server is busy, next try in 1 s")
        generated(page, 1)


def test_lost_connections_are_told_in_our_words(browser, server):
    with opened(browser, server) as page:
        page.route("**/v1/invocations", lambda route: route.abort(), times=1)
        generate(page, "a cat")
        expect(page.locator("#queue .failed .told")).to_have_text("The server cannot be reached")
        page.route("**/v1/invocations", lambda route: route.fulfill(body="event: queued\ndata: {\"position\": 1}\n\n"), times=1)
        page.locator("#queue").get_by_text("Try again").click()
        expect(page.locator("#queue .failed .told")).to_contain_text("before the images were finished")
        page.locator("#queue").get_by_text("Try again").click()
        generated(page, 1)


def test_progress_is_said_and_no_more_often_than_helps(browser, server):
    with opened(browser, server) as page:
        page.evaluate(
            """() => {
                window.said = [];
                const live = document.getElementById("live");
                new MutationObserver(() => said.push(live.textContent)).observe(live, { childList: true });
            }"""
        )
        generate(page, "a cat", steps=40)
        generated(page, 1)
        said = page.evaluate("said")
        assert said[0] == "Added to the queue" and said[-1] == "1 image finished"
        assert len(said) < 8 and any("percent" in text for text in said)


def test_many_results_are_no_wider_than_a_small_phone(browser, server):
    with opened(browser, server, viewport={"width": 360, "height": 740}) as page:
        generate(page, "a-word-that-is-far-too-long-for-one-line-of-any-phone-in-the-world", count=4, width=64, height=64)
        generated(page, 4)
        assert is_as_wide_as_its_window(page)
