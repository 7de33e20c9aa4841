"""The page in a real browser: chat, completion, stop, errors; on a desk and a telephone."""

import contextlib
import hashlib
import importlib.util
from pathlib import Path

import pytest

from helpers.browser import NEEDS_BROWSER, launched
from helpers.models import make_config, random_model
from helpers.serving import SlowEngine, SomeModels, serving
from legacy1bit.generator import Generator

pytestmark = [
    *NEEDS_BROWSER,
    pytest.mark.skipif(
        importlib.util.find_spec("uvicorn") is None, reason="uvicorn is not installed"
    ),
]

SCREENS = {"desk": (1280, 900), "telephone": (360, 740)}
NASTY = "<script>document.title = 'changed'</script><img src=x onerror=alert(1)> & **bold**"
KEY = "0123456789abcdef"


class Repeating(SlowEngine):
    """Answers with the end of the prompt, so that a page shows what it was sent."""

    def _generate(self, request, on_event, ticket):
        from legacy1bit.serve.requests import Finished, Piece

        text = bytes(request.tokens[1:].astype("u1")).decode()[-400:]
        for count, character in enumerate(text):
            if ticket.ended.wait(self.seconds):
                self.cancelled += 1
                on_event(Finished("cancelled", 3, 0, count))
                return
            on_event(Piece(character, 0))
        on_event(Finished("stop", 3, 0, len(text)))


@pytest.fixture(scope="module")
def engine():
    return Repeating(Generator(random_model(make_config(vocab_size=256, sequence_length=2000))))


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@contextlib.contextmanager
def opened(browser, engine, screen="desk", colours="light", **settings):
    engine.seconds = 0.0
    width, height = SCREENS[screen]
    models = SomeModels(**{"a-name-without-a-break" * 3: engine, "other": engine})
    with serving(models, template=Path("plain"), **settings) as server:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=colours
        )
        page = context.new_page()
        page.errors, page.asked = [], []
        page.on("console", lambda message: page.errors.append(message.text))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(server.url)
        page.wait_for_load_state("networkidle")
        yield page, server
        context.close()


def say(page, text):
    page.get_by_label("message", exact=True).fill(text)
    page.keyboard.press("Enter")


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_chat_shows_texts_as_texts(browser, engine, screen, colours, tmp_path):
    with opened(browser, engine, screen, colours) as (page, server):
        say(page, NASTY)
        page.locator(".note").wait_for()
        said = page.locator(".said").all_inner_texts()
        assert said[0] == NASTY
        assert NASTY in said[1]
        assert "tokens/s" in page.locator(".note").inner_text()
        page.locator("summary").click()
        page.screenshot(path=tmp_path / f"{screen}-{colours}.png")
        assert page.title() == "legacy1bit"
        assert page.errors == []
        assert all(url.startswith(server.url) for url in page.asked)
        wide, room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= room
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(dark.split("(")[1].split(",")[0]) < 100) == (colours == "dark")
        # The second message is asked with the first and its answer.
        say(page, "And?")
        page.locator(".note").nth(1).wait_for()
        assert "Assistant: User: <script>" in page.locator(".said").nth(3).inner_text()


def test_keyboard_and_completion(browser, engine):
    with opened(browser, engine) as (page, _):
        page.get_by_role("button", name="Completion").click()
        page.get_by_label("message", exact=True).focus()
        page.keyboard.type("Once")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("more")
        page.keyboard.press("Enter")
        page.locator(".note").wait_for()
        assert page.locator(".said").all_inner_texts() == ["Once\nmoreOnce\nmore"]
        assert page.get_by_label("message", exact=True).input_value() == ""
        page.get_by_role("button", name="Clear").click()
        assert page.locator(".said").count() == 0


def test_stop_ends_the_request(browser, engine):
    with opened(browser, engine) as (page, _):
        engine.seconds, cancelled = 0.05, engine.cancelled
        say(page, "a" * 300)
        page.locator(".said").nth(1).filter(has_text="aaa").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.locator(".note").wait_for()
        assert page.locator(".note").inner_text() == "stopped"
        page.wait_for_timeout(300)
        assert engine.cancelled == cancelled + 1
        assert page.get_by_role("button", name="Send").is_visible()


def test_key_is_asked_for(browser, engine):
    with opened(browser, engine, keys=(hashlib.sha256(KEY.encode()).digest(),)) as (page, _):
        assert "a key is needed" in page.locator("#card").inner_text()
        page.locator("summary").click()
        page.get_by_label("key", exact=True).fill(KEY)
        page.keyboard.press("Tab")
        page.locator("#model option").nth(1).wait_for(state="attached")
        say(page, "Hi")
        page.locator(".note").wait_for()
        assert page.locator(".said").count() == 2
