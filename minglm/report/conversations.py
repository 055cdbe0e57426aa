"""A section of the page: the same held-out problems, as the models answer them one after the other. Thinking is folded."""

import json
from collections.abc import Mapping
from typing import Any

from minglm.posttrain.experts.exam import CONVERSATIONS
from minglm.posttrain.experts.results import COLUMNS
from minglm.report.html import Html, folded, heading, html, later, paragraph, section
from minglm.report.parts import Story, read_json

MODE = "automatic"
LONGEST = 2000  # characters of one text: a small model may go on for ever


def conversations_section(story: Story) -> Html:
    title, paper = "Conversations, before and after", "report, sections 3.1 to 3.4"
    pools: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for column, folders in story.exams().items():
        for folder in folders:
            for one in read_json(folder / CONVERSATIONS) or ():
                if one["mode"] == MODE:
                    pools.setdefault((one["family"], one["level"]), {})[column] = one
    if not pools:
        waiting = "one held-out problem of each difficulty, as the base, the experts and the unified model answer it."
        return section("conversations", title, paper, later(waiting))
    text = "One held-out problem of each difficulty, asked in automatic mode: each model decides for itself whether it thinks."
    inside = [_pool(f"{family}, difficulty {level}", found) for (family, level), found in pools.items()]
    return section("conversations", title, paper, text, *inside)


def _pool(title: str, found: Mapping[str, Mapping[str, Any]]) -> Html:
    problem = next(iter(found.values()))["messages"]
    rewards = ", ".join(f"{COLUMNS[column].partition(',')[0]} {_reward(one)}" for column, one in found.items())
    parts = [_messages(problem)]
    for column, one in found.items():
        parts += [heading(f"{COLUMNS[column]}: reward {_reward(one)}, {one['tokens']:,} tokens"), _messages(one["response"])]
        if one["unread"]:
            parts.append(_said("assistant, cut off or not to be read", one["unread"]))
        if one["reasons"]:
            parts.append(paragraph("; ".join(one["reasons"])[:LONGEST], kind="faint"))
    return folded(f"{title} ({rewards})", *parts)


def _reward(one: Mapping[str, Any]) -> str:
    return "none" if one["reward"] is None else f"{one['reward']:.2g}"


def _messages(messages: list[Mapping[str, Any]]) -> Html:
    return Html("".join(map(_message, messages)))


def _message(message: Mapping[str, Any]) -> Html:
    thinking, content, calls = (message.get(key) for key in ("reasoning_content", "content", "tool_calls"))
    parts = [folded("thinking", _text(thinking))] if thinking else []
    if content or not (thinking or calls):
        parts.append(_text(content or "(nothing)"))
    for call in calls or ():
        function = call["function"]
        parts.append(_text(f"{function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})", "call"))
    return _said(message["role"], *parts)


def _said(role: str, *parts: str) -> Html:
    inside = "".join(one if isinstance(one, Html) else _text(one) for one in parts)
    kind = role.partition(",")[0]
    kind = kind if kind in ("system", "user", "assistant", "tool") else "other"
    return Html(f'<div class="said {kind}"><span class="role">{html(role)}</span>{inside}</div>')


def _text(text: str, kind: str = "") -> Html:
    shown = text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} characters)"
    name = f' class="{kind}"' if kind else ""
    return Html(f"<pre{name}>{html(shown)}</pre>")
