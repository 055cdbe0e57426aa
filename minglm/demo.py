"""The demo: the whole story of GLM-4.5 at a size that a laptop trains, part by part, with one progress display and one page.

    text and tokenizer, the stages of training      a run of `train`
    cold start, experts, unified model, its RL      an iteration of `experts`
    what the stages can do, how reliable it is      two of `eval`
    model/, report.html

Every part goes on where it was killed and is a function of its recipe, so the whole is. What the parts print goes into
demo.log; the display, and report.html, are made by a thread that only reads what is in the folder.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Literal

from minglm.posttrain.experts.recipe import ExpertsRecipe, load_experts_recipe, scaled
from minglm.report.costs import PROGRAM
from minglm.report.html import duration
from minglm.report.parts import EXPERTS, Story, evaluations
from minglm.report.progress import Progress
from minglm.train.recipe import Recipe, load_recipe
from minglm.train.stages import require

Form = Literal["quick", "default", "full"]
DEFAULT_TRAINING = 0.8
"""Of the lengths of the stages, so that the story takes no more than half an hour on two cores."""
FULL = 8.0
"""Times the lengths of nano's recipes."""
LOG = "demo.log"


class Stopped(RuntimeError):
    """A signal has stopped the demo, and everything is saved. Attribute: signal."""

    def __init__(self, signal: Signals):
        super().__init__(f"stopped by {signal.name}; everything is saved")
        self.signal = signal


@dataclass(frozen=True)
class Plan:
    """What the demo is to do."""

    form: Form
    training: Recipe
    experts: ExpertsRecipe
    folder: Path

    @classmethod
    def of(cls, form: Form, folder: Path | None = None) -> "Plan":
        """quick: recipes that only show that everything works; default: nano's, of training `DEFAULT_TRAINING`; full: nano's,
        every length `FULL` times."""
        name = "quick" if form == "quick" else "nano"
        training, experts = load_recipe(name), load_experts_recipe(name)
        longer = {"quick": 1.0, "default": DEFAULT_TRAINING, "full": FULL}[form]
        if longer != 1:
            training = replace(training, training=replace(training.training, scale=longer * training.training.scale))
        if form == "full":
            experts = scaled(experts, FULL)
        default = {"quick": "quick", "default": "demo", "full": "full"}[form]
        return cls(form, training, experts, folder or Path("runs", default))

    def open(self) -> Story:
        """Write the recipes into the folder, so that what will come is known from the first moment on -> the story.

        Raises `ConfigError` if the folder holds another one.
        """
        from minglm.posttrain.experts.pipeline import open_folder
        from minglm.train.recipe import resolve_paths
        from minglm.train.run_folder import RunFolder

        require(bool(self.training.stages), "stages", (), "a recipe with stages")
        RunFolder(self.folder).open(resolve_paths(self.training))
        open_folder(self._experts, self.folder / EXPERTS)
        return Story.of(self.folder)

    @property
    def base(self) -> Path:
        """Where the last stage will leave its model."""
        return self.folder / "checkpoints" / f"step-{self.training.plan().steps}"

    @property
    def _experts(self) -> ExpertsRecipe:
        return replace(self.experts, base=self.base)

    def steps(self) -> list[Callable[[], None]]:
        """What does the parts, in order. Each does nothing that is done already."""
        return [self._train, self._iterate, self._evaluate, self._keep_model]

    def _train(self) -> None:
        from minglm.engine.generate import generate
        from minglm.train.trainer import train

        if not self.base.is_dir():
            outcome = train(self.training, self.folder, generate)
            if outcome.stopped_by is not None:
                raise Stopped(outcome.stopped_by)

    def _iterate(self) -> None:
        from minglm.posttrain.experts import pipeline

        try:
            pipeline.experts(self._experts, self.folder / EXPERTS)
        except pipeline.Stopped as stopped:
            raise Stopped(stopped.signal) from stopped

    def _evaluate(self) -> None:
        import tyro

        from minglm.evals.command import Eval, run_eval

        story = Story.of(self.folder)
        done = {part.name for part in story.parts() if part.done}
        for name, arguments in evaluations(story).items():
            if name not in done:
                run_eval(tyro.cli(Eval, args=arguments))

    def _keep_model(self) -> None:
        """The kept round's model, after RL, as a folder of its own without what only its training needs."""
        import shutil

        from minglm.files import write_folder_atomically
        from minglm.train.run_folder import RunFolder

        story = Story.of(self.folder)
        newest = RunFolder(story.iteration / f"round-{story.kept_round()}" / "rl").newest_checkpoint()
        if not story.model.is_dir():
            with write_folder_atomically(story.model) as aside:
                for file in newest.iterdir():
                    if file.is_file():
                        shutil.copy(file, aside)


def demo(plan: Plan) -> int:
    """Do all parts, or those that are still to be done. -> the exit code. Raises what the parts raise."""
    story = plan.open()
    parts = story.parts()
    left = [part for part in parts if not part.done]
    progress = Progress(story, plan.form)
    print(
        f"demo: {len(parts)} parts, {len(parts) - len(left)} of them done, about {duration(progress.left())} to go; everything"
    )
    print(
        f"is written to {plan.folder}, what the parts print to {plan.folder / LOG}\n\n  {progress.report}    look at it now\n"
    )
    try:
        with progress, _quiet(plan.folder / LOG):
            for step in plan.steps():
                step()
    except Stopped as stopped:
        print(f"\n{stopped}\nto go on: the same command")
        return 128 + stopped.signal
    print(_ending(story, progress))
    return 0


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """What is printed goes into a file, so that there is one display."""
    with log.open("a", encoding="utf-8", buffering=1) as file:
        file.write(f"\n=== {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield


def _ending(story: Story, progress: Progress) -> str:
    folder = story.folder
    return f"""
{(story.iteration / "results.md").read_text(encoding="utf-8").partition("## Rounds")[0].rstrip()}

made, in {duration(sum(progress.record.seconds.values()))}:
  {progress.report}    the whole story: pictures, tables, conversations, costs
  {story.model}    the model at its end: a Hugging Face folder, with its tokenizer
  {folder}    the run of training: a checkpoint at the end of each stage
  {story.iteration}    experts, answers, unified models, exams

to try next:
  {PROGRAM} chat {folder}
  {PROGRAM} serve {folder}
  {PROGRAM} convert {story.model} my-model --dtype bf16
  {PROGRAM} experts --recipe {story.iteration / "config.toml"} --compare    two other ways to one model; then
  {PROGRAM} report {folder}    the page with them
  {PROGRAM} eval {folder}    every stage, a column each"""
