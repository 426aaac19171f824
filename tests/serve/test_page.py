"""The page in a real browser: Debian's Chromium, driven by playwright."""

import os
import shutil
from pathlib import Path

import pytest

QUESTION = "Count from 15 to 19."
LONG = {"ignore_eos": True}
# texts of the newest answer as it grows
WATCH = """() => {
  window.seen = [];
  new MutationObserver(() => {
    const texts = document.querySelectorAll(".answer .text");
    if (texts.length) window.seen.push(texts[texts.length - 1].textContent);
  }).observe(document.getElementById("turns"), { childList: true, subtree: true, characterData: true });
}"""


@pytest.fixture(scope="module")
def browser():
    """Chromium: the one that LORA_MS_CHROMIUM names, else one that is there; skips where none is."""
    chromium = os.environ.get("LORA_MS_CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium: install it (Debian: apt-get install chromium), or name it in LORA_MS_CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        args = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox does not run as root
        browser = playwright.chromium.launch(executable_path=chromium, args=args)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page, of which nothing may fail, be said on the console, or come from elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-US")
    page = context.new_page()
    page.set_default_timeout(20_000)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: request.url.startswith(origin) or faults.append(request.url))
    origin = f"http://127.0.0.1:{server.port}/"
    page.goto(origin)
    page.locator("#first option").nth(3).wait_for(state="attached")
    yield page
    context.close()
    assert faults == []


def ask(page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def answers(page) -> list[str]:
    """Texts, once all have ended."""
    page.locator("#send:not([disabled])").wait_for()
    return [text.rstrip() for text in page.locator(".answer .text").all_text_contents()]


def expected(server, model: str, **settings) -> str:
    messages = [{"role": "user", "content": QUESTION}]
    return server.chat(model=model, messages=messages, **settings).json["choices"][0]["message"]["content"].rstrip()


def test_an_adapter_answers_as_it_is_written(page, server):
    assert page.locator("#first option").all_text_contents() == [
        "tiny",
        "tiny-alias",
        "one (adapter)",
        "two (adapter)",
    ]
    assert page.input_value("#first") == "one"  # an adapter, where there is one
    page.select_option("#first", "two")
    page.click("#open-settings")
    page.fill("#max_tokens", "40")
    page.evaluate(WATCH)
    ask(page, QUESTION)
    found = answers(page)
    assert found == [expected(server, "two", max_tokens=40)]
    assert page.locator(".answer h3").all_text_contents() == ["two"]
    seen = list(dict.fromkeys(page.evaluate("window.seen")))
    assert len(seen) > 5 and all(after.startswith(before) for before, after in zip(seen, seen[1:], strict=False))
    page.click(".again")
    assert answers(page) == found


def test_stop_ends_an_answer(page, server):
    before = server.number("lora_ms_generated_tokens_total")
    page.click("#open-settings")
    page.fill("#max_tokens", "480")
    page.route("**/completions", lambda route: route.continue_(post_data={**route.request.post_data_json, **LONG}))
    ask(page, QUESTION)
    page.locator(".answer.running .text:not(:empty)").wait_for()
    page.click(".stop")
    assert answers(page)[0]
    assert "stopped" in page.inner_text(".answer .count")
    page.wait_for_function("document.querySelectorAll('.answer.running').length === 0")
    assert server.number("lora_ms_generated_tokens_total") - before < 480
    page.click("#fresh")
    assert page.locator(".turn").count() == 0


def test_two_models_side_by_side_wide_and_narrow(page, server, tmp_path: Path):
    page.click("#compare")
    page.select_option("#second", "tiny")
    page.click("#open-settings")
    page.fill("#max_tokens", "60")
    page.click("#open-settings")
    ask(page, QUESTION)
    assert answers(page) == [expected(server, name, max_tokens=60) for name in ("one", "tiny")]
    left, right = (card.bounding_box() for card in page.locator(".answer").all())
    assert left["y"] == right["y"] and left["x"] + left["width"] < right["x"]
    page.screenshot(path=tmp_path / "page_1280.png")
    page.set_viewport_size({"width": 390, "height": 844})
    above, below = (card.bounding_box() for card in page.locator(".answer").all())
    assert above["x"] == below["x"] and above["y"] + above["height"] < below["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#language")
    assert page.inner_text("#send") == "发送"
    page.screenshot(path=tmp_path / "page_390.png")
    assert min((tmp_path / name).stat().st_size for name in ("page_1280.png", "page_390.png")) > 5000
