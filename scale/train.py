"""Train on many devices by the recipe that one device takes: `torchrun --nproc-per-node N -m scale.train RECIPE`.

The loop is `minglm.train.trainer`'s; what learns is spread over the ranks (`scale.learner`). The run folder must be one
that all ranks see. However the run ends, the same command goes on from its newest complete checkpoint, on this or any other
number of ranks; torchrun's --max-restarts does so by itself when a rank dies.
"""

import math
import os
import signal
import sys
import time
from contextlib import ExitStack, closing, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import tyro
from torch.distributed.elastic.multiprocessing.errors import record
from tyro.conf import Positional, arg

from minglm import ops
from minglm.config import ConfigError
from minglm.train.device import Device, choose_device
from minglm.train.preparation import prepare_data
from minglm.train.recipe import Hardware, Recipe, load_recipe, resolve_paths
from minglm.train.run_folder import RunFolder
from minglm.train.stages import PlannedStage
from minglm.train.stop import StopRequest
from minglm.train.trainer import Outcome, Trainer
from scale.learner import ShardedLearner
from scale.mesh import Layout, LayoutError, control_group, first_rank_does, first_rank_first, make_mesh

PROGRAM = "torchrun --nproc-per-node N -m scale.train"
# So long a rank that has lost another one waits for torchrun to notice which rank it was that died.
GRACE_SECONDS = 10


@dataclass(frozen=True)
class Train:
    """Train by a recipe on all processes that torchrun has started; without torchrun, on this one.

    world size = dp x fsdp x ep. Any key of the recipe can be overridden: --training.steps 100. Run again, on any number of
    processes, it goes on from the newest checkpoint.
    """

    recipe_file: Annotated[Positional[str], arg(metavar="RECIPE")]
    """nano, tiny, mini or a path; runs/NAME/config.toml goes on with that run."""
    recipe: Annotated[Recipe, arg(name="")]  # its options have no prefix
    dp: int = 1
    """Copies of the sharded model."""
    fsdp: int | None = None
    """Ranks that share one copy's parameters and see different sequences (by default what dp and ep leave)."""
    ep: int = 1
    """Ranks among which the routed experts are divided; they exchange tokens in every layer: keep them in one node."""
    run_folder: Path | None = None
    """Where everything is written (runs/ and the recipe's name); on a file system that all processes share."""
    resume: bool = False
    """Refuse to start anew if there is no checkpoint to go on from."""


@record
def main(arguments: list[str] | None = None) -> int:
    """The command line of every rank; returns its exit code, as `python -m minglm` does."""
    arguments = sys.argv[1:] if arguments is None else arguments
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        command = _parse(arguments)
        path = Path(command.recipe_file)
        folder = command.run_folder or (path.parent if path.name == "config.toml" else Path("runs", path.stem))
        layout = Layout.over(world_size, command.dp, command.fsdp, command.ep)
        with redirect_stdout(sys.stdout if rank == 0 else open(os.devnull, "w")):
            outcome = train(command.recipe, folder, layout, command.resume)
            _say_what_next(outcome, RunFolder(folder), layout)
            sys.stdout.flush()
        return 0 if outcome.stopped_by is None else 128 + outcome.stopped_by
    except (ValueError, OSError) as error:  # ours are for people to read, and the same on all ranks
        if type(error).__module__.partition(".")[0] not in ("minglm", "scale") and not isinstance(error, OSError):
            raise
        print(f"scale.train: {error}" if rank == 0 else f"scale.train, rank {rank}: {error}", file=sys.stderr)
        return 2
    except dist.DistError as error:
        _lost(rank, error)
        raise
    except RuntimeError as error:
        if world_size > 1 and any(word in str(error) for word in ("gloo", "NCCL", "Connection", "Timed out")):
            _lost(rank, error)
        raise


def train(recipe: Recipe, run_folder: str | Path, layout: Layout, must_resume: bool = False) -> Outcome:
    """Train by `recipe` in `run_folder` on all ranks of `layout`, going on from the newest checkpoint if there is any.

    Every process must call it with the same arguments; process groups are made here. Samples of text are not written: the
    model is nowhere whole. Raises `LayoutError` for a layout that does not fit model, batch or number of processes, before
    anything is allocated, and else what `minglm.train.trainer.train` raises.
    """
    check(recipe, layout)
    recipe = resolve_paths(recipe)
    folder = RunFolder(run_folder)
    device = _device_of_rank(recipe.hardware)
    with ExitStack() as stack:
        if not dist.is_initialized():
            _start_process_groups(device)
            stack.callback(control_group.cache_clear)
            stack.callback(dist.destroy_process_group)
        mesh = make_mesh(layout, device.torch_device.type)
        checkpoint = first_rank_does(partial(folder.open, recipe, must_resume))
        print(f"run folder: {folder.path} (recipe, metrics, plots, checkpoints)")
        print(f"devices: {layout.world_size} ranks, {layout}; the first: {device}")
        tokenizer, dataset = first_rank_first(partial(prepare_data, recipe, folder.path))
        stack.enter_context(ops.using(recipe.hardware.gear))
        stop = stack.enter_context(StopRequest())
        make_learner = partial(ShardedLearner, mesh)
        trainer = stack.enter_context(closing(Trainer(recipe, folder, device, tokenizer, dataset, checkpoint, make_learner)))
        outcome = trainer.run(stop)
        dist.barrier(group=control_group())  # torchrun ends all others when one ends: not before the first has drawn its plots
        return outcome


