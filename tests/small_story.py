"""The smallest story that has every part, of the demo; and a reader of pages."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import small_experts
import small_run
import torch

from minglm.demo import Plan, demo
from minglm.train.stages import Stage

VOID = {"meta"}  # of the tags that this page has


def small_plan(folder: Path, text: Path) -> Plan:
    """Of the two families of small_experts. text: where the story's raw text is, or is to be."""
    if not text.is_file():
        words = (f"yes 3 no 4 so maybe {number} 0123456789" for number in range(60))
        text.write_text("".join(json.dumps({"text": one}) + "\n" for one in words))
    stages = (Stage("first", tokens=256), Stage("second", tokens=256, rope_theta=1e6))
    training = small_run.small_recipe(text, stages=stages, warmup_steps=1, every=4, keep=1)
    experts = replace(small_experts.small_recipe(folder), base=None)
    return Plan("quick", training, experts, folder)


def run_demo(plan: Plan) -> None:
    torch.set_num_threads(1)
    small_experts.know_families()
    raise SystemExit(demo(plan))


class Page(HTMLParser):
    """Reads a page: tags and attributes, the text of each section; what is not balanced is an AssertionError."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.sections: dict[str, str] = {}
        self.open: list[str] = []
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.add(tag)
        self.attributes |= set(found)
        self.links += [found[name] for name in ("href", "src", "xlink:href") if name in found]
        if tag == "section":
            self.section = found["id"]
            self.sections[self.section] = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data):
        if self.section:
            self.sections[self.section] += data
