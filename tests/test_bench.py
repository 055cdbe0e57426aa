"""The benchmark compares equals: the same weights, tokens and loss for all, every second of a step accounted for."""

import dataclasses

import pytest
import torch

from minglm import bench, bench_data, bench_decoding, shakespeare
from minglm.config import ConfigError


@pytest.fixture(scope="module")
def result() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bench.WORKLOADS, "nano", bench.Workload("nano", sequences=1, length=32, repeats=1))
        return bench.run("nano", device="cpu", memory=False)  # raises if the contestants' losses differ


def test_every_contestant_has_a_speed_and_the_shares_add_up(result):
    assert result["tokens_per_second"].keys() == bench.CONTESTANTS.keys()
    assert min(result["tokens_per_second"].values()) > 0 and result["peak_flops"] > 1e9
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert all(share > 0.001 for part, share in result["shares"].items() if part != "everything else")


def test_the_report_divides_by_the_fastest_of_transformers(result):
    speeds = {name: 100.0 for name in result["tokens_per_second"]}
    speeds |= {"transformers eager, AdamW": 50.0, "transformers grouped_mm, AdamW": 80.0}
    lines = bench.report({**result, "tokens_per_second": speeds}).splitlines()
    assert "1.25" in next(line for line in lines if line.startswith("minglm, Muon"))


def test_contestants_that_compute_something_else_are_not_timed(monkeypatch):
    monkeypatch.setitem(bench.WORKLOADS, "nano", bench.Workload("nano", sequences=1, length=8, repeats=1))
    build = bench.build_step
    monkeypatch.setattr(
        bench, "build_step", lambda name, *rest: (lambda: torch.tensor(1.0)) if "eager" in name else build(name, *rest)
    )
    with pytest.raises(RuntimeError, match="same loss"):
        bench.run("nano", device="cpu", memory=False)


def test_a_race_ends_with_both_losses_on_the_same_text(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("ROMEO: To be, or not to be: that is the question.\n" * 400)
    recipe = shakespeare.load_recipe("shakespeare")
    training = dataclasses.replace(recipe.training, steps=2, sequence_length=64)
    short = dataclasses.replace(recipe, training=training, schedule=dataclasses.replace(recipe.schedule, warmup_steps=1))
    monkeypatch.setattr(shakespeare, "load_recipe", lambda name: short)
    monkeypatch.setattr(shakespeare, "GPT2_STEPS", 3)
    monkeypatch.setattr(shakespeare, "GPT2_WARMUP", 1)
    result = shakespeare.race(text, tmp_path / "race")
    assert 0 < result["gpt2"]["held_out_loss"] < 6 and 0 < result["minglm"]["held_out_loss_context_64"] < 6
    assert result["minglm"]["activated_parameters"] <= 809_856  # GPT-2's with tiny shakespeare's 65 characters
    assert f"{result['gpt2']['parameters']:,}" in shakespeare.report(result)
    with pytest.raises(ConfigError, match="new folder"):
        shakespeare.race(text, tmp_path / "race")


def test_the_memory_of_a_step_is_measured_in_a_process_of_its_own():
    workload = bench.Workload("nano", sequences=1, length=32, repeats=1)
    weights_gradients_and_moments = 4 * 4 * 2_429_056
    assert weights_gradients_and_moments < bench.peak_memory("minglm, AdamW", workload) < 10 * weights_gradients_and_moments


def test_data_is_prepared_and_dealt_at_a_speed_that_is_a_share_of_a_step():
    workload = bench.Workload("nano", sequences=4, length=64, repeats=1)
    data, other = (bench_data.run(workload, seconds, repeats=1, text_bytes=200_000) for seconds in (10.0, 1e-6))
    assert 200_000 <= data["preparation_bytes"] < 500_000 and data["preparation_bytes_per_second"] > 1e4
    assert 0 < data["dealing_seconds"] < 1 and data["dealing_share"] == pytest.approx(data["dealing_seconds"] / 10)
    assert other["dealing_share"] > 1
    preparation, dealing = bench_data.report(data | {"dealing_seconds": 0.0125, "dealing_share": 0.04}).splitlines()
    assert preparation.startswith("data preparation: ") and f"{data['preparation_threads']} threads" in preparation
    assert "12.50 ms a batch of 4 x 64 tokens" in dealing and "4.0% of a training step (wanted below 3%)" in dealing


@pytest.fixture(scope="module")
def decoding() -> dict:
    few = {"unequal": bench_decoding.Requests((3, 9, 5), (4, 1, 2))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_decoding, "HOPELESS", 1000)  # so that all of them run
        patch.setattr(bench_decoding.exact, "report", lambda model: "gaps and costs")
        return bench_decoding.run("nano", repeats=1, workloads=few)  # raises where the first tokens differ


def test_everybody_writes_the_same_and_has_a_speed(decoding):
    entries = decoding["decoding"]["unequal"]
    assert len(entries) == 2 + len(bench_decoding.EXPERTS) * len(bench_decoding.CACHES)
    assert min(entry["tokens_per_second"] for entry in entries.values()) > 0
    assert min(entry["seconds_to_first_token"] for entry in entries.values()) > 0


def test_the_decoding_report_divides_by_the_fastest_of_transformers(decoding):
    entries = decoding["decoding"]["unequal"]
    for who, entry in entries.items():
        entry["tokens_per_second"] = 300.0 if who == "minglm" else 50.0
    entries["transformers eager, static cache"]["tokens_per_second"] = 120.0
    line = next(line for line in bench_decoding.report(decoding).splitlines() if line.strip().startswith("minglm"))
    assert " 2.50 " in line


def test_the_report_says_why_transformers_does_not_draft(decoding):
    """It knows an MTP layer by the published models' layer numbers, 46 and 92."""
    lines = bench_decoding.report(decoding).splitlines()
    assert any("use_mtp" in line and "weights are missing" in line for line in lines)
    assert lines[-1] == "gaps and costs"


def test_writers_that_disagree_are_not_timed(monkeypatch):
    monkeypatch.setattr(bench_decoding, "_generate", lambda *_, **__: lambda prompts, lengths: [-1] * len(prompts))
    with pytest.raises(RuntimeError, match="something else"):
        bench_decoding.run("nano", repeats=1, workloads={"one": bench_decoding.Requests((4,), (2,))})