def check(recipe: Recipe, layout: Layout) -> None:
    """Raises `LayoutError` or `ConfigError`, naming the fix, if the recipe cannot be trained on this layout."""
    layout.check(recipe.model)
    plan = recipe.plan()
    for stage in plan.stages:
        _check_shared(stage.sequences_per_step, stage, "sequences_per_step", recipe, layout)
    if plan.batch_warmup_steps:
        _check_shared(plan.first_sequences_per_step, plan.stages[0], "first_sequences_per_step", recipe, layout)
    if recipe.hardware.compile:
        raise ConfigError("hardware.compile = true: not together with scale.train yet; wanted false")


def _check_shared(found: int, stage: PlannedStage, key: str, recipe: Recipe, layout: Layout) -> None:
    """Each rank must get equally many whole micro-batches of a step."""
    at_once = stage.sequences_per_micro_batch * layout.world_size
    if found % at_once == 0:
        return
    own = recipe.stages and stage.sequence_length != recipe.training.sequence_length
    where = f"stages.{stage.number}" if own else "training"  # where an option changes it
    nearest = max(1, round(found / at_once)) * at_once
    smaller = math.gcd(found // layout.world_size, stage.sequences_per_micro_batch)
    shrink = f", --{where}.sequences-per-micro-batch {smaller}" if found % layout.world_size == 0 else ""
    name = f"stages.{stage.name}" if own else "training"
    raise LayoutError(
        f"{name}.{key} = {found}: {layout.world_size} ranks take {at_once} sequences at once "
        f"({stage.sequences_per_micro_batch} each); wanted a multiple, such as --{where}.{key.replace('_', '-')} "
        f"{nearest}{shrink}, or fewer ranks"
    )


def _parse(arguments: list[str]) -> Train:
    """The recipe's values are the defaults of the options; in plain `--help`, nano's."""
    name = arguments[0] if arguments else ""
    recipe = load_recipe("nano" if not name or name.startswith("-") else name)
    command = tyro.cli(Train, prog=PROGRAM, default=Train(tyro.MISSING, recipe), args=arguments)
    if command.recipe_file != name:
        raise ConfigError(f"found {name!r} first; wanted the recipe first and its options after it")
    return command


def _device_of_rank(hardware: Hardware) -> Device:
    """A GPU for each rank of a node, by its number there; or the CPU."""
    if torch.cuda.is_available() and hardware.device in ("auto", "cuda"):
        hardware = replace(hardware, device=f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}")
    elif hardware.device == "auto":
        hardware = replace(hardware, device="cpu")
    device = choose_device(hardware)
    if device.torch_device.type == "cuda":
        torch.cuda.set_device(device.torch_device)
    return device


def _start_process_groups(device: Device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.torch_device.type == "cuda" else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    # After a restart, torchrun of PyTorch 2.13 hands out the store of the attempt before, with the addresses of dead
    # processes. Nodes may count restarts differently: where there are several, scale/launch has torchrun make new stores.
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def _lost(rank: int, error: Exception) -> None:
    """A rank that others wait for is gone. torchrun names the first that died, if this one does not die meanwhile."""
    print(f"scale.train, rank {rank}: lost another rank ({str(error).splitlines()[0][:200]})", file=sys.stderr, flush=True)
    time.sleep(GRACE_SECONDS)


def _say_what_next(outcome: Outcome, run: RunFolder, layout: Layout) -> None:
    if outcome.stopped_by is not None:
        print(f"\nstopped by {signal.Signals(outcome.stopped_by).name} after step {outcome.step}: {outcome.checkpoint}")
        print(f"to go on: torchrun --nproc-per-node {layout.world_size} -m scale.train {run.config}")
        return
    print(f"""
made:
  {run.overview}    plots: losses, bits per byte, how the experts are used
  {outcome.checkpoint}    weights and optimiser, in parts
  {run.metrics}    every number

to try next:
  python -m scale.export {outcome.checkpoint} OUT    a Hugging Face folder, with its tokenizer""")


if __name__ == "__main__":
    sys.exit(main())
