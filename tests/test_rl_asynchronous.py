"""The asynchronous mode for real: weights that are compared, rollouts over a change of weights, processes that are killed."""

import json
import os
import random
import re
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load, save
from small_run import in_child
from test_rl_loop import CONTEXT, recipe_of
from test_rl_rewards import reward_model
from test_rl_rollout import TOKENIZER, Echo, policy

from minglm import ops
from minglm.checkpoint import load_model, save_model
from minglm.config import ConfigError
from minglm.engine.engine import Engine
from minglm.rl.asynchronous import bench, staleness
from minglm.rl.asynchronous.buffer import Buffer
from minglm.rl.asynchronous.exchange import Exchange, Journal, replay
from minglm.rl.asynchronous.messages import Delivery, Experts, Order, Poll, Result, Span
from minglm.rl.asynchronous.server import Server
from minglm.rl.asynchronous.timeline import read_spans, write_spans
from minglm.rl.asynchronous.weights import WeightsError, checksums, take_weights, write_weights
from minglm.rl.asynchronous.worker import Connection, Worker, WorkerError, work
from minglm.rl.environment import Failure
from minglm.rl.learner import PolicyLearner
from minglm.rl.loop import rl
from minglm.rl.objective import named
from minglm.rl.practice import RLError
from minglm.rl.recipe import Asynchronous, Rewards, Sampling, Tasks, save_rl_recipe
from minglm.rl.rewards import combined
from minglm.rl.rollout import Asked, Attempt, Limits, Rollouts, Trajectory
from minglm.rl.rows import Rows
from minglm.tasks import FAMILIES
from minglm.tasks.task import Verdict
from minglm.train.metrics import WALL_CLOCK, read_metrics

AT_WILL = {"thinking": None, "opens_thinking": False}  # the policy chooses


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    save_model(policy(), folder)
    TOKENIZER.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------- weights


def sent(model, tmp_path, version=3) -> bytes:
    write_weights(model, version, tmp_path / "weights.safetensors")
    return (tmp_path / "weights.safetensors").read_bytes()


def test_weights_arrive_whole_with_router_bias_and_mtp(tmp_path):
    source, engine = policy(1), Engine(policy(2), TOKENIZER)
    for router in source.routers():
        router.e_score_correction_bias.uniform_(-1, 1)
    names = checksums(source).keys()
    assert any("e_score_correction_bias" in name for name in names) and any(name.startswith("mtp.") for name in names)
    assert take_weights(engine, sent(source, tmp_path)) == 3 == engine.weights_version
    assert checksums(engine.model) == checksums(source)


@pytest.mark.parametrize("part", ["e_score_correction_bias", "mtp.eh_proj", "lm_head"])
def test_a_changed_tensor_is_named_before_anything_is_sampled(tmp_path, part):
    data = sent(policy(1), tmp_path)
    size = 8 + int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8:size])["__metadata__"]
    tensors = load(data)
    name = next(name for name in tensors if part in name)
    tensors[name].view(torch.int32).flatten()[-1] ^= 1  # one bit
    with pytest.raises(WeightsError, match=f"1 of {len(tensors)} tensors differ from the trainer's: {name}"):
        take_weights(Engine(policy(2), TOKENIZER), save(tensors, metadata))


def test_a_bias_in_bf16_a_missing_layer_and_other_bytes_are_refused(tmp_path):
    model = policy(1)
    for router in model.routers():
        router.e_score_correction_bias.uniform_(-1, 1)
    data = sent(model, tmp_path)
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    rounded = {k: v.bfloat16() if "e_score_correction_bias" in k else v for k, v in load(data).items()}
    without_mtp = {k: v for k, v in load(data).items() if not k.startswith("mtp.")}
    for broken, message in (
        (save(rounded, metadata), "e_score_correction_bias"),
        (save(without_mtp, metadata), "weights are missing"),
        (data[:-10], "version 3"),
        (b"<html>", "found no version"),
    ):
        with pytest.raises(WeightsError, match=message):
            take_weights(Engine(policy(2), TOKENIZER), broken)


