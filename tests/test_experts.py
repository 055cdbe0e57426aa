"""An expert iteration end to end with a tiny model: its steps, its gates, its resumption, its tables, the ways compared."""

import json
import os
import pickle
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_experts import SayNo, know_families, run_experts, small_recipe, write_base
from small_run import in_child

from minglm.__main__ import main
from minglm.checkpoint import load_model
from minglm.config import ConfigError
from minglm.posttrain.experts import exam
from minglm.posttrain.experts.exam import Sat, difference, questions, score
from minglm.posttrain.experts.filters import FILTERS
from minglm.posttrain.experts.paths import PATHS, compare, spent_by
from minglm.posttrain.experts.pipeline import ExpertsError, Made, Round, Stopped, experts, gate_of, unified_sft
from minglm.posttrain.experts.policy import Placed
from minglm.posttrain.experts.recipe import Exam, ExpertsRecipe, load_experts_recipe, save_experts_recipe
from minglm.posttrain.experts.results import write_results_of_seeds
from minglm.posttrain.lint import Sample, read_samples
from minglm.rl.recipe import Tasks
from minglm.tasks import FAMILIES
from minglm.train.run_folder import RunFolder

DOMAIN_OF = {"say_yes": "reasoning", "say_no": "agent"}


@pytest.fixture(scope="module", autouse=True)
def families():
    know_families()
    yield
    for name in DOMAIN_OF:
        del FAMILIES[name]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "model")


def finished(function, *arguments) -> int:
    process = in_child(function, *arguments)
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert finished(run_experts, small_recipe(base), folder) == 0
    return folder


def results_of(folder: Path) -> dict:
    found = json.loads((folder / "results.json").read_text())
    del found["checkpoints"]  # which say where the folder is
    return found


def test_every_step_is_a_folder_and_the_table_shows_what_each_has_gained(undisturbed, base):
    for run in ("start", "experts/reasoning", "experts/agent", "round-1/sft", "round-1/rl", "round-2/sft", "round-2/rl"):
        assert RunFolder(undisturbed / run).newest_checkpoint() is not None
    # Self-distillation starts from the base, RL from what was fine-tuned; the second round's agent answers for itself.
    assert f'base = "{base}"' in (undisturbed / "round-1/sft/config.toml").read_text()
    assert str(undisturbed / "round-1/sft") in (undisturbed / "round-1/rl/config.toml").read_text()
    assert (undisturbed / "round-2/answers/agent").is_dir() and not (undisturbed / "round-2/answers/reasoning").exists()
    second = (undisturbed / "round-2/sft/config.toml").read_text()
    assert str(undisturbed / "round-1/answers/reasoning") in second
    # It goes on from the first round's model, as long, on other demonstrations.
    assert f'base = "{RunFolder(undisturbed / "round-1/rl").newest_checkpoint()}"' in second
    lengths = [RunFolder(undisturbed / f"round-{number}/sft").newest_checkpoint().name for number in (1, 2)]
    assert lengths == ["step-40", "step-40"] and "seed = 1002" in second
    found = results_of(undisturbed)
    assert set(found["table"]) == {"base", "start", "expert", "unified", "unified_rl"}
    for rows in found["table"].values():
        assert {"all", "all reasoning", "all agent", "say_yes", "say_no", "say_yes 1"} <= set(rows)
        assert set(rows["all"]) == {"thinking", "non-thinking", "automatic"}
    rewards = {column: rows["all"]["non-thinking"]["reward"][0] for column, rows in found["table"].items()}
    assert rewards["base"] == 0 < rewards["start"]
    gates = found["gates"]
    assert gates[0]["kept"] and gates[1]["kept"] == (gates[1]["score"] >= gates[0]["score"])
    assert found["kept_round"] == (2 if gates[1]["kept"] else 1)
    text = (undisturbed / "results.md").read_text()
    assert "| say_no | automatic |" in text and "dropped: wrong" in text and gates[1]["reason"] in text


def test_answers_are_samples_that_sft_reads_and_every_attempt_is_counted(undisturbed):
    for domain in ("reasoning", "agent"):
        folder = undisturbed / "round-1" / "answers" / domain
        samples = list(read_samples(folder / "samples.jsonl"))
        assert samples and all(isinstance(sample, Sample) for sample in samples)
        assert all(sample.opens_thinking == (sample.thinking is True) for sample in samples)
        counts = json.loads((folder / "counts.json").read_text())
        kept = counts["kept"]
        assert len(samples) == sum(kept.values()) and list(counts["took"]) == list(FILTERS)
        assert counts["attempts"] == 6 * 3 * 2 == sum(counts["took"].values()) + kept["thinking"] + kept["non-thinking"]


