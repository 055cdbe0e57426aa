"""The chat page in a real browser, asking a real server: what a person sees and does.

With MINGLM_SCREENSHOTS set to a folder, it leaves pictures of the page there.
"""

import json
import os
import re
import shutil
from pathlib import Path

import httpx
import pytest
from by_heart import CONCLUSION, SCRIPT, THOUGHT, WEATHER, learnt, serving
from playwright.sync_api import Page, expect, sync_playwright

from minglm.engine.engine import Engine
from minglm.serve.app import PAGE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: install the system's (apt: chromium)")
DESKTOP, PHONE = {"width": 1280, "height": 820}, {"width": 390, "height": 760}


@pytest.fixture(scope="module")
def served():
    model, tokenizer = learnt()
    engine = Engine(model, tokenizer, max_running=8)
    with serving(engine, tokenizer) as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served):
    """The page at a desktop's width, greedy. Nothing in it may fail or ask anybody but its server."""
    context = browser.new_context(viewport=DESKTOP)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith(served.url) else problems.append(request.url))
    page.goto(served.url)
    expect(page.locator("#model")).to_have_text("parrot")
    page.evaluate("document.getElementById('temperature').value = 0")
    yield page
    context.close()
    allowed = ("data:", "Failed to load resource: the server responded with a status of 400")  # a refusal, which is shown
    assert [problem for problem in problems if not problem.startswith(allowed)] == []


def say(page: Page, text: str) -> None:
    page.fill("#input", text)
    page.click("#send")


def finished(page: Page, answers: int = 1) -> None:
    expect(page.locator(".message.assistant")).to_have_count(answers)
    expect(page.locator("#send")).to_have_text("Send", timeout=20_000)


def picture(page: Page, name: str) -> None:
    folder = os.environ.get("MINGLM_SCREENSHOTS")
    if not folder:
        return
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for size, viewport in {"desktop": DESKTOP, "phone": PHONE}.items():
            page.set_viewport_size(viewport)
            page.screenshot(path=Path(folder, f"{name}-{size}-{scheme}.png"))
    page.set_viewport_size(DESKTOP)


def test_the_page_is_one_file_that_asks_nobody(served):
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"""(?:src|href|url\()\s*=?\s*["']?(?!data:)(\w+:)?//""", text) == []
    assert "innerHTML" not in text and "outerHTML" not in text and "insertAdjacentHTML" not in text and "eval(" not in text
    policy = httpx.get(served.url).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy


@needs_browser
def test_an_answer_is_shown_with_its_length(page):
    picture(page, "welcome")
    say(page, "hello")
    finished(page)
    answer = page.locator(".message.assistant").last
    expect(answer.locator(".answer")).to_have_text("Hello! How are you?")
    expect(answer.locator(".speed")).to_have_text(
        re.compile(r"^\d+ tokens( · \d+ tokens/s)?$")
    )  # what came at once has no speed
    expect(page.locator(".message.user")).to_have_text("hello")
    page.fill("#input", "hello")
    page.press("#input", "Enter")
    finished(page, 2)


@needs_browser
def test_text_grows_while_it_is_written_with_its_speed_and_stop_ends_it(page, served):
    say(page, "sing")
    text = page.locator(".message.assistant .answer")
    expect(text).to_contain_text("la la")
    before = len(text.inner_text())
    page.wait_for_function("n => document.querySelector('.answer').textContent.length > n", arg=before)
    expect(page.locator("#send")).to_have_text("Stop")
    picture(page, "streaming")
    page.click("#send")
    expect(page.locator(".note")).to_contain_text("stopped")
    written = text.inner_text()
    page.wait_for_timeout(300)
    assert text.inner_text() == written and written.startswith("la la")
    expect(page.locator(".message.assistant .speed")).to_have_text(re.compile(r"^\d+ tokens · \d+ tokens/s$"))
    assert served.worker.open_answers == 0 and served.worker.cancelled >= 1
    say(page, "hello")  # and it goes on
    finished(page, 2)


