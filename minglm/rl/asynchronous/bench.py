"""Trajectories a second where environments are slow to answer: asynchronous against synchronous, in one run.

    python -m minglm.rl.asynchronous.bench

The world answers each turn after a wait that is drawn from a log-normal distribution, as web searches and builds in containers
do: most answers come soon, a few take ten times as long. The synchronous mode waits for the slowest of a batch, turn by turn.
Both modes train the same small policy on the same problems in batches of the same size; the asynchronous one is two
processes, a trainer and a worker, and they share the cores that the synchronous one has alone.
"""

import itertools
import math
import multiprocessing
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
import tyro

from minglm.chat import render_tokens
from minglm.checkpoint import save_model
from minglm.config import GLMConfig
from minglm.model import GLM
from minglm.rl.asynchronous.worker import work
from minglm.rl.loop import rl
from minglm.rl.objective import named
from minglm.rl.recipe import Asynchronous, RLRecipe, Sampling, Tasks
from minglm.tasks import FAMILIES
from minglm.tasks.task import Episode, Message, Problem, Verdict, reply
from minglm.tokenizer import Tokenizer, train_tokenizer
from minglm.train.metrics import read_metrics
from minglm.train.recipe import Optimizer

TURNS, WORLD, POLICY = 3, "And then?", "Go on."
SPREAD = 1.2  # the standard deviation of a wait's logarithm


@dataclass(frozen=True)
class Waiting(Problem):
    """A conversation of some turns whose other side takes its time; any answer is as good as its draw. Its difficulty is the
    median of the waits, in milliseconds."""

    number: int
    milliseconds: int
    family = "waiting"
    stands_for = "Environments that wait (report, section 3.5): none of its tasks, but their latencies."
    difficulties = range(1, 60_001)
    chance = 0.5

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> "Waiting":
        return cls(rng.getrandbits(40), difficulty)

    @property
    def key(self) -> str:
        return str(self.number)

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": WORLD}]

    def demonstrate(self, thinking: bool) -> list[Message]:
        return [m for _ in range(TURNS) for m in (*reply(POLICY), {"role": "user", "content": WORLD})][:-1]

    def verify(self, response: list[Message]) -> Verdict:
        return Verdict(float(random.Random(f"{self.number} {response}").random() < 0.5))

    def near_miss(self, rng: random.Random) -> list[Message]:
        return self.demonstrate(False)

    def guess(self, rng: random.Random) -> list[Message]:
        return self.demonstrate(False)

    def start(self) -> Episode:
        return _Slow(self.milliseconds / 1000)


_STARTED = itertools.count()  # in both modes the first episode waits as the first, and so on


class _Slow(Episode):
    """Answers after a wait of its own draw."""

    def __init__(self, median: float) -> None:
        self.median, self.left, self.rng = median, TURNS, random.Random(next(_STARTED))

    def step(self, message: Message) -> list[Message]:
        time.sleep(self.median * math.exp(self.rng.gauss(0, SPREAD)))
        self.left -= 1
        self.done = self.left == 0
        return [] if self.done else [{"role": "user", "content": WORLD}]


def _register() -> None:
    """For the benchmark alone: in its own process, and in the worker's."""
    FAMILIES[Waiting.family] = Waiting


def make_policy(folder: Path, patience: int = 400) -> None:
    """Write a small policy that knows its line by heart, and its tokenizer."""
    tokenizer = train_tokenizer([f"{WORLD} {POLICY}\n"] * 4, 300, show_progress=False)
    problem = Waiting(0, 1)
    talk = [*problem.messages, *problem.demonstrate(False), {"role": "user", "content": WORLD}]
    ids = torch.tensor([render_tokens(tokenizer, talk, None, False).ids])
    torch.manual_seed(0)
    model = GLM(_config(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(patience):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        if loss.lm.item() < 0.01:
            save_model(model.eval(), folder)
            tokenizer.save_pretrained(folder)
            return
    raise RuntimeError(f"the policy did not learn its line in {patience} steps: loss {loss.lm.item():.3f}")


def _config(tokenizer: Tokenizer) -> GLMConfig:
    return GLMConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        max_position_embeddings=256,
    )


def recipe_of(base: Path, steps: int, milliseconds: int) -> RLRecipe:
    return RLRecipe(
        base=base,
        tasks=Tasks({Waiting.family: (milliseconds,)}, curriculum="none"),
        steps=steps,
        sampling=Sampling(group_size=4, groups=4, tokens=16, turns=TURNS, thinking="non-thinking", rounds=1),
        objective=named("reinforce++"),
        optimizer=Optimizer(learning_rate=1e-6),  # the line is to be known to the end
        evaluate_every=0,
        evaluation_problems=2,
        checkpoint_every=steps,
        asynchronous=Asynchronous(workers=0, room=64),
    )


def trajectories_per_second(folder: Path) -> float:
    """Of those trained on, from the beginning of the first step to the end of the last. What is under way at the end does not
    count, and the asynchronous mode is charged what its worker takes to load the model."""
    steps = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "step"]
    first = steps[0]
    began = first["seconds"] - first["sampling_seconds"] - first["update_seconds"]
    return sum(record["trained_on"] for record in steps) / (steps[-1]["seconds"] - began)


def asynchronous_run(recipe: RLRecipe, folder: Path) -> None:
    """Trainer here, one worker in another process."""
    context = multiprocessing.get_context("spawn")
    imported = context.Event()
    worker = context.Process(target=_work, args=(folder, imported))
    worker.start()
    imported.wait()  # the synchronous run has imported everything, too
    rl(replace(recipe, mode="asynchronous"), folder)
    worker.join()


def _work(folder: Path, imported: Event) -> None:
    torch.set_num_threads(1)
    _register()
    imported.set()
    while not (folder / "server.json").exists():
        time.sleep(0.1)
    work(folder)


def main(steps: int = 12, milliseconds: int = 400, repeats: int = 1, folder: Path | None = None) -> None:
    """Print trajectories a second of both modes, and their ratio.

    milliseconds: the median of a wait; folder: keeps the runs, with the timeline as a plot.
    """
    torch.set_num_threads(1)
    _register()
    folder = folder or Path(tempfile.mkdtemp(prefix="minglm-bench-"))
    make_policy(folder / "base")
    recipe, ratios = recipe_of(folder / "base", steps, milliseconds), []
    for repeat in range(repeats):
        speeds = {}
        for mode, run in (("synchronous", rl), ("asynchronous", asynchronous_run)):
            path = folder / f"{mode}-{repeat}"
            run(recipe, path)
            speeds[mode] = trajectories_per_second(path)
        ratios.append(speeds["asynchronous"] / speeds["synchronous"])
        shown = ", ".join(f"{mode} {speed:.2f}" for mode, speed in speeds.items())
        print(f"trajectories a second: {shown}; ratio {ratios[-1]:.2f}")
    median, longest = milliseconds / 1000, milliseconds / 1000 * math.exp(SPREAD * 2)
    print(f"waits of {median} s in the median, one in 44 longer than {longest:.1f} s; {TURNS} turns an attempt")
    print(f"asynchronous / synchronous: {statistics.median(ratios):.2f}")
    print(f"made: {path / 'timeline.png'}")


if __name__ == "__main__":
    tyro.cli(main)