def test_what_is_finished_is_not_done_again_and_another_recipe_is_refused(undisturbed, base):
    written_anew = ("results.json", "results.md", "gate.json")
    files = [path for path in undisturbed.rglob("*") if path.is_file() and path.name not in written_anew]
    before = {path: path.stat().st_mtime_ns for path in files}
    results = results_of(undisturbed)
    experts(small_recipe(base), undisturbed)
    assert {path: path.stat().st_mtime_ns for path in before} == before and results_of(undisturbed) == results
    with pytest.raises(ConfigError, match="rounds: found 2, wanted 1"):
        experts(small_recipe(base, rounds=1), undisturbed)
    with pytest.raises(ConfigError, match="base: missing"):
        experts(small_recipe(None), undisturbed)


def run_until(recipe, folder: Path, sight: str) -> None:
    """Kill this process as soon as the file or folder is there."""

    def watch() -> None:
        while not (folder / sight).exists():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    run_experts(recipe, folder)


@pytest.fixture(scope="module")
def real(base) -> ExpertsRecipe:
    """With families that other processes know, too."""
    small = small_recipe(base, rounds=1)
    conversations = replace(small.start.conversations, families=("weekdays", "clock"), levels=1)
    training = replace(small.start.training, sequence_length=512, steps=8)
    start = replace(small.start, conversations=conversations, training=training)
    sampling = replace(small.experts["agent"].sampling, context=512)
    own = {
        domain: replace(expert, tasks=Tasks({family: (1,)}), sampling=sampling)
        for (domain, expert), family in zip(small.experts.items(), ("weekdays", "clock"), strict=True)
    }
    unified = replace(small.unified_rl, tasks=Tasks({"weekdays": (1,), "clock": (1,)}), sampling=sampling)
    sft = replace(start, conversations=replace(conversations, automatic=0.5))
    return replace(small, start=start, experts=own, unified_sft=sft, unified_rl=unified)


@pytest.fixture(scope="module")
def one_by_one(real, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one_by_one") / "run"
    assert finished(run_experts, real, folder) == 0
    return folder


def check_the_same(folder: Path, other: Path) -> None:
    for domain in ("reasoning", "agent"):
        checkpoints = [RunFolder(one / "experts" / domain).newest_checkpoint() for one in (folder, other)]
        states = [load_model(checkpoint).state_dict() for checkpoint in checkpoints]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert results_of(folder) == results_of(other)


@pytest.mark.slow
def test_experts_side_by_side_are_those_one_after_the_other(real, one_by_one, tmp_path):
    """Both have one thread each."""
    assert finished(run_experts, replace(real, experts_at_once=2), tmp_path / "run") == 0
    assert (tmp_path / "run" / "experts" / "agent" / "log.txt").read_text()
    check_the_same(tmp_path / "run", one_by_one)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_experts_side_by_side_that_are_stopped_go_on_to_the_same_end(real, one_by_one, tmp_path, how):
    folder, recipe = tmp_path / "run", replace(real, experts_at_once=2)
    process = in_child(run_experts, recipe, folder)
    while not (folder / "experts" / "agent" / "rollouts").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, how)
    process.join()
    assert process.exitcode not in (0, None) and not (folder / "results.json").exists()
    assert finished(run_experts, recipe, folder) == 0
    check_the_same(folder, one_by_one)


@pytest.mark.slow
def test_an_iteration_that_is_killed_again_and_again_ends_with_the_same_bits(undisturbed, base, tmp_path):
    folder = tmp_path / "run"
    for sight in ("start/checkpoints/step-20", "experts/agent/rollouts", "round-1/answers/reasoning", "round-1/rl/rollouts"):
        assert finished(run_until, small_recipe(base), folder, sight) == -signal.SIGKILL, sight
    assert finished(run_experts, small_recipe(base), folder) == 0
    assert results_of(folder) == results_of(undisturbed)
    for run in ("start", "experts/reasoning", "experts/agent", "round-1/sft", "round-1/rl", "round-2/sft", "round-2/rl"):
        states = [load_model(RunFolder(where / run).newest_checkpoint()).state_dict() for where in (folder, undisturbed)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), run
    for domain in ("reasoning", "agent"):
        texts = [(where / f"round-1/answers/{domain}/samples.jsonl").read_bytes() for where in (folder, undisturbed)]
        assert texts[0] == texts[1]