@needs_browser
def test_thinking_is_folded_and_opens(page):
    page.get_by_text("Thinking", exact=True).click()
    say(page, "2+2?")
    finished(page)
    details = page.locator("details.thinking")
    expect(details.locator("summary")).to_contain_text("Thought for")
    assert details.get_attribute("open") is None
    expect(details.locator(".body")).to_be_hidden()
    expect(page.locator(".answer")).to_have_text(CONCLUSION)
    details.locator("summary").click()
    expect(details.locator(".body")).to_have_text(THOUGHT)
    expect(details.locator(".body")).to_be_visible()
    picture(page, "thinking")


@needs_browser
@pytest.mark.parametrize("mode, wanted", [("Auto", None), ("Thinking", True), ("Direct", False)])
def test_the_mode_is_sent(page, mode, wanted):
    page.get_by_text(mode, exact=True).click()
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "2+2?")
    assert asked.value.post_data_json.get("chat_template_kwargs") == (None if wanted is None else {"enable_thinking": wanted})
    finished(page)
    expect(page.locator("details.thinking")).to_have_count(0 if wanted is False else 1)


@needs_browser
def test_a_script_in_an_answer_or_a_question_stays_text(page):
    say(page, "script")
    finished(page)
    answer = page.locator(".message.assistant .answer")
    expect(answer).to_have_text(SCRIPT.replace("`", ""))
    say(page, '<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script>')
    finished(page, 2)
    assert page.evaluate("window.hacked === undefined")
    assert page.locator("#messages script, #messages img, #messages b").count() == 0


@needs_browser
def test_code_is_set_apart(page):
    say(page, "code")
    finished(page)
    expect(page.locator(".code pre")).to_have_text("print(1 < 2)")
    expect(page.locator(".code .bar")).to_contain_text("python")
    picture(page, "code")


@needs_browser
def test_tool_calls_are_shown_and_take_their_result(page):
    page.click("#open-settings")
    page.fill("#tools", "[{")
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#settings-error")).to_contain_text("not JSON")
    page.fill("#tools", json.dumps([WEATHER]))
    picture(page, "settings")
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#settings")).to_be_hidden()
    say(page, "rain?")
    finished(page)
    call = page.locator(".call")
    expect(call.locator(".name")).to_contain_text("weather")
    expect(call.locator("dt")).to_have_text(["city", "days"])
    expect(call.locator("dd")).to_have_text(["Paris", "3"])
    picture(page, "tools")
    call.locator("input").fill("sunny")
    with page.expect_request("**/v1/chat/completions") as asked:
        call.get_by_role("button").click()
    *_, assistant, tool = asked.value.post_data_json["messages"]
    assert tool["content"] == "sunny" and tool["tool_call_id"] == assistant["tool_calls"][0]["id"]
    finished(page, 2)


@needs_browser
def test_an_error_is_shown_and_the_message_comes_back(page):
    page.evaluate("document.getElementById('temperature').value = -1")
    say(page, "hello")
    expect(page.locator(".message .error")).to_contain_text("temperature")
    expect(page.locator("#input")).to_have_value("hello")
    expect(page.locator(".message.user")).to_have_count(0)
    picture(page, "error")
    page.evaluate("document.getElementById('temperature').value = 0")
    page.click("#send")
    finished(page, 2)
    expect(page.locator(".answer").last).to_have_text("Hello! How are you?")


@needs_browser
def test_a_phone_needs_no_sideways_scrolling(page):
    page.set_viewport_size(PHONE)
    say(page, "code")
    finished(page)
    say(page, "x" * 300)
    finished(page, 2)
    width = page.evaluate("Math.max(document.documentElement.scrollWidth, document.getElementById('scroller').scrollWidth)")
    assert width <= PHONE["width"]
    for selector in ("#send", "#input", ".modes", "#new"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]


@needs_browser
def test_a_key_is_asked_for_and_used(browser):
    model, tokenizer = learnt()
    with serving(Engine(model, tokenizer), tokenizer, api_key="secret") as served:
        page = browser.new_page()
        page.goto(served.url)
        expect(page.locator("#settings")).to_be_visible()
        page.fill("#key", "secret")
        page.get_by_role("button", name="Done").click()
        expect(page.locator("#model")).to_have_text("parrot")
        say(page, "hello")
        finished(page)
        expect(page.locator(".message .error")).to_have_count(0)
        page.close()
