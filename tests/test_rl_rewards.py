"""Rewards from several sources: the laws of their combination, and what happens when one of them fails."""

import dataclasses
import json
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from by_heart import serving
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rl_rollout import CONFIG, TOKENIZER, Echo, collect, policy

from minglm.chat import render_tokens
from minglm.checkpoint import save_model
from minglm.config import ConfigError
from minglm.engine.engine import Engine
from minglm.evals.endpoint import GRADER_KEY, Endpoint
from minglm.model import GLM
from minglm.posttrain.reward_model import RewardModel
from minglm.rl.loop import rl
from minglm.rl.objective import named
from minglm.rl.practice import RLError
from minglm.rl.recipe import Rewards, RLRecipe, Sampling, Tasks, load_rl_recipe
from minglm.rl.rewards import Case, Combined, Grader, ModelSource, Verifier, combine, combined, read_grade
from minglm.rl.rollout import Limits
from minglm.tasks.task import Verdict, reply
from minglm.train.metrics import read_metrics
from minglm.train.recipe import Hardware

LAW = settings(max_examples=150, derandomize=True, deadline=None)
NAMES = ("verifier", "model", "rubric")
rewards = st.floats(0, 1)
weights = st.dictionaries(st.sampled_from(NAMES), st.floats(0.1, 5), min_size=1)


def verdicts(values) -> dict[str, Verdict | None]:
    return {name: None if value is None else Verdict(value, (name,)) for name, value in values.items()}


# ------------------------------------------------------------------------------------------------------ laws of `combine`


@LAW
@given(st.data(), weights)
def test_a_combination_is_the_weighed_mean_within_its_parts_and_rises_with_each(data, weight):
    values = {name: data.draw(rewards) for name in weight}
    found = combine(verdicts(values), weight, (), 0.5).reward
    assert found == pytest.approx(sum(weight[n] * values[n] for n in weight) / sum(weight.values()))
    assert min(values.values()) - 1e-9 <= found <= max(values.values()) + 1e-9
    scale = data.draw(st.floats(0.1, 10))
    assert combine(verdicts(values), {n: scale * w for n, w in weight.items()}, (), 0.5).reward == pytest.approx(found)
    name = data.draw(st.sampled_from(sorted(weight)))
    higher = {**values, name: data.draw(st.floats(values[name], 1))}
    assert combine(verdicts(higher), weight, (), 0.5).reward >= found - 1e-9


@LAW
@given(st.data(), weights, st.floats(0.05, 1))
def test_a_veto_stands_whatever_others_say_or_fail_to_say(data, weight, below):
    name = data.draw(st.sampled_from(sorted(weight)))
    values = {n: data.draw(st.none() | rewards) for n in weight}
    values[name] = data.draw(st.floats(0, below, exclude_max=True))
    found = combine(verdicts(values), weight, (name,), below)
    assert found.reward == 0 and found.reasons[0] == f"vetoed by the {name}"
    values = {n: value or 0.0 for n, value in values.items()} | {name: data.draw(st.floats(below, 1))}
    assert combine(verdicts(values), weight, (name,), below).reward == combine(verdicts(values), weight, (), below).reward


@LAW
@given(st.data(), weights)
def test_without_a_verdict_of_one_source_there_is_none_at_all(data, weight):
    name = data.draw(st.sampled_from(sorted(weight)))
    values = {n: data.draw(rewards) for n in weight} | {name: None}
    assert combine(verdicts(values), weight, (), 0.5) is None
    assert combine(verdicts(values), weight, (name,), 0.5) is None


def test_one_source_alone_is_as_it_is_and_a_source_without_weight_may_still_veto():
    alone = Verdict(0.3, ("because",))
    assert combine({"verifier": alone}, {"verifier": 2.0}, (), 0.5) is alone
    both = {"verifier": Verdict(1.0), "model": Verdict(0.8)}
    assert combine(both, {"verifier": 0.0, "model": 1.0}, ("verifier",), 0.5).reward == 0.8
    both["verifier"] = Verdict(0.0, ("wrong",))
    assert combine(both, {"verifier": 0.0, "model": 1.0}, ("verifier",), 0.5) == (0.0, ("vetoed by the verifier", "wrong"))


