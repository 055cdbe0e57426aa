"""`eval` on the stages of a real run and on folders of models: one table, from the checkpoints as they are."""

import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from memorised import fresh, tokenizer_of
from small_run import MODEL, run_small, small_recipe

from minglm.__main__ import main
from minglm.config import ConfigError, GLMConfig
from minglm.data.shards import open_dataset
from minglm.evals import suite
from minglm.evals.command import find_columns
from minglm.evals.interval import Estimate, share
from minglm.evals.measure import EvaluationError, Measure, Results, direction, scored, summed, table
from minglm.evals.suite import PARTS, evaluate, needle_lengths_of, parts_of
from minglm.model import GLM
from minglm.tokenizer import Tokenizer
from minglm.train.run_folder import RunFolder
from minglm.train.stages import Stage

STAGES = (
    Stage("general", tokens=6 * 64, mixture={"prose": 3.0, "code": 1.0}),
    Stage("long", tokens=4 * 64, mixture={"prose": 1.0, "code": 1.0}, sequence_length=32, rope_theta=1e6),
)
QUICK = ["--suite", "bits,completion,fim,needle,likelihood", "--limit", "4", "--families", "arithmetic", "--window", "64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two stages on text of two domains."""
    folder = tmp_path_factory.mktemp("staged")
    (folder / "text").mkdir()
    draw = random.Random(0)
    for number in range(40):
        words = draw.choices("the model token expert router learns routes reads small large".split(), k=80)
        (folder / "text" / f"{number}.md").write_text(" ".join(words) + f" {number}.\n")
        (folder / "text" / f"{number}.py").write_text("".join(f"def {w}_{number}(x):\n    return {w}(x)\n" for w in words[:8]))
    model = replace(MODEL, max_position_embeddings=512)
    run_small(small_recipe(folder / "text", model=model, stages=STAGES, every=4, keep=1), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def judged(run) -> Path:
    assert main(["eval", str(run), *QUICK]) == 0
    return run / "eval-bits+completion+fim+needle+likelihood"


def test_every_stage_is_a_column_and_every_number_has_its_interval(judged):
    header, _, *rows = (judged / "table.md").read_text().splitlines()
    assert header == "| part | of | measure | chance | general | long |"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert {row[0] for row in cells} == {"bits", "completion", "fim", "needle", "families"}
    assert {row[1] for row in cells if row[0] == "bits"} == {"prose", "code"}
    for row in cells:
        assert len(row) == 6
        for cell in row[4:]:
            assert "[" in cell and "?" not in cell, row
    for name in ("needle-chosen.png", "needle-exact.png"):
        assert (judged / name).read_bytes().startswith(b"\x89PNG")


def test_the_results_are_those_of_the_stages_checkpoints(run, judged):
    for stage, folder in RunFolder(run).stage_checkpoints().items():
        tokenizer = Tokenizer.from_pretrained(folder)
        dataset = open_dataset(run / "data" / "tokens", tokenizer)
        model = GLM.from_pretrained(folder).eval()
        again = evaluate(model, tokenizer, dataset, QUICK[1], 4, label=stage, window=64, families_asked=["arithmetic"])
        found = Results.load(judged / f"{stage}.json")
        assert found.measures == again.measures
        assert found.details["needle"] == again.details["needle"]


def test_the_rope_base_is_the_checkpoints(run, tmp_path):
    folder = RunFolder(run).stage_checkpoints()["long"]
    config = GLMConfig.from_pretrained(folder)
    assert config.rope_theta == 1e6
    copy = shutil.copytree(folder, tmp_path / "other")
    replace(config, rope_theta=1e2).save_pretrained(copy)
    tokenizer = Tokenizer.from_pretrained(folder)
    dataset = open_dataset(run / "data" / "tokens", tokenizer)
    found, changed = (evaluate(GLM.from_pretrained(f).eval(), tokenizer, dataset, "bits", 4) for f in (folder, copy))
    assert found.measures != changed.measures


def test_documents_of_many_pieces_are_read_with_the_longest_view_too(run, monkeypatch):
    monkeypatch.setattr(suite, "LONG_DOMAINS", ("code",))
    folder = RunFolder(run).stage_checkpoints()["long"]
    tokenizer, model = Tokenizer.from_pretrained(folder), GLM.from_pretrained(folder).eval()
    dataset, longest = open_dataset(run / "data" / "tokens", tokenizer), model.config.max_position_embeddings
    found = [(m.name, m.quantity) for m in evaluate(model, tokenizer, dataset, "bits", 4, window=32).measures]
    views = {"prose": (32,), "code": (32, longest)}
    assert sorted(found) == sorted((name, f"bits per byte, windows of {view}") for name in views for view in views[name])


def test_what_was_judged_is_read_again_unless_something_changed(run, tmp_path, capsys):
    command = ["eval", str(run), "--suite", "bits", "--limit", "2", "--out", str(tmp_path)]
    results = tmp_path / "general.json"

    def is_judged(*options: str) -> bool:
        before = results.stat().st_mtime_ns if results.exists() else 0
        assert main([*command, *options]) == 0
        assert ("general: judged before" in capsys.readouterr().out) == (results.stat().st_mtime_ns == before)
        return results.stat().st_mtime_ns != before

    assert is_judged() and not is_judged()
    assert is_judged("--seed", "1") and is_judged() and is_judged("--again")


def test_a_models_folder_alone_is_judged_with_and_without_own_text(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "\n".join(f"Line {number} of a text about {number * 7} small things." for number in range(60))
    tokenizer = tokenizer_of((text,))
    fresh(tokenizer).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    (tmp_path / "text.txt").write_text(text)
    arguments = ["eval", "mine", "--suite", "bits,chat", "--limit", "2", "--families", "arithmetic"]
    assert main(arguments) == 0
    assert "--data names a prepared folder or own text" in capsys.readouterr().out
    found = Results.load("runs/eval-bits+chat-mine/mine.json")
    assert [m.quantity for m in found.measures] == ["reward, chat, at once", "reward, chat, thinking"]
    assert main([*arguments, "--data", "text.txt"]) == 0
    assert Results.load("runs/eval-bits+chat-mine/mine.json").find("bits", "prose").estimate.value > 1
    assert not list(Path("mine").glob("eval*"))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["."], "found no checkpoint in ."),
        ([], "RUN_OR_CHECKPOINT|wanted a run folder"),
        (["mine", "--suite", "bitz"], "suite = 'bitz': wanted base, chat, all, or some of bits"),
        (["mine", "--limit", "0"], "wanted 1 or more"),
        (["mine", "--window", "9999"], "a window of 32 to 512 tokens"),
        (["mine", "--families", "arithmetik"], "wanted some of arithmetic"),
        (["mine", "--data", "other/tokens"], "of another tokenizer|fingerprint"),
        (["sharded"], "found no .*safetensors in sharded; .* scale.export"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_a_sentence(arguments, complaint, tmp_path, run, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tokenizer_of(("some text to learn from",))
    fresh(tokenizer).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    shutil.copytree(run / "data", tmp_path / "other")
    shutil.copytree(tmp_path / "mine", tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    try:
        code = main(["eval", *arguments])
    except SystemExit as stopped:  # the command line itself
        code = stopped.code
    assert code == 2
    assert re.search(complaint, capsys.readouterr().err)


# ---- tables


def test_models_of_equal_names_are_told_apart_by_the_folders_above(run, tmp_path):
    for variant in ("token", "sequence"):
        (tmp_path / variant).mkdir()
        (tmp_path / variant / "seed-1").symlink_to(run)  # resolved: one run
    copies = [Path(shutil.copytree(run, tmp_path / "copies" / variant / "seed-1")) for variant in ("token", "sequence")]
    labels = list(find_columns(copies))
    assert all(label.startswith(("token/seed-1: ", "sequence/seed-1: ")) for label in labels) and len(set(labels)) == len(
        labels
    )
    steps = RunFolder(copies[0]).checkpoints()[-2:]
    assert list(find_columns(steps)) == [f"seed-1: {step.name}" for step in steps]
    assert list(find_columns([steps[0], RunFolder(copies[1]).newest_checkpoint()]))[0] == f"token/seed-1: {steps[0].name}"
    with pytest.raises(ConfigError, match="twice; wanted different models"):
        find_columns([tmp_path / "token" / "seed-1", tmp_path / "sequence" / "seed-1"])


def test_a_table_has_all_rows_of_all_columns_and_bold_where_better_than_chance():
    better = scored("needle", "128 tokens", "chosen of 4", [1.0] * 20, 0.25)
    same = scored("needle", "128 tokens", "chosen of 4", [1.0, 0, 0, 0] * 5, 0.25, left_out=3)
    bits = Measure("bits", "code", "bits per byte", Estimate(1.5, 1.4, 1.6, 9), lower_is_better=True)
    rows = table({"a": Results("a", "base", 4, 0, [bits, better]), "b": Results("b", "base", 4, 0, [same])}).splitlines()
    assert rows[0].split("|")[5:7] == [" a ", " b "]
    assert rows[2].endswith("| bits per byte ↓ |  | 1.500 [1.400, 1.600] | – |")
    assert "**1.000 [" in rows[3] and "| 0.250 [" in rows[3] and "(3 left out)" in rows[3]
    assert rows[3].count("**") == 2


def test_marks_say_what_is_surely_better_or_worse_than_the_column_before():
    def column(scores: list[float], nats: list[float]) -> Results:
        measures = [scored("a", "b", "score", scores), summed("a", "b", "nats", nats, [2.0] * len(nats))]
        return Results("m", "base", 4, 0, measures)

    low, high = [0.0] * 9 + [1.0], [1.0] * 9 + [0.0]
    small, large = [1.0 + 0.1 * number for number in range(10)], [1.2 + 0.1 * number for number in range(10)]
    rows = table({"1": column(low, small), "2": column(high, large), "3": column(high, small)}).splitlines()[2:]
    assert ["".join(mark for mark in "▲▼" if mark in cell) for cell in rows[0].split("|")[5:8]] == ["", "▲", ""]
    assert ["".join(mark for mark in "▲▼" if mark in cell) for cell in rows[1].split("|")[5:8]] == ["", "▼", "▲"]
    few = scored("a", "b", "c", [0.0] * 7), scored("a", "b", "c", [1.0] * 7)
    assert direction(*few) == 0
    assert direction(scored("a", "b", "c", [0.0] * 9), scored("a", "b", "c", [1.0] * 9, left_out=1)) == 0
    # Each was left out of another problem: what stands in the same place is not the same problem.
    first, last = [None, *[0.0] * 9], [*[1.0] * 9, None]
    assert direction(scored("a", "b", "c", first), scored("a", "b", "c", last)) == 0
    assert direction(scored("a", "b", "c", first), scored("a", "b", "c", last[::-1])) == 1


def test_results_are_read_back_equal(tmp_path):
    found = Results("m", "base", 4, 1, [scored("a", "b", "c", [0.5, 1.0], 0.25)], {"needle": {"chosen": [[0.5]]}})
    found.save(tmp_path / "m.json")
    assert Results.load(tmp_path / "m.json") == found
    assert found.find("a", "b").estimate == share([0.5, 1.0])
    with pytest.raises(EvaluationError, match="there are \\['a/b: c'\\]"):
        found.find("a", "x")
    (tmp_path / "m.json").write_text("[]")
    with pytest.raises(EvaluationError, match="delete the file"):
        Results.load(tmp_path / "m.json")


def test_suites_and_lengths():
    assert parts_of("base") == tuple(part for part in PARTS if part != "chat") and parts_of("bits,fim") == ("bits", "fim")
    assert needle_lengths_of(2048) == needle_lengths_of(8192) == (128, 256, 512, 1024, 2048, 4096)
    assert needle_lengths_of(300) == (128, 256, 512)