def test_a_turn_goes_on_over_a_change_of_weights_and_each_token_has_its_own_versions_log_probability(tmp_path):
    first, second = policy(1), policy(2)
    engine = Engine(policy(0), TOKENIZER, gear="exact")
    take_weights(engine, sent(first, tmp_path, 4))
    attempt = Attempt(Rollouts(engine, TOKENIZER, Limits(tokens=12)), Asked(Echo(1, False), 5))
    attempt.ask()
    while engine.has_work:
        for output in engine.step():
            attempt.take(output)
        if attempt.trajectory.length == 5:
            take_weights(engine, sent(second, tmp_path, 5))
    trajectory = attempt.trajectory
    versions = [version for version in trajectory.versions if version >= 0]
    assert versions == [4] * 5 + [5] * (len(versions) - 5) and len(versions) > 5
    rows = Rows.of([trajectory], torch.device("cpu"))
    for model, version in ((first, 4), (second, 5)):
        with ops.using("exact"), torch.no_grad():
            hidden = model.hidden_and_side_losses(rows.input_ids, rows.labels, rows.document_ids)[0]
            own = rows.versions == version
            assert torch.equal(ops.token_log_probs(hidden[own], model.lm_head.weight, rows.labels[own]), rows.log_probs[own])


# -------------------------------------------------------------------------------------------------------------- the wire


def test_the_server_wants_its_token_and_well_formed_messages(tmp_path):
    order = Order(family="arithmetic", level=1, draw=1, seed=1, tokens=4, temperature=1.0, **AT_WILL).model_dump()
    exchange = Exchange(Buffer(2, 1, 1, 0), [].extend, lambda version, number: order, time.monotonic, 10.0)
    result = Result(
        ids=[1, 2],
        sampled=[False, True],
        log_probs=[0, -1.5],
        versions=[-1, 0],
        response=[],
        reward=1.0,
        reasons=[],
        end="done",
        failure=None,
        temperature=1.0,
        experts=None,
        parts={},
    )
    server = Server(
        exchange, lambda version: tmp_path / f"{version}", lambda spans: None, "127.0.0.1", tmp_path / "server.json"
    )
    with server:
        assert (tmp_path / "server.json").stat().st_mode & 0o077 == 0
        connection = Connection(tmp_path, None)
        answer = connection.post("/poll", Poll(worker="w", version=0, room=1, held=[], spans=[]))
        assert answer["leases"] == [[0, 0, 0, 0, order]] and not answer["stop"]
        assert connection.weights(7) is None
        delivery = Delivery(worker="w", lease=0, version=0, result=result)
        assert connection.post("/deliver", delivery) == connection.post("/deliver", delivery) == {"accepted": True}
        assert connection.post("/deliver", delivery.model_copy(update={"lease": 9})) == {"accepted": False}
        with pytest.raises(WorkerError, match="Field required"):
            connection.post("/poll", Order(**order))
        wrong = connection.client.post("/poll", headers={"Authorization": "Bearer guess"}, content="{}")
        assert wrong.status_code == 401
        url = connection.client.base_url
        with socket.create_connection((url.host, url.port)) as dying:
            head = f"POST /deliver HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {server.token}\r\nContent-Length: 99\r\n\r\n"
            dying.sendall(f"{head}{{".encode())
        time.sleep(0.2)  # for the server to hear of it
        assert connection.weights(7) is None and server.failure is None
    assert not (tmp_path / "server.json").exists()


def test_a_journal_that_cannot_be_written_ends_the_run(base, tmp_path, monkeypatch):
    def full(journal, calls):
        raise OSError("no space left")

    monkeypatch.setattr(Journal, "write", full)
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(rl, asynchronous(base), tmp_path / "run")
        while not (tmp_path / "run" / "server.json").exists() and not run.done():
            time.sleep(0.05)
        address = json.loads((tmp_path / "run" / "server.json").read_text())
        ask = Poll(worker="w", version=0, room=1, held=[], spans=[]).model_dump_json()
        headers = {"Authorization": f"Bearer {address['token']}"}
        answer = httpx.post(f"{address['url']}/poll", headers=headers, content=ask, trust_env=False)
        assert answer.status_code == 500
        with pytest.raises(RLError, match="no space left"):
            run.result(600)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 3), st.integers(1, 4))
