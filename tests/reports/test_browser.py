"""The page about a run in a real browser: on a desk and on a telephone, by day and by night."""

import contextlib
import importlib.util
import json
import re

import pytest

from helpers.browser import NEEDS_BROWSER, launched
from helpers.runs import SHORT
from helpers.studies import make_study
from legacy1bit.main import main

pytestmark = [
    *NEEDS_BROWSER,
    pytest.mark.skipif(
        importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
    ),
]

SCREENS = {"desk": (1280, 900), "tablet": (768, 1024), "telephone": (360, 740)}
NASTY = "<script>document.title = 'changed'</script><img src=http://127.0.0.1:9/x> & \x00"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page about a run with long names and hostile samples."""
    folder = tmp_path_factory.mktemp("pages") / ("a-name-without-a-break-" * 4)
    assert main([*SHORT, "--out", str(folder)]) == 0
    with open(folder / "samples.jsonl", "a") as file:
        file.write(json.dumps({"step": 6, "text": NASTY}) + "\n")
        file.write(json.dumps({"step": 6, "text": "x" * 500}) + "\n")
    out = folder.parent / "page.html"
    assert main(["report", str(folder), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@contextlib.contextmanager
def opened(browser, path, screen, colours, picture):
    """A page on a screen, and what went wrong or was asked for while it was loaded."""
    width, height = SCREENS[screen]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=colours)
    page = context.new_page()
    errors, asked = [], []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_load_state("networkidle")
    page.screenshot(path=picture / f"{screen}-{colours}.png", full_page=True)
    yield page, errors, asked
    context.close()


@pytest.fixture(params=[(s, c) for s in SCREENS for c in ("light", "dark")], ids="-".join)
def shown(request, browser, written, tmp_path):
    """The page on a screen, the colours that are wanted there, and what went wrong or was asked
    for while it was loaded."""
    screen, colours = request.param
    with opened(browser, written, screen, colours, tmp_path) as (page, errors, asked):
        yield page, colours, errors, asked


def luminance(colour):
    """The relative luminance of ``rgb(...)`` (WCAG 2.1)."""
    parts = [int(n) / 255 for n in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def style_of(page, selector, name):
    return page.locator(selector).first.evaluate(f"e => getComputedStyle(e)['{name}']")


def test_page_loads_alone_and_without_a_word(shown, written):
    page, _, errors, asked = shown
    assert errors == []
    assert asked == [written.as_uri()]
    assert page.title().startswith("a-name-without-a-break-")


def test_page_fits_its_screen(shown):
    page, *_ = shown
    wide, room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= room


def assert_figures_are_seen(page, count):
    figures = page.locator("figure svg")
    assert figures.count() == count
    for i in range(figures.count()):
        box = figures.nth(i).bounding_box()
        assert box["width"] > 250
        assert box["height"] > 120
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= page.viewport_size["width"]
    heights = figures.locator("text").evaluate_all(
        "texts => texts.map(text => text.getBoundingClientRect().height)"
    )
    assert min(heights) > 7


def test_figures_and_texts_are_seen(shown):
    page, *_ = shown
    assert_figures_are_seen(page, 7)
    text = page.locator("body").inner_text()
    for wanted in ("validation loss", "entropy floor", "step 2", "Loss", "blocks.1.ffn.wo", "CPU"):
        assert wanted in text
    assert "<script>document.title" in text


def test_ink_stands_out_from_paper(shown):
    page, colours, *_ = shown
    paper = style_of(page, "body", "backgroundColor")
    assert (luminance(paper) < 0.1) == (colours == "dark")
    assert contrast(style_of(page, "body", "color"), paper) > 7
    assert contrast(style_of(page, "figcaption", "color"), paper) > 4.5
    assert contrast(style_of(page, "figure svg text", "fill"), paper) > 7


def test_folded_settings_open(shown):
    page, *_ = shown
    setting = page.get_by_text("rope_base")
    assert not setting.is_visible()
    page.get_by_text("All other settings").click()
    assert setting.is_visible()


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("studies"))


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_page_of_a_study_is_seen(browser, searched, screen, colours, tmp_path):
    out = tmp_path / "page.html"
    assert main(["report", str(searched), "--out", str(out)]) == 0
    with opened(browser, out, screen, colours, tmp_path) as (page, errors, asked):
        assert errors == []
        assert asked == [out.as_uri()]
        wide, room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= room
        assert_figures_are_seen(page, 3 + 4)
        trials = page.locator("details table")
        assert not trials.is_visible()
        page.locator("summary").click()
        assert trials.is_visible()
        assert "legacy1bit tune" in page.locator("body").inner_text()
