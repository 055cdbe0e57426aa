"""The demo with a tiny model: every part, one page, the same numbers however often it is killed."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from small_experts import know_families
from small_run import in_child
from small_story import Page, run_demo, small_plan
from test_report import check

from minglm.__main__ import main
from minglm.checkpoint import load_model
from minglm.config import ConfigError
from minglm.demo import DEFAULT_TRAINING, FULL, Plan
from minglm.posttrain.experts.recipe import scaled
from minglm.report.page import write_report
from minglm.report.parts import Story, evaluations
from minglm.report.record import Record
from minglm.tasks import FAMILIES
from minglm.train.recipe import load_recipe


@pytest.fixture(scope="module", autouse=True)
def families():
    know_families()
    yield
    for name in ("say_yes", "say_no"):
        del FAMILIES[name]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("text") / "text.jsonl"


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = in_child(run_demo, small_plan(folder, text))
    process.join()
    assert process.exitcode == 0, (folder / "demo.log").read_text()[-3000:]
    return folder


def test_every_part_is_done_and_the_page_says_so(undisturbed):
    story = Story.of(undisturbed)
    parts = story.parts()
    assert all(part.done for part in parts) and [part.kind for part in parts[:4]] == ["data", "training", "training", "sft"]
    record = Record.of(undisturbed)
    assert record.form == "quick" and record.done == [part.name for part in parts]
    assert set(record.seconds) == set(record.done) and record.left(parts) == 0
    page = check((undisturbed / "report.html").read_text())
    assert not [name for name, found in page.sections.items() if "To come" in found]
    assert "No family of this recipe is solved with tools." in page.sections["tools"]
    assert f"{len(parts)} of {len(parts)} parts are done" in page.sections["story"]
    for model in ("base", "SFT", "unified", "unified, after RL"):
        assert model in page.sections["gains"] and model in page.sections["conversations"]
    assert "harder half" in page.sections["thinking"] and "expert: agent" in page.sections["rl"]
    assert "python -m minglm --quick --run-folder" in page.sections["reproduce"]


def test_the_story_ends_with_a_model_to_talk_to(undisturbed):
    kept = Story.of(undisturbed).kept_round()
    (newest,) = (undisturbed / f"experts/round-{kept}/rl/checkpoints").glob("step-2")
    for file in ("model.safetensors.index.json", "tokenizer.json", "config.json"):
        assert (undisturbed / "model" / file).read_bytes() == (newest / file).read_bytes()
    assert not (undisturbed / "model" / "trainer").exists()
    assert load_model(undisturbed / "model").config.vocab_size == 300


def test_a_finished_demo_does_nothing_again(undisturbed, text):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.safetensors")}
    process = in_child(run_demo, small_plan(undisturbed, text))
    process.join()
    assert process.exitcode == 0
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.safetensors")} == before


def test_a_half_told_story_has_a_page_that_says_what_is_there_and_what_will_come(undisturbed, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(undisturbed, half)
    for gone in ("experts/exams", "experts/round-2", "experts/round-1/gate.json", "eval-stages", "experts/results.json"):
        path = half / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = check(write_report(half).read_text())
    coming = {name for name, found in page.sections.items() if "To come" in found}
    assert coming == {"loss", "gains", "thinking", "conversations"}  # of loss: only the families
    assert "next: round 1: gate" in page.sections["story"] and "expert: agent" in page.sections["rl"]
    assert "round 2: RL on it" not in page.sections["rl"]


def test_what_models_write_is_text_and_nothing_else(undisturbed, tmp_path):
    folder, bad = tmp_path / "run", "</pre><script src='https://x.example/'>alert(1)</script><img onerror=1 src=//x>&amp;\"'"
    shutil.copytree(undisturbed, folder)
    for path in (folder / "experts" / "exams").glob("*/conversations.json"):
        found = json.loads(path.read_text())
        for one in found:
            call = {"type": "function", "function": {"name": bad, "arguments": {bad: bad}}}
            said = {"role": bad, "content": bad, "reasoning_content": bad, "tool_calls": [call]}
            one |= {"messages": [{"role": "user", "content": bad}], "response": [said], "unread": bad, "reasons": [bad]}
        path.write_text(json.dumps(found))
    text = write_report(folder).read_text()
    page = check(text)
    assert page.sections["conversations"].count(bad) >= 5 and "<script" not in text


def test_a_folder_of_another_demo_is_refused(undisturbed, text):
    plan = small_plan(undisturbed, text)
    with pytest.raises(ConfigError, match="another recipe"):
        Plan("quick", plan.training, scaled(plan.experts, 2), undisturbed).open()


def test_the_forms_are_recipes_and_one_number():
    quick, default, full = (Plan.of(form) for form in ("quick", "default", "full"))
    assert [plan.folder for plan in (quick, default, full)] == [Path("runs", name) for name in ("quick", "demo", "full")]
    assert Plan.of("quick", Path("here")).folder == Path("here")
    whole = load_recipe("nano").plan().steps
    assert full.training.plan().steps == pytest.approx(FULL * whole, rel=0.01)
    assert default.training.plan().steps == pytest.approx(DEFAULT_TRAINING * whole, rel=0.01)
    for domain, expert in default.experts.experts.items():
        assert full.experts.experts[domain].steps == FULL * expert.steps
    for domain in default.experts.experts:
        assert full.experts.harvest.count(domain) == FULL * default.experts.harvest.count(domain)
    assert set(quick.experts.experts) == set(default.experts.experts)  # every part of the story
    assert quick.training.plan().steps < 100 and quick.experts.start.training.steps < 100


def test_quick_and_full_exclude_each_other(capsys):
    assert main(["--quick", "--full"]) == 2
    assert "found --quick and --full; wanted one of them" in capsys.readouterr().err


def test_evaluations_ask_what_the_recipes_practise(undisturbed):
    assert list(evaluations(Story.of(undisturbed))) == ["eval/stages"]  # there is no agent
    (arguments,) = evaluations(Story.of(undisturbed)).values()
    assert arguments[0] == str(undisturbed) and "--families" not in arguments


def results_of(folder: Path) -> dict:
    found = json.loads((folder / "experts" / "results.json").read_text())
    del found["checkpoints"]  # which say where the folder is
    return found


@pytest.mark.slow
def test_a_demo_that_is_killed_again_and_again_ends_with_the_same_numbers(undisturbed, text, tmp_path):
    """By SIGKILL as soon as something of a part is there, and once by SIGTERM, after which the step is finished and saved."""
    plan = small_plan(tmp_path / "run", text)
    for there, how in (
        ("checkpoints/step-4", signal.SIGKILL),
        ("experts/start/checkpoints/step-20", signal.SIGTERM),
        ("experts/round-1/answers/agent", signal.SIGKILL),
        ("experts/exams/start", signal.SIGKILL),
    ):
        process = in_child(run_demo, plan)
        while not (plan.folder / there).exists() and process.is_alive():
            time.sleep(0.01)
        assert process.is_alive()
        os.kill(process.pid, how)
        process.join()
        assert process.exitcode in (-how, 128 + how)
        check((plan.folder / "report.html").read_text())
    process = in_child(run_demo, plan)
    process.join()
    assert process.exitcode == 0
    assert results_of(plan.folder) == results_of(undisturbed)
    for file in ("model-00001-of-00001.safetensors", "tokenizer.json"):
        assert (plan.folder / "model" / file).read_bytes() == (undisturbed / "model" / file).read_bytes()
    assert (
        Page((plan.folder / "report.html").read_text()).sections["gains"]
        == Page((undisturbed / "report.html").read_text()).sections["gains"]
    )
