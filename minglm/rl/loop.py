"""Reinforcement learning, synchronous and colocated: sample, verify, advantages, loss, update, and again.
`minglm.rl.asynchronous` derives the loop whose samples come from other processes.

One process, and one set of weights: the engine samples with the very tensors that the step has changed, so nothing is pushed
(slime's synchronous mode, report, section 3.5), unless the sampler is to have a copy in FP8. In the exact gear the trainer
finds the sampler's log-probabilities to the bit. Every draw is a function of the recipe's seed and the step, so that a run
that was killed goes on as if it had not been.
"""

import math
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minglm import ops
from minglm.config import GLMConfig
from minglm.engine.engine import Engine
from minglm.rl.browser import write_browser
from minglm.rl.curriculum import Curriculum
from minglm.rl.distillation import FORMULA, DistillationLearner, load_teachers
from minglm.rl.held_out import attempt_held_out, set_aside
from minglm.rl.learner import PolicyLearner
from minglm.rl.objective import formula
from minglm.rl.plots import plot_run
from minglm.rl.practice import Practice, practise
from minglm.rl.quantised import fp8_copy, fp8_state
from minglm.rl.recipe import RLRecipe, load_rl_recipe, resolve_base, save_rl_recipe
from minglm.rl.records import forget_rollouts, record_of, tokens_of, write_rollouts
from minglm.rl.rehearsal import rehearse
from minglm.rl.rewards import combined
from minglm.rl.rollout import Limits, Rollouts
from minglm.rl.temperature import Temperature
from minglm.tokenizer import Tokenizer
from minglm.train.device import Device, choose_device
from minglm.train.metrics import MetricsFile, read_metrics
from minglm.train.run_folder import RunFolder, model_folder
from minglm.train.state import read_state, write_state
from minglm.train.stop import StopRequest
from minglm.train.trainer import Outcome, TrainingDiverged


