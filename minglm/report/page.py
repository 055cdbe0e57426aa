"""report.html: everything that a run folder tells, in one file that needs no network, no script and no other file.

The page is a function of what is in the folder: it can be written before the first step and at any moment after, and a section
whose data is not there yet says what will come. What models have written is anybody's text and is escaped; the page's own
policy allows no script and no connection.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from minglm.files import write_text_atomically
from minglm.report.conversations import conversations_section
from minglm.report.costs import chat_section, costs_section, reproduce_section, story_section
from minglm.report.gains import Attempts, gains_section, reliability_section, thinking_section, tools_section
from minglm.report.html import Html
from minglm.report.parts import Story, evaluations
from minglm.report.practice import rl_section
from minglm.report.record import Record
from minglm.report.style import STYLE
from minglm.report.training import architecture_section, balance_section, loss_section, parameters_section

NAME = "report.html"
CONTENTS = {
    "story": ("The story so far", ""),
    "architecture": ("Architecture", "2.1"),
    "parameters": ("Parameters", "2.1"),
    "loss": ("Loss by stage", "2.2–2.4"),
    "balance": ("Expert load and balance", "2.1, 2.4"),
    "gains": ("What each step has gained", "3"),
    "thinking": ("To think or not to think", "3.1"),
    "rl": ("Reinforcement learning", "3.2–3.5"),
    "conversations": ("Conversations", "3.1–3.4"),
    "tools": ("Calls of tools", "3.3, 4"),
    "reliability": ("pass^k", "4"),
    "costs": ("Time and FLOPs", "2.4, 3.5"),
    "reproduce": ("Do it again", ""),
    "chat": ("Talk to it", ""),
}


def write_report(folder: str | Path) -> Path:
    """Write the page of a run folder, which need not be there yet -> its path. Raises what reading broken files raises."""
    story = Story.of(folder)
    story.folder.mkdir(parents=True, exist_ok=True)
    path = story.folder / NAME
    write_text_atomically(path, page(story))
    return path


def page(story: Story) -> str:
    record, parts, attempts = Record.of(story.folder), story.parts(), Attempts(story)
    sections = [
        story_section(story, record, parts),
        architecture_section(story),
        parameters_section(story),
        loss_section(story),
        balance_section(story),
        gains_section(story, attempts),
        thinking_section(attempts),
        rl_section(story),
        conversations_section(story),
        tools_section(attempts),
        reliability_section(story),
        costs_section(story, record, parts),
        reproduce_section(story, record, list(evaluations(story).values())),
        chat_section(story),
    ]
    return _document(story.folder.name, sections)


def _document(name: str, sections: Sequence[Html]) -> str:
    links = "".join(
        f'<li><a href="#{anchor}">{escape(title)}</a>{f" <small>{paper}</small>" if paper else ""}</li>'
        for anchor, (title, paper) in CONTENTS.items()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{escape(name)}: from raw text to a hybrid agent</title><style>{STYLE}</style></head><body>
<header><h1>From raw text to a hybrid agent</h1>
<p>The story of GLM-4.5, told by a small model: <b>{escape(name)}</b>. Section numbers are those of the GLM-4.5 technical
report (arXiv 2508.06471).</p>
<nav><ol>{links}</ol></nav></header>
<main>{"".join(sections)}</main></body></html>
"""