class Fixed:
    """A source that says what it was told to, and remembers whom it was asked about."""

    def __init__(self, values):
        self.values, self.asked = values, []

    def judge(self, cases):
        self.asked += [case.response[0]["content"] for case in cases]
        return [verdicts({"x": self.values[case.response[0]["content"]]})["x"] for case in cases]


def test_no_source_is_asked_about_what_is_vetoed_already():
    cases = [Case(Echo(1, False), reply(text)) for text in "abc"]
    rule, model = Fixed({"a": 1.0, "b": 0.0, "c": None}), Fixed({"a": 0.5, "b": 0.9, "c": 0.7})
    judge = Combined({"verifier": rule, "model": model}, Rewards(0.0, 1.0, vetoes=("verifier",)))
    found = judge.judge(cases)
    assert [one and one.reward for one in found] == [0.5, 0.0, None] and model.asked == ["a", "c"]


def test_what_was_cut_off_or_malformed_stays_at_zero_and_a_failed_environment_stays_failed():
    trajectories = collect([Echo(1, False) for _ in range(4)], Limits(tokens=6))
    for one, end, verdict in zip(
        trajectories, ("length", "malformed", "failed", "done"), (Verdict(0.0), Verdict(0.0), None, Verdict(1.0)), strict=True
    ):
        one.end, one.verdict, one.response = end, verdict, reply("a")
    judge = Combined({"verifier": Verifier(), "model": Fixed({"a": 0.25})}, Rewards(1.0, 1.0))
    judge.apply(trajectories)
    assert [one.verdict and one.verdict.reward for one in trajectories] == [0.0, 0.0, None, 0.625]
    assert trajectories[3].parts == {"verifier": 1.0, "model": 0.25} and not trajectories[0].parts


def test_values_that_make_no_rewards_are_refused():
    for changes, key in [
        (dict(verifier=0.0), "verifier"),
        (dict(model=-1.0), "model"),
        (dict(veto_below=0.0), "veto_below"),
    ]:
        with pytest.raises(ConfigError, match=f"^{key} = "):
            Rewards(**changes)
    for changes, key in [
        (dict(model=1.0), "model_folder"),
        (dict(rubric=1.0), "rubric_text"),
        (dict(vetoes=("rubric",), rubric_text="good"), "grader_name"),
    ]:
        with pytest.raises(ConfigError, match=f"rewards.{key}: missing"):
            combined(Rewards(**changes), torch.device("cpu"))
    recipe = load_rl_recipe("style")
    assert recipe.rewards.vetoes == ("verifier",) and recipe.rewards.uses("verifier") and not recipe.rewards.uses("rubric")


# --------------------------------------------------------------------------------------------------------- reward model


def reward_model(seed: int = 0) -> RewardModel:
    model = RewardModel.upon(policy())
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model.eval()


def test_a_reward_model_judges_whole_conversations_without_their_reasoning(caplog):
    source = ModelSource(reward_model(), TOKENIZER)
    cases = [
        Case(Echo(1, False), reply("the sum is 7")),
        Case(Echo(1, False), reply("the sum is 7", "3 and 4")),
        Case(Echo(1, False), []),
        Case(Echo(1, False), reply("7 " * 2000)),
        Case(Echo(1, False), [{"role": "assistant", "content": 3}]),
    ]
    with caplog.at_level(logging.WARNING):
        found = source.judge(cases)
    ids = render_tokens(TOKENIZER, [*cases[0].problem.messages, *cases[0].response], end_of_turn=True).ids
    with torch.no_grad():
        score = source.model(torch.tensor([ids])).logits[0, -1, 0].item()
    assert found[0].reward == pytest.approx(1 / (1 + math.exp(-score)), abs=1e-5) and found[1].reward == found[0].reward
    assert found[2] == (0.0, ("does not end with an answer",)) and found[3] is None and found[4] is None
    assert "wanted at most its 1024 positions" in caplog.text and caplog.text.count("no verdict of the reward model") == 2


def test_a_score_that_is_not_finite_is_no_verdict(caplog):
    model = reward_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert ModelSource(model, TOKENIZER).judge([Case(Echo(1, False), reply("7"))]) == [None]
    assert "its score is nan" in caplog.text


# ------------------------------------------------------------------------------------------------ grading by a rubric


@contextmanager
def endpoint(answer) -> Iterator[tuple[str, list[dict]]]:
    """An OpenAI-compatible endpoint: answer(question) -> status and body. Yields its address and what it was asked."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            status, body = answer(asked[-1]["messages"][-1]["content"])
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_) -> None:
            """Not on the tests' stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(content) -> str:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]})


