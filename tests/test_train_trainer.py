"""One step, what is recorded of it, and what stops a run."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from small_run import MODEL, WORDS, run_small, small_recipe, write_text

from minglm.config import ConfigError
from minglm.data.shards import prepare
from minglm.data.sources import DataError, documents_from_path
from minglm.data.stream import StreamError, TokenStream, held_out_batches
from minglm.model import GLM
from minglm.tokenizer import train_tokenizer
from minglm.train.device import Device, choose_device
from minglm.train.held_out import HeldOutError, evaluate_held_out
from minglm.train.metrics import read_metrics
from minglm.train.prefetch import Prefetcher
from minglm.train.preparation import VocabularyError
from minglm.train.recipe import Hardware
from minglm.train.run_folder import RunFolder
from minglm.train.trainer import TrainingDiverged

CPU = Device(torch.device("cpu"), bf16=False, why="a test")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def records(folder: Path, kind: str) -> list[dict]:
    return [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == kind]


def test_accumulation_equals_one_big_batch(text, tmp_path):
    """Losses, expert counts and bias the same; the weights but for rounding, since sums come in another order."""
    runs = []
    for micro_batch in (4, 2, 1):
        folder = tmp_path / str(micro_batch)
        recipe = small_recipe(text, steps=3, sequences_per_micro_batch=micro_batch, every=100, warmup_steps=0)
        run_small(recipe, folder)
        runs.append(records(folder, "step"))
    whole, *split = runs
    for run in split:
        for step, wanted in zip(run, whole, strict=True):
            assert (step["sequences"], step["tokens"]) == (wanted["sequences"], wanted["tokens"])
            for key in ("loss", "lm_loss", "mtp_loss", "balance_loss", "gradient_norm"):
                assert step[key] == pytest.approx(wanted[key], rel=1e-4), key
        assert run[0]["max_violation"] == whole[0]["max_violation"]


@pytest.mark.parametrize("change", [{"gear": "naive"}, {"activation_checkpointing": True}])
def test_how_it_is_computed_does_not_change_what_is_learned(text, tmp_path, change):
    """Not even how many tokens each expert gets: recomputing a layer must not count them twice."""
    for name, hardware in (("plain", {}), ("changed", change)):
        run_small(small_recipe(text, steps=3, every=100, **hardware), tmp_path / name)
    for plain, changed in zip(records(tmp_path / "plain", "step"), records(tmp_path / "changed", "step"), strict=True):
        assert changed["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert changed["max_violation"] == pytest.approx(plain["max_violation"], abs=0.05)


def test_the_batch_warms_up_and_the_learning_rate_follows_its_schedule(text, tmp_path):
    recipe = small_recipe(
        text, steps=8, sequences_per_step=6, first_sequences_per_step=2, batch_warmup_steps=5, warmup_steps=2, every=100
    )
    run_small(recipe, tmp_path)
    steps = records(tmp_path, "step")
    assert [step["sequences"] for step in steps] == [2, 2, 4, 4, 6, 6, 6, 6]
    assert [step["tokens"] for step in steps] == [16 * n for n in (2, 4, 8, 12, 18, 24, 30, 36)]
    rates = [step["learning_rate"] for step in steps]
    assert rates[:2] == [0.005, 0.01] and rates[-1] == pytest.approx(0.001) and rates[1:] == sorted(rates[1:], reverse=True)


def test_a_frozen_bias_stays_zero_and_a_learned_one_moves_by_its_rate(text, tmp_path):
    for rate in (0.0, 0.25):
        run_small(small_recipe(text, steps=1, warmup_steps=0, router_bias_rate=rate), tmp_path / str(rate))
        (router,) = records(tmp_path / str(rate), "router")
        assert {abs(bias) for layer in router["bias"] for bias in layer} - {0} == {rate} - {0}
        assert all(sum(layer) == pytest.approx(1) for layer in router["expert_share"])


def test_every_kind_of_record_comes_when_it_is_due(text, tmp_path):
    run_small(small_recipe(text, steps=7), tmp_path)  # every 6 steps held-out, every 8 a sample
    found = [(record["step"], record["kind"]) for record in read_metrics(tmp_path / "metrics.jsonl")]
    steps = [(step, "step") for step in range(1, 8)]
    due = [(0, "held_out"), (6, "held_out"), (6, "router"), (7, "held_out"), (7, "router"), (7, "sample")]
    assert sorted(found) == sorted(steps + due)
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_training_learns(text, tmp_path):
    run_small(small_recipe(text, learning_rate=2e-2), tmp_path)
    bits = [record["bits_per_byte"] for record in records(tmp_path, "held_out")]
    assert bits == sorted(bits, reverse=True) and bits[-1] < 0.75 * bits[0]


@pytest.mark.parametrize("part", ["lm", "mtp", "balance"])
def test_a_loss_that_is_not_finite_stops_the_run_naming_step_part_and_checkpoint(text, tmp_path, monkeypatch, part):
    loss, calls = GLM.loss, 0

    def broken_loss(model, *arguments, **options):
        nonlocal calls
        found = loss(model, *arguments, **options)
        if model.training:
            calls += 1
            if calls == 9:  # two micro-batches a step: in step 5
                bad = getattr(found, part) * math.nan
                found = found._replace(total=found.total + bad, **{part: bad})
        return found

    monkeypatch.setattr(GLM, "loss", broken_loss)
    with pytest.raises(TrainingDiverged, match=rf"step 5: {part} loss, gradient norm not finite .* is {tmp_path}.*step-4\."):
        run_small(small_recipe(text), tmp_path)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["step-2", "step-4"]
    assert max(record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_a_weight_that_is_not_finite_is_never_saved(text, tmp_path, monkeypatch):
    """Losses and gradients are of the weights before the step: they cannot tell."""
    update, calls = GLM.update_router_bias, 0

    def break_a_weight(model, rate):
        nonlocal calls
        calls += 1
        if calls == 4:
            model.model.norm.weight.data[3] = math.inf
        return update(model, rate)

    monkeypatch.setattr(GLM, "update_router_bias", break_a_weight)
    with pytest.raises(TrainingDiverged, match=r"step 4: 1 weight tensors not finite, model.norm.weight .*step-2\."):
        run_small(small_recipe(text), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(text, tmp_path):
    train_tokenizer([" ".join(WORDS)] * 3, vocab_size=310).save_pretrained(tmp_path / "words")
    with pytest.raises(VocabularyError, match=r"model.vocab_size = 300: the tokenizer has 310 ids.*--model.vocab-size 310"):
        run_small(small_recipe(text, tokenizer=str(tmp_path / "words")), tmp_path / "run")


def test_a_model_may_have_more_rows_than_the_tokenizer_has_ids(text, tmp_path):
    outcome = run_small(small_recipe(text, tokenizer="characters", steps=2, temperature=9.0), tmp_path)
    assert outcome.step == 2
    assert GLM.from_pretrained(outcome.checkpoint).config.vocab_size == 300


def test_a_tokenizer_that_is_not_there_is_named(text, tmp_path):
    with pytest.raises(ConfigError, match="tokenizer: .*nowhere: no such file"):
        run_small(small_recipe(text, tokenizer=str(tmp_path / "nowhere")), tmp_path / "run")


def test_a_prompt_without_ids_is_named(text, tmp_path):
    with pytest.raises(ConfigError, match="samples.prompts: 'Ü': .*not in this vocabulary"):
        run_small(small_recipe(text, tokenizer="characters", prompts=("Ü",)), tmp_path)


@pytest.mark.parametrize(
    "content, error, complaint",
    [
        (b"", DataError, "text.txt: the file is empty"),
        (b"abc \xff", DataError, "text.txt: not UTF-8"),
        (b"one short line", StreamError, "fewer than one sequence of 16"),
    ],
)
def test_too_little_or_unreadable_data_is_refused(tmp_path, content, error, complaint):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(error, match=complaint):
        run_small(small_recipe(path), tmp_path / "run")
    assert RunFolder(tmp_path / "run").checkpoints() == []


def test_data_of_another_tokenizer_in_a_shared_folder_is_refused(text, tmp_path):
    shared = tmp_path / "shared"
    run_small(small_recipe(text, steps=2, folder=shared), tmp_path / "first")
    run_small(small_recipe(text, steps=2, folder=shared, seed=2), tmp_path / "second")
    assert not (tmp_path / "second" / "data").exists()
    with pytest.raises(ConfigError, match="shared/tokenizer/trained_from.json: this tokenizer was made from"):
        run_small(small_recipe(text, steps=2, folder=shared, tokenizer="characters"), tmp_path / "third")


# ---------------------------------------------------------------------------------------------------- held-out loss


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory):
    tokenizer = train_tokenizer([document.text for document in documents_from_path(text)], vocab_size=300)
    return tokenizer, prepare(documents_from_path(text), tokenizer, tmp_path_factory.mktemp("tokens") / "data", progress=False)


def test_bits_per_byte_are_the_surprise_of_the_text_over_its_bytes(prepared):
    """Against a loop over single tokens, each document by itself, special tokens left out of nats and of bytes."""
    tokenizer, dataset = prepared
    torch.manual_seed(0)
    model = GLM(dataclasses.replace(MODEL, initializer_range=0.2))
    batches = list(held_out_batches(dataset, sequence_length=24, batch_size=3))
    found = evaluate_held_out(model, batches, torch.from_numpy(tokenizer.token_byte_lengths()), CPU)
    nats = num_bytes = tokens = 0
    for batch in batches:
        for ids, labels, documents in zip(batch.input_ids, batch.labels, batch.document_ids, strict=True):
            for t, label in enumerate(labels.tolist()):
                if label == -100 or label in tokenizer.special_ids.values():
                    continue
                context = ids[: t + 1][documents[: t + 1] == documents[t]]
                with torch.no_grad():
                    nats -= model(context[None]).logits[0, -1].log_softmax(-1)[label].item()
                num_bytes += len(tokenizer.decode_bytes([label]))
                tokens += 1
    assert found.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_evaluation_leaves_mode_and_expert_counts_alone(prepared):
    tokenizer, dataset = prepared
    model = GLM(MODEL).train()
    model.expert_load += 3
    lengths = torch.from_numpy(tokenizer.token_byte_lengths())
    first, again = (evaluate_held_out(model, held_out_batches(dataset, 16, size), lengths, CPU) for size in (2, 5))
    assert model.training and (model.expert_load == 3).all()
    assert first.bits_per_byte == pytest.approx(again.bits_per_byte, rel=1e-5)  # whatever the batch size


def test_held_out_text_without_text_is_refused(prepared):
    tokenizer, dataset = prepared
    with pytest.raises(HeldOutError, match="no text to predict"):
        evaluate_held_out(GLM(MODEL), held_out_batches(dataset, 16, 2), torch.zeros(300, dtype=torch.int32), CPU)


# ------------------------------------------------------------------------------------------- prefetch, device, metrics


def test_prefetched_batches_are_the_streams_and_the_state_is_of_the_last_one_dealt(prepared):
    _, dataset = prepared
    prefetcher = Prefetcher(TokenStream(dataset, "train", 16, seed=3), 2, torch.device("cpu"))
    stream = TokenStream(dataset, "train", 16, seed=3)
    assert prefetcher.state_dict() == stream.state_dict()
    for _ in range(5):
        found, wanted = prefetcher.next(), stream.next(2)
        assert torch.equal(found.input_ids, wanted.input_ids) and torch.equal(found.labels, wanted.labels)
        assert prefetcher.state_dict() == stream.state_dict()
    prefetcher.close()


def test_an_exception_in_the_prefetching_thread_surfaces(prepared, monkeypatch):
    _, dataset = prepared
    stream = TokenStream(dataset, "train", 16, seed=3)
    good = stream.next(2)
    answers = iter([good])

    def read(_sequences, _rank, _ranks):
        for answer in answers:
            return answer
        raise OSError("the disk is gone")

    monkeypatch.setattr(stream, "next", read)
    prefetcher = Prefetcher(stream, 2, torch.device("cpu"))
    assert prefetcher.next().input_ids is not None
    with pytest.raises(OSError, match="the disk is gone"):
        prefetcher.next()
    prefetcher.close()


@pytest.mark.parametrize(
    "hardware, complaint",
    [
        (Hardware(device="tpu9"), "hardware.device = 'tpu9': wanted"),
        (Hardware(device="cuda:99"), "hardware.device = 'cuda:99' is not on this machine"),
        (Hardware(device="cpu", precision="bf16"), "hardware.precision = 'bf16': wanted 'fp32' or 'auto' on a CPU"),
    ],
)
def test_hardware_that_is_not_there_is_refused(hardware, complaint):
    with pytest.raises(ConfigError, match=complaint):
        choose_device(hardware)


def test_a_cpu_computes_in_fp32_and_says_why():
    device = choose_device(Hardware(device="cpu"))
    assert not device.bf16 and str(device) == "cpu, fp32 (as the recipe says; a CPU computes in fp32)"


def test_metrics_are_strict_json(text, tmp_path):
    run_small(small_recipe(text, steps=2), tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.slow
def test_compiled_layers_learn_the_same(text, tmp_path):
    """A minute on a CPU, nearly all of it the compiler's."""
    for name, hardware in (("plain", {}), ("compiled", {"compile": True})):
        run_small(small_recipe(text, steps=2, every=100, **hardware), tmp_path / name)
    for plain, compiled in zip(records(tmp_path / "plain", "step"), records(tmp_path / "compiled", "step"), strict=True):
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert compiled["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-3)
