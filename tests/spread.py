"""Training on several gloo processes, beside one process that does the same: what the tests of `scale/` share."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from small_run import in_child

from minglm.config import GLMConfig
from minglm.data.stream import IGNORED, PADDING, Batch
from minglm.train.device import Device
from minglm.train.learner import Learner
from minglm.train.recipe import Hardware, Optimizer, Recipe, Training
from scale.learner import ShardedLearner
from scale.mesh import Layout, make_mesh

CPU = Device(torch.device("cpu"), False, "the tests' device")
STEPS = 10


def nano_recipe(**changes: object) -> Recipe:
    """The real nano model; `changes` are its configuration's."""
    config = replace(GLMConfig.from_toml("configs/model/nano.toml"), **changes)
    training = Training(steps=STEPS, sequence_length=48, sequences_per_step=8, sequences_per_micro_batch=1)
    return Recipe(config, training, optimizer=Optimizer(learning_rate=8e-3), hardware=Hardware(device="cpu"))


def sequences_of_step(recipe: Recipe, step: int) -> Batch:
    """Packed documents with a skewed vocabulary, some single tokens, padding at the end of some rows."""
    count, length = recipe.training.sequences_per_step, recipe.training.sequence_length
    generator = torch.Generator().manual_seed(step)
    ids = (torch.rand(count, length + 1, generator=generator) ** 3 * recipe.model.vocab_size).long()
    starts = torch.rand(count, length + 1, generator=generator) < 0.08
    documents = starts.long().cumsum(1)
    padded = torch.arange(length + 1) >= length + 1 - torch.randint(0, 9, (count, 1), generator=generator)
    documents = documents.masked_fill(padded, PADDING)
    labels = ids[:, 1:].masked_fill((documents[:, 1:] != documents[:, :-1]) | padded[:, 1:], IGNORED)
    return Batch(ids[:, :-1].contiguous(), labels, documents[:, :-1].contiguous().int())


def batches_of_rank(recipe: Recipe, step: int, rank: int, ranks: int) -> list[Batch]:
    """This rank's micro-batches, of one sequence each: those that `TokenStream.next` would deal to it."""
    whole = sequences_of_step(recipe, step)
    return [
        Batch(*(getattr(whole, name)[i : i + 1] for name in ("input_ids", "labels", "document_ids")))
        for i in range(rank, len(whole.input_ids), ranks)
    ]


def take_steps(learner: Learner, steps: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> the numbers that `Learner.step` returns, (steps, n), and all router biases after each step, (steps, layers, E)."""
    numbers, biases = [], []
    for step in steps:
        numbers.append(learner.step(batches_of_rank(learner.recipe, step, learner.rank, learner.ranks), 1.0))
        biases.append(torch.stack([router.e_score_correction_bias.clone() for router in learner.model.routers()]))
    return torch.stack(numbers), torch.stack(biases)


def spread_learner(layout: Layout, recipe: Recipe, checkpoint: Path | None = None) -> ShardedLearner:
    learner = ShardedLearner(make_mesh(layout, "cpu"), recipe, recipe.model, CPU, checkpoint)
    learner.model.train()
    return learner


def on_ranks(ranks: int, work: Callable[..., None], *arguments: object) -> None:
    """Run `work(*arguments)` on that many gloo processes; what one of them raises is raised here, in words."""
    with tempfile.TemporaryDirectory() as folder:
        children = [in_child(_rank, rank, ranks, folder, work, *arguments) for rank in range(ranks)]
        for child in children:
            child.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
        assert not errors, "\n".join(errors)
        assert all(child.exitcode == 0 for child in children), [child.exitcode for child in children]


def _rank(rank: int, ranks: int, folder: str, work: Callable[..., None], *arguments: object) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
        )
        work(*arguments)
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(f"rank {rank} of {ranks}:\n{traceback.format_exc()}")
        sys.stderr.flush()
        os._exit(1)
