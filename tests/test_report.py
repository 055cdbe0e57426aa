"""The page of a run folder, and the pictures on it: from nothing at all on, whole, escaped, and asking nobody for anything."""

import io
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import small_recipe, write_text
from small_story import Page

from minglm.__main__ import main
from minglm.config import GLMConfig
from minglm.report import architecture, progress
from minglm.report.page import CONTENTS, write_report
from minglm.report.parts import Part, Story
from minglm.report.record import Record
from minglm.report.svg import Row, Series, bars, heat, intervals, lines, ticks
from minglm.train.recipe import CONFIGS, save_recipe
from minglm.train.stages import Stage

WORDS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="\x7f"), max_size=20)
NUMBERS = st.floats(-1e6, 1e6)
SHARES = st.floats(0, 1)


def read(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def inside(svg: ElementTree.Element) -> bool:
    """Whether every dot is within the picture."""
    _, _, width, height = map(float, svg.get("viewBox").split())
    return all(0 <= float(dot.get("cx")) <= width and 0 <= float(dot.get("cy")) <= height for dot in svg.iter("circle"))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=20), WORDS, WORDS)
def test_any_curve_is_drawn_within_its_picture(points, name, label):
    bounds = [(y - 1, y + 1) for _, y in points]
    series = [Series(name, points, 1, "dots", bounds), Series("", points, 0, "pale")]
    drawn = read(lines(series, label, name, [(3.0, name)]))
    assert inside(drawn) and len(list(drawn.iter("circle"))) >= len(points)
    assert {label, name} <= {one.text or "" for one in drawn.iter("text")}


@given(st.lists(st.tuples(WORDS, SHARES, SHARES, SHARES), min_size=1, max_size=8), st.lists(WORDS, min_size=1, max_size=5))
def test_any_intervals_bars_and_heat_are_drawn_within_their_pictures(rows, names):
    around = [(label, [middle, low, high]) for label, *some in rows for low, middle, high in [sorted(some)]]
    values = [Row(label, [None, *[one] * (len(names) - 1)]) for label, one in around]
    drawn = read(intervals(values, names, "share"))
    assert inside(drawn) and len(list(drawn.iter("circle"))) == len(rows) * (len(names) - 1)
    assert len(list(read(bars([(label, one, label) for label, one, *_ in rows], "s")).iter("rect"))) == len(rows)
    assert len(list(read(heat([some for _, *some in rows], [label for label, *_ in rows], "e")).iter("rect"))) == 3 * len(rows)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_and_within(low, width):
    high = low + width
    if not high > low:
        return
    found = ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), width)
    assert len(found) <= 12 and all(low - slack <= one <= high + slack for one in found) and found == sorted(found)


@pytest.mark.parametrize("size", ["nano", "tiny", "mini", "glm-4.5-air", "glm-4.5"])
def test_the_architecture_is_drawn_from_the_configuration(size):
    config = GLMConfig.from_toml(CONFIGS / "model" / f"{size}.toml")
    stack, attention, experts = (
        read(draw(config)) for draw in (architecture.stack, architecture.attention, architecture.experts)
    )
    words = " ".join("".join(one.itertext()) for one in stack.iter("text"))
    assert f"{config.num_moe_layers} x MoE layer" in words and f"{config.first_k_dense_replace} x dense layer" in words
    assert f"{config.vocab_size:,} logits" in words and "MTP layer" in words
    kinds = [one.get("class") for one in experts.iter("rect")]
    assert kinds.count("box moe on") == config.num_experts_per_tok
    assert kinds.count("box moe on") + kinds.count("box moe") == config.n_routed_experts
    heads = [one.get("class") for one in attention.iter("rect")]
    per_group = config.num_attention_heads // config.num_key_value_heads
    assert heads.count("box dense") == heads.count("box moe") * per_group
    assert f"{config.num_attention_heads} query heads of {config.head_dim}" in "".join(attention.itertext())


