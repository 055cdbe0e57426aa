"""The training loop: stream, losses, gradients, optimiser, router balance; held-out loss, samples and checkpoints.

`train` runs a recipe in a run folder (report, sections 2.2 to 2.4). Whatever happens to the process, the same command
goes on from the newest checkpoint and ends with the same bits as a run to which nothing happened.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minglm import ops
from minglm.data.shards import Dataset
from minglm.data.stream import Batch, RowStream, held_out_batches
from minglm.tokenizer import Tokenizer
from minglm.train.device import Device, choose_device
from minglm.train.held_out import HeldOutLoss, evaluate_held_out, share_of_rank
from minglm.train.learner import Learner
from minglm.train.metrics import MetricsFile, read_metrics
from minglm.train.mixture import describe, make_stream
from minglm.train.plots import plot_overview
from minglm.train.prefetch import Prefetcher
from minglm.train.preparation import encode_prompts, prepare_data
from minglm.train.recipe import Recipe, resolve_paths
from minglm.train.run_folder import RunFolder
from minglm.train.span import WHOLE_RUN, Span, check_tokenizer
from minglm.train.stages import PlannedStage
from minglm.train.state import read_state, write_state
from minglm.train.stop import StopRequest

# Metrics stay on the device until so many seconds have passed, so that no step makes the host wait for the device.
READ_EVERY_SECONDS = 1.0
DRAW_EVERY_SECONDS = 180.0  # plots, after a checkpoint; drawing takes three seconds


class TrainingDiverged(RuntimeError):
    """A loss, gradient or weight is not finite. The message says which, at which step, and which checkpoint is good."""


@dataclass(frozen=True)
class Outcome:
    """How `train` ended: the steps done, the newest checkpoint, and the signal that stopped it (None: it is finished)."""

    step: int
    checkpoint: Path
    stopped_by: Signals | None


def train(
    recipe: Recipe,
    run_folder: str | Path,
    generate: Callable[..., list[list[int]]] | None = None,
    must_resume: bool = False,
    span: Span = WHOLE_RUN,
) -> Outcome:
    """Train by `recipe` in `run_folder`, going on from its newest checkpoint if it has any.

    generate: what writes the samples, `minglm.engine.generate.generate`; without it there are none. (Engines build on this
    room, so it does not import them.) must_resume: refuse to start at the beginning. span: only some of the stages.

    SIGINT or SIGTERM: the step is finished and saved, and the outcome says so; a second one ends the process at once.

    Raises `ConfigError` for a recipe that does not fit the machine, its own data or the run folder, `TrainingDiverged`,
    and what `minglm.data`, `minglm.tokenizer` and `minglm.checkpoint` raise for files that cannot be used.
    """
    recipe = span.share_data(resolve_paths(recipe))
    folder = RunFolder(run_folder)
    device = choose_device(recipe.hardware)
    checkpoint, last_step = span.open(folder, recipe, must_resume)
    print(f"run folder: {folder.path} (recipe, metrics, plots, checkpoints)")
    print(f"device: {device}")
    tokenizer, dataset = prepare_data(recipe, folder.path)
    if checkpoint is not None:
        check_tokenizer(checkpoint, tokenizer)
    with ExitStack() as stack:
        stack.enter_context(ops.using(recipe.hardware.gear))
        stop = stack.enter_context(StopRequest())
        trainer = stack.enter_context(
            closing(Trainer(recipe, folder, device, tokenizer, dataset, checkpoint, generate=generate))
        )
        return trainer.run(stop, last_step)


class Trainer:
    """One run: what learns, its place in the data, and the steps done so far.

    Another kind of data than prepared text has its own `make_streams` and `held_out_batches`.
    """

    counts_specials = False  # in the held-out loss; text has none that a model could foresee

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        device: Device,
        tokenizer: Tokenizer,
        dataset: Dataset,
        checkpoint: Path | None = None,
        make_learner: Callable[..., Learner] = Learner,
        generate: Callable[..., list[list[int]]] | None = None,
    ):
        """At the beginning, or as of `checkpoint`. Where several ranks train together, the first alone writes and prints."""
        self.recipe, self.folder, self.device, self.tokenizer = recipe, folder, device, tokenizer
        self.plan, self.dataset, self.generate = recipe.plan(), dataset, generate
        self.step = self.tokens = self.tokens_read = 0
        self.seconds_before = 0.0  # that this run took in processes which were stopped or killed

        # What other programs read from config.json: where the model's turn ends, and what fills up a batch.
        ids = {"eos_token_id": list(tokenizer.end_of_turn_ids), "pad_token_id": tokenizer.end_of_document_id}
        config = replace(recipe.model, unused={**recipe.model.unused, **ids})
        # Before anything is allocated, of every stage: a run must not end after days because the last one lacks data.
        self.streams = self.make_streams()
        self.prompts = encode_prompts(recipe.samples.prompts, tokenizer)
        self.learner = make_learner(recipe, config, device, checkpoint)
        self.model, self.is_first = self.learner.model, self.learner.rank == 0
        self.byte_lengths = torch.from_numpy(tokenizer.token_byte_lengths()).to(device.torch_device)

        self.metrics = MetricsFile(folder.metrics, enabled=self.is_first)
        self.unread: list[tuple[dict[str, Any], Tensor]] = []  # records of steps whose numbers are still on the device
        self.standing = ""  # the last held-out record in a few words
        state = None if checkpoint is None else self._restore(checkpoint)
        self.stream: Prefetcher | None = None
        self._enter(self.plan.at(min(self.step + 1, self.plan.steps)), state)
        if self.is_first:
            describe(self.plan, self.streams, recipe, self.model, tokenizer)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()

    def _enter(self, stage: PlannedStage, state: dict[str, Any] | None = None) -> None:
        """Begin a stage, or go on in the middle of it from the state of a checkpoint."""
        self.close()
        self.stage = stage
        self.learner.enter(stage)
        stream = self.streams[stage.number]
        if state is not None and stage.border < self.step < stage.last_step:
            stream.load_state_dict(state["stream"])
        self.stream = Prefetcher(
            stream, stage.sequences_per_micro_batch, self.device.torch_device, self.learner.rank, self.learner.ranks
        )
        self.held_out = self._held_out(self.recipe.evaluation.tokens)

    def make_streams(self) -> list[RowStream]:
        """The sequences of each stage, from its first one."""
        return [make_stream(self.recipe, stage, self.dataset) for stage in self.plan.stages]

    def held_out_batches(self, tokens: int, domain: str | None = None) -> Iterator[Batch]:
        """The first held-out tokens (of a domain), always the same ones, for the stage."""
        stage = self.stage
        return held_out_batches(self.dataset, stage.sequence_length, stage.sequences_per_micro_batch, tokens, domain)

    def run(self, stop: StopRequest, last: int | None = None) -> Outcome:
        """Train to the last step, or that of an earlier stage, or until `stop` has a signal."""
        recipe, last = self.recipe, last or self.plan.steps
        stopped_by = None

        def due(every: int) -> bool:
            return self.plan.is_border(self.step) or (every > 0 and self.step % every == 0)

        self.start = time.perf_counter() - self.seconds_before
        self.read_at = self.drawn_at = self.seconds_before
        interval = 0.5 if sys.stderr.isatty() else 10  # a log file needs no animation
        self.bar = tqdm(
            total=last,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=interval,
            disable=not self.is_first,
        )
        with self.bar:
            if self.step == 0:
                self.evaluate()
            while self.step < last and stopped_by is None:
                self.train_step()
                if self.step < last:
                    stopped_by = self.learner.agree(stop.signal)
                if due(recipe.evaluation.every):
                    self.evaluate()
                if self.recipe.stages and self.plan.is_border(self.step):
                    self.end_stage()
                if self.generate is not None and due(recipe.samples.every):
                    self.write_samples()
                if due(recipe.checkpoints.every) or stopped_by is not None:
                    self.save()
                    if self._seconds() - self.drawn_at > DRAW_EVERY_SECONDS:
                        self.draw()
                if self._seconds() - self.read_at > READ_EVERY_SECONDS:
                    self.read_metrics()
        self.draw()
        return Outcome(self.step, self.folder.checkpoint(self.step), stopped_by)

    def train_step(self) -> None:
        """One optimiser step; its numbers stay on the device until `read_metrics`."""
        if self.step == self.stage.last_step:
            self._enter(self.plan.at(self.step + 1))
        self.step += 1
        batches = [self.stream.next() for _ in range(self.plan.micro_batches(self.step, self.learner.ranks))]
        factor = self.plan.learning_rate_factor(self.step)
        numbers = self.learner.step(batches, factor)

        sequences = len(batches) * self.stage.sequences_per_micro_batch * self.learner.ranks
        self.tokens += sequences * self.stage.sequence_length
        record = {"step": self.step, "kind": "step", "tokens": self.tokens, "sequences": sequences}
        record["learning_rate"] = factor * self.recipe.optimizer.learning_rate
        self.unread.append((record, numbers))

    def evaluate(self) -> None:
        """Record the held-out loss, and how the experts are used."""
        self.read_metrics()
        learner = self.learner
        held_out = self.judge()
        if not math.isfinite(held_out["loss"]):
            raise self._diverged(self.step, f"held-out loss not finite ({held_out['loss']})")
        self.metrics.write({"step": self.step, "kind": "held_out", **held_out, "seconds": self._seconds()})
        if learner.expert_load is not None and len(learner.expert_load):
            share = learner.expert_load / learner.expert_load.sum(1, keepdim=True)
            bias = torch.stack([router.e_score_correction_bias for router in self.model.routers()])
            router = {"expert_share": share.tolist(), "bias": bias.tolist()}
            self.metrics.write({"step": self.step, "kind": "router", **router})
        self.read_at = self._seconds()  # not the training's time

    def judge(self) -> dict[str, Any]:
        """What a held-out record says: `loss`, and more."""
        held_out = self._held_out_loss(self.held_out)
        self.standing = f"held-out {held_out.bits_per_byte:.3f} bits/byte"
        return asdict(held_out)

    def end_stage(self) -> None:
        """Record that a stage has ended, and the held-out loss of each domain, at the stage's sequence length."""
        self.read_metrics()
        stage = self.stage
        self.metrics.write({"step": self.step, "kind": "stage", "name": stage.name, "sequence_length": stage.sequence_length})
        tokens = max(1, self.recipe.evaluation.tokens // len(self.dataset.domains))
        for domain in self.dataset.held_out_domains:
            batches = self._held_out(tokens, domain)
            held_out = self._held_out_loss(batches)
            self.metrics.write({"step": self.step, "kind": "domain", "domain": domain, **asdict(held_out)})
        self.read_at = self._seconds()  # not the training's time

    def _held_out(self, tokens: int, domain: str | None = None) -> list[Batch]:
        """This rank's share of the first held-out tokens (of a domain)."""
        return share_of_rank(list(self.held_out_batches(tokens, domain)), self.learner.rank, self.learner.ranks)

    def _held_out_loss(self, batches: list[Batch]) -> HeldOutLoss:
        sum_over_ranks = self.learner.sum_over_ranks
        return evaluate_held_out(self.model, batches, self.byte_lengths, self.device, sum_over_ranks, self.counts_specials)

    def write_samples(self) -> None:
        """Let the model continue each prompt, always with the same draws: what changes from sample to sample is the model."""
        self.read_metrics()
        samples = self.recipe.samples
        for prompt, ids in self.prompts.items():
            with self.device.autocast():
                (written,) = self.generate(
                    self.model,
                    torch.tensor([ids], device=self.device.torch_device),
                    samples.tokens,
                    temperature=samples.temperature,
                    top_p=samples.top_p,
                    stop_ids=[self.tokenizer.end_of_document_id],
                    vocab_size=self.tokenizer.vocab_size,
                    generator=torch.Generator(self.device.torch_device).manual_seed(self.recipe.seed),
                )
            text = self.tokenizer.decode(written)
            self.metrics.write({"step": self.step, "kind": "sample", "prompt": prompt, "text": text})
            self.bar.write(f"--- step {self.step}: {prompt!r} continued\n{prompt}{text}\n")
        self.read_at = self._seconds()  # not the training's time

    def save(self) -> None:
        """Write a checkpoint, and drop the oldest ones."""
        self.read_metrics()
        bad = self.learner.bad_weights()
        if bad:
            raise self._diverged(self.step, f"{len(bad)} weight tensors not finite, {bad[0]} the first")
        with self.learner.writing(self.folder.checkpoint(self.step)) as aside:
            state = {
                "step": self.step,
                "tokens": self.tokens,
                "seconds": self._seconds(),
                "standing": self.standing,
                "stream": self.stream.state_dict(),
                **self.learner.save(aside),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all(),
            }
            if self.is_first:
                self.tokenizer.save_pretrained(aside)
                write_state(state, aside)
        if self.is_first:
            self.folder.prune(self.recipe.checkpoints.keep, {stage.last_step for stage in self.plan.stages})
        self.read_at = self._seconds()  # not the training's time

    def draw(self) -> None:
        """Redraw the plots from the metrics on disk."""
        if self.is_first:
            plot_overview(read_metrics(self.folder.metrics), self.folder.overview, f"minglm: {self.folder.path.name}")
        self.read_at = self.drawn_at = self._seconds()

    def _restore(self, checkpoint: Path) -> dict[str, Any]:
        """Return the state, of which the place in the data is still to be restored."""
        state = read_state(checkpoint)
        self.step, self.tokens, self.seconds_before = state["step"], state["tokens"], state["seconds"]
        self.tokens_read, self.standing = self.tokens, state["standing"]
        self.learner.load(checkpoint, state)
        torch.set_rng_state(state["rng"])
        if len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.metrics.cut_back(self.step)
        if self.is_first:
            print(f"resuming: {checkpoint}")
        return state

    def read_metrics(self) -> None:
        """Fetch the numbers of the steps since the last time, check and write them, and show the newest."""
        if not self.unread:
            return
        records, numbers = zip(*self.unread, strict=True)
        self.unread = []
        rows = torch.stack(numbers).tolist()  # the host waits for the device here
        now = self._seconds()
        seconds_each = (now - self.read_at) / len(records)
        tokens_per_second = (records[-1]["tokens"] - self.tokens_read) / (now - self.read_at)
        self.tokens_read = records[-1]["tokens"]
        good = []
        names = self.learner.numbers
        for record, values in zip(records, rows, strict=True):
            parts = dict(zip(names, values[: len(names)], strict=True))
            if not all(map(math.isfinite, parts.values())):
                self.metrics.write(*good)
                shown = {name.replace("_", " "): value for name, value in parts.items() if name != "loss"}  # it is their sum
                bad = ", ".join(name for name, value in shown.items() if not math.isfinite(value))
                found = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
                raise self._diverged(record["step"], f"{bad} not finite ({found})")
            record |= {**parts, "max_violation": values[len(names) :]}
            record["seconds"] = self.read_at + seconds_each * (len(good) + 1)
            record["tokens_per_second"] = tokens_per_second
            good.append(record)
        self.metrics.write(*good)
        self.bar.set_postfix_str(
            f"loss {good[-1]['loss']:.3f}, {self.standing}, {tokens_per_second:,.0f} tokens/s",
            refresh=False,
        )
        self.bar.update(len(good))
        self.read_at = now

    def _seconds(self) -> float:
        """How long this run has taken, in this process and those before it."""
        return time.perf_counter() - self.start

    def _diverged(self, step: int, what: str) -> TrainingDiverged:
        newest = self.folder.newest_checkpoint()
        return TrainingDiverged(
            f"step {step}: {what}. Nothing was saved since; the last good checkpoint is "
            f"{newest or 'none: there was no save before'}. What may help, in another run folder: a lower "
            f"optimizer.learning_rate (now {self.recipe.optimizer.learning_rate:g}), a longer schedule.warmup_steps "
            f"(now {self.recipe.schedule.warmup_steps})"
        )
