"""Muon against the SVD, PyTorch's Muon and a float64 definition; AdamW against PyTorch's; one state dict for both."""

import copy
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from minglm import optim
from minglm.config import GLMConfig
from minglm.model import GLM
from minglm.optim import MuonAdamW, build_optimizer, logical_matrices, newton_schulz

CONFIG = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    max_position_embeddings=64,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_model(seed: int = 0, **changes) -> GLM:
    torch.manual_seed(seed)
    return GLM(GLMConfig(**(CONFIG | changes)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps with gradients of the real loss, each on its own random batch."""
    for step in steps:
        tokens = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(step))
        model.loss(tokens[:, :-1], tokens[:, 1:]).total.backward()
        optimizer.step()
        optimizer.zero_grad()


def in_float64(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Jordan's definition of Newton-Schulz for one matrix, as plain as it can be."""
    x = matrix.double()
    x = x / max(x.norm().item(), 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


# ---------------------------------------------------------------- Newton-Schulz

sides = st.integers(1, 40) | st.sampled_from([63, 64, 65, 128, 130, 192, 200])


@settings(max_examples=60, deadline=None)
@given(rows=sides, cols=sides, seed=st.integers(0, 2**31))
@example(rows=1, cols=40, seed=0)
@example(rows=40, cols=1, seed=0)
@example(rows=1, cols=1, seed=0)
@example(rows=192, cols=192, seed=0)
@example(rows=65, cols=130, seed=0)
@example(rows=400, cols=200, seed=0)
def test_newton_schulz_keeps_singular_vectors_and_brings_singular_values_near_one(rows, cols, seed):
    matrix = normal(rows, cols, seed=seed)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    rotated = u.T @ newton_schulz(matrix).double() @ vh.T  # what the result does to each singular direction
    values = rotated.diagonal()
    assert (rotated - values.diag()).abs().max() < 1e-4
    reached = s / s.norm() > 0.0015  # five steps do not lift smaller ones to the plateau
    assert (values[reached] > 0.67).all() and (values < 1.21).all() and (values > 0).all()
    if reached.all():
        direction = (u @ vh).flatten()
        assert torch.cosine_similarity(newton_schulz(matrix).double().flatten(), direction, dim=0) > 0.97


def test_newton_schulz_has_a_rounding_error_like_the_textbook_form_on_every_spectrum():
    for rows, cols in ((64, 128), (128, 128), (192, 384), (200, 250)):
        u, _, vh = torch.linalg.svd(normal(rows, cols, dtype=torch.float64), full_matrices=False)
        falling = torch.linspace(0, 1, rows, dtype=torch.float64)
        powers = 1 / (1 + torch.arange(rows))  # the least favourable one: 5 times the textbook form's error
        for spectrum in (falling**0, 10 ** (-3 * falling), 10 ** (-8 * falling), falling < 0.5, powers):
            matrix = ((u * spectrum) @ vh).float()
            wanted = in_float64(matrix)
            textbook = optim._iterate((matrix / matrix.norm())[None], 5)[0]
            error, allowed = ((result.double() - wanted).norm() for result in (newton_schulz(matrix), textbook))
            assert error < 10 * allowed, f"{rows} x {cols}: {error:.1e} beside {allowed:.1e}"


@settings(max_examples=30, deadline=None)
@given(rows=sides, cols=sides, rank=st.integers(0, 5), seed=st.integers(0, 2**31))
@example(rows=64, cols=64, rank=0, seed=0)
@example(rows=192, cols=300, rank=1, seed=0)
def test_newton_schulz_of_low_rank_stays_in_its_subspace(rows, cols, rank, seed):
    left, right = normal(rows, rank, seed=seed), normal(rank, cols, seed=seed + 1)
    result = newton_schulz(left @ right).double()
    assert result.isfinite().all()
    if rank == 0:
        assert (result == 0).all()
    else:
        basis = torch.linalg.qr(left.double())[0]
        assert (result - basis @ (basis.T @ result)).norm() < 2e-3 * result.norm()


@settings(max_examples=25, deadline=None)
@given(stack=st.lists(st.integers(1, 4), max_size=3), rows=sides, cols=sides, seed=st.integers(0, 2**31))
@example(stack=[3, 3], rows=64, cols=128, seed=0)
@example(stack=[7], rows=7, cols=13, seed=0)
@example(stack=[5], rows=201, cols=195, seed=0)
def test_a_stack_equals_its_matrices_one_by_one_to_the_bit(stack, rows, cols, seed):
    matrices = normal(*stack, rows, cols, seed=seed)
    before = matrices.clone()
    together = newton_schulz(matrices)
    one_by_one = torch.stack([newton_schulz(matrix) for matrix in matrices.reshape(-1, rows, cols)])
    assert together.shape == matrices.shape and torch.equal(together, one_by_one.reshape(matrices.shape))
    assert torch.equal(matrices, before)


def test_newton_schulz_of_the_transpose_is_the_transpose():
    matrix = normal(5, 130, 64)
    torch.testing.assert_close(newton_schulz(matrix.mT), newton_schulz(matrix).mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows, cols", [(32, 48), (64, 128), (200, 192)])
def test_newton_schulz_in_bfloat16_is_near_float32_and_keeps_the_input_dtype(rows, cols):
    matrix = normal(2, rows, cols)
    result = newton_schulz(matrix, dtype=torch.bfloat16)
    assert result.dtype == torch.float32
    assert (result - newton_schulz(matrix)).norm() < 0.1 * result.norm()
    assert newton_schulz(matrix.bfloat16(), dtype=torch.float32).dtype == torch.bfloat16


def test_newton_schulz_refuses_vectors_and_no_steps():
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        newton_schulz(torch.ones(4))
    with pytest.raises(ValueError, match="steps 0"):
        newton_schulz(torch.ones(4, 4), steps=0)


# ---------------------------------------------------------------- logical matrices


def test_gate_and_up_of_every_expert_are_matrices_of_their_own():
    gate, up = normal(3, 5, 7, seed=1), normal(3, 5, 7, seed=2)
    stack = torch.cat([gate, up], dim=1)  # (E, 2I, H)
    views = logical_matrices("model.layers.1.mlp.experts.gate_up_proj", stack)
    assert torch.equal(views[0::2], gate) and torch.equal(views[1::2], up)
    views[2] = 0  # expert 1's gate: it is a view
    assert (stack[1, :5] == 0).all() and torch.equal(stack[1, 5:], up[1])


def test_a_stack_of_unknown_layout_is_refused_by_name():
    parameter = nn.Parameter(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match=r"heads\.weight: shape \(2, 3, 4\)"):
        MuonAdamW([{"params": [("heads.weight", parameter)], "method": "muon"}], lr=0.1)


# ---------------------------------------------------------------- one step against other definitions


def run_on_random_gradients(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int = 4) -> None:
    for step in range(steps):
        for i, parameter in enumerate(parameters):
            parameter.grad = normal(*parameter.shape, seed=100 * step + i)
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)  # a schedule
        optimizer.step()


def test_muon_equals_torch_muon_on_matrices_over_several_steps():
    shapes = [(32, 48), (48, 32), (64, 128), (32, 48), (1, 9)]
    ours, theirs = ([nn.Parameter(normal(*s, seed=i)) for i, s in enumerate(shapes)] for _ in range(2))
    named = [(f"{i}.weight", parameter) for i, parameter in enumerate(ours)]
    run_on_random_gradients(MuonAdamW([{"params": named, "method": "muon"}], lr=0.01), ours)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    run_on_random_gradients(reference, theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        moved = (b - normal(*shapes[i], seed=i)).norm()
        assert (a - b).norm() < 0.03 * moved  # theirs computes Newton-Schulz in bfloat16


def test_muon_equals_its_definition_on_stacks_over_several_steps():
    name = "layer.mlp.experts.gate_up_proj"
    parameter, lr, momentum, decay = nn.Parameter(normal(3, 20, 24)), 0.01, 0.9, 0.2
    wanted, average = parameter.detach().double(), torch.zeros(3, 20, 24, dtype=torch.float64)
    group = {"params": [(name, parameter)], "method": "muon"}
    run_on_random_gradients(MuonAdamW([group], lr=lr, momentum=momentum, weight_decay=decay), [parameter])
    for step in range(4):
        gradient, step_lr = normal(3, 20, 24, seed=100 * step).double(), lr * (step + 1)
        average = momentum * average + (1 - momentum) * gradient
        nesterov = momentum * average + (1 - momentum) * gradient
        wanted = wanted * (1 - step_lr * decay)
        for expert in range(3):
            for rows in (slice(0, 10), slice(10, 20)):  # gate, up
                wanted[expert, rows] -= step_lr * 0.2 * math.sqrt(24) * in_float64(nesterov[expert, rows])
    torch.testing.assert_close(parameter.detach().double(), wanted, rtol=0, atol=1e-5)


def test_adamw_groups_equal_torch_adamw_to_the_bit():
    def reference(model: GLM) -> torch.optim.AdamW:
        trainable = list(model.named_parameters())
        decayed = [p for _, p in trainable if p.ndim > 1]
        others = [p for _, p in trainable if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)

    ours, theirs = make_model(), make_model()
    train(ours, build_optimizer(ours, lr=1e-2, kind="adamw"), range(5))
    train(theirs, reference(theirs), range(5))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_embedding_head_norms_and_biases_are_updated_by_adamw_also_beside_muon():
    model, by_adamw = make_model(), make_model()
    optimizer, reference = build_optimizer(model, lr=1e-2), build_optimizer(by_adamw, lr=1e-2, kind="adamw")
    train(model, optimizer, range(1))
    train(by_adamw, reference, range(1))
    for (name, a), b in zip(model.named_parameters(), by_adamw.parameters(), strict=True):
        is_muons = a.ndim > 1 and not name.startswith(("model.embed_tokens", "lm_head"))
        assert torch.equal(a, b) != is_muons, name


@pytest.mark.parametrize("rows, cols", [(16, 64), (64, 64), (64, 16)])
def test_an_update_has_root_mean_square_of_a_fifth_of_the_learning_rate(rows, cols):
    parameter = nn.Parameter(torch.zeros(rows, cols))
    parameter.grad = 1e-4 * normal(rows, cols)
    MuonAdamW([{"params": [("weight", parameter)], "method": "muon"}], lr=0.5).step()
    assert parameter.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.5, rel=0.15)


@pytest.mark.parametrize("elements", [1, 3000, 2**40])
def test_the_result_is_independent_of_chunking(elements, monkeypatch):
    def trained() -> dict[str, torch.Tensor]:
        model = make_model()
        train(model, build_optimizer(model, lr=1e-2), range(3))
        return model.state_dict()

    wanted = trained()
    monkeypatch.setattr(optim, "CHUNK_ELEMENTS_CPU", elements)
    for name, tensor in trained().items():
        assert torch.equal(tensor, wanted[name]), name


@given(counts=st.lists(st.integers(1, 9), max_size=5), size=st.integers(1, 12))
def test_chunks_hold_at_most_their_size_and_all_matrices_in_order(counts, size):
    stacks = [(normal(count, 2, 3, seed=i),) for i, count in enumerate(counts)]
    chunks = [[piece for (piece,) in pieces] for pieces in optim._in_chunks(stacks, size)]
    assert all(sum(len(piece) for piece in pieces) == size for pieces in chunks[:-1])
    assert all(0 < sum(len(piece) for piece in pieces) <= size for pieces in chunks[-1:])
    if counts:
        dealt = torch.cat([piece for pieces in chunks for piece in pieces])
        assert torch.equal(dealt, torch.cat([stack for (stack,) in stacks]))


def test_parameters_without_gradient_stay_as_they_are():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    build_optimizer(model, lr=1e-2).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_trainable_parameter_is_in_exactly_one_group(kind, tied):
    model = make_model(tie_word_embeddings=tied)
    model.model.layers[0].requires_grad_(False)
    groups = build_optimizer(model, lr=0.1, kind=kind).param_groups
    listed = [name for group in groups for name in group["param_names"]]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(listed) == len(set(listed)) and set(listed) == trainable
    assert ("lm_head.weight" in listed) != tied
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held)) == len(listed)


def test_groups_divide_by_method_and_weight_decay():
    model = make_model()
    placed = {
        name: (group["method"], group["weight_decay"])
        for group in build_optimizer(model, lr=0.1, weight_decay=0.3).param_groups
        for name in group["param_names"]
    }
    for name, parameter in model.named_parameters():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert placed[name] == ("adamw", 0.3), name
        elif name.endswith("bias") or "norm" in name:
            assert placed[name] == ("adamw", 0.0), name
        else:
            assert parameter.ndim > 1 and placed[name] == ("muon", 0.3), name
    assert placed["model.layers.1.mlp.gate.weight"][0] == placed["mtp.eh_proj.weight"][0] == "muon"


def test_one_multiplier_drives_every_group():
    optimizer = build_optimizer(make_model(), lr=0.1)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1] * 3
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05] * 3


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("lr", -1.0, "lr is -1.0"),
        ("lr", math.nan, "lr is nan"),
        ("lr", "fast", "lr is 'fast'"),
        ("momentum", 1.0, "momentum is 1.0"),
        ("betas", (0.9, 1.5), r"betas\[1\] is 1.5"),
        ("betas", 0.9, "betas is 0.9"),
        ("eps", -1e-8, "eps is -1e-08"),
        ("weight_decay", math.inf, "weight_decay is inf"),
        ("newton_schulz_dtype", "float16", "newton_schulz_dtype is 'float16'"),
        ("kind", "sgd", "kind is 'sgd'"),
    ],
)
def test_bad_hyper_parameters_are_named_with_their_value(key, value, told):
    with pytest.raises(ValueError, match=told):
        build_optimizer(make_model(), **({"lr": 0.1} | {key: value}))


