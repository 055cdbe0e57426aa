"""A plan as text for people: the mesh, what each rank holds, the estimated time, the neighbours, the command to launch."""

import dataclasses
import math
import textwrap
from collections.abc import Callable
from pathlib import Path

from minglm.config import ConfigError, GLMConfig
from minglm.params import count, training_flops_per_token, training_memory
from minglm.train.recipe import CONFIGS, Recipe, load_recipe
from scale.footprint import Memory, memory_of_rank, most_memory, parameters_of_rank
from scale.mesh import Layout
from scale.roofline import slower_because
from scale.search import AS_GOOD, GIB, MOST_GPUS, Candidate, Plan, divisors, judge, plan, remedies
from scale.train import check

REPORT_TOKENS = 22e12  # of pre-training: 15T general, 7T code and reasoning; report, section 2.3

LABEL, COLUMN = 38, 15  # of a table with four columns: 98 characters
WIDTH = 99
ROWS: tuple[tuple[str, Callable[[Memory], int]], ...] = (
    ("weights, fp32", lambda m: m.weights),
    ("gradients, fp32", lambda m: m.gradients),
    ("optimiser state, fp32", lambda m: m.optimizer),
    ("two layers gathered", lambda m: m.unsharded_layers),
    ("gradients of two layers", lambda m: m.layer_gradients),
    ("root group gathered, fp32", lambda m: m.root_weights),
    ("root group's gradient, fp32", lambda m: m.root_gradient),
    ("bf16 copies of weights", lambda m: m.weight_copies),
    ("activations", lambda m: m.activations),
    ("rows in the experts", lambda m: m.expert_rows),
    ("loss: chunk of logits, head", lambda m: m.loss),
    ("Muon: exchange (u)", lambda m: m.exchange),
    ("Muon: Newton-Schulz (u)", lambda m: m.newton_schulz),
    ("reserve", lambda m: m.reserve),
)


def report(made: Plan) -> str:
    """All of a plan as text for people, less than 100 columns wide."""
    sections = [_heading(made)]
    if made.chosen is None:
        sections += [_nothing_fits(made), _neighbours(made)]
    else:
        sections += [_choice(made), _holdings(made), _rollout(made), _time(made), _neighbours(made)]
        sections += [_micro_batches(made)]
    return "\n\n".join("\n".join(section) for section in sections)


def _heading(made: Plan) -> list[str]:
    setting, workload = made.setting, made.setting.workload
    parameters, gpu = count(setting.config), setting.gpu
    lines = [
        f"{parameters.main:,} parameters and {parameters.mtp:,} in the MTP layer, on {made.gpus} x {gpu.name}"
        f" ({made.nodes} x {min(made.gpus, gpu.gpus_per_node)})",
        f"micro-batch of each rank: {workload.sequences_per_micro_batch} x {workload.sequence_length:,} tokens, activation"
        f" checkpointing {'on' if workload.activation_checkpointing else 'off'}",
        f"step: {made.tokens_per_step:,} tokens in {setting.micro_batches(made.gpus)} micro-batches",
    ]
    if made.tokens_per_step != setting.tokens_per_step:
        lines.append(
            f"  (rounded from {setting.tokens_per_step:,} to a multiple of the {made.gpus * workload.tokens:,}"
            " that all ranks take at once)"
        )
    return lines


def _choice(made: Plan) -> list[str]:
    layout, config = made.chosen.layout, made.setting.config
    fitting = [candidate for candidate in made.candidates if candidate.fits(made.setting.gpu)]
    valid = [candidate for candidate in made.candidates if not candidate.error]
    fastest = min(candidate.time.total for candidate in fitting)
    cut = "whole experts" if layout.expert_dim(config) == 0 else "rows of every expert"
    local = layout.local_experts(config)
    reason = "has the shortest estimated step"
    if made.chosen.time.total > fastest:
        reason = "is within 1% of the shortest estimated step and has the fewest ranks a copy"
    return [
        f"Mesh: {layout}",
        f"  dp {layout.dp:<5} {_copies(layout.dp)}",
        f"  fsdp {layout.fsdp:<3} each rank's {local} experts a layer are cut into {layout.fsdp} ({cut}),",
        f"           all else into {layout.shards}",
        f"  ep {layout.ep:<5} {config.n_routed_experts} experts a layer, {local} on each rank",
        f"  why: of {len(made.candidates)} meshes {len(valid)} divide the model and {len(fitting)} fit; this one",
        f"  {reason}: {_seconds(made.chosen.time.total)}",
    ]


