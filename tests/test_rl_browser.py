"""The page of rollouts: everything is on it as text, nothing that a policy writes is markup, it filters by itself."""

import json
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import sync_playwright
from test_page import CHROMIUM, needs_browser

from minglm.rl import browser
from minglm.rl.browser import page, write_browser

HOSTILE = """</pre></script><script>fetch("https://example.org")</script><img src=x onerror="alert(1)">"'&amp;<think>"""


def attempt(step=1, family="ordering", reward=1.0, text="", **changes) -> dict:
    response = [{"role": "assistant", "reasoning_content": text, "content": text, "tool_calls": [{"name": text}]}]
    own = {
        "messages": [{"role": "user", "content": text}],
        "response": response,
        "text": text,
        "reasons": [text],
        "end": "done",
        "length": 1234,
        "parts": {"verifier": 1.0, "pathology": 0.5},
    }
    return {"step": step, "family": family, "reward": reward, **own, **changes}


class Reader(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.attributes, self.inside = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append((tuple(self.inside), data))


PLAIN = Reader(page([attempt(text="x")], 1, "run"))


ANY = st.text(min_size=1, alphabet=st.characters(exclude_characters="\r\x00", exclude_categories=["Cs"]))


@given(st.just(HOSTILE) | ANY)
def test_whatever_a_policy_writes_is_text(text):
    found = Reader(page([attempt(text=text, family=text)], 1, text))
    assert found.tags == PLAIN.tags
    assert [sorted(attributes) for _, attributes in found.attributes] == [sorted(a) for _, a in PLAIN.attributes]
    for tag, attributes in found.attributes:
        if tag == "article":
            assert attributes["data-family"] == text
    in_pre = "".join(data for inside, data in found.texts if inside and inside[-1] == "pre")
    assert in_pre.count(text) >= 4  # prompt, thinking, content, all that was seen


def test_a_heading_says_what_became_of_an_attempt_and_which_source_said_what():
    judged = page([attempt(2, "clock", 0.25)], 1, "run")
    assert "<h2>step 2 · clock · reward 0.25 · done · 1,234 tokens</h2>" in judged
    assert "<p>by source: verifier 1, pathology 0.5</p>" in judged
    failed = page([attempt(2, "clock", None, end="failed", parts={"verifier": 1.0})], 1, "run")
    assert "<h2>step 2 · clock · failed · 1,234 tokens</h2>" in failed and "by source" not in failed


def test_thinking_is_folded_and_nothing_is_fetched():
    html = page([attempt(text="because")], 1, "run")
    assert "<details><summary>thinking</summary><pre>because</pre></details>" in html
    assert "default-src 'none'" in html and "http" not in html.replace("http-equiv", "")


def test_a_run_gets_a_page_with_its_steps_in_order_and_long_ones_every_nth(tmp_path, monkeypatch):
    folder = tmp_path / "run" / "rollouts"
    folder.mkdir(parents=True)
    for step in (10, 9):
        lines = [{k: v for k, v in attempt(reward=r).items() if k != "step"} for r in (None, 0.25, 1)]
        (folder / f"step-{step}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = write_browser(tmp_path / "run")
    assert path == tmp_path / "run" / "rollouts.html"
    articles = [a for tag, a in Reader(path.read_text()).attributes if tag == "article"]
    assert [(a["data-step"], a["data-reward"]) for a in articles] == [(s, r) for s in ("9", "10") for r in ("", "0.25", "1")]
    monkeypatch.setattr(browser, "MOST", 4)
    html = write_browser(tmp_path / "run").read_text()
    assert html.count("<article") == 3 and "3 of 6 attempts, evenly chosen" in html


def test_a_line_ends_at_its_newline_alone(tmp_path):
    folder = tmp_path / "run" / "rollouts"
    folder.mkdir(parents=True)
    line = {k: v for k, v in attempt(text="a\u2028b\x85c\x1cd").items() if k != "step"}
    (folder / "step-1.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert write_browser(tmp_path / "run").read_text(encoding="utf-8").count("<article") == 1


@needs_browser
def test_the_page_filters_in_a_browser(tmp_path):
    attempts = [attempt(1, "ordering", 1.0), attempt(2, "clock", 0.0), attempt(3, "clock", None, end="failed")]
    (tmp_path / "page.html").write_text(page(attempts, 3, "run"))
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = chromium.new_page()
        tab.goto((tmp_path / "page.html").as_uri())

        def seen():
            return [one.get_attribute("data-step") for one in tab.query_selector_all("article:not([hidden])")]

        assert seen() == ["1", "2", "3"]
        tab.select_option("[name=family]", "clock")
        assert seen() == ["2", "3"]
        tab.uncheck("[name=failed]")
        assert seen() == ["2"] and tab.text_content("#count") == "1"
        tab.fill("[name=low]", "0.5")
        assert seen() == []
        tab.select_option("[name=family]", "")
        assert seen() == ["1"]
        tab.fill("[name=first]", "2")
        assert seen() == []
        chromium.close()
