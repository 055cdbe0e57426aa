"""The smallest run that has everything: MTP, accumulation, evaluation, samples, checkpoints; and ways to kill it."""

import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # torch imports it at the first optimiser step, which would cost each child a second

import minglm
from minglm.config import GLMConfig
from minglm.engine.generate import generate
from minglm.train.metrics import WALL_CLOCK, read_metrics
from minglm.train.recipe import Checkpoints, Data, Evaluation, Hardware, Optimizer, Recipe, Samples, Schedule, Training
from minglm.train.run_folder import RunFolder
from minglm.train.state import read_state
from minglm.train.trainer import Outcome, train

Run = Callable[[Any, Path], Any]
"""Of a recipe, in a folder."""
STEPS = 24
MODEL = GLMConfig(
    vocab_size=300,
    hidden_size=16,
    num_hidden_layers=2,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    max_position_embeddings=64,
)
WORDS = "the a of model token expert router learns routes reads small large true false and or not if else return".split()


def write_text(path: Path, documents: int = 20, words: int = 60) -> Path:
    """Sentences of a few words, as JSONL."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=words)) + f" {number}." for number in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def small_recipe(text: Path, **changes: object) -> Recipe:
    """`changes` are keys of any of the tables, by name."""
    tables = {
        "training": (Training, dict(steps=STEPS, sequence_length=16, sequences_per_step=4, sequences_per_micro_batch=2)),
        "optimizer": (Optimizer, dict(learning_rate=1e-2)),
        "schedule": (Schedule, dict(warmup_steps=2)),
        "evaluation": (Evaluation, dict(every=6, tokens=128)),
        "samples": (Samples, dict(every=8, prompts=("the model",), tokens=5)),
        "checkpoints": (Checkpoints, dict(every=2, keep=2)),
        "data": (Data, dict(path=text)),
        "hardware": (Hardware, dict(device="cpu")),
    }
    top = {key: changes.pop(key) for key in ("seed", "tokenizer", "model", "stages") if key in changes}
    if "stages" in top:
        tables["training"][1].pop("steps")
    for cls, values in tables.values():
        values |= {key: changes.pop(key) for key in list(changes) if key in cls.__dataclass_fields__}
    assert not changes, changes
    return Recipe(**({"model": MODEL} | top), **{name: cls(**values) for name, (cls, values) in tables.items()})


def run_small(recipe: Recipe, folder: Path) -> Outcome:
    torch.set_num_threads(1)
    return train(recipe, folder, generate)


_COUNTED = (str(Path(minglm.__file__).parent), torch.serialization.__file__)


def count_calls(when_reached: Callable[[int], None]) -> None:
    """Have `when_reached` told the number of each call that minglm and `torch.save` make in this thread from now on."""
    made = 0

    def count(frame, _event, _argument) -> None:
        nonlocal made
        if frame.f_code.co_filename.startswith(_COUNTED):
            made += 1
            when_reached(made)

    sys.setprofile(count)


def run_counting(recipe: Any, folder: Path, calls: Path, run: Run = run_small) -> None:
    """`run`, then write into the file `calls` how many calls it took."""
    last = 0

    def remember(made: int) -> None:
        nonlocal last
        last = made

    count_calls(remember)
    run(recipe, folder)
    sys.setprofile(None)
    calls.write_text(str(last))


def run_until_killed(recipe: Any, folder: Path, calls: int, run: Run = run_small) -> None:
    """`run` in a process that kills itself by SIGKILL at its `calls`-th call, whatever it is doing."""
    count_calls(lambda made: os.kill(os.getpid(), signal.SIGKILL) if made == calls else None)
    run(recipe, folder)


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["small_run"])


def in_child(function: Callable[..., None], *arguments: object) -> multiprocessing.Process:
    """Start `function` in a process of its own, forked from a server that has imported torch once."""
    process = _context.Process(target=function, args=arguments)
    # The server, which starts with the first child, finds modules by the environment's path only.
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        process.start()
    return process


def finished_run(recipe: Recipe, folder: Path) -> Path:
    """The folder of a finished run inside of `folder`, the number of calls that it took (in `calls`) beside it."""
    process = in_child(run_counting, recipe, folder / "run", folder / "calls")
    process.join()
    assert process.exitcode == 0
    return folder / "run"


def everything_written(folder: Path) -> tuple[list[dict], dict[str, bytes], dict]:
    """What must be equal between two runs: metrics but for the clock, all files of the newest checkpoint, its state."""
    run = RunFolder(folder)
    metrics = [{k: v for k, v in record.items() if k not in WALL_CLOCK} for record in read_metrics(run.metrics)]
    checkpoint = run.newest_checkpoint()
    files = {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir()) if path.is_file()}
    state = read_state(checkpoint)
    del state["seconds"]
    return metrics, files, state


def equal(a: object, b: object) -> bool:
    """Equality to the bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b
