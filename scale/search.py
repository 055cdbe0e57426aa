"""The choice of a mesh: every layout of a number of ranks, what it needs, and the best of those that fit.

Layouts that do not divide the model or do not fit into memory (`scale.footprint`) are dropped; of the others the one with the
shortest estimated step is taken (`scale.roofline`), and where several are within 1% of it, the one whose shards lie on the
fewest ranks.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from minglm.config import ConfigError, GLMConfig
from scale.footprint import Memory, Workload, most_memory
from scale.hardware import GPU
from scale.mesh import Layout, LayoutError
from scale.roofline import StepTime, step_time

REPORT_TOKENS_PER_STEP = 16 * 2**20  # GLM-4.5's first batch size, 16M tokens; report, section 2.4
SMALL_TOKENS_PER_STEP = 2**19  # of models below a billion parameters
AS_GOOD = 1.01  # estimates closer than this are the same
MOST_GPUS = 2**16  # that advice looks for
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """What is planned for, apart from the number of GPUs."""

    config: GLMConfig
    gpu: GPU
    workload: Workload = Workload()
    tokens_per_step: int = REPORT_TOKENS_PER_STEP
    reserve: int = 6 * GIB
    """Bytes."""
    mfu: float = 0.35

    def __post_init__(self) -> None:
        longest = self.config.max_position_embeddings
        if self.workload.sequence_length > longest:
            raise ConfigError(
                f"sequence_length = {self.workload.sequence_length}: the model takes {longest} (max_position_embeddings)"
            )
        if self.tokens_per_step < 1:
            raise ConfigError(f"tokens_per_step = {self.tokens_per_step}: wanted 1 or more")
        if not 0 <= self.reserve < self.gpu.memory_bytes:
            raise ConfigError(
                f"reserve_gib = {self.reserve / GIB:g}: wanted 0 or more, and less than the GPU's {self.gpu.memory_gib:g} GiB"
            )
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"mfu = {self.mfu}: wanted above 0, up to 1")

    def micro_batches(self, gpus: int) -> int:
        """In a step of each rank: tokens_per_step rounded to what all ranks take at once, once at least."""
        return max(1, round(self.tokens_per_step / (gpus * self.workload.tokens)))


@dataclass(frozen=True)
class Candidate:
    """A layout with what it needs, or why it cannot be."""

    layout: Layout
    error: str = ""
    memory: Memory | None = None  # of the rank that needs most
    time: StepTime | None = None

    def fits(self, gpu: GPU) -> bool:
        return self.memory is not None and self.memory.total <= gpu.memory_bytes


@dataclass(frozen=True)
class Plan:
    """Every layout of `gpus` ranks, and the chosen one; None if none fits."""

    setting: Setting
    gpus: int
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    dp: int | None = None
    """Forced, as are the next two; None: any."""
    fsdp: int | None = None
    ep: int | None = None

    @property
    def tokens_per_step(self) -> int:
        return self.setting.micro_batches(self.gpus) * self.gpus * self.setting.workload.tokens

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.setting.gpu.gpus_per_node)


def plan(setting: Setting, gpus: int, dp: int | None = None, fsdp: int | None = None, ep: int | None = None) -> Plan:
    """Choose a layout of `gpus` ranks; dp, fsdp and ep force a number.

    Raises `ConfigError` for GPUs that do not fill their nodes, and `LayoutError` if no layout has the forced numbers, or the
    one that has all of them does not divide the model.
    """
    _check_nodes(gpus, setting.gpu.gpus_per_node)
    candidates = tuple(judge(setting, layout) for layout in _layouts(gpus, dp, fsdp, ep))
    if all(candidate.error for candidate in candidates):
        raise LayoutError(candidates[0].error)
    return Plan(setting, gpus, candidates, choose(candidates, setting.gpu), dp, fsdp, ep)


def judge(setting: Setting, layout: Layout) -> Candidate:
    """What a layout needs, if it divides the model."""
    try:
        layout.check(setting.config)
    except LayoutError as error:
        return Candidate(layout, str(error))
    memory = most_memory(setting.config, layout, setting.workload, setting.reserve)
    micro_batches = setting.micro_batches(layout.world_size)
    time = step_time(setting.config, layout, setting.workload, setting.gpu, setting.mfu, micro_batches)
    return Candidate(layout, memory=memory, time=time)


def choose(candidates: tuple[Candidate, ...], gpu: GPU) -> Candidate | None:
    """The fastest that fits; among those within 1% of it the one with the fewest ranks a shard group, then least memory."""
    fitting = [candidate for candidate in candidates if candidate.fits(gpu)]
    if not fitting:
        return None
    fastest = min(candidate.time.total for candidate in fitting)
    as_good = [candidate for candidate in fitting if candidate.time.total <= AS_GOOD * fastest]
    return min(as_good, key=lambda candidate: (candidate.layout.shards, candidate.memory.total, candidate.time.total))


def _check_nodes(gpus: int, per_node: int) -> None:
    if gpus < 1:
        raise ConfigError(f"--gpus {gpus}: wanted 1 or more")
    if gpus % per_node and gpus > per_node:
        below = gpus // per_node * per_node
        raise ConfigError(
            f"--gpus {gpus} does not fill nodes of {per_node}: the nearest that do are {below} and {below + per_node}; "
            f"--gpus-per-node says that nodes are of another size"
        )


def _layouts(gpus: int, dp: int | None, fsdp: int | None, ep: int | None) -> Iterator[Layout]:
    forced = {"dp": dp, "fsdp": fsdp, "ep": ep}
    for name, value in forced.items():
        if value is not None and (value < 1 or gpus % value):
            raise LayoutError(f"--{name} {value}: {gpus} GPUs do not divide by it; {_nearest_divisors(gpus, value)}")
    found = [
        Layout(copies, gpus // copies // experts, experts)
        for copies in divisors(gpus)
        for experts in divisors(gpus // copies)
        if dp in (None, copies) and ep in (None, experts) and fsdp in (None, gpus // copies // experts)
    ]
    if not found:
        asked = " ".join(f"--{name} {value}" for name, value in forced.items() if value is not None)
        product = math.prod(value for value in forced.values() if value is not None)
        raise LayoutError(f"{asked}: the product {product} must divide {gpus} GPUs, and be {gpus} where all three are given")
    return iter(found)


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _nearest_divisors(number: int, wanted: int) -> str:
    below = [str(d) for d in divisors(number) if d < wanted][-1:]
    return "the nearest that do are " + " and ".join(below + [str(d) for d in divisors(number) if d > wanted][:1])


# --------------------------------------------------------------------------------------------------------------- advice


def remedies(made: Plan) -> list[str]:
    """Options that would make a plan fit that does not: the cheapest change on the same GPUs, if there is one; then more of
    them, the fewest by powers of two of nodes."""
    found = []
    change = next((text for text, changed in _changes(made) if _fits(changed)), None)
    if change is not None:
        found.append(change)
    settings = {"": made.setting}
    frugal = dataclasses.replace(made.setting.workload, sequences_per_micro_batch=1, activation_checkpointing=True)
    words = " --activation-checkpointing --sequences-per-micro-batch 1"
    settings[words] = dataclasses.replace(made.setting, workload=frugal)
    for words, setting in settings.items():
        gpus = _enough_gpus(made, setting)
        if gpus is not None:
            found.append(f"--gpus {gpus}{words}")
            break
    return found


def _changes(made: Plan) -> Iterator[tuple[str, tuple]]:
    """Of what is asked on the same GPUs, cheapest first: the options to give, and the arguments of `plan` that they mean."""
    workload, forced = made.setting.workload, (made.dp, made.fsdp, made.ep)
    options = [("", forced)]
    if forced != (None, None, None):
        options.append(("(without --dp, --fsdp, --ep)", (None, None, None)))
    sequences = workload.sequences_per_micro_batch
    while sequences >= 1:
        for words, numbers in options:
            for checkpointing in sorted({workload.activation_checkpointing, True}):
                changed = dataclasses.replace(
                    workload, sequences_per_micro_batch=sequences, activation_checkpointing=checkpointing
                )
                said = [words] if words else []
                if checkpointing != workload.activation_checkpointing:
                    said.append("--activation-checkpointing")
                if sequences != workload.sequences_per_micro_batch:
                    said.append(f"--sequences-per-micro-batch {sequences}")
                setting = dataclasses.replace(made.setting, workload=changed)
                yield " ".join(said), (setting, made.gpus, *numbers)
        sequences //= 2


def _enough_gpus(made: Plan, setting: Setting) -> int | None:
    """The smallest power of two times GPUs in a node, above those there are, on which the same fits; dp and ep stay forced."""
    gpus = setting.gpu.gpus_per_node
    while gpus <= MOST_GPUS:
        if gpus > made.gpus and _fits((setting, gpus, made.dp, None, made.ep)):
            return gpus
        gpus *= 2
    return None


def _fits(arguments: tuple) -> bool:
    try:
        return plan(*arguments).chosen is not None
    except LayoutError:
        return False