def called(arguments) -> str:
    return with_calls([{"id": "a", "type": "function", "function": {"name": "grade", "arguments": arguments}}])


def with_calls(calls) -> str:
    choice = {"index": 0, "finish_reason": "tool_calls", "message": {"role": "assistant", "content": "", "tool_calls": calls}}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]})


def grader(url: str, by_call: bool = False) -> Grader:
    asked = Endpoint(url, "judge", GRADER_KEY, seconds=10)
    asked._client = asked._client.with_options(max_retries=0)
    return Grader(asked, "Is it kind?", by_call)


def test_grades_become_rewards_and_every_failure_becomes_no_verdict(caplog):
    answers = {
        "kind": (200, completion("It is kind.\nGrade: 9")),
        "rude": (200, completion("Grade: 0")),
        "vague": (200, completion("I would say 7 or so.")),
        "twice": (200, completion("Grade: 10\nGrade: 2")),
        "above": (200, completion("Grade: 11")),
        "empty": (200, completion(None)),
        "none": (200, json.dumps({"object": "chat.completion", "choices": []})),
        "number": (200, json.dumps({"choices": 3})),
        "hollow": (200, json.dumps({"choices": [{}]})),
        "text": (200, json.dumps({"choices": [{"message": "Grade: 9"}]})),
        "list": (200, "[]"),
        "html": (200, "<html>busy</html>"),
        "broken": (500, "{}"),
        "refused": (401, "{}"),
    }

    def answer(question):
        return answers[next(name for name in answers if f"[assistant] {name}" in question)]

    with endpoint(answer) as (url, asked), caplog.at_level(logging.WARNING):
        found = grader(url).judge([Case(Echo(1, False), reply(name, "a thought")) for name in answers])
    assert [one and one.reward for one in found] == [0.9, 0.0] + [None] * 12
    assert found[0].reasons == ("graded 9 of 10",)
    assert caplog.text.count("no verdict of the grader for a problem of echo") == 12
    assert all("Is it kind?" in one["messages"][0]["content"] and one["temperature"] == 0 for one in asked)
    assert all("say 3" in one["messages"][1]["content"] and "a thought" not in str(one) for one in asked)


def test_grades_by_call_become_rewards_and_arguments_that_are_none_no_verdict(caplog):
    answers = {
        "kind": (200, called('{"grade": 9}')),
        "rude": (200, called('{"grade": 0}')),
        "above": (200, called('{"grade": 11}')),
        "text": (200, called('{"grade": "9"}')),
        "truth": (200, called('{"grade": true}')),
        "more": (200, called('{"grade": 9, "again": 2}')),
        "hollow": (200, called("{}")),
        "list": (200, called("[9]")),
        "broken": (200, called('{"grade": ')),
        "wordy": (200, completion("Grade: 9")),
        **{f"other {call!r}": (200, with_calls([call])) for call in ({}, {"function": None}, "grade", {"type": "custom"})},
        "none": (200, with_calls(None)),
    }

    def answer(question):
        return answers[next(name for name in answers if f"[assistant] {name}" in question)]

    with endpoint(answer) as (url, asked), caplog.at_level(logging.WARNING):
        found = grader(url, by_call=True).judge([Case(Echo(1, False), reply(name)) for name in answers])
    assert [one and one.reward for one in found] == [0.9, 0.0] + [None] * 13
    assert caplog.text.count("no verdict of the grader for a problem of echo") == 13
    assert all(one["tool_choice"]["function"]["name"] == one["tools"][0]["function"]["name"] == "grade" for one in asked)


def test_nobody_at_the_endpoint_is_no_verdict_and_the_attempt_has_failed(caplog):
    (one,) = collect([Echo(1, False)], Limits(tokens=6))
    one.end, one.verdict = "done", Verdict(1.0)
    Combined({"verifier": Verifier(), "rubric": grader("http://127.0.0.1:9/v1")}, Rewards(1.0, rubric=1.0)).apply([one])
    assert one.verdict is None and one.end == "failed" and one.parts == {"verifier": 1.0}
    assert "APIConnectionError" in caplog.text


