"""Learning from preferences: what a pair is, the losses against naive formulas, exact resumption, and a rise above chance."""

import dataclasses
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import MODEL, equal, everything_written

from minglm.__main__ import main
from minglm.chat import render_tokens
from minglm.checkpoint import CheckpointError, load_model
from minglm.config import ConfigError, GLMConfig
from minglm.data.stream import Batch
from minglm.model import GLM
from minglm.posttrain.bradley_terry import bradley_terry_loss
from minglm.posttrain.lint import LintError, Sample
from minglm.posttrain.pair_learner import learner_of
from minglm.posttrain.preferences import PairReader, preference_data, without_reasoning
from minglm.posttrain.recipe import Preferences, RewardRecipe, load_reward_recipe, save_reward_recipe
from minglm.posttrain.reward import reliability, train_on_preferences
from minglm.posttrain.reward_model import RewardModel, ends, load_reward_model, score
from minglm.posttrain.sft_data import DataRefused, PackedConversations
from minglm.tasks.general.style import pair
from minglm.tasks.task import reply
from minglm.tokenizer import Tokenizer, train_tokenizer
from minglm.train.device import choose_device
from minglm.train.metrics import read_metrics
from minglm.train.recipe import Checkpoints, Evaluation, Hardware, Optimizer, Schedule, Training
from minglm.train.run_folder import RunFolder