def test_an_attempt_arrives_as_it_was(seed, length, layers, k):
    rng = random.Random(seed)
    chosen = [rng.random() < 0.5 for _ in range(length)]
    failed, recorded = rng.random() < 0.5, rng.random() < 0.5
    one = Trajectory(
        Echo(1, False),
        [rng.randrange(100) for _ in chosen],
        chosen,
        [-rng.random() if own else 0.0 for own in chosen],
        [rng.randrange(9) if own else -1 for own in chosen],
        [{"role": "assistant", "content": "é", "tool_calls": []}],
        None if failed else Verdict(rng.random(), ("so", "so")),
        "failed" if failed else "done",
        Failure("time-out", "no answer") if failed else None,
        0.5 + rng.random(),
        torch.randint(-1, 2**15, (length - 1, layers, k), dtype=torch.int16) if recorded else None,
        {"verifier": rng.random()},
    )
    for found in (
        Result.model_validate_json(Result.of(one).model_dump_json()),  # to the trainer
        Result(**json.loads(json.dumps(Result.of(one).model_dump()))),  # from the journal
    ):
        again = found.trajectory(one.problem)
        assert replace(again, experts=None) == replace(one, experts=None)
        assert torch.equal(again.experts, one.experts) if recorded else again.experts is None


def test_experts_of_another_shape_are_refused():
    for shape, data in (([1, 2, 2], "AAAA"), ([1, 2], "AAAAAA=="), ([-1, -1, 2], "AAAAAA==")):
        with pytest.raises(ValidationError, match="wanted .tokens, MoE layers, K., 2 bytes each"):
            Experts(shape=shape, data=data)


@dataclass(frozen=True)
class Hanging(FAMILIES["arithmetic"]):
    """Its verifier does not come back while `AWAKE` is not set."""

    family = "hanging"

    def verify(self, response):
        AWAKE.wait()
        return super().verify(response)


AWAKE = threading.Event()


def test_a_workers_environments_have_their_time_and_its_attempts_are_judged_by_all_sources(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "hanging", Hanging)
    save_model(reward_model(), tmp_path / "judge")
    TOKENIZER.save_pretrained(tmp_path / "judge")
    write_weights(policy(), 0, tmp_path / "weights")

    def draw(version, number):
        family = ("hanging", "arithmetic")[number % 2]
        return Order(family=family, level=1, draw=number, seed=number, tokens=40, temperature=1.5, **AT_WILL).model_dump()

    exchange = Exchange(Buffer(2, 8, 1, 0), [].extend, draw, time.monotonic, 60.0)
    rewards = combined(Rewards(0.0, 1.0, tmp_path / "judge"), torch.device("cpu"))
    rollouts = Rollouts(Engine(policy(3), TOKENIZER), TOKENIZER, Limits(seconds=0.1, thinking=False), True, rewards.apply)
    server = Server(exchange, lambda version: tmp_path / "weights", lambda spans: None, "127.0.0.1", tmp_path / "server.json")
    with server, ThreadPoolExecutor(1) as thread:
        working = thread.submit(Worker("w", rollouts, 16, Connection(tmp_path, None)).run)
        with server.lock:
            assert server.lock.wait_for(lambda: exchange.buffer.aside and exchange.buffer.due, 300)
            groups = [*exchange.buffer.aside, *exchange.buffer.due]
        server.say_stop(60)
        working.result(60)
    AWAKE.set()
    results = [(group.order["family"], Result(**slot.result)) for group in groups for slot in group.slots]
    failures = [(family, one.failure) for family, one in results if one.reward is None]
    assert failures and all(family == "hanging" and one["kind"] == "time-out" for family, one in failures)
    spoke = [one for _, one in results if one.end == "done"]
    assert spoke and all(one.parts == {"model": one.reward} and 0 < one.reward < 1 for one in spoke)
    assert all(one.temperature == 1.5 and one.experts.shape[1:] == [1, 2] for _, one in results)


# ------------------------------------------------------------------------------------------------------- the virtual clock


def asynchronous(base, steps=4, **changes):
    values = {"max_staleness": 2, "room": 8, "workers": 0, "lease_seconds": 10.0, **changes}
    sampling = Sampling(group_size=2, groups=3, tokens=12, rounds=1, context=CONTEXT)
    own = Asynchronous(**values)
    # A narrow band: what is dropped shows that the correction meets the gap that staleness makes.
    objective = named("reinforce++", importance="mask_tokens", importance_low=0.99, importance_high=1.01)
    common = {"mode": "asynchronous", "sampling": sampling, "objective": objective, "evaluate_every": 0}
    return recipe_of(base, steps=steps, asynchronous=own, **common)


def steps_of(folder):
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "step"]
    clocks = (*WALL_CLOCK, "sampling_seconds", "update_seconds")
    return [{key: value for key, value in record.items() if key not in clocks} for record in records]