@pytest.mark.slow
def test_three_ways_are_compared_at_equal_compute(undisturbed, base):
    found = compare(small_recipe(base), undisturbed)
    assert tuple(found) == PATHS
    own, distilled, together = (found[path] for path in PATHS)
    step = 16 * (6 + 4 * 41)  # the most that one step of RL can cost: an overshoot
    assert own["compute"] == own["generated"] + 3 * own["trained"] + own["teacher"] and own["teacher"] == 0
    for one in (distilled, together):
        assert own["compute"] <= one["compute"] <= own["compute"] + step
    teachers = spent_by(undisturbed / "distilled").teacher
    assert distilled["teacher"] == teachers > 0 == together["teacher"]
    assert str(undisturbed / "experts/agent") in (undisturbed / "distilled/config.toml").read_text()
    text = (undisturbed / "paths.md").read_text()
    assert all(f"| {path} |" in text for path in PATHS)


def test_the_command_goes_on_with_the_folder_and_says_what_it_made(undisturbed, capsys):
    assert main(["experts", "--recipe", str(undisturbed / "config.toml")]) == 0
    said = capsys.readouterr().out
    assert f"round-{results_of(undisturbed)['kept_round']}/rl" in said and "| say_yes | thinking |" in said
    assert main(["experts"]) == 2 and "wanted the mid-trained model" in capsys.readouterr().err


def test_what_says_that_an_iteration_was_stopped_comes_back_from_another_process():
    again = pickle.loads(pickle.dumps(Stopped(signal.SIGTERM, Path("runs/one/start"))))
    assert again.signal == signal.SIGTERM and str(again) == "stopped by SIGTERM in runs/one/start, which is saved"


def test_over_seeds_the_table_has_their_mean(undisturbed, base, tmp_path):
    write_results_of_seeds(small_recipe(base), tmp_path, [undisturbed, undisturbed])
    one, both = (json.loads((where / "results.json").read_text()) for where in (undisturbed, tmp_path))
    assert both["claims"] == {
        text: {**found, "measured": [found["measured"][0]] * 3, "verdict": both["claims"][text]["verdict"]}
        for text, found in one["claims"].items()
    }
    one, both = one["table"], both["table"]
    value = one["start"]["all"]["thinking"]["reward"][0]
    assert both["start"]["all"]["thinking"]["reward"] == [value] * 3 and both["start"]["all"]["thinking"]["seeds"] == 2


# ----------------------------------------------------------------------------------------------------- gates and recipes


def sat(rewards: list[float], family: str = "say_yes") -> list[Sat]:
    return [Sat(family, 1, "automatic", reward, 3, False, "done", 0, 0) for reward in rewards]


def test_a_gate_keeps_what_is_no_worse_and_nothing_else():
    before = sat([1.0, 0.0, 1.0, 0.0])
    assert gate_of([], before, DOMAIN_OF)["kept"]
    for after, kept in (([1, 0, 1, 1], True), ([0, 1, 0, 1], True), ([1, 0, 0, 0], False), ([0, 0, 0, 0], False)):
        gate = gate_of(before, sat(after), DOMAIN_OF)
        assert gate["kept"] == kept and gate["reason"].startswith("kept" if kept else "not kept")
        assert gate["before"] == 0.5 and gate["score"] == sum(after) / 4
        assert gate["difference"][0] == pytest.approx(gate["score"] - 0.5)


def test_the_last_kept_round_is_the_one_that_counts():
    rounds = [Round(n, {}, Path(f"sft-{n}"), Path(f"rl-{n}"), {"kept": kept}) for n, kept in ((1, True), (2, True), (3, False))]
    assert Made(Path(), {}, rounds).kept.number == 2 and Made(Path(), {}, rounds[:1]).kept.number == 1


def test_domains_count_alike_and_failed_attempts_not_at_all():
    many = [*sat([1.0] * 6), *sat([0.0, 0.0], "say_no"), Sat("say_no", 1, "automatic", None, 0, False, "failed", 0, 0)]
    assert score(many, DOMAIN_OF) == 0.5
    assert (
        difference(sat([1.0, 0.0]), [*sat([0.0]), Sat("say_yes", 1, "automatic", None, 0, False, "failed", 0, 0)]).value == -1.0
    )


