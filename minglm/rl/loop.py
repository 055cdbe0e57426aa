"""Reinforcement learning, synchronous and colocated: sample, verify, advantages, loss, update, and again.
`minglm.rl.asynchronous` derives the loop whose samples come from other processes.

One process, and one set of weights: the engine samples with the very tensors that the step has changed, so nothing is pushed
(slime's synchronous mode, report, section 3.5). In the exact gear the trainer finds the sampler's log-probabilities to the
bit. Every draw is a function of the recipe's seed and the step, so that a run that was killed goes on as if it had not been.
"""

import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minglm import ops
from minglm.config import GLMConfig
from minglm.data.sources import HELD_OUT
from minglm.engine.engine import Engine
from minglm.evals.interval import mean
from minglm.rl.curriculum import Curriculum, Pool
from minglm.rl.learner import PolicyLearner
from minglm.rl.objective import SPREAD, formula
from minglm.rl.plots import plot_run
from minglm.rl.recipe import RLRecipe, load_rl_recipe, resolve_base, save_rl_recipe
from minglm.rl.rollout import Asked, Limits, Rollouts, Trajectory, groups_of
from minglm.tasks import FAMILIES
from minglm.tasks.task import problems
from minglm.tokenizer import Tokenizer
from minglm.train.device import Device, choose_device
from minglm.train.metrics import MetricsFile, read_metrics
from minglm.train.run_folder import RunFolder
from minglm.train.state import read_state, write_state
from minglm.train.stop import StopRequest
from minglm.train.trainer import Outcome, TrainingDiverged


class RLError(RuntimeError):
    """A run that cannot go on: no attempt of a step has a verdict."""


@dataclass
class Practice:
    """What a step has sampled: whole groups to train on, in order, the pool of each; and all attempts that have a verdict."""

    trajectories: list[Trajectory] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)
    judged: list[Trajectory] = field(default_factory=list)
    rounds: int = 0
    without_spread: int = 0  # groups that were left out for that
    failed: int = 0  # attempts whose environment failed, left out with their groups
    numbers: dict[str, Any] = field(default_factory=dict)  # what else the step's record is to tell


def rl(recipe: RLRecipe, run_folder: str | Path, must_resume: bool = False) -> Outcome:
    """Train the policy by `recipe` in `run_folder`, going on from its newest checkpoint if it has any. SIGINT or SIGTERM:
    the step is finished and saved.

    Raises `ConfigError` for a recipe that does not fit the base or the run folder, `TrainingDiverged`, `RLError`.
    """
    recipe = resolve_base(recipe)
    folder, device = RunFolder(run_folder), choose_device(recipe.hardware)
    checkpoint = folder.open(recipe, must_resume, load_rl_recipe, save_rl_recipe)
    base = RunFolder(recipe.base).newest_checkpoint() or recipe.base
    tokenizer, config = Tokenizer.from_pretrained(base), GLMConfig.from_pretrained(base)
    print(
        f"run folder: {folder.path} (recipe, metrics, rollouts, checkpoints)\ndevice: {device}\n\n{formula(recipe.objective)}\n"
    )
    with ExitStack() as stack:
        stack.enter_context(ops.using(recipe.hardware.gear))
        stop = stack.enter_context(StopRequest())
        return loop_of(recipe)(recipe, folder, tokenizer, config, device, base, checkpoint).run(stop)


def loop_of(recipe: RLRecipe) -> type["Loop"]:
    """What runs the recipe's mode."""
    if recipe.mode == "synchronous":
        return Loop
    from minglm.rl.asynchronous import trainer, virtual_trainer  # which derive from Loop

    return virtual_trainer.VirtualLoop if recipe.asynchronous.clock == "virtual" else trainer.AsynchronousLoop


