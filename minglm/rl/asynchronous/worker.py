"""A rollout worker: a process that samples with its own copy of the weights, and never waits for the trainer's steps.

    python -m minglm.rl.asynchronous.worker RUN_FOLDER

Attempts come and go one by one: while environments answer and sources of rewards judge, in threads, the engine goes on with
the others. A reward model is the worker's own copy; the key of an endpoint that grades is in its environment. New weights are
taken between two steps of the engine. Turns under way go on with them (partial rollouts): their tokens stay, the cache is
computed anew, so that each token has its log-probability from one version, which it carries, for all that stands before it.
"""

import os
import secrets
import socket
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from json import loads
from pathlib import Path
from typing import Annotated

import httpx
import tyro
from pydantic import BaseModel
from tyro.conf import Positional

from minglm import ops
from minglm.checkpoint import load_model
from minglm.engine.engine import Engine
from minglm.rl.asynchronous.buffer import Lease
from minglm.rl.asynchronous.messages import Delivery, Order, Poll, Result
from minglm.rl.asynchronous.timeline import Recorder
from minglm.rl.asynchronous.weights import take_weights
from minglm.rl.environment import Answer, Failure
from minglm.rl.recipe import load_rl_recipe
from minglm.rl.rewards import combined
from minglm.rl.rollout import Attempt, Limits, Rollouts
from minglm.tokenizer import Tokenizer
from minglm.train.device import choose_device
from minglm.train.run_folder import model_folder

POLL_SECONDS = 0.1
RETRY_SECONDS = 0.2


class WorkerError(RuntimeError):
    """The trainer refuses what this worker says, or the trainer that it was to work for has ended."""


class Connection:
    """To the trainer of a run folder, through its deaths: a request is sent again until there is an answer.

    parent: a process that the worker is to outlive by no more than a moment; None: it waits for the trainer for ever.
    """

    def __init__(self, run_folder: Path, parent: int | None):
        self.address, self.parent = run_folder / "server.json", parent
        self.client: httpx.Client | None = None

    def post(self, path: str, body: BaseModel) -> dict:
        """-> the answer's JSON. Raises WorkerError where the trainer refuses the request."""
        return self._ask("POST", path, body.model_dump_json()).json()

    def weights(self, version: int) -> bytes | None:
        """The file, None where the trainer does not have it, or not yet."""
        answer = self._ask("GET", f"/weights/{version}")
        return None if answer.status_code == 404 else answer.content

    def _ask(self, method: str, path: str, content: str | None = None) -> httpx.Response:
        while True:
            if self.parent is not None and os.getppid() != self.parent:
                raise WorkerError("the trainer that started this worker has ended")
            try:
                answer = self._connected().request(method, path, content=content)
                if answer.status_code == 200 or (method, answer.status_code) == ("GET", 404):
                    return answer
                if answer.status_code == 400:
                    raise WorkerError(f"{path}: {answer.text}")
                found = f"status {answer.status_code}"  # 401: of another trainer; 5xx: it is going
            except (httpx.TransportError, OSError, ValueError) as error:  # it is dead or not there yet
                found = f"{type(error).__name__}"
            print(f"{path}: {found}; again in {RETRY_SECONDS} s", flush=True)
            self.client = None
            time.sleep(RETRY_SECONDS)

    def _connected(self) -> httpx.Client:
        if self.client is None:
            address = loads(self.address.read_text())
            headers = {"Authorization": f"Bearer {address['token']}"}
            self.client = httpx.Client(base_url=address["url"], headers=headers, timeout=60, trust_env=False)
        return self.client


@dataclass
class _Held:
    lease: Lease
    attempt: Attempt
    request: int | None = None  # of the engine, while the policy is at work
    until: float = 0.0  # by the monotonic clock: for the environment that is at work