def test_problems_that_judge_are_not_those_that_choose():
    found = questions({"arithmetic": (1, 2), "say_no": (1,)}, Exam(problems=8), seed=1)
    judging, choosing = ({one.problem.key for one in own} for own in found)
    assert not judging & choosing and len(judging) == len(found.judging) == 24
    assert found == questions({"arithmetic": (1, 2), "say_no": (1,)}, Exam(problems=8), seed=1)


def test_an_exam_may_allow_more_turns_than_practice(base, tmp_path, monkeypatch):
    allowed = []

    class Seen(exam.Policy):
        def __init__(self, folder, recipe):
            super().__init__(folder, recipe)
            allowed.append(self.rollouts.limits.turns)

    monkeypatch.setattr(exam, "Policy", Seen)
    recipe = small_recipe(base).unified_rl
    asked = questions({"say_no": (1,)}, Exam(problems=1), seed=1).judging
    for turns in (None, 3):
        exam.sit(base, recipe, asked, Exam(problems=1, turns=turns), tmp_path / str(turns), "exam")
    assert allowed == [recipe.sampling.turns, 3] and recipe.sampling.turns != 3


class Broken(SayNo):
    def verify(self, response):
        raise OSError("the sandbox is gone")


def test_an_exam_that_tells_nothing_is_not_kept(undisturbed, tmp_path):
    model = RunFolder(undisturbed / "start").newest_checkpoint()
    asked = [Placed("say_no", 1, Broken(number)) for number in range(2)]
    with pytest.raises(exam.ExpertsError, match="all 2 attempts at say_no have failed.*the sandbox is gone"):
        exam.sit(model, small_recipe(model).unified_rl, asked, Exam(), tmp_path / "exam", "exam")
    assert not (tmp_path / "exam").exists()


def counts(folder: Path, **kept: int) -> Path:
    folder.mkdir()
    kept = {"thinking": 0, "non-thinking": 0, "automatic": 0} | {name.replace("_", "-"): n for name, n in kept.items()}
    (folder / "counts.json").write_text(json.dumps({"kept": kept}))
    return folder


def test_every_sample_is_dealt_and_a_mode_without_any_is_left_out(base, tmp_path):
    recipe = small_recipe(base)
    own = {"reasoning": counts(tmp_path / "a", thinking=30, non_thinking=5), "agent": counts(tmp_path / "b", thinking=10)}
    data = unified_sft(recipe, own).conversations
    assert data.weights == {"thinking": 0.5, "non-thinking": 0.5, "automatic": 0.0} and data.samples == 80
    assert unified_sft(recipe, own).base == base
    with pytest.raises(ExpertsError, match="no answer has passed"):
        unified_sft(recipe, {"agent": counts(tmp_path / "c")})


def test_recipes_share_what_stands_once_and_come_back_as_they_were_written(tmp_path):
    recipe = load_experts_recipe("nano", ["experts.agent.steps=7", "rl.sampling.tokens=33", "seed=5"])
    assert recipe.experts["agent"].steps == 7 != recipe.experts["reasoning"].steps
    runs = [*recipe.experts.values(), recipe.unified_rl]
    assert {one.sampling.tokens for one in runs} == {33} and {one.seed for one in (*runs, recipe.start)} == {5}
    assert set(recipe.unified_rl.tasks.levels) == set(recipe.domain_of)
    save_experts_recipe(recipe, tmp_path / "config.toml")
    assert load_experts_recipe(tmp_path / "config.toml") == recipe
    with pytest.raises(ConfigError, match="rl.steps=3.*wanted experts.reasoning or .* unified_rl in place of rl"):
        load_experts_recipe(tmp_path / "config.toml", ["rl.steps=3"])
    for change, message in (
        ("experts.agent.stepz=7", "unknown key 'stepz'"),
        ("rounds=1,2", "found 2 values"),
        ("seed.x=1", "seed is 1"),
        ("regenerated=[['chat']]", "regenerated"),
        ("harvest.problems_of={chat=3}", "harvest.problems_of = .*'chat'.*wanted domains of experts"),
        ("harvest.problems_of={agent=0}", "problems_of.agent = 0: wanted 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_experts_recipe("nano", [change])
    with pytest.raises(ConfigError, match="each family in one domain"):
        replace(recipe, experts={**recipe.experts, "other": recipe.experts["agent"]})