LAW = settings(max_examples=60, derandomize=True, deadline=None)
LENGTH = 160
ASKED = [{"role": "user", "content": "How is the mill?"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model without training, whose tokenizer has seen answers of the style family."""
    folder = tmp_path_factory.mktemp("base") / "model"
    rng = random.Random(0)
    texts = [answer[0]["content"] for _ in range(200) for answer in pair(rng)[1:3]]
    tokenizer = train_tokenizer(texts, 420, show_progress=False)
    torch.manual_seed(0)
    GLM(dataclasses.replace(MODEL, vocab_size=420, max_position_embeddings=512)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small(base: Path, **changes: object) -> RewardRecipe:
    """`changes` are keys of any of the tables, or of the top, by name."""
    tables = {
        "preferences": (Preferences, dict(pairs=24)),
        "training": (Training, dict(steps=4, sequence_length=LENGTH, sequences_per_step=4, sequences_per_micro_batch=2)),
        "optimizer": (Optimizer, dict(learning_rate=1e-2)),
        "schedule": (Schedule, dict(warmup_steps=1)),
        "evaluation": (Evaluation, dict(every=2, tokens=1_000)),
        "checkpoints": (Checkpoints, dict(every=2)),
        "hardware": (Hardware, dict(device="cpu")),
    }
    for cls, values in tables.values():
        values |= {key: changes.pop(key) for key in list(changes) if key in cls.__dataclass_fields__}
    return RewardRecipe(**{name: cls(**values) for name, (cls, values) in tables.items()}, base=base, **changes)


def held_out(folder: Path) -> list[dict]:
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "held_out"]


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_both_answers_of_a_pair_share_a_row_and_follow_one_another(base):
    recipe, tokenizer = small(base), Tokenizer.from_pretrained(base)
    census = preference_data(recipe, tokenizer).training
    assert len(census.conversations) == 48 and not census.faults
    packed = PackedConversations(census.conversations, LENGTH, 1, 0, together=2)
    (batch,) = packed.batches(packed.rows_per_epoch)
    found = []
    for ids, documents in zip(batch.input_ids, batch.document_ids, strict=True):
        count = int(documents.max()) + 1
        assert count % 2 == 0
        found += [ids[documents == number].tolist() for number in range(count)]
    assert found == [census.conversations[number].ids.tolist() for number in packed.order]
    chosen, rejected = census.conversations[:2]
    shared = next(n for n, (a, b) in enumerate(zip(chosen.ids, rejected.ids, strict=False)) if a != b)
    assert chosen.source == rejected.source and not chosen.mask[: shared - 1].all() and shared > 5


def test_held_out_pairs_are_not_trained_on(base):
    data = preference_data(small(base, pairs=200, levels=(1,)), Tokenizer.from_pretrained(base))
    training, judged = ({one.ids.tobytes() for one in census.conversations} for census in (data.training, data.held_out))
    pairs = {tuple(sorted(p)) for p in zip(*[iter(one.ids.tobytes() for one in data.training.conversations)] * 2, strict=True)}
    others = {tuple(sorted(p)) for p in zip(*[iter(one.ids.tobytes() for one in data.held_out.conversations)] * 2, strict=True)}
    assert training and judged and pairs.isdisjoint(others)


OWN = {"messages": ASKED, "chosen": reply("It is bright."), "rejected": reply("It is lucent.")}


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"chosen": OWN["rejected"]}, "pair: chosen and rejected are the same"),
        ({"chosen": reply("It is lucent.", "a thought")}, "pair: chosen and rejected are the same"),
        ({"rejected": []}, "pair: an answer does not begin with a message of the assistant"),
        ({"rejected": ASKED}, "pair: an answer does not begin with a message of the assistant"),
        ({"rejected": "no"}, 'json: found .*; wanted an object with "messages", "chosen", "rejected", lists'),
        ({"messages": None}, "json"),
        ({"thinking": "yes"}, 'json: "thinking" is'),
        ({"chosen": reply("It <|user|> is")}, "doubled mark"),
        ({"chosen": reply("")}, "cut answer"),
        ({"messages": [*ASKED, *reply("well")]}, "cut answer"),
        ({"chosen": reply("bright " * 200)}, "too long"),
        ({"messages": [{"role": "ghost", "content": "a"}]}, "role"),
    ],
)
def test_pairs_that_must_not_be_learnt_from_are_refused_with_their_place(base, tmp_path, changes, fault):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(OWN) + "\n\n" + json.dumps({**OWN, **changes}) + "\n")
    data = preference_data(small(base, files=(path,), levels=(), held_out_files=(path,)), Tokenizer.from_pretrained(base))
    with pytest.raises(DataRefused, match=rf"own.jsonl, line 3, sample 2: {fault}"):
        data.refuse_faults()
    assert len(data.training.faults) == 1 and len(data.training.conversations) == 24


def test_two_answers_that_do_not_fit_into_one_row_are_refused_together(base):
    reader = PairReader(Tokenizer.from_pretrained(base), 60, False)
    found = reader.read(Sample(ASKED, "here"), (reply("bright " * 18), reply("lucent " * 18)), "own")
    assert isinstance(found, LintError) and "both answers have" in found.reason


def test_files_have_their_share_and_an_empty_one_is_refused(base, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(OWN) + "\n")
    data = preference_data(small(base, files=(path,), file_share=0.25), Tokenizer.from_pretrained(base))
    assert sum(one.source == "own.jsonl" for one in data.training.conversations) == 12
    path.write_text("\n")
    with pytest.raises(ConfigError, match="the files hold no train pairs"):
        preference_data(small(base, files=(path,), levels=(), held_out_files=(path,)), Tokenizer.from_pretrained(base))


def test_reasoning_is_read_by_dpo_and_never_by_a_reward_model(base, tmp_path):
    path = tmp_path / "own.jsonl"
    own = {**OWN, "chosen": reply("It is bright.", "I see"), "rejected": reply("It is lucent.", "I see"), "thinking": True}
    path.write_text(json.dumps(own) + "\n")
    tokenizer = Tokenizer.from_pretrained(base)
    for objective, thinks in (("dpo", True), ("bradley_terry", False)):
        recipe = small(base, files=(path,), levels=(), held_out_files=(path,), objective=objective, pairs=1)
        chosen = preference_data(recipe, tokenizer).training.conversations[0]
        assert ("I see" in tokenizer.decode(chosen.ids.tolist())) == thinks
    marked = [*reply("\n<think>I see</think>\nIt is bright."), {"role": "tool", "content": "</think>"}]
    assert without_reasoning(marked) == [{"role": "assistant", "content": "It is bright."}, marked[1]]


# --------------------------------------------------------------------------------------------------------------- losses

numbers = st.floats(-20, 20)


@LAW
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5), st.floats(0, 1))
def test_the_bradley_terry_loss_is_the_naive_one(rows, weight):
    chosen, rejected = torch.tensor(rows, dtype=torch.float64).unbind(1)
    found = bradley_terry_loss(chosen, rejected, weight)
    wanted = [-math.log(math.exp(c) / (math.exp(c) + math.exp(r))) + weight * (c + r) ** 2 for c, r in rows]
    assert found.loss.item() == pytest.approx(sum(wanted) / len(rows), abs=1e-9)
    assert found.margins.tolist() == pytest.approx([c - r for c, r in rows])


@pytest.mark.parametrize("shapes, weight", [(((0,), (0,)), 0), (((2,), (3,)), 0), (((2, 1), (2, 1)), 0), (((2,), (2,)), -1)])
def test_what_has_no_bradley_terry_loss_is_refused(shapes, weight):
    with pytest.raises(ValueError, match="wanted two of one shape"):
        bradley_terry_loss(*map(torch.zeros, shapes), weight)


def packed_pairs(base, objective="bradley_terry") -> tuple[list, Batch]:
    recipe = small(base, pairs=5, objective=objective)
    census = preference_data(recipe, Tokenizer.from_pretrained(base)).training
    packed = PackedConversations(census.conversations, LENGTH, 1, 0, together=2)
    (batch,) = packed.batches(packed.rows_per_epoch + 1)  # and a row of padding
    return [census.conversations[number] for number in packed.order], batch


def make_learner(base, **changes):
    recipe = small(base, **changes)
    config = GLMConfig.from_pretrained(base)
    return learner_of(recipe)(recipe.as_training(config), config, choose_device(recipe.hardware), None)


def with_random_head(model: RewardModel) -> RewardModel:
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_scores_of_packed_answers_are_those_of_each_alone_at_its_last_token(base):
    model = with_random_head(make_learner(base).model).eval()
    answers, batch = packed_pairs(base)
    with torch.no_grad():
        found = model.scores(batch)
        alone = [model(torch.from_numpy(one.ids)[None]).logits[0, -1, 0] for one in answers]
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert int(ends(batch.document_ids).sum()) == len(answers)
    for tokens in (1, 200, 10**6):
        assert score(model, answers, 0, tokens) == pytest.approx(torch.stack(alone).tolist(), rel=1e-4, abs=1e-5)
    assert score(model, [], 0, 1) == []


def test_the_dpo_loss_of_a_batch_is_the_naive_formula_answer_by_answer(base):
    learner = make_learner(base, objective="dpo", beta=0.3)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    answers, batch = packed_pairs(base, "dpo")

    def log_prob(model, one):
        ids = torch.from_numpy(one.ids)
        log_probs = model(ids[None, :-1]).logits[0].log_softmax(-1)
        return sum(log_probs[t, ids[t + 1]] for t in range(len(ids) - 1) if one.mask[t + 1])

    with torch.no_grad():
        found = learner.loss(batch)
        ratios = [log_prob(learner.model, one) - log_prob(learner.reference, one) for one in answers]
    margins = torch.stack([0.3 * (chosen - rejected) for chosen, rejected in zip(ratios[::2], ratios[1::2], strict=True)])
    assert margins.abs().min() > 1e-3
    torch.testing.assert_close(found.margins, margins, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.preference, -F.logsigmoid(margins).mean(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", ["bradley_terry", "dpo"])
def test_a_step_is_the_same_however_it_is_cut_into_micro_batches(base, objective):
    _, batch = packed_pairs(base, objective)
    found = []
    for cut in (len(batch.input_ids), 1):
        learner = make_learner(base, objective=objective, kind="adamw")
        if objective == "bradley_terry":
            with_random_head(learner.model)
        parts = zip(*(getattr(batch, key).split(cut) for key in ("input_ids", "labels", "document_ids")), strict=True)
        parts = [Batch(*part) for part in parts if (part[2] >= 0).any()]
        found.append((learner.step(parts, 0.1), torch.cat([p.detach().flatten() for p in learner.model.parameters()])))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=2e-3 * 1e-1)


# ---------------------------------------------------------------------------------------------------------- calibration


@LAW
@given(st.lists(st.floats(-8, 8).map(lambda m: round(m, 3)), min_size=1, max_size=30))
def test_accuracy_and_bins_are_those_of_counting(margins):
    found = reliability(margins)
    told = [1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins]
    assert found["accuracy"][0] == pytest.approx(sum(told) / len(told))
    assert found["accuracy"][1] <= found["accuracy"][0] <= found["accuracy"][2]
    assert found["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / len(margins))
    assert sum(count for *_, count in found["bins"]) == found["pairs"] == len(margins)
    assert sum(share * count for _, share, count in found["bins"]) == pytest.approx(sum(told))
    wanted = sum(abs(confidence - share) * count for confidence, share, count in found["bins"]) / len(margins)
    assert found["calibration_error"] == pytest.approx(wanted)
    assert all(0.5 <= confidence <= 1 for confidence, *_ in found["bins"])


def test_who_says_what_is_true_is_calibrated_and_who_boasts_is_not():
    rng = np.random.default_rng(0)
    size = rng.uniform(0, 4, 20_000)
    margins = np.where(rng.random(20_000) < 1 / (1 + np.exp(-size)), size, -size)
    assert reliability(margins)["calibration_error"] < 0.02
    assert reliability(10 * margins)["calibration_error"] > 0.1
    assert reliability([0.0] * 4)["accuracy"][0] == 0.5


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("objective", ["bradley_terry", "dpo"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(base, tmp_path, objective):
    recipe = small(base, objective=objective)
    train_on_preferences(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    run = RunFolder(tmp_path / "cut")
    run.delete(run.newest_checkpoint())
    train_on_preferences(recipe, tmp_path / "cut")
    for found, wanted in zip(*(everything_written(tmp_path / name) for name in ("cut", "whole")), strict=True):
        assert equal(found, wanted)
    assert load_reward_recipe(run.config) == recipe and (tmp_path / "whole" / "overview.png").is_file()


def test_a_reward_model_learns_which_answer_is_better(base, tmp_path):
    """Answers that differ in all marks or nearly all: untrained, half are right; trained for some seconds, nearly all."""
    recipe = small(base, pairs=400, levels=(1, 2), steps=24, learning_rate=5e-3, every=24, tokens=12_000, sequence_length=300)
    outcome = train_on_preferences(recipe, tmp_path / "run")
    first, last = held_out(tmp_path / "run")
    assert first["accuracy"][0] == 0.5 and first["loss"] == pytest.approx(math.log(2))
    assert last["accuracy"][1] > 0.7, last
    # What is read back scores as what was trained, and a language model is none.
    model, tokenizer = load_reward_model(outcome.checkpoint, torch.device("cpu")), Tokenizer.from_pretrained(base)
    _, chosen, rejected, _ = found = pair(random.Random(9), 5)
    reader = PairReader(tokenizer, 300, False)
    scores = score(model, reader.read(Sample(found.messages, "here"), (chosen, rejected), "style"), 0, 1_000)
    assert scores[0] > scores[1] and abs(sum(scores)) < 4
    with pytest.raises(ConfigError, match="no reward model"):
        load_reward_model(base, torch.device("cpu"))
    with pytest.raises(CheckpointError, match="lm_head.weight"):
        load_model(outcome.checkpoint)


def test_dpo_raises_the_chosen_answers_above_the_rejected_and_leaves_a_policy(base, tmp_path):
    recipe = small(base, objective="dpo", beta=0.5, levels=(1,), steps=12, pairs=60, every=12)
    outcome = train_on_preferences(recipe, tmp_path / "run")
    first, last = held_out(tmp_path / "run")
    assert first["loss"] == pytest.approx(math.log(2)) and last["loss"] < first["loss"] - 0.02
    before, after = load_model(base), load_model(outcome.checkpoint)
    assert not torch.equal(before.mtp.eh_proj.weight, after.mtp.eh_proj.weight)


def test_the_command_trains_goes_on_and_checks(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_reward_recipe(small(base, steps=2), tmp_path / "small.toml")
    arguments = ["reward", str(base), "--recipe", "small.toml", "--run-folder", "run"]
    assert main([*arguments, "--lint"]) == 0
    out = capsys.readouterr().out
    assert "style, margin 3" in out and not Path("run").exists()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "accuracy from 0.500 (" in out and "95% intervals" in out and "run/checkpoints/step-2" in out
    before = Path("run/metrics.jsonl").read_bytes()
    assert main(["reward", "--recipe", "run/config.toml"]) == 0
    assert Path("run/metrics.jsonl").read_bytes() == before
    Path("own.jsonl").write_text("[]\n")
    assert main([*arguments, "--lint", "--preferences.files", "own.jsonl"]) == 2
    assert "own.jsonl, line 1, sample 1: json" in capsys.readouterr().err
    assert main(["reward"]) == 2 and "wanted the model to start from" in capsys.readouterr().err


def test_values_that_make_no_recipe_are_refused(base):
    for changes, key in [
        (dict(pairs=0), "pairs"),
        (dict(levels=()), "levels"),
        (dict(levels=(), files=(Path("a"),)), "held_out_files"),
        (dict(file_share=2.0), "file_share"),
        (dict(beta=0.0), "beta"),
        (dict(center_weight=-1.0), "center_weight"),
    ]:
        with pytest.raises(ConfigError, match=f"^{key} = "):
            small(base, **changes)
    assert load_reward_recipe("nano").preferences.levels == (1, 2, 3, 4, 5)


def test_the_score_is_read_where_the_template_says_whose_turn_is_next(base):
    tokenizer = Tokenizer.from_pretrained(base)
    chosen, _ = PairReader(tokenizer, 300, False).read(Sample(ASKED, "here"), (OWN["chosen"], OWN["rejected"]), "own")
    assert chosen.ids[-1] == tokenizer.special_ids["<|user|>"]
    assert chosen.ids.tolist() == render_tokens(tokenizer, [*ASKED, *OWN["chosen"]], end_of_turn=True).ids