def check(page: str) -> Page:
    """That the page is whole, has every section, and can neither ask for nor run anything. -> its parts"""
    found = Page(page)
    assert list(found.sections) == list(CONTENTS)
    assert found.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "form", "base", "use", "image"})
    assert all(link.startswith("#") and link[1:] in CONTENTS for link in found.links)
    assert not [name for name in found.attributes if name.startswith("on") or name == "style"]
    style = page.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style.replace("url(#tip)", "") and "@import" not in style
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    return found


def test_a_folder_that_is_not_there_yet_has_a_page_that_says_what_will_come(tmp_path):
    found = check(write_report(tmp_path / "run").read_text())
    said = {name for name, text in found.sections.items() if "To come" in text}
    assert said == set(CONTENTS) - {"reproduce", "chat"}


def test_a_run_that_has_just_begun_shows_its_model(tmp_path):
    stages = (Stage("a <b> & c", tokens=64), Stage("second", tokens=64))
    save_recipe(small_recipe(write_text(tmp_path / "text.jsonl"), stages=stages, warmup_steps=0), tmp_path / "config.toml")
    found = check(write_report(tmp_path).read_text())
    assert "To come" not in found.sections["architecture"] + found.sections["parameters"]
    assert "0 of 3 parts are done; next: text and tokenizer" in found.sections["story"]
    assert "training: a <b> & c" in found.sections["story"]
    assert "To come" in found.sections["loss"]


def test_the_command_writes_the_page_of_a_folder_that_is_there(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 0 and (tmp_path / "report.html").is_file()
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "found no folder" in capsys.readouterr().err and not (tmp_path / "none").exists()


def part(folder: Path, name: str, kind: str, work: float, done: bool) -> Part:
    if done:
        (folder / name).touch()
    return Part(name, name, kind, folder / name, work)


def test_what_has_been_measured_says_how_long_the_rest_takes(tmp_path):
    parts = [
        part(tmp_path, "a", "rl", 100, True),
        part(tmp_path, "b", "rl", 300, False),
        part(tmp_path, "c", "sft", 1e4, False),
    ]
    expected = {one.name: one.expected_seconds for one in parts}
    assert Record().left(parts) == pytest.approx(expected["b"] + expected["c"])
    twice = Record(seconds={"a": 2 * expected["a"]})
    assert twice.left(parts) == pytest.approx(2 * (expected["b"] + expected["c"]))  # of no sft: the machine is half as fast
    for name in "bc":
        (tmp_path / name).touch()
    assert twice.left(parts) == 0 and Record().left([]) == 0


def test_time_counts_in_equal_shares_for_parts_that_are_under_way_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.01)
    watched = progress.Progress(Story.of(tmp_path), "quick", io.StringIO())
    watched.parts = [
        Part(name, name, "rl", tmp_path / name, 100, tmp_path / f"{name}.jsonl", (0, 10))
        for name in ("first", "second", "third")
    ]
    (tmp_path / "second.jsonl").write_text('{"kind": "step", "step": 3, "reward": 0.5}\n')
    with watched:
        time.sleep(0.3)
    seconds = watched.record.seconds
    assert set(seconds) == {"first", "second"}  # the third one has not begun
    assert seconds["first"] == seconds["second"] and sum(seconds.values()) == pytest.approx(0.3, abs=0.2)


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = Record("quick", {"a": 1.5}, ["a"], {"cores": "2"})
    record.save(tmp_path)
    assert Record.of(tmp_path) == record and Record.of(tmp_path / "none") == Record()


def test_sections_name_the_report_and_the_list_of_contents_leads_to_all(tmp_path):
    page = write_report(tmp_path).read_text()
    assert set(re.findall(r'<section id="(\w+)">', page)) == set(re.findall(r'<li><a href="#(\w+)">', page))
    assert Story.of(tmp_path).parts() == []
