"""`python -m scale.plan MODEL --gpus N`: a mesh for a model on a cluster, before a single GPU is booked.

    python -m scale.plan configs/model/glm-4.5.toml --gpus 512 --gpu h100

Chooses dp x fsdp x ep (`scale.search`) and prints what each rank holds, to the parameter (`scale.footprint`), how long a step
would take (`scale.roofline`, an estimate), why the neighbouring meshes were not taken, and the command that launches the run
(`scale.report`). Exit code 0; 1 if nothing fits; 2 for what cannot be asked.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from minglm.config import ConfigError, GLMConfig
from minglm.params import PRE_TRAINING_LENGTH, count
from minglm.train.recipe import find_config
from scale.footprint import Workload, memory_of_rank, parameters_of_rank
from scale.hardware import GPU, find_gpu
from scale.report import launch, report
from scale.search import GIB, REPORT_TOKENS_PER_STEP, SMALL_TOKENS_PER_STEP, Plan, Setting, plan

__all__ = ["Plan", "Setting", "Workload", "main", "memory_of_rank", "parameters_of_rank", "plan", "report"]

PROGRAM = "python -m scale.plan"


@dataclass(frozen=True)
class Options:
    """Which mesh, how much memory, how long: for a model on a number of GPUs."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """The name of a size in configs/model, a TOML file, or a Hugging Face folder."""
    gpus: int
    """In all nodes together."""
    gpu: str = "h100"
    """a100-40, a100-80, h100, h200, b200 or mi300x."""
    gpus_per_node: int | None = None
    """By default 8, or all GPUs if there are fewer."""
    sequence_length: int | None = None
    """Tokens; by default 4096, that of GLM-4.5's pre-training, or what the model can take."""
    sequences_per_micro_batch: int = 1
    """So many go through the model at once, on each rank its own."""
    tokens_per_step: int | None = None
    """Of all ranks, rounded to a multiple of what they take at once. By default 16M, the report's; 0.5M below 1B parameters."""
    activation_checkpointing: bool = True
    """Compute a layer's activations again in the backward pass instead of keeping them."""
    dp: int | None = None
    """Only meshes with so many copies of the model."""
    fsdp: int | None = None
    """Only meshes that cut a copy into so many parts beside ep."""
    ep: int | None = None
    """Only meshes that divide the experts by this."""
    reserve_gib: float = 6.0
    """A rank's memory that nobody can count: CUDA context, buffers of NCCL, fragmentation."""
    imbalance: float = 1.3
    """The busiest expert-parallel rank gets so many times its fair share of rows."""
    rollout_tokens: int = 8 * 8192
    """Of a rollout on each rank (sequences times length), for its KV cache."""
    mfu: float = 0.35
    """The part of the peak that matrix products reach while they run, for the estimate."""
    memory_gib: float | None = None
    """Of a GPU; these last four replace what the table of GPUs says."""
    tflops: float | None = None
    """Peak of dense bf16 products, 10^12 FLOPs a second."""
    intra_node_gbps: float | None = None
    """Between GPUs of a node, one direction, 10^9 bits a second (3600 for NVLink of an H100)."""
    inter_node_gbps: float | None = None
    """Network of each GPU, one direction, 10^9 bits a second, as the card's name says (400)."""
    dry_run: bool = False
    """Then build and run the first, middle and last rank of the chosen mesh on a fake process group."""


def main(arguments: list[str] | None = None) -> int:
    """Plan, print, and return the exit code."""
    options = tyro.cli(Options, prog=PROGRAM, description=Options.__doc__, args=arguments)
    try:
        made = plan(setting(options), options.gpus, options.dp, options.fsdp, options.ep)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(made))
    if made.chosen is None:
        return 1
    print("\n" + launch(made, options.model))
    if options.dry_run:
        from scale.dry_run import dry_run
        from scale.dry_run import report as dry_run_report

        workload, last = made.setting.workload, made.gpus - 1
        runs = dry_run(
            made.setting.config,
            made.chosen.layout,
            workload.sequence_length,
            workload.sequences_per_micro_batch,
            workload.activation_checkpointing,
            ranks=tuple(sorted({0, made.gpus // 2, last})),
        )
        print("\n" + dry_run_report(runs, made.setting.config, made.chosen.layout))
    return 0


def setting(options: Options) -> Setting:
    """The options with what they leave out filled in. Raises `ConfigError`."""
    config = find_model(options.model)
    small = count(config).total < 1e9
    length = min(PRE_TRAINING_LENGTH, config.max_position_embeddings)
    workload = Workload(
        length if options.sequence_length is None else options.sequence_length,
        options.sequences_per_micro_batch,
        options.activation_checkpointing,
        options.imbalance,
        options.rollout_tokens,
    )
    tokens_per_step = options.tokens_per_step
    if tokens_per_step is None:
        tokens_per_step = SMALL_TOKENS_PER_STEP if small else REPORT_TOKENS_PER_STEP
    return Setting(config, gpu(options), workload, tokens_per_step, int(options.reserve_gib * GIB), options.mfu)


def gpu(options: Options) -> GPU:
    """The GPU of the table, with the numbers that the options replace."""
    gigabytes = {"intra_node_gb_per_s": options.intra_node_gbps, "inter_node_gb_per_s": options.inter_node_gbps}
    replaced = {name: None if bits is None else bits / 8 for name, bits in gigabytes.items()}
    replaced |= {name: getattr(options, name) for name in ("memory_gib", "tflops", "gpus_per_node")}
    return dataclasses.replace(find_gpu(options.gpu), **{name: v for name, v in replaced.items() if v is not None})


def find_model(name_or_path: str) -> GLMConfig:
    """A size in configs/model by its name, a TOML file, or a Hugging Face folder (or its config.json)."""
    path = Path(name_or_path)
    if path.is_dir() or path.suffix == ".json":
        return GLMConfig.from_pretrained(path)
    return GLMConfig.from_toml(find_config("model", path))


if __name__ == "__main__":
    sys.exit(main())
