"""What the launcher costs where it is not needed: a training step on one process, spread and plain, in turns.

`python -m scale.bench` prints the ratio of the medians. Both sides start from the same weights and see the same tokens.
"""

import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from minglm.config import ConfigError, GLMConfig
from minglm.data.stream import Batch
from minglm.train.device import Device, choose_device
from minglm.train.learner import Learner
from minglm.train.recipe import Hardware, Recipe, Training, find_config
from scale.learner import ShardedLearner
from scale.mesh import Layout, make_mesh


@dataclass(frozen=True)
class Bench:
    """A training step on this one process: spread over a mesh of one rank, beside the plain one."""

    model: str = "nano"
    """The name of a size in configs/model, or a TOML file."""
    sequences: int = 8
    length: int = 256
    """Tokens in a sequence."""
    repeats: int = 15
    """Steps of each, after one to warm up."""


def bench(command: Bench) -> tuple[float, float]:
    """Seconds of a step (plain, spread): medians over steps that take turns. Starts a process group if there is none."""
    device = choose_device(Hardware())
    config = GLMConfig.from_toml(find_config("model", command.model))
    recipe = Recipe(config, Training(command.length, command.sequences, command.sequences, steps=1))
    started = not dist.is_initialized()
    if started:
        backend = "cpu:gloo,cuda:nccl" if device.torch_device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = make_mesh(Layout(), device.torch_device.type)
        learners = Learner(recipe, config, device), ShardedLearner(mesh, recipe, config, device)
        batch = _batch(command, config, device)
        losses = [learner.step([batch], 1.0)[0].item() for learner in learners]
        assert losses[0] == losses[1], "the two do not compute the same"
        seconds: tuple[list[float], list[float]] = ([], [])
        for repeat in tqdm(range(command.repeats), "steps of each", disable=None):
            for side in (0, 1) if repeat % 2 else (1, 0):
                start = time.perf_counter()
                learners[side].step([batch], 1.0).tolist()  # reading the numbers waits for the device
                seconds[side].append(time.perf_counter() - start)
        return statistics.median(seconds[0]), statistics.median(seconds[1])
    finally:
        if started:
            dist.destroy_process_group()


def _batch(command: Bench, config: GLMConfig, device: Device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (command.sequences, command.length + 1), generator=generator)
    documents = torch.zeros(command.sequences, command.length, dtype=torch.int32)
    tensors = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents
    return Batch(*(tensor.to(device.torch_device) for tensor in tensors))


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for what cannot be done as asked."""
    command = tyro.cli(Bench, prog="python -m scale.bench", args=arguments)
    try:
        plain, spread = bench(command)
    except ConfigError as error:
        print(f"scale.bench: {error}", file=sys.stderr)
        return 2
    size = f"{command.model}, {command.sequences} x {command.length} tokens, {torch.get_num_threads()} threads"
    print(f"{size}: plain {plain:.3f} s, spread on one rank {spread:.3f} s, ratio {spread / plain:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