class Loop:
    """One run: the policy, the engine that samples from it, the curriculum, and the steps done so far."""

    def __init__(
        self,
        recipe: RLRecipe,
        folder: RunFolder,
        tokenizer: Tokenizer,
        config: GLMConfig,
        device: Device,
        base: Path,
        checkpoint: Path | None,
    ):
        self.recipe, self.folder, self.tokenizer = recipe, folder, tokenizer
        training = recipe.as_training(config)
        self.learner = PolicyLearner(
            recipe.objective, training, config, device, base, checkpoint, recipe.tokens_at_once, recipe.passes
        )
        self.curriculum = Curriculum(recipe.tasks, recipe.seed)
        self.step, self.seconds_before = 0, 0.0
        self.resumed = checkpoint is not None
        self.metrics = MetricsFile(folder.metrics)
        if checkpoint is not None:
            self._restore(checkpoint)
        sampling = recipe.sampling
        self.limits = Limits.of(sampling)
        self.engine = Engine(
            self.learner.model, tokenizer, gear=recipe.hardware.gear, max_running=sampling.groups * sampling.group_size
        )
        self.engine.weights_version = self.step  # counts steps, also over a resumption
        self.rollouts = Rollouts(self.engine, tokenizer, self.limits)
        self.held_out = [
            problem
            for family, levels in recipe.tasks.levels.items()
            for _, problem in zip(
                range(recipe.evaluation_problems), problems(FAMILIES[family], HELD_OUT, recipe.seed, levels), strict=False
            )
        ]

    def run(self, stop: StopRequest) -> Outcome:
        recipe = self.recipe
        self.start = time.perf_counter() - self.seconds_before
        stopped_by, reward = None, math.nan
        interval = 0.5 if sys.stderr.isatty() else 10
        with tqdm(total=recipe.steps, initial=self.step, unit="step", dynamic_ncols=True, mininterval=interval) as bar:
            if not self.resumed:
                self.evaluate(bar)
                self.save()
            while self.step < recipe.steps and stopped_by is None:
                reward = self.train_step()
                bar.update()
                bar.set_postfix_str(f"reward {reward:.3f}, stage {self.curriculum.stage}")
                last = self.step == recipe.steps
                if last or (recipe.evaluate_every and self.step % recipe.evaluate_every == 0):
                    self.evaluate(bar)
                stopped_by = None if last else stop.signal
                if last or stopped_by is not None or self.step % recipe.checkpoint_every == 0:
                    self.save()
        return Outcome(self.step, self.folder.checkpoint(self.step), stopped_by)

    def train_step(self) -> float:
        """Sample, verify, update. -> the mean reward of all that was sampled."""
        self.step += 1
        began = time.perf_counter()
        practice = self.practise()
        sampled = time.perf_counter()
        record: dict[str, Any] = {"step": self.step, "kind": "step"}
        if practice.trajectories:
            size = self.recipe.sampling.group_size
            groups = [number // size for number in range(len(practice.trajectories))]
            numbers = self.learner.policy_step(practice.trajectories, groups)
            bad = [key for key, value in numbers._asdict().items() if not math.isfinite(value)] or self.learner.bad_weights()
            if bad:
                raise TrainingDiverged(
                    f"step {self.step}: not finite: {bad}. The last good checkpoint is "
                    f"{self.folder.newest_checkpoint()}; a lower optimizer.learning_rate may help, in another run folder"
                )
            record |= numbers._asdict()
            gaps = self.learner.gap_by_version
            record["gap_by_staleness"] = {self.step - 1 - version: gap for version, gap in gaps.items()}
        self.engine.weights_changed()  # in place: these are the learner's
        everything = practice.judged
        rewards = [one.verdict.reward for one in everything]
        record |= {
            "reward": statistics.fmean(rewards),
            "reward_by_family": _by_family(everything),
            "length": statistics.fmean(one.length for one in everything),
            "turns": statistics.fmean(one.turns for one in everything),
            "ends": dict(Counter(one.end for one in everything)),
            "attempts": len(everything),
            "trained_on": len(practice.trajectories),
            "rounds": practice.rounds,
            "groups_without_spread": practice.without_spread,
            "failed": practice.failed,
            "curriculum_stage": self.curriculum.stage,
            "pass_rates": {f"{family} {level}": rate for (family, level), rate in self.curriculum.rates.items()},
            "seconds": self._seconds(),
            "sampling_seconds": sampled - began,
            "update_seconds": time.perf_counter() - sampled,
            **practice.numbers,
        }
        self.metrics.write(record)
        self.write_rollouts(everything)
        return record["reward"]

    def practise(self) -> Practice:
        """Whole groups with a spread of rewards, as many as the recipe wants if rounds suffice."""
        sampling, size = self.recipe.sampling, self.recipe.sampling.group_size
        found, seen, drawn = Practice(), [], 0
        while found.rounds < sampling.rounds and (missing := sampling.groups - len(found.pools)) > 0:
            problems_now = self.curriculum.draw(self.step, drawn, missing)
            asked = [
                Asked(problem, random.Random(f"{self.recipe.seed} {self.step} {drawn + number} {attempt}").getrandbits(62))
                for number, (_, problem) in enumerate(problems_now)
                for attempt in range(size)
            ]
            drawn += missing
            found.rounds += 1
            attempts = self.rollouts.collect(asked)
            for (pool, _), group in zip(problems_now, groups_of(attempts, size), strict=True):
                failed = sum(one.verdict is None for one in group)
                found.failed += failed
                judged = [one for one in group if one.verdict is not None]
                found.judged += judged
                seen += [pool] * len(judged)
                if failed:
                    continue
                rewards = [one.verdict.reward for one in group]
                if max(rewards) - min(rewards) <= SPREAD and sampling.rounds > 1:
                    found.without_spread += 1
                    continue
                found.trajectories += group
                found.pools.append(pool)
        if not found.judged:
            raise RLError(
                f"step {self.step}: the environments of all {found.failed} attempts failed; nothing was learnt or lost"
            )
        self.curriculum.learn(seen, [one.verdict.reward for one in found.judged])
        return found

    def evaluate(self, bar: tqdm) -> None:
        """Record the mean reward on held-out problems, one attempt each, with 95% intervals."""
        asked = [Asked(problem, number) for number, problem in enumerate(self.held_out)]
        attempts = [one for one in self.rollouts.collect(asked) if one.verdict is not None]
        estimates = {"all": mean([one.verdict.reward for one in attempts])}
        for family in self.recipe.tasks.levels:
            own = [one.verdict.reward for one in attempts if one.problem.family == family]
            estimates[family] = mean(own)
        record = {name: [e.value, e.low, e.high] for name, e in estimates.items()}
        ends = dict(Counter(one.end for one in attempts))
        length = statistics.fmean(one.length for one in attempts)
        self.metrics.write({"step": self.step, "kind": "held_out", "rewards": record, "length": length, "ends": ends})
        shown = ", ".join(f"{name} {e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for name, e in estimates.items())
        bar.write(f"step {self.step}: held-out reward {shown}")

    def write_rollouts(self, trajectories: Sequence[Trajectory]) -> None:
        """What was asked and answered, one attempt a line, in rollouts/step-N.jsonl."""
        folder = self.folder.path / "rollouts"
        folder.mkdir(exist_ok=True)
        lines = (
            json.dumps(
                {
                    "family": one.problem.family,
                    "messages": one.problem.messages,
                    "response": one.response,
                    "text": self.tokenizer.decode(one.ids),
                    "reward": one.verdict.reward,
                    "reasons": one.verdict.reasons,
                    "end": one.end,
                },
                ensure_ascii=False,
            )
            for one in trajectories
        )
        (folder / f"step-{self.step}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def save(self) -> None:
        with self.learner.writing(self.folder.checkpoint(self.step)) as aside:
            state = self.learner.save(aside)
            self.tokenizer.save_pretrained(aside)
            write_state({**state, **self.own_state()}, aside)
        self.folder.prune(self.recipe.keep)
        plot_run(read_metrics(self.folder.metrics), self.folder.overview, f"minglm: {self.folder.path.name}")

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the learner's state."""
        return {"step": self.step, "seconds": self._seconds(), "curriculum": self.curriculum.state_dict()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.step, self.seconds_before = state["step"], state["seconds"]
        self.curriculum.load_state_dict(state["curriculum"])

    def _restore(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        self.learner.load(checkpoint, state)
        self.load_own_state(state)
        self.metrics.cut_back(self.step)
        print(f"resuming: {checkpoint}")

    def _seconds(self) -> float:
        return time.perf_counter() - self.start


def _by_family(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    rewards: dict[str, list[float]] = {}
    for one in trajectories:
        rewards.setdefault(one.problem.family, []).append(one.verdict.reward)
    return {family: statistics.fmean(own) for family, own in rewards.items()}
