"""Sections of the page: the architecture, its parameters, pre-training and mid-training, the balance of the experts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minglm.config import GLMConfig
from minglm.evals.command import file_name
from minglm.evals.measure import Results
from minglm.params import count, forward_flops_per_token, kv_cache_bytes_per_token, training_flops_per_token
from minglm.report import architecture
from minglm.report.html import Html, charts, folded, heading, interval, later, section, si, table
from minglm.report.parts import STAGES_EVALUATED, Story
from minglm.report.svg import Series, heat, lines
from minglm.train.metrics import read_metrics

Records = Sequence[dict[str, Any]]


def architecture_section(story: Story) -> Html:
    title, paper = "Architecture", "report, section 2.1"
    if story.training is None:
        return section("architecture", title, paper, later("the model, drawn from its configuration."))
    config = story.training.model
    wide = config.num_attention_heads * config.head_dim / config.hidden_size
    text = (
        f"{config.num_hidden_layers} layers of width {config.hidden_size:,}: the shape of GLM-4.5, deep and narrow, with "
        f"{config.num_attention_heads} attention heads, {wide:.3g} times as wide together as the model. The same class, by "
        "another configuration, is the model of 355B parameters."
    )
    drawn = [(architecture.stack(config), "From token to next token, and the multi-token-prediction layer beside it.")]
    drawn.append((architecture.attention(config), "Grouped-query attention with partial RoPE."))
    if config.num_moe_layers:
        drawn.append((architecture.experts(config), "A mixture of experts: loss-free balance chooses, the scores weigh."))
    return section("architecture", title, paper, text, charts(*drawn))


def parameters_section(story: Story) -> Html:
    title, paper = "Parameters", "report, section 2.1, table 1"
    if story.training is None:
        return section("parameters", title, paper, later("how many numbers each part of the model has."))
    config = story.training.model
    found = count(config)
    parts = ("embedding", "attention", "dense_mlp", "router", "routed_experts", "shared_experts", "norms", "head")
    numbers = [(part.replace("_", " "), getattr(found, part), getattr(found, part) / found.main) for part in parts]
    rows = [[name, f"{number:,}", f"{share:.1%}"] for name, number, share in numbers]
    rows.append(["main stack", f"{found.main:,}", "100%"])
    rows.append(["used by one token", f"{found.activated:,}", f"{found.activated / found.main:.1%}"])
    rows.append(["MTP layer, beside it", f"{found.mtp:,}", f"{found.mtp / found.main:.1%}"])
    length = story.training.plan().stages[0].sequence_length
    costs = (
        f"For one token, in sequences of {length:,}: {si(forward_flops_per_token(config, length))}FLOPs forward, "
        f"{si(training_flops_per_token(config, length))}FLOPs in training; {kv_cache_bytes_per_token(config):,} bytes of "
        "keys and values in bf16."
    )
    return section("parameters", title, paper, table(["part", "parameters", "share"], rows), costs)


def loss_section(story: Story) -> Html:
    title, paper = "Loss by stage", "report, sections 2.2 to 2.4"
    waiting = later("training and held-out loss of every stage, and what each domain has gained by it.")
    if story.training is None or not story.run.metrics.is_file():
        return section("loss", title, paper, waiting)
    records = read_metrics(story.run.metrics)
    steps, held_out, ends = (of_kind(records, kind) for kind in ("step", "held_out", "stage"))
    if not steps:
        return section("loss", title, paper, waiting)
    marks = [(end["step"], end["name"]) for end in ends]
    losses = [
        Series("next token", smooth(steps, "lm_loss"), 0),
        Series("", [(one["step"], one["lm_loss"]) for one in steps], 0, "pale"),
        Series("held out", [(one["step"], one["loss"]) for one in held_out], 1, "dots"),
    ]
    if any(one["mtp_loss"] for one in steps):
        losses.append(Series("token after the next (MTP)", smooth(steps, "mtp_loss"), 2))
    bits = [Series("", [(one["step"], one["bits_per_byte"]) for one in held_out], 1, "dots")]
    drawn = charts(
        (
            lines(losses, "step", "nats a token", marks, (0.0, None)),
            "Cross-entropy in training, smoothed over the pale raw one.",
        ),
        (lines(bits, "step", "bits per byte", marks, (0.0, None)), "Held-out text, in a unit that no tokenizer changes."),
    )
    stages = [[stage.name, *_described(stage)] for stage in story.training.plan().stages]
    plan = table(["stage", "steps", "tokens", "sequence", "packing", "RoPE base", "mixture"], stages)
    return section("loss", title, paper, drawn, plan, *_by_domain(records), *_by_family(story))


def _described(stage: Any) -> list[str]:
    tokens = stage.steps * stage.sequences_per_step * stage.sequence_length
    whole = sum(stage.mixture.values()) or 1.0
    mixture = ", ".join(f"{name} {weight / whole:.0%}" for name, weight in stage.mixture.items()) or "all there is"
    return [f"{stage.steps:,}", f"{tokens:,}", f"{stage.sequence_length:,}", stage.packing, f"{stage.rope_theta:g}", mixture]


def _by_domain(records: Records) -> list[Html]:
    """Bits per byte of each domain at the end of each stage that has ended."""
    ends, domains = of_kind(records, "stage"), of_kind(records, "domain")
    if not domains:
        return []
    found = {(one["step"], one["domain"]): one["bits_per_byte"] for one in domains}
    names = dict.fromkeys(one["domain"] for one in domains)
    rows = [
        [name, *(f"{found[end['step'], name]:.3f}" if (end["step"], name) in found else "–" for end in ends)] for name in names
    ]
    caption = "Held-out bits per byte at the end of each stage, by domain."
    return [heading("By domain"), table(["domain", *(end["name"] for end in ends)], rows, caption)]


def _by_family(story: Story) -> list[Html]:
    """What `eval` has measured on the checkpoint at the end of each stage."""
    names = [stage.name for stage in story.training.plan().stages]
    files = {name: story.folder / STAGES_EVALUATED / f"{file_name(name)}.json" for name in names}
    columns = {name: Results.load(path) for name, path in files.items() if path.is_file()}
    title = heading("By task family")
    if not columns:
        return (
            [title, later("how likely right answers have become, by family and stage, with intervals.")]
            if story.experts
            else []
        )
    rows: dict[tuple, list[str]] = {}
    for place, results in enumerate(columns.values()):
        for one in results.measures:
            arrow = "less is better" if one.lower_is_better else "more is better"
            row = rows.setdefault(one.key, [one.name, f"{one.quantity} ({arrow})", *["–"] * len(columns)])
            row[2 + place] = interval(one.estimate.numbers)
    head, caption = ["of", "measure", *columns], "Held-out documents and problems, with 95% intervals."
    together = [row for row in rows.values() if row[0].startswith("all ")]
    each = [row for row in rows.values() if row not in together]
    if not together:
        return [title, table(head, each, caption)]
    return [title, table(head, together, caption), folded("each domain and family", table(head, each))]


def balance_section(story: Story) -> Html:
    title, paper = "Expert load and balance", "report, sections 2.1 and 2.4"
    waiting = later("how evenly the experts are used, and the bias that keeps them so.")
    records = read_metrics(story.run.metrics) if story.training and story.run.metrics.is_file() else []
    routers, steps = of_kind(records, "router"), [one for one in of_kind(records, "step") if one.get("max_violation")]
    if not routers or not steps:
        return section("balance", title, paper, waiting)
    last = routers[-1]
    share = np.array(last["expert_share"])
    names = layer_names(story.training.model, len(share))
    violation = [{"step": one["step"], "mean": float(np.mean(one["max_violation"]))} for one in steps]
    ends = of_kind(records, "stage")
    drawn = charts(
        (heat((share * share.shape[1]).tolist(), names, "expert"), f"Load of each expert at step {last['step']:,}."),
        (
            lines(
                [Series("", smooth(violation, "mean"), 0), Series("", [(v["step"], v["mean"]) for v in violation], 0, "pale")],
                "step",
                "MaxVio, mean of layers",
                [(end["step"], end["name"]) for end in ends],
                (0.0, None),
            ),
            "MaxVio: by how much the fullest expert exceeds its fair share. 0 is perfect balance.",
        ),
    )
    fullest, emptiest = share.max(1) * share.shape[1], share.min(1) * share.shape[1]
    bias = np.array(last["bias"])
    rows = [
        [name, f"{most:.2f}", f"{least:.2f}", f"{low:+.4f} to {high:+.4f}"]
        for name, most, least, low, high in zip(names, fullest, emptiest, bias.min(1), bias.max(1), strict=True)
    ]
    head = ["layer", "fullest expert", "emptiest expert", "bias"]
    return section("balance", title, paper, drawn, table(head, rows, "Load in fair shares, and the selection bias."))


def layer_names(config: GLMConfig, rows: int) -> list[str]:
    """Of the layers with experts, from the first on; what is more than the stack has is the MTP layer's."""
    own = [f"layer {config.first_k_dense_replace + place}" for place in range(config.num_moe_layers)]
    return [*own, *["MTP"] * (rows - len(own))]


def of_kind(records: Records, kind: str) -> Records:
    return [one for one in records if one["kind"] == kind]


def smooth(records: Records, key: str) -> list[tuple[float, float]]:
    """The mean over a window around each record, of up to 1/25 of them."""
    values = np.array([one[key] for one in records], dtype=float)
    half = len(values) // 50
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    end = np.minimum(np.arange(len(values)) + half + 1, len(values))
    means = (sums[end] - sums[first]) / (end - first)
    return [(one["step"], float(mean)) for one, mean in zip(records, means, strict=True)]