def test_half_precision_parameters_are_refused_by_name():
    with pytest.raises(ValueError, match=r"\.weight is torch.bfloat16"):
        build_optimizer(make_model().bfloat16(), lr=0.1)


def test_newton_schulz_dtype_reaches_muon():
    models = [make_model() for _ in range(3)]
    for model, dtype in zip(models, (None, "float32", "bfloat16"), strict=True):
        train(model, build_optimizer(model, lr=1e-2, newton_schulz_dtype=dtype), range(1))
    default, full, half = (model.mtp.eh_proj.weight for model in models)
    assert torch.equal(default, full) and not torch.equal(full, half)


# ---------------------------------------------------------------- state dict


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_training_continues_from_a_saved_state_to_the_bit(kind, tmp_path):
    straight = make_model()
    train(straight, build_optimizer(straight, lr=1e-2, kind=kind), range(6))

    first = make_model()
    optimizer = build_optimizer(first, lr=1e-2, kind=kind)
    train(first, optimizer, range(3))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = make_model(seed=1)
    second.load_state_dict(saved["model"])
    continued = build_optimizer(second, lr=0.5, kind=kind)  # the saved learning rate counts
    continued.load_state_dict(saved["optimizer"])
    train(second, continued, range(3, 6))
    for (name, a), b in zip(straight.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"num_hidden_layers": 1}, r"not in this model: model\.layers\.1\."),
        ({"num_hidden_layers": 3}, r"not in the saved state: model\.layers\.2\."),
        ({"vocab_size": 65}, r"of another shape: model\.embed_tokens\.weight, lm_head\.weight$"),
    ],
)
def test_a_state_of_other_parameters_is_refused_with_their_names(changes, told):
    model, other = make_model(), make_model(**changes)
    optimizer = build_optimizer(model, lr=1e-2)
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match=told):
        build_optimizer(other, lr=1e-2).load_state_dict(optimizer.state_dict())


def test_a_state_in_another_order_is_refused():
    named = [(name, nn.Parameter(torch.ones(4, 4))) for name in ("a.weight", "b.weight")]
    forwards = MuonAdamW([{"params": named, "method": "muon"}], lr=0.1)
    backwards = MuonAdamW([{"params": named[::-1], "method": "muon"}], lr=0.1)
    with pytest.raises(ValueError, match=r"in another order: b\.weight, a\.weight"):
        forwards.load_state_dict(backwards.state_dict())


def test_a_state_of_another_method_or_optimiser_is_refused():
    model = make_model()
    muon, adamw = build_optimizer(model, lr=1e-2), build_optimizer(model, lr=1e-2, kind="adamw")
    with pytest.raises(ValueError, match=r"updated by another method: model\.layers\.0\.self_attn\.q_proj\.weight"):
        adamw.load_state_dict(muon.state_dict())
    with pytest.raises(ValueError, match="not saved by MuonAdamW"):
        muon.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