def rl(recipe: RLRecipe, run_folder: str | Path, must_resume: bool = False) -> Outcome:
    """Train the policy by `recipe` in `run_folder`, going on from its newest checkpoint if it has any. SIGINT or SIGTERM:
    the step is finished and saved.

    Raises `ConfigError` for a recipe that does not fit the base or the run folder, `TrainingDiverged`, `RLError`.
    """
    recipe = resolve_base(recipe)
    folder, device = RunFolder(run_folder), choose_device(recipe.hardware)
    checkpoint = folder.open(recipe, must_resume, load_rl_recipe, save_rl_recipe)
    base = model_folder(recipe.base)
    tokenizer, config = Tokenizer.from_pretrained(base), GLMConfig.from_pretrained(base)
    loss = FORMULA if recipe.teachers else formula(recipe.objective)
    print(f"run folder: {folder.path} (recipe, metrics, rollouts, checkpoints)\ndevice: {device}\n\n{loss}\n")
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
    """One run: the policy, the engine that samples from it, curriculum and temperature, and the steps done so far."""

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
        learns = (
            recipe.objective,
            recipe.as_training(config),
            config,
            device,
            base,
            checkpoint,
            recipe.tokens_at_once,
            recipe.passes,
            recipe.routing_replay,
        )
        if recipe.teachers:
            teachers = load_teachers(recipe.teachers, config, device.torch_device)
            self.learner = DistillationLearner(*learns, teachers=teachers)
        else:
            self.learner = PolicyLearner(*learns)
        self.curriculum = Curriculum(recipe.tasks, recipe.seed)
        self.temperature = Temperature(recipe.sampling)
        self.step, self.compute, self.seconds_before = 0, 0, 0.0
        self.resumed = checkpoint is not None
        self.metrics = MetricsFile(folder.metrics)
        if checkpoint is not None:
            self._restore(checkpoint)
        sampling = recipe.sampling
        self.limits = Limits.of(sampling)
        self.engine = Engine(
            fp8_copy(self.learner.model) if sampling.precision == "fp8" else self.learner.model,
            tokenizer,
            gear=recipe.hardware.gear,
            max_running=sampling.groups * sampling.group_size,
        )
        self.engine.weights_version = self.step  # counts steps, also over a resumption
        rewards = combined(recipe.rewards, device.torch_device)
        self.rollouts = Rollouts(self.engine, tokenizer, self.limits, recipe.records_experts, rewards.apply, device.autocast)
        self.held_out, self.validation = set_aside(recipe)

    @property
    def finished(self) -> bool:
        budget = self.recipe.compute_budget
        return self.step >= self.recipe.steps or bool(budget and self.compute >= budget)

    def run(self, stop: StopRequest) -> Outcome:
        recipe = self.recipe
        self.start = time.perf_counter() - self.seconds_before
        if not self.finished:
            samples = recipe.sampling.groups * recipe.sampling.group_size
            print(f"rehearsed: {rehearse(self.learner, self.rollouts.context + 1, samples)}")
        stopped_by, reward = None, math.nan
        interval = 0.5 if sys.stderr.isatty() else 10
        total = None if recipe.compute_budget else recipe.steps
        with tqdm(total=total, initial=self.step, unit="step", dynamic_ncols=True, mininterval=interval) as bar:
            if not self.resumed:
                self.evaluate(bar)
                self.save()
            while not self.finished and stopped_by is None:
                reward = self.train_step()
                bar.update()
                bar.set_postfix_str(f"reward {reward:.3f}, stage {self.curriculum.stage}")
                last = self.finished
                if last or (recipe.evaluate_every and self.step % recipe.evaluate_every == 0):
                    self.evaluate(bar)
                stopped_by = None if last else stop.signal
                if last or stopped_by is not None or self.step % recipe.checkpoint_every == 0:
                    self.save()
        write_browser(self.folder.path)
        return Outcome(self.step, self.folder.checkpoint(self.step), stopped_by)

    def train_step(self) -> float:
        """Sample, verify, update. -> the mean reward of all that was sampled."""
        self.step += 1
        began = time.perf_counter()
        limits = self.limits_at(self.step)
        practice = self.practise()
        sampled = time.perf_counter()
        record: dict[str, Any] = {"step": self.step, "kind": "step"}
        if practice.kept:
            numbers = self.learner.policy_step(practice.trajectories, practice.groups, version=self.engine.weights_version)
            known = numbers.record()
            floats = {key: value for key, value in known.items() if isinstance(value, float)}
            bad = [key for key, value in floats.items() if not math.isfinite(value)] or self.learner.bad_weights()
            if bad:
                raise TrainingDiverged(
                    f"step {self.step}: not finite: {bad}. The last good checkpoint is "
                    f"{self.folder.newest_checkpoint()}; a lower optimizer.learning_rate may help, in another run folder"
                )
            record |= known
        if self.recipe.sampling.precision == "fp8":
            self.engine.update_weights(fp8_state(self.learner.model))
        else:
            self.engine.weights_changed()  # in place: these are the learner's
        tokens = tokens_of(practice, self.recipe)
        self.compute += tokens.compute
        record |= {
            **record_of(practice),
            **tokens._asdict(),
            "compute": self.compute,
            "tokens": limits.tokens,
            "temperature": limits.temperature,
            "curriculum_stage": self.curriculum.stage,
            "curriculum": self.curriculum.record(),
            "seconds": self._seconds(),
            "sampling_seconds": sampled - began,
            "update_seconds": time.perf_counter() - sampled,
            **practice.numbers,
        }
        self.metrics.write(record)
        write_rollouts([*practice.judged, *practice.failed], self.tokenizer, self.folder.path / "rollouts", self.step)
        if self.temperature.learn(record["reward"]):
            self.choose_temperature()
        return record["reward"]

    def limits_at(self, step: int) -> Limits:
        """Of what is sampled for a step, by the temperature that is known now."""
        tokens = self.recipe.sampling.tokens_at(min(step, self.recipe.steps), self.recipe.steps)
        return replace(self.limits, tokens=tokens, temperature=self.temperature.value)

    def practise(self) -> Practice:
        """What the step is to learn from."""
        self.rollouts.limits = self.limits_at(self.step)
        return practise(self.rollouts, self.curriculum, self.recipe.sampling, self.recipe.seed, self.step)

    def evaluate(self, bar: tqdm) -> None:
        """Record the reward on held-out problems, always at the recipe's temperature and full length."""
        self.rollouts.limits = self.limits
        found = attempt_held_out(self.rollouts, self.recipe.sampling, self.held_out)
        self.metrics.write({"step": self.step, "kind": "held_out", **found.record()})
        bar.write(f"step {self.step}: held-out reward {found}")

    def choose_temperature(self) -> None:
        """For the steps to come, by the reward on problems set aside at each temperature there is to choose."""
        found = {}
        for value in self.temperature.choices:
            self.rollouts.limits = replace(self.limits, temperature=value)
            found[value] = attempt_held_out(self.rollouts, self.recipe.sampling, self.validation).rewards["all"]
        self.temperature.choose({value: estimate.value for value, estimate in found.items()})
        rewards = [[value, *estimate.numbers] for value, estimate in found.items()]
        self.metrics.write({"step": self.step, "kind": "temperature", "rewards": rewards, "chosen": self.temperature.value})

    def save(self) -> None:
        with self.learner.writing(self.folder.checkpoint(self.step)) as aside:
            state = self.learner.save(aside)
            self.tokenizer.save_pretrained(aside)
            write_state({**state, **self.own_state()}, aside)
        # As a run that goes on from here begins: prefixes that held-out problems have left would change last bits.
        self.engine.blocks.forget_prefixes()
        self.folder.prune(self.recipe.keep)
        plot_run(read_metrics(self.folder.metrics), self.folder.overview, f"minglm: {self.folder.path.name}")

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the learner's state."""
        return {
            "step": self.step,
            "compute": self.compute,
            "seconds": self._seconds(),
            "curriculum": self.curriculum.state_dict(),
            "temperature": self.temperature.state_dict(),
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.step, self.compute, self.seconds_before = state["step"], state["compute"], state["seconds"]
        self.curriculum.load_state_dict(state["curriculum"])
        self.temperature.load_state_dict(state["temperature"])

    def _restore(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        self.learner.load(checkpoint, state)
        self.load_own_state(state)
        self.metrics.cut_back(self.step)
        forget_rollouts(self.folder.path / "rollouts", self.step)
        print(f"resuming: {checkpoint}")

    def _seconds(self) -> float:
        return time.perf_counter() - self.start
