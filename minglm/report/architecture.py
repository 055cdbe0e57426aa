"""The architecture as pictures, drawn from a configuration: the stack with its MTP layer, one attention, one mixture of experts
(report, section 2.1). Whatever stands in a picture is computed from the numbers that the model is built from."""

from collections.abc import Sequence

from minglm.config import GLMConfig
from minglm.report.svg import WIDTH, figure, text

BOX, TALL, GAP = 26, 54, 14
LINE = 17
MOST_HEADS = 24  # of query heads that are drawn
ARROW_HEAD = (
    '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    '<path class="tip" d="M0 0 10 5 0 10z"/></marker></defs>'
)


def stack(config: GLMConfig) -> str:
    """From token to next token, bottom to top, and beside it the MTP layer."""
    dense, moe = config.first_k_dense_replace, config.num_moe_layers
    boxes = [("head", f"{config.vocab_size:,} logits", "plain", BOX), ("RMSNorm", f"{config.hidden_size:,}", "plain", BOX)]
    boxes += [(f"{moe} x MoE layer", "attention + experts", "moe", TALL)] if moe else []
    boxes += [(f"{dense} x dense layer", "attention + SwiGLU", "dense", TALL)] if dense else []
    boxes += [("embedding", f"{config.vocab_size:,} x {config.hidden_size:,}", "plain", BOX)]
    left, width, y = 12.0, 200.0, 30.0
    middle = left + width / 2
    parts = [ARROW_HEAD, text(middle, 18, "next token", "middle", "faint")]
    for name, note, kind, height in boxes:
        parts.append(_box(left, y, width, height, name, note, kind))
        parts.append(_wire(f"M{middle} {y + height + GAP}V{y + height + 1}"))
        y += height + GAP
    parts.append(text(middle, y + 12, "token t", "middle", "faint"))
    if config.num_nextn_predict_layers:
        parts += _mtp(config, left + width, 30 + BOX / 2, 30 + BOX + GAP + BOX / 2)
    return figure(parts, y + 20, f"{config.num_hidden_layers} layers between embedding and head")


def _mtp(config: GLMConfig, edge: float, head: float, norm: float) -> list[str]:
    """Beside the stack's right edge: the layer that joins a state with the next token; head, norm: how high these are."""
    left, width, top = 248, 180, norm + 24
    lines = (
        "norms of state t, token t+1,",
        f"joined: {2 * config.hidden_size:,} to {config.hidden_size:,};",
        "one MoE layer, a norm,",
        "the same head: token t+2",
    )
    count = config.num_nextn_predict_layers
    parts = [_shape(left, top, width, 30 + LINE * len(lines), "moe")]
    parts.append(text(left + width / 2, top + 18, "MTP layer" if count == 1 else f"{count} MTP layers", "middle", "strong"))
    parts += [
        text(left + width / 2, top + 20 + LINE * (place + 1), line, "middle", "faint") for place, line in enumerate(lines)
    ]
    parts.append(_wire(f"M{edge} {norm}H{left + 60}V{top - 1}"))
    parts.append(_wire(f"M{left + width - 40} {top - 1}V{head}H{edge + 2}", "dashed"))
    return parts


def attention(config: GLMConfig) -> str:
    """Grouped-query attention: every query head a square, over the keys and values that its group shares."""
    heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    squares = min(heads // groups, MOST_HEADS)
    shown = max(1, min(groups, MOST_HEADS // squares))
    size = min(26.0, (WIDTH - 24 - 14 * shown) / (shown * squares))
    parts = [text(12, 18, f"{heads} query heads of {head_dim}, over {groups} of keys and values")]
    for group in range(shown):
        left = 12 + group * (squares * size + 14)
        middle = left + (squares * size - 3) / 2
        for head in range(squares):
            x = left + head * size
            parts.append(_shape(x, 30, size - 3, 24, "dense"))
            parts.append(f'<path class="wire" d="M{x + (size - 3) / 2:.1f} 55L{middle:.1f} 79"/>')
        parts += [_shape(left, 80, squares * size - 3, 24, "moe"), text(middle, 96, "k, v", "middle")]
    width = heads * head_dim
    biased = "q, k and v with a bias, o without" if config.attention_bias else "no biases"
    lines = [f"{shown} of {groups} such groups are drawn"] if shown < groups else []
    lines += [f"{biased}; {config.hidden_size:,} to {width:,}, {width / config.hidden_size:.3g} times the width"]
    lines += ["RMSNorm on every head of q and k, before RoPE" if config.use_qk_norm else "no norm on q and k"]
    lines += [f"RoPE turns {config.partial_rotary_factor:.0%} of a head's components, base {config.rope_theta:g}"]
    return figure([*parts, *_notes(124, lines)], 124 + LINE * len(lines), "grouped-query attention")


def experts(config: GLMConfig) -> str:
    """A mixture of experts: every routed expert a square, as many filled as a token meets, and the shared one."""
    routed, chosen, width = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
    columns = min(routed, 16 if routed <= 64 else 32)
    size, top = (WIDTH - 24) / columns, 46.0
    filled = {place * routed // chosen for place in range(chosen)}
    parts = [_box(12, 8, 130, BOX, "router", "", "plain")]
    parts.append(text(152, 25, f"sigmoid in fp32; best {chosen} of {routed} by score + bias", kind="faint"))
    for expert in range(routed):
        row, column = divmod(expert, columns)
        kind = "moe on" if expert in filled else "moe"
        parts.append(_shape(12 + column * size, top + row * size, size - 3, size - 3, kind))
    bottom = top + -(-routed // columns) * size + 4
    if config.n_shared_experts:
        parts.append(_box(12, bottom, 130, BOX, "shared expert", "", "dense"))
        shared = f"SwiGLU of {width * config.n_shared_experts:,}, for every token"
        parts.append(text(152, bottom + 17, shared, kind="faint"))
        bottom += BOX + 4
    norm = "divided by their sum, " if config.norm_topk_prob else ""
    lines = [
        f"a routed expert: SwiGLU of {width:,}; filled: what one token meets",
        f"weights: the scores without the bias, {norm}times {config.routed_scaling_factor:g}",
        "the bias moves towards equal load after every step, outside autograd",
    ]
    name = f"{routed} routed experts, {chosen} for each token"
    return figure([*parts, *_notes(bottom + LINE, lines)], bottom + LINE * (len(lines) + 1), name)


def _box(x: float, y: float, width: float, height: float, name: str, note: str, kind: str) -> str:
    """A box with its name, and a note: behind the name in a low box, under it in a tall one."""
    shape, middle = _shape(x, y, width, height, kind), x + width / 2
    if not note:
        return shape + text(middle, y + height / 2 + 4, name, "middle", "strong")
    if height <= BOX:
        return shape + text(x + 10, y + 17, name, "start", "strong") + text(x + width - 10, y + 17, note, "end", "faint")
    return shape + text(middle, y + 23, name, "middle", "strong") + text(middle, y + 41, note, "middle", "faint")


def _shape(x: float, y: float, width: float, height: float, kind: str) -> str:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="box {kind}" {box} rx="{min(6, width / 5):.1f}"/>'


def _wire(path: str, kind: str = "") -> str:
    return f'<path class="wire {kind}" marker-end="url(#tip)" d="{path}"/>'


def _notes(y: float, lines: Sequence[str]) -> list[str]:
    return [text(12, y + LINE * place, line, kind="faint") for place, line in enumerate(lines)]