class Worker:
    """Attempts under leases by an engine. rollouts: with a judge. run: until the trainer says stop."""

    def __init__(self, name: str, rollouts: Rollouts, room: int, connection: Connection):
        self.name, self.rollouts, self.room, self.connection = name, rollouts, room, connection
        self.engine = rollouts.engine
        self.engine.weights_version = -1  # has none of the run's yet
        self.held: dict[int, _Held] = {}  # by lease
        self.environments = rollouts.environments
        self.answering: dict[Future[Answer | Failure], _Held] = {}  # whose environment is at work
        self.judging: dict[Future[None], _Held] = {}  # that have ended
        self.judges = ThreadPoolExecutor(room, thread_name_prefix="judge")
        self.recorder = Recorder(name.split(".")[0], time.time)

    def run(self) -> None:
        while True:
            room = self.room - len(self.held)
            poll = Poll(
                worker=self.name,
                version=self.engine.weights_version,
                room=room,
                held=list(self.held),
                spans=self.recorder.drain(),
            )
            answer = self.connection.post("/poll", poll)
            if answer["stop"]:
                return
            for lease in answer["void"]:
                self._drop(self.held.pop(lease))
            for lease in answer["leases"]:
                self._start(Lease(*lease))
            if answer["version"] != self.engine.weights_version and self._take_weights(answer["version"]):
                continue  # and ask for work with them
            for held in self._work(POLL_SECONDS):
                self._deliver(held)

    def _take_weights(self, version: int) -> bool:
        self.recorder.now("weights")
        data = self.connection.weights(version)
        return data is not None and take_weights(self.engine, data) == version

    def _start(self, lease: Lease) -> None:
        attempt = Attempt(self.rollouts, Order(**lease.order).asked(lease.attempt, self.rollouts.limits))
        held = self.held[lease.number] = _Held(lease, attempt)
        self._go_on(held, attempt.has_room())

    def _go_on(self, held: _Held, speaks: bool) -> None:
        """The policy speaks, or the attempt has ended."""
        if speaks:
            held.request = held.attempt.ask()
        else:
            self.judging[self.judges.submit(self.rollouts.judge, [held.attempt.trajectory])] = held

    def _drop(self, held: _Held) -> None:
        if held.request is not None:
            self.engine.cancel(held.request)
            held.request = None

    def _work(self, seconds: float) -> list[_Held]:
        """Sample for so long, or until an attempt is over -> those that are."""
        over: list[_Held] = []
        end = time.monotonic() + seconds
        while not over and (left := end - time.monotonic()) > 0:
            if self.engine.has_work:
                self.recorder.now("sampling")
                self._step()
                left = 0
            else:
                self.recorder.now("waiting")
            if not (self.answering or self.judging):
                time.sleep(left)
                continue
            wait([*self.answering, *self.judging], left, FIRST_COMPLETED)
            self._hear()
            for judged in [one for one in self.judging if one.done()]:
                held = self.judging.pop(judged)
                judged.result()  # raises what it has raised
                if held.lease.number in self.held:  # else void
                    over.append(held)
        return over

    def _step(self) -> None:
        by_request = {held.request: held for held in self.held.values() if held.request is not None}
        for output in self.rollouts.step():
            held = by_request.get(output.request_id)
            if held is None:  # void
                continue
            held.attempt.take(output)
            if output.finish_reason is None:
                continue
            held.request = None
            if (question := held.attempt.end_turn()) is None:
                self._go_on(held, False)
            else:
                held.until = time.monotonic() + self.environments.seconds
                self.answering[self.environments.start(question)] = held

    def _hear(self) -> None:
        """Environments that have answered, or whose time is over."""
        now = time.monotonic()
        for asked in [one for one, held in self.answering.items() if one.done() or now >= held.until]:
            held, answer = self.answering.pop(asked), self.environments.hear(asked)
            if held.lease.number in self.held:  # else void
                self._go_on(held, held.attempt.hear(answer))

    def _deliver(self, held: _Held) -> None:
        lease, result = held.lease, Result.of(held.attempt.trajectory)
        delivery = Delivery(worker=self.name, lease=lease.number, version=lease.version, result=result)
        self.connection.post("/deliver", delivery)
        del self.held[lease.number]


def work(run_folder: Path, name: str | None = None, parent: int | None = None) -> None:
    """Be a worker of the run in `run_folder`, until it ends. name: by default of this machine and process.

    Raises WorkerError, WeightsError.
    """
    recipe = load_rl_recipe(run_folder / "config.toml")
    base = model_folder(recipe.base)
    tokenizer = Tokenizer.from_pretrained(base)
    device = choose_device(recipe.hardware)
    model = load_model(base, device=device.torch_device).requires_grad_(False)
    room = recipe.asynchronous.room
    engine = Engine(model.eval(), tokenizer, gear=recipe.hardware.gear, max_running=room)
    rewards = combined(recipe.rewards, device.torch_device)
    limits = Limits.of(recipe.sampling)
    rollouts = Rollouts(engine, tokenizer, limits, recipe.records_experts, rewards.apply, device.autocast)
    name = name or f"{socket.gethostname()}-{os.getpid()}.{secrets.token_hex(4)}"
    with ops.using(recipe.hardware.gear):
        Worker(name, rollouts, room, Connection(run_folder, parent)).run()


def main(
    run_folder: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN_FOLDER")],
    name: str | None = None,
    parent: int | None = None,
) -> None:
    """Sample for the asynchronous run in RUN_FOLDER, here or on another machine that sees the folder."""
    work(run_folder, name, parent)


if __name__ == "__main__":
    tyro.cli(main)
