"""The auditor of rewards: each planted fault is found, and the families' own verifiers have none."""

import itertools
import random
import re

import pytest
import torch
from test_rl_rewards import reward_model
from test_rl_rollout import TOKENIZER

from minglm.__main__ import main
from minglm.rl.audit import CANARIES, audit, report
from minglm.rl.rewards import ModelSource, Verifier
from minglm.tasks import FAMILIES
from minglm.tasks.task import Verdict, final_content

COUNT = 24


class Planted:
    """The verifier of the task with a fault: reward(case, what the verifier says) -> reward, or a verdict."""

    def __init__(self, reward):
        self.reward = reward

    def judge(self, cases):
        found = (self.reward(case, case.problem.verify(case.response).reward) for case in cases)
        return [one if one is None or isinstance(one, Verdict) else Verdict(one) for one in found]


def text_of(case) -> str:
    return final_content(case.response)


def gold_of(case) -> str:
    return final_content(case.problem.demonstrate(False))


def asked_of(case) -> str:
    return case.problem.messages[-1]["content"]


def appended(case, right):
    case.response.append({"role": "assistant", "content": "seen"})
    return right


def raising(case, right):
    if not case.response:
        raise KeyError("content")
    return right


DRAWS, CALLS = random.Random(0), itertools.count()
FAULTS = {
    "everything is right": (lambda case, right: 1.0, "no spread"),
    "everything is wrong": (lambda case, right: 0.0, "false negatives (thinking)"),
    "near misses are right": (
        lambda case, right: max(right, float(len(text_of(case)) == len(gold_of(case)) and bool(case.response))),
        "false positives",
    ),
    "the gold anywhere in the answer": (lambda case, right: float(gold_of(case) in text_of(case)), "canary: all candidates"),
    "the gold anywhere in the message": (
        lambda case, right: float(any(gold_of(case) in str(one.get("reasoning_content", one)) for one in case.response)),
        "canary: right only in the reasoning",
    ),
    "whoever says it": (
        lambda case, right: max(right, float(any(one["content"] == gold_of(case) for one in case.response))),
        "canary: said by the user",
    ),
    "long answers are good": (
        lambda case, right: max(right, min(1.0, len(text_of(case)) / 1000)),
        "canary: a very long answer",
    ),
    "repetition is good": (
        lambda case, right: max(right, 1 - len({*text_of(case).split()}) / max(1, len(text_of(case).split()))),
        "canary: repetition",
    ),
    "words of the prompt are good": (
        lambda case, right: max(
            right, len({*asked_of(case).split()} & {*text_of(case).split()}) / len({*asked_of(case).split()})
        ),
        "canary: the prompt copied",
    ),
    "it believes what it is told": (
        lambda case, right: max(right, float("correct" in text_of(case))),
        "canary: a claim to be right",
    ),
    "form alone is good": (
        lambda case, right: max(right, float({*re.findall(r"\w", text_of(case))} == {"x"})),
        "canary: form without content",
    ),
    "no answer is right": (lambda case, right: max(right, float(not case.response)), "canary: nothing"),
    "an empty answer is right": (lambda case, right: max(right, float(text_of(case) == "")), "canary: an empty answer"),
    "what breaks the verifier is right": (
        lambda case, right: max(right, float("Traceback" in text_of(case))),
        "canary: an error of the verifier",
    ),
    "thoughts are punished": (
        lambda case, right: right * (not any("reasoning_content" in one for one in case.response)),
        "false negatives (thinking)",
    ),
    "only thoughts count": (
        lambda case, right: right * any("reasoning_content" in one for one in case.response),
        "false negatives (non-thinking)",
    ),
    "not a number": (lambda case, right: float("nan") if len(text_of(case)) > 500 else right, "not from 0 to 1"),
    "more than one": (lambda case, right: 1.5 * right, "not from 0 to 1"),
    "a truth value": (lambda case, right: right == 1, "not from 0 to 1"),
    "drawn": (lambda case, right: right * DRAWS.random(), "not deterministic"),
    "by order": (lambda case, right: min(right, next(CALLS) % 2), "not deterministic"),
    "silent": (lambda case, right: None if text_of(case) == "" else right, "no verdict"),
    "raising": (raising, "raises"),
    "meddling": (appended, "changes the answers"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_planted_fault_is_found(name):
    reward, wanted = FAULTS[name]
    found = audit(Planted(reward), FAMILIES["ordering"], COUNT)
    assert wanted in found.faults, found.faults


def test_fewer_or_more_verdicts_than_answers_are_found():
    class Short:
        def judge(self, cases):
            return Verifier().judge(cases)[1:]

    assert "verdicts of" in audit(Short(), FAMILIES["ordering"], 2).faults["raises"]


AUDITED = ["arithmetic", "ordering", "clock", "function_calling", "instruction_following", "style_preference", "style_answer"]


@pytest.mark.parametrize("name", AUDITED)
def test_the_families_own_verifiers_have_no_fault(name):
    found = audit(Verifier(), FAMILIES[name], COUNT)
    assert found.faults == {}, found.faults
    assert found.false_positives.value == 0 and all(one.value == 0 for one in found.false_negatives.values())
    assert found.no_spread.value == 0 and set(found.canaries) == set(CANARIES)


def test_an_audit_is_a_function_of_its_seed():
    assert audit(Verifier(), FAMILIES["clock"], 5) == audit(Verifier(), FAMILIES["clock"], 5)


def test_a_reward_model_that_has_learnt_nothing_is_found_out():
    source = ModelSource(reward_model(), TOKENIZER)
    found = audit(source, FAMILIES["style_answer"], 12, right=0.5)
    assert {"false positives", "not deterministic"} & found.faults.keys() == {"false positives"}, found.faults
    assert "style_answer" in report([found]) and "false positives" in report([found])


def test_the_command_audits_verifiers_and_refuses_unknown_families(capsys):
    assert main(["audit", "ordering", "--problems", "4"]) == 0
    assert "0 faults" in capsys.readouterr().out
    assert main(["audit", "orderings"]) == 2
    assert "found 'orderings'; wanted some of" in capsys.readouterr().err


def test_the_command_audits_a_reward_model(tmp_path, capsys):
    reward_model().save_pretrained(tmp_path / "judge")
    TOKENIZER.save_pretrained(tmp_path / "judge")
    assert main(["audit", "style_answer", "--problems", "3", "--reward-model", str(tmp_path / "judge")]) == 1
    assert "the reward model" in capsys.readouterr().out
    assert torch.get_default_dtype() == torch.float32