@pytest.mark.slow
def test_on_a_virtual_clock_a_run_is_the_same_to_the_bit_and_the_gap_is_told_by_staleness(base, tmp_path):
    recipe = asynchronous(base, steps=6, clock="virtual", workers=2)
    first, again = rl(recipe, tmp_path / "first"), rl(recipe, tmp_path / "again")
    states = [load_model(outcome.checkpoint).state_dict() for outcome in (first, again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    steps = steps_of(tmp_path / "first")
    assert steps == steps_of(tmp_path / "again")
    seen = {int(staleness): gap for step in steps for staleness, gap in step["gap_by_staleness"].items()}
    assert seen.keys() == {0, 1, 2} and max(step["largest_staleness"] for step in steps) == 2
    for step in steps:
        assert all((gap == 0) == (staleness == "0") for staleness, gap in step["gap_by_staleness"].items())
        assert (step["dropped"] > 0) == (step["staleness"] > 0)
    assert (tmp_path / "first" / "timeline.png").is_file()
    assert {span.who for span in read_spans(tmp_path / "first" / "timeline.jsonl")} == {"trainer", "worker-0", "worker-1"}


def test_with_staleness_zero_sampler_and_trainer_are_equal_to_the_bit(base, tmp_path):
    rl(asynchronous(base, clock="virtual", workers=1, max_staleness=0), tmp_path / "run")
    assert all(step["largest_gap"] == 0 and step["staleness"] == 0 for step in steps_of(tmp_path / "run"))


@pytest.mark.slow
def test_a_virtual_run_that_was_cut_off_does_its_steps_again_and_goes_on(base, tmp_path):
    recipe = asynchronous(base, steps=6, clock="virtual", workers=1)
    rl(recipe, tmp_path / "run")
    before = steps_of(tmp_path / "run")
    for step in (6, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step}")
    rl(recipe, tmp_path / "run")
    assert [step["groups"] for step in steps_of(tmp_path / "run")] == [step["groups"] for step in before]
    assert [step["entropy"] for step in steps_of(tmp_path / "run")] == [step["entropy"] for step in before]


def test_length_temperature_and_mode_come_with_the_problem_and_experts_with_the_attempt(base, tmp_path, monkeypatch):
    monkeypatch.setattr("minglm.rl.temperature.WINDOW", 1)
    monkeypatch.setattr("minglm.rl.curriculum.WINDOW", 1)
    recipe = asynchronous(base, clock="virtual", workers=1, max_staleness=1, room=4)
    modes = {"thinking": ("thinking", "non-thinking", "automatic"), "opens_thinking": True}
    sampling = replace(recipe.sampling, groups=2, tokens=(2, 4), temperatures=(1.0, 1.5), precision="fp8", **modes)
    tasks = Tasks({"arithmetic": (1, 2)})
    rl(replace(recipe, tasks=tasks, sampling=sampling, routing_replay="R3"), tmp_path / "run")
    steps = steps_of(tmp_path / "run")
    assert [(step["tokens"], step["temperature"]) for step in steps] == [(2, 1.0), (2, 1.0), (4, 1.5), (4, 1.5)]
    assert all(step["mean_gap"] > 0 for step in steps) and any(step["stale_gap"] > 0 for step in steps)
    calls = Journal(tmp_path / "run" / "journal").read(0)
    results = [Result(**arguments[1]) for name, arguments in calls if name == "deliver"]
    orders = [arguments[0] for name, arguments in calls if name == "open"]
    assert {(order["tokens"], order["temperature"]) for order in orders} >= {(2, 1.0), (4, 1.5)}
    in_turn = [(True, True), (False, False), (None, False)]
    assert [(one["thinking"], one["opens_thinking"]) for one in orders] == [in_turn[n % 3] for n in range(len(orders))]
    assert {one.temperature for one in results} == {1.0, 1.5} and all(one.experts is not None for one in results)
    assert all(sum(one.sampled) <= (2 if one.temperature == 1.0 else 4) for one in results)


def test_a_virtual_clock_needs_workers():
    with pytest.raises(ConfigError, match="workers"):
        Asynchronous(clock="virtual", workers=0)


# ------------------------------------------------------------------------------------------------------------------ kills


STEP_SECONDS = 0.2  # at least, so that there is a run to kill on any machine


def run_trainer(recipe, folder):
    torch.set_num_threads(1)
    step = PolicyLearner.policy_step

    def slow_step(*arguments, **named):
        time.sleep(STEP_SECONDS)
        return step(*arguments, **named)

    PolicyLearner.policy_step = slow_step  # in this process
    rl(recipe, folder)


def run_worker(folder, name):
    torch.set_num_threads(1)
    work(folder, name)


class Cluster:
    """A trainer and workers, each a process; any can be killed, and is started again."""

    def __init__(self, recipe, folder, workers):
        self.recipe, self.folder, self.names = recipe, folder, 0
        self.trainer = in_child(run_trainer, recipe, folder)
        self.wait(lambda: (folder / "server.json").exists())
        self.workers = [self.start_worker(number) for number in range(workers)]

    def start_worker(self, number):
        self.names += 1
        return in_child(run_worker, self.folder, f"w{number}.{self.names}")

    def wait(self, condition, seconds=600):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "nothing goes on"
            assert self.trainer.is_alive(), f"the trainer ended with {self.trainer.exitcode}"
            time.sleep(0.02)

    def calls(self):
        return sum(path.read_bytes().count(b"\n") for path in (self.folder / "journal").glob("*.jsonl"))

    def kill(self, rng):
        """One of all processes, a moment after something has gone on."""
        before = self.calls()
        self.wait(lambda: self.calls() > before)
        time.sleep(rng.random() * 0.5)
        victim = rng.choice(["trainer", *range(len(self.workers))])
        process = self.trainer if victim == "trainer" else self.workers[victim]
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if victim == "trainer":
            self.trainer = in_child(run_trainer, self.recipe, self.folder)
        else:
            self.workers[victim] = self.start_worker(victim)
        return victim

    def finish(self):
        self.trainer.join(900)
        assert self.trainer.exitcode == 0
        for process in self.workers:
            process.join(120)
            assert process.exitcode == 0


def audit(recipe, folder):
    """What the files of a run say: each attempt once, none too old, none lost; and that its steps give its weights again."""
    own, sampling = recipe.asynchronous, recipe.sampling
    calls = Journal(folder / "journal").read(0)
    buffer = Buffer(sampling.group_size, sampling.groups, sampling.rounds, own.max_staleness)
    replay(buffer, calls)
    results = {arguments[0]: arguments[1] for name, arguments in calls if name == "deliver"}
    steps = steps_of(folder)
    assert [step["step"] for step in steps] == list(range(1, recipe.steps + 1)) and buffer.step == recipe.steps
    seen = Counter()
    for step in steps:
        batch = buffer.taken[step["step"]]
        assert step["groups"] == [group.number for group in batch.groups]
        seen.update(step["groups"])
        for group in batch.groups:
            assert len({slot.lease for slot in group.slots}) == sampling.group_size
            assert all(slot.result == results[slot.lease] for slot in group.slots)
            versions = [v for slot in group.slots for v in slot.result["versions"] if v >= 0]
            assert 0 <= step["step"] - 1 - max(versions) and step["step"] - 1 - min(versions) <= own.max_staleness
        lines = (folder / "rollouts" / f"step-{step['step']}.jsonl").read_text().splitlines()
        assert len(lines) == sampling.group_size * (len(batch.groups) + len(batch.aside))
        seen.update(group.number for group in batch.aside)
    seen.update([*buffer.open_groups, *(group.number for group in buffer.aside)])
    assert seen == Counter(range(buffer.opened))

    # From the first checkpoint and the journal alone, without a worker: the same steps, the same weights.
    shutil.copytree(folder, again := folder.with_name("again"))
    for step in range(1, recipe.steps + 1):
        shutil.rmtree(again / "checkpoints" / f"step-{step}", ignore_errors=True)
    rl(recipe, again)
    assert timeless(steps_of(again)) == timeless(steps)
    last = [load_model(run / "checkpoints" / f"step-{recipe.steps}").state_dict() for run in (folder, again)]
    assert all(torch.equal(last[0][key], last[1][key]) for key in last[0])


def timeless(steps):
    """Without what a step says of the moment: how many wait, and who died since this process began."""
    return [{key: value for key, value in step.items() if key not in ("leases_expired", "groups_open")} for step in steps]


def run_with_kills(base, folder, steps, kills, workers, seed):
    recipe = asynchronous(base, steps=steps)
    # With experts in the journal, and a sampler whose weights are not the trainer's.
    recipe = replace(recipe, routing_replay="R3", sampling=replace(recipe.sampling, precision="fp8"))
    cluster, rng = Cluster(recipe, folder, workers), random.Random(seed)
    try:
        victims = Counter("trainer" if cluster.kill(rng) == "trainer" else "worker" for _ in range(kills))
        cluster.finish()
    finally:
        for process in (cluster.trainer, *cluster.workers):
            process.kill()
    audit(recipe, folder)
    return victims


@pytest.mark.slow
def test_trainer_and_worker_are_killed_and_no_sample_is_lost_or_doubled(base, tmp_path):
    victims = run_with_kills(base, tmp_path / "run", steps=12, kills=3, workers=1, seed=3)
    assert victims["trainer"] and victims["worker"]


def test_a_run_without_workers_ends_when_it_is_asked_to(base, tmp_path):
    trainer = in_child(run_trainer, asynchronous(base), tmp_path / "run")
    while not (tmp_path / "run" / "checkpoints" / "step-0").exists():
        assert trainer.is_alive()
        time.sleep(0.05)
    trainer.terminate()
    trainer.join(600)
    assert trainer.exitcode == 1  # by RLError


@pytest.mark.slow
def test_twenty_kills(base, tmp_path):
    victims = run_with_kills(base, tmp_path / "run", steps=60, kills=20, workers=2, seed=1)
    assert victims["trainer"] >= 3 and victims["worker"] >= 3


@pytest.mark.slow
def test_a_run_starts_its_workers_again_and_ends_with_them(base, tmp_path):
    recipe, run = asynchronous(base, steps=20, workers=1), tmp_path / "run"
    trainer = in_child(run_trainer, recipe, run)
    end = time.monotonic() + 600
    while not (run / "rollouts" / "step-1.jsonl").exists():
        assert time.monotonic() < end and trainer.is_alive()
        time.sleep(0.05)
    os.kill(worker_of(trainer.pid), signal.SIGKILL)
    trainer.join(900)
    assert trainer.exitcode == 0 and len(list((run / "workers").glob("worker-0.*.log"))) == 2
    assert any(span.what == "died" for span in read_spans(run / "timeline.jsonl"))


def worker_of(trainer: int) -> int:
    """The child of a process that is a rollout worker."""
    import psutil

    (found,) = (p.pid for p in psutil.Process(trainer).children() if "minglm.rl.asynchronous.worker" in p.cmdline())
    return found


# ------------------------------------------------------------------------------------------------- what is run by hand


def test_learning_curves_against_staleness_are_drawn_from_runs_under_each_bound(base, tmp_path, capsys):
    save_rl_recipe(asynchronous(base, steps=2), tmp_path / "recipe.toml")
    staleness.main(base, tmp_path / "runs", str(tmp_path / "recipe.toml"), bounds=(0, 1))
    said = capsys.readouterr().out
    assert "staleness at most 0: 0.00 on average" in said and "staleness at most 1: " in said
    assert (tmp_path / "runs" / "staleness.png").is_file()
    records = read_metrics(tmp_path / "runs" / "staleness-1-seed-1" / "metrics.jsonl")
    assert staleness.mean_staleness([records]) > 0 and staleness.gap_by_staleness([records])[0] == 0


@pytest.mark.slow
def test_the_benchmark_says_how_fast_both_modes_are(capsys, tmp_path):
    bench.main(steps=3, milliseconds=50, folder=tmp_path)
    found = re.search(r"synchronous ([\d.]+), asynchronous ([\d.]+); ratio", capsys.readouterr().out)
    assert float(found[1]) > 0 and float(found[2]) > 0
    assert (tmp_path / "asynchronous-0" / "timeline.png").is_file()


# ------------------------------------------------------------------------------------------------------------ timeline


@given(st.integers(0, 4), st.integers(0, 200))
def test_what_a_kill_has_cut_off_is_written_over(before, kept):
    spans = [Span(who="trainer", what="training", start=float(n), end=n + 0.5) for n in range(6)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "timeline.jsonl"
        write_spans(spans[: before + 1], path)
        whole = path.read_bytes()
        begin = whole[:-1].rfind(b"\n") + 1
        path.write_bytes(whole[: min(begin + kept, len(whole) - 1)])  # of the last one a part, without its end
        assert read_spans(path) == spans[:before]
        write_spans(spans[5:], path)
        assert read_spans(path) == [*spans[:before], spans[5]]


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_workers_need_an_address_that_leads_to_the_trainer(host):
    with pytest.raises(ConfigError, match="host = "):
        Asynchronous(host=host)