@LAW
@given(st.text(max_size=30), st.integers(0, 30))
def test_a_grade_is_read_only_where_it_stands_alone_on_its_line(text, number):
    assert read_grade(f"well\n Grade: {number}\n") == (number if number <= 10 else None)
    assert read_grade(f"Grade: {number} of 10") is None and read_grade(f"My Grade: {number}") is None
    assert read_grade(text.replace("Grade", "")) is None


def ended(count: int):
    """Attempts that the verifier finds half right."""
    trajectories = collect([Echo(1, False)] * count, Limits(tokens=6))
    for number, one in enumerate(trajectories):
        one.end, one.verdict, one.response = "done", Verdict(0.5), reply("call weather " * number + "7")
    return trajectories


def test_our_own_server_may_grade_and_what_an_untrained_model_says_is_no_verdict_and_no_zero(caplog):
    trajectories = ended(3)
    with serving(Engine(policy(), TOKENIZER), TOKENIZER, model_name="judge") as served:
        judge = Combined({"verifier": Verifier(), "rubric": grader(f"{served.url}/v1")}, Rewards(1.0, rubric=1.0))
        judge.apply(trajectories)
    assert caplog.text.count("found no single grade from 0 to 10 in") == 3
    for one in trajectories:
        assert one.verdict is None and one.end == "failed" and one.parts == {"verifier": 0.5}
        assert str(one.failure) == "reward: a source of rewards gave no verdict"


def test_held_to_the_grammar_of_a_call_even_an_untrained_model_gives_well_formed_grades(caplog):
    trajectories = ended(3)
    torch.manual_seed(0)
    model = GLM(dataclasses.replace(CONFIG, max_position_embeddings=2048)).eval()
    with serving(Engine(model, TOKENIZER), TOKENIZER, model_name="judge") as served:
        judge = Combined({"rubric": grader(f"{served.url}/v1", by_call=True)}, Rewards(0.0, rubric=1.0, grader_call=True))
        judge.apply(trajectories)
    assert "no verdict" not in caplog.text
    for one in trajectories:
        assert one.end == "done" and 10 * one.verdict.reward in range(11)
        assert one.verdict.reasons == (f"graded {10 * one.verdict.reward:g} of 10",)


# ------------------------------------------------------------------------------------------------------------ in the loop


def style_recipe(tmp_path: Path, **changes) -> RLRecipe:
    save_model(policy(), tmp_path / "base")
    save_model(reward_model(), tmp_path / "judge")
    for name in ("base", "judge"):
        TOKENIZER.save_pretrained(tmp_path / name)
    values = {
        "tasks": Tasks({"style_answer": (1,)}, "none"),
        "steps": 2,
        "rewards": Rewards(0.0, 1.0, tmp_path / "judge"),
        "sampling": Sampling(group_size=2, groups=3, tokens=40, rounds=1, thinking="non-thinking"),
        "objective": named("reinforce++"),
        "evaluation_problems": 3,
        "checkpoint_every": 1,
        "hardware": Hardware(device="cpu"),
    }
    return RLRecipe(base=tmp_path / "base", **{**values, **changes})


def test_a_run_is_judged_by_its_reward_model_and_says_what_each_source_said(tmp_path):
    recipe = style_recipe(tmp_path, rewards=Rewards(1.0, 3.0, tmp_path / "judge"))
    rl(recipe, tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "run" / "rollouts" / "step-2.jsonl").read_text().splitlines()]
    judged = [line for line in lines if line["end"] == "done"]
    assert len(lines) == 6
    for line in judged:
        assert line["parts"]["verifier"] == 0 and line["reward"] == pytest.approx(0.75 * line["parts"]["model"])
    assert all(line["reward"] == 0 and not line["parts"] for line in lines if line["end"] == "length")
    assert all("reward_by_source" in record for record in records if record["kind"] == "step")
    assert load_rl_recipe(tmp_path / "run" / "config.toml") == recipe


def test_where_no_attempt_has_a_verdict_the_run_ends_before_it_learns(tmp_path):
    """The reward model gives no finite score, and whatever was not cut off goes without a verdict."""
    recipe = style_recipe(tmp_path, sampling=Sampling(group_size=2, groups=1, tokens=500, rounds=1), evaluation_problems=1)
    broken = reward_model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    save_model(broken, tmp_path / "judge")
    with pytest.raises(RLError, match="all 1 attempts at held-out problems have failed"):
        rl(recipe, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