def _copies(dp: int) -> str:
    return "one copy of the model" if dp == 1 else f"{dp} copies of the model; their gradients are summed"


def _holdings(made: Plan) -> list[str]:
    setting, layout = made.setting, made.chosen.layout
    config, world = setting.config, layout.world_size
    ranks = sorted({0, world // 2, world - 1})
    memories = [memory_of_rank(config, layout, rank, setting.workload, setting.reserve) for rank in ranks]
    memories.append(most_memory(config, layout, setting.workload, setting.reserve))
    held = [parameters_of_rank(config, layout, rank) for rank in range(layout.shards)]
    sums, expected = [sum(column) for column in zip(*held, strict=True)], count(config)
    assert sums == [expected.main, expected.mtp], f"ranks of {layout} hold {sums}, the model {expected.main, expected.mtp}"

    titles = [f"rank {rank:,}" for rank in ranks] + ["most of any"]
    lines = [_row("What each rank holds", titles)]
    for name, index in (("parameters, main stack", 0), ("parameters, MTP layer", 1)):
        numbers = [held[rank % layout.shards][index] for rank in ranks] + [max(both[index] for both in held)]
        lines.append(_row(f"  {name}", [f"{number:,}" for number in numbers]))
    lines.append(f"  sum over the {layout.shards:,} ranks of a copy = the whole model:")
    lines.append(f"    {sums[0]:,} in the main stack, {sums[1]:,} in the MTP layer")
    lines.append(_row("  memory in GiB", [""] * len(titles)))
    lines += [_row(f"    {name}", [_gib(of(memory)) for memory in memories]) for name, of in ROWS]
    available = setting.gpu.memory_bytes
    lines.append(_row(f"  fullest moment, of {setting.gpu.memory_gib:g} GiB", [_gib(memory.total) for memory in memories]))
    lines.append(_row("", [f"{memory.total / available:.0%}" for memory in memories]))
    whole = training_memory(config)
    return lines + [
        "  (u) in the update, when no layer is gathered: the fullest moment counts these or those of a",
        "  micro-batch. FSDP pads shards, so weights may be more than parameters x 4.",
        f"  A checkpoint (weights and optimiser state, fp32) has {(whole.weights + whole.optimizer) / 1e12:,.2f} TB.",
    ]


def _rollout(made: Plan) -> list[str]:
    memory, setting = made.chosen.memory, made.setting
    fits = memory.rollout <= setting.gpu.memory_bytes
    return [
        f"KV cache of a rollout of {setting.workload.rollout_tokens:,} tokens on each rank, bf16: {_gib(memory.kv_cache)} GiB.",
        f"  Beside weights and optimiser state (colocated): {_gib(memory.rollout)} GiB of {setting.gpu.memory_gib:g}, which"
        f" {'fits' if fits else 'does not fit'}.",
    ]


def _time(made: Plan) -> list[str]:
    setting, time = made.setting, made.chosen.time
    tokens_per_second = made.tokens_per_step / time.total
    flops = training_flops_per_token(setting.config, setting.workload.sequence_length)
    mfu = tokens_per_second * flops / (made.gpus * setting.gpu.tflops * 1e12)
    hidden = "hidden behind the products" if time.fsdp + time.copies <= time.products else "hides the products behind it"
    rows = [
        ("matrix products", time.products, f"at {setting.mfu:.0%} of {setting.gpu.tflops:g} TFLOP/s, or reading weights"),
        ("FSDP gathers, reductions", time.fsdp, hidden),
        ("sum over copies", time.copies, "with FSDP's traffic"),
        ("all-to-all of experts", time.all_to_all, "not hidden"),
        ("root group", time.root, "not hidden"),
        ("update: Newton-Schulz", time.newton_schulz, "not hidden"),
        ("update: exchange", time.exchange, "not hidden"),
        ("update: elementwise", time.elementwise, "not hidden"),
        ("step", time.total, "the longer of products and traffic, then what is not hidden"),
    ]
    days = REPORT_TOKENS / tokens_per_second / 86_400
    return [
        "Time of a step: an estimate from peaks and bandwidths, not a measurement",
        *(f"  {name:<26}{_seconds(seconds):>10}  {note}" for name, seconds, note in rows),
        f"  {tokens_per_second:,.0f} tokens/s ({tokens_per_second / made.gpus:,.0f} a GPU, {mfu:.1%} of the peak);"
        f" {days:,.0f} days for 22T tokens",
    ]


def _neighbours(made: Plan) -> list[str]:
    """Meshes around the chosen one, valid or not, each with its verdict."""
    chosen = made.chosen.layout if made.chosen else None
    lines = [f"{'Neighbouring meshes':<26}verdict" if chosen else f"{'Meshes tried':<26}verdict"]
    known = {candidate.layout: candidate for candidate in made.candidates}
    for dp, ep in _around(made):
        if made.gpus % (dp * ep):
            near = made.gpus // (dp * ep) * dp * ep
            found = " or ".join(str(gpus) for gpus in (near, near + dp * ep) if gpus)
            text = f"does not divide: {made.gpus} GPUs by dp x ep = {dp * ep} ({found} would)"
            lines.append(_mesh_line(dp, "-", ep, text, False))
            continue
        layout = Layout(dp, made.gpus // (dp * ep), ep)
        candidate = known.get(layout) or judge(made.setting, layout)
        lines.append(_mesh_line(dp, layout.fsdp, ep, verdict(made, candidate), layout == chosen))
    return lines


def _around(made: Plan) -> list[tuple[int, int]]:
    """(dp, ep): dp up to 8 and about the chosen one; ep all that divide the ranks, one step beyond the experts' number, and
    some that divide the experts alone."""
    experts, gpus = made.setting.config.n_routed_experts, made.gpus
    dp, ep = (made.chosen.layout.dp, made.chosen.layout.ep) if made.chosen else (1, 1)
    copies = {d for d in (1, 2, 4, 8, dp // 2, dp, 2 * dp) if d and gpus % d == 0}
    parts = [e for e in divisors(gpus) if e <= experts] + [e for e in divisors(gpus) if e > experts][:1]
    if len(parts) > 10:  # of a number with many divisors, those about the chosen one
        nearest = sorted(parts, key=lambda e: abs(math.log(e / ep)))[:10]
        parts = sorted(nearest)
    pairs = {(d, e) for d in copies for e in parts if gpus % (d * e) == 0}
    elsewhere = sorted(
        (e for e in divisors(experts) if gpus % (dp * e) and dp * e <= 2 * gpus), key=lambda e: abs(math.log(e / ep))
    )
    return sorted(pairs | {(dp, e) for e in elsewhere[:4]} | {(dp, ep)} if made.chosen else pairs)


def verdict(made: Plan, candidate: Candidate) -> str:
    """Why a mesh is not the chosen one; "chosen" if it is."""
    setting = made.setting
    if candidate.error:
        return "does not divide: " + _does_not_divide(setting.config, candidate.layout)
    need = f"{math.ceil(candidate.memory.total / GIB)} GiB"
    if not candidate.fits(setting.gpu):
        return f"needs {need} of {setting.gpu.memory_gib:g}: {_largest(candidate.memory)}"
    if made.chosen is None:
        return f"fits: {need}"
    if candidate.layout == made.chosen.layout:
        return f"chosen: {need}, {_seconds(candidate.time.total)} a step"
    if candidate not in made.candidates:
        return f"fits: {need}, {_seconds(candidate.time.total)} a step; not asked for"
    ratio = candidate.time.total / made.chosen.time.total
    if ratio <= AS_GOOD and candidate.layout.shards >= made.chosen.layout.shards:
        return f"fits: {need}, as fast within 1%, on as many ranks a copy or more"
    reason = slower_because(made.chosen.time, candidate.time, candidate.layout, setting.gpu)
    return f"fits: {need}, {ratio:.2f} times slower: {reason}"


def _does_not_divide(config: GLMConfig, layout: Layout) -> str:
    """`Layout.check`'s complaint in fewer words."""
    if config.n_routed_experts % layout.ep:
        return f"{config.n_routed_experts} routed experts by ep {layout.ep}"
    return f"a rank's {layout.local_experts(config)} experts, or the rows of each, by fsdp {layout.fsdp}"


def _largest(memory: Memory) -> str:
    """The largest part of the fullest moment, in GiB."""
    parts = {
        "weights, gradients and optimiser state": memory.held,
        "two layers gathered": memory.unsharded_layers + memory.layer_gradients,
        "embedding and head gathered, their gradients": memory.root_weights + memory.root_gradient,
        "bf16 copies of weights": memory.weight_copies,
        "activations": memory.activations + memory.expert_rows,
        "the loss": memory.loss,
    }
    name = max(parts, key=parts.get)
    return f"{name} {parts[name] / GIB:.0f}"


def _mesh_line(dp: int, fsdp: int | str, ep: int, text: str, is_chosen: bool) -> str:
    return f"{'*' if is_chosen else ' '} dp {dp:<3} fsdp {fsdp:<4} ep {ep:<3}  {text}"


def _micro_batches(made: Plan) -> list[str]:
    """What other micro-batches would bring, each with the mesh that is best for it."""
    lines = [f"{'Other micro-batches':<34}best mesh, with no number forced (*: this plan)"]
    for checkpointing in (True, False):
        for sequences in (1, 2, 4, 8, 16):
            changes = {"sequences_per_micro_batch": sequences, "activation_checkpointing": checkpointing}
            workload = dataclasses.replace(made.setting.workload, **changes)
            other = plan(dataclasses.replace(made.setting, workload=workload), made.gpus)
            title = f"  {sequences:>2} sequences, checkpointing {'on' if checkpointing else 'off'}"
            if other.chosen is None:
                lines.append(f"{title:<34}does not fit")
                break  # nor do more
            speed = other.tokens_per_step / other.chosen.time.total
            text = f"{other.chosen.layout}, {math.ceil(other.chosen.memory.total / GIB)} GiB, {speed:,.0f} tokens/s"
            lines.append(f"{title:<34}{text}{' *' if other.chosen == made.chosen else ''}")
    return lines


def _nothing_fits(made: Plan) -> list[str]:
    lines = ["Nothing fits. What would:"]
    found = remedies(made)
    lines += [f"  {text}" for text in found]
    if found:
        return lines
    return [f"Nothing fits, not even on {MOST_GPUS:,} GPUs. It takes shorter sequences, or GPUs with more memory."]


# --------------------------------------------------------------------------------------------------------------- launch


def launch(made: Plan, model: str) -> str:
    """The command that trains `model` (as given on the command line) by the plan, and what the recipe must say for it."""
    path = Path(model)
    stem = path.parent.name if path.name == "config.json" else path.name.removesuffix(".toml")
    recipe = f"configs/recipe/{stem}.toml"
    found = load_recipe(CONFIGS / "recipe" / f"{stem}.toml") if (CONFIGS / "recipe" / f"{stem}.toml").is_file() else None
    if found is not None and found.model != made.setting.config:
        found = None
    wanted = _wanted(made)
    lines, options = [], []
    if found is None:
        lines = [f"There is no {recipe} for this model: copy configs/recipe/mini.toml, and set"]
        lines += [f"  {key} = {str(value).lower()}" for key, value in wanted.items()] + [""]
    else:
        if found.training.batch_warmup_steps:
            wanted["training.first_sequences_per_step"] = _first_sequences(made, found)
        options = [_option(key, value) for key, value in wanted.items() if _value(found, key) != value]
        if problem := _problem(found, wanted, made):
            lines = [*textwrap.wrap(f"Not before this is changed in {recipe}, which does not fit: {problem}", WIDTH), ""]
    return "\n".join(lines + (_on_one_node if made.nodes == 1 else _on_many_nodes)(made, recipe, options))


def _problem(recipe: Recipe, wanted: dict[str, int | bool], made: Plan) -> str | None:
    """Why the ranks could not train the recipe so: the plan is for one sequence length, and stages may have others."""
    tables: dict[str, dict[str, int | bool]] = {"training": {}, "hardware": {}}
    for key, value in wanted.items():
        table, name = key.split(".")
        tables[table][name] = value
    try:
        varied = {table: dataclasses.replace(getattr(recipe, table), **values) for table, values in tables.items()}
        check(dataclasses.replace(recipe, **varied), made.chosen.layout)
    except ConfigError as error:
        return str(error)
    return None


def _on_one_node(made: Plan, recipe: str, options: list[str]) -> list[str]:
    layout = made.chosen.layout
    return [
        "Launch (scale/launch/one_node.sh does the same with restarts and logs):",
        f"  torchrun --standalone --nproc-per-node {made.gpus} -m scale.train {recipe} \\",
        *(f"    {option} \\" for option in options),
        f"    --dp {layout.dp} --fsdp {layout.fsdp} --ep {layout.ep}",
    ]


def _on_many_nodes(made: Plan, recipe: str, options: list[str]) -> list[str]:
    layout, per_node = made.chosen.layout, made.setting.gpu.gpus_per_node
    mesh = f"DP={layout.dp} FSDP={layout.fsdp} EP={layout.ep}"
    return [
        "Launch with Slurm, RUN_FOLDER on a file system that all nodes share:",
        f"  RECIPE={recipe} {mesh} RUN_FOLDER=... \\",
        *([f'    OPTIONS="{(chr(10) + " " * 13).join(options)}" \\'] if options else []),
        f"    sbatch --nodes {made.nodes} --gpus-per-node {per_node} scale/launch/slurm.sbatch",
        "which runs on every node:",
        f"  torchrun --nnodes {made.nodes} --nproc-per-node {per_node} --rdzv-backend c10d \\",
        "    --rdzv-endpoint FIRST_NODE:PORT --rdzv-id JOB \\",
        f"    -m scale.train {recipe} \\",
        *(f"    {option} \\" for option in options),
        f"    --dp {layout.dp} --fsdp {layout.fsdp} --ep {layout.ep} --run-folder RUN_FOLDER",
    ]


def _wanted(made: Plan) -> dict[str, int | bool]:
    """What a recipe must say for this plan."""
    workload = made.setting.workload
    return {
        "training.sequence_length": workload.sequence_length,
        "training.sequences_per_step": made.tokens_per_step // workload.sequence_length,
        "training.sequences_per_micro_batch": workload.sequences_per_micro_batch,
        "hardware.activation_checkpointing": workload.activation_checkpointing,
    }


def _first_sequences(made: Plan, recipe: Recipe) -> int:
    """The recipe's smaller first batch, as the nearest multiple of what all ranks take at once."""
    at_once = made.gpus * made.setting.workload.sequences_per_micro_batch
    most = made.tokens_per_step // made.setting.workload.sequence_length
    return min(most, max(1, round(recipe.training.first_sequences_per_step / at_once)) * at_once)


def _value(recipe: Recipe, key: str) -> object:
    table, name = key.split(".")
    return getattr(getattr(recipe, table), name)


def _option(key: str, value: int | bool) -> str:
    """As scale.train's command line takes it."""
    table, name = key.replace("_", "-").split(".")
    if isinstance(value, bool):
        return f"--{table}.{name}" if value else f"--{table}.no-{name}"
    return f"--{table}.{name} {value}"


# --------------------------------------------------------------------------------------------------------------- layout


def _row(label: str, values: list[str]) -> str:
    return (f"{label:<{LABEL}}" + "".join(f"{value:>{COLUMN}}" for value in values)).rstrip()


def _gib(number: int) -> str:
    return f"{number / GIB:,.2f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"
