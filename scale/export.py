"""A Hugging Face folder of a run's checkpoint: `python -m scale.export runs/nano/checkpoints/step-600 my-model`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tyro.conf import Positional, arg

from scale.checkpoint import export

PROGRAM = "python -m scale.export"


@dataclass(frozen=True)
class Export:
    """Write the weights of a checkpoint of scale.train as a Hugging Face folder. One process, the memory of one layer."""

    checkpoint: Annotated[Positional[Path], arg(metavar="CHECKPOINT")]
    """A step-N folder."""
    target: Annotated[Positional[Path], arg(metavar="TARGET")]
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the weights; routing biases stay fp32 always."""
    max_shard_gb: float = 5.0
    """Size of a file at most, in GB."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for what cannot be done as asked."""
    command = tyro.cli(Export, prog=PROGRAM, args=arguments)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    print(f"export: {command.checkpoint} is read a parameter at a time; {command.target} appears when all of it is there")
    try:
        export(command.checkpoint, command.target, dtypes[command.dtype], int(command.max_shard_gb * 1e9))
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    print(f"made: {command.target}, a Hugging Face folder that minglm, transformers, vLLM and SGLang read")
    return 0


if __name__ == "__main__":
    sys.exit(main())
