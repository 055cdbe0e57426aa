"""One process is the oracle: every layout of ranks takes the same steps and ends with the same model.

In float64. A sum over ranks goes in another order than one process's; in float32 its rounding, 1e-7, would within ten steps
tip one of the 15,000 choices of experts, and Adam makes a step of full size of a gradient that is nothing but rounding. In
float64 the two runs can be told apart by what the code rounds to float32 on purpose alone: router, softmax, loss and
Newton-Schulz. So a wrong sum, however small, cannot hide behind rounding.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_run import MODEL
from spread import CPU, STEPS, nano_recipe, on_ranks, spread_learner, take_steps

import scale.muon
from minglm.model import GLM
from minglm.optim import build_optimizer
from minglm.train.learner import Learner
from minglm.train.recipe import Recipe
from scale.mesh import Layout, make_mesh
from scale.muon import ShardedMuonAdamW
from scale.shard import build, local, parts

# Of the losses, the gradient norm and MaxVio, relative; and of every number of every parameter, after ten steps of 8e-3: where
# the gradients of one nearly cancel, AdamW makes an eighth of a step of what rounding leaves (seen: 1.1e-4, one in 131,072).
NUMBERS_TOLERANCE, PARAMETER_TOLERANCE = 1e-5, 1e-3


def alone(recipe: Recipe, steps: int = STEPS):
    """-> numbers and router biases of each step, and the parameters after the last."""
    torch.set_num_threads(1)
    learner = Learner(recipe, recipe.model, CPU)
    numbers, biases = take_steps(learner, range(steps))
    return numbers, biases, {name: p.detach() for name, p in learner.model.named_parameters()}


def compare_layouts(layouts: list[Layout], recipe: Recipe, reference, out: Path) -> None:
    torch.set_default_dtype(torch.float64)
    wanted_numbers, wanted_biases, wanted = reference
    for layout in layouts:
        learner = spread_learner(layout, recipe)
        numbers, biases = take_steps(learner, range(len(wanted_numbers)))
        torch.testing.assert_close(numbers, wanted_numbers, rtol=NUMBERS_TOLERANCE, atol=NUMBERS_TOLERANCE)
        assert torch.equal(biases, wanted_biases), f"{layout}: router biases differ"
        held = 0
        for part in learner.parts:
            ours = part.cut_out(wanted[part.name])
            torch.testing.assert_close(part.local, ours, rtol=0, atol=PARAMETER_TOLERANCE, msg=part.name)
            held += part.local.numel()
        held = torch.tensor(held)
        dist.all_reduce(held)
        assert held == layout.dp * sum(p.numel() for p in wanted.values())
    if dist.get_rank() == 0:
        out.write_text("\n".join(map(str, layouts)))


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (2, [Layout(2, 1, 1), Layout(1, 2, 1), Layout(1, 1, 2)]),
        pytest.param(
            4,
            [Layout(4, 1, 1), Layout(1, 4, 1), Layout(1, 1, 4), Layout(2, 2, 1), Layout(2, 1, 2), Layout(1, 2, 2)],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ten_steps_of_nano_are_the_same_in_every_layout(float64, tmp_path, ranks, layouts):
    """Muon and AdamW, MTP, router balance, accumulated micro-batches, packed documents, padding."""
    recipe = nano_recipe()
    on_ranks(ranks, compare_layouts, layouts, recipe, alone(recipe), tmp_path / "compared")
    assert (tmp_path / "compared").read_text() == "\n".join(map(str, layouts))


# Six experts on four ranks are cut by rows; three ranks divide neither 16 nor 300.
SMALL = replace(MODEL, n_routed_experts=6, vocab_size=300)


@pytest.mark.parametrize(
    ("ranks", "layouts", "changes"),
    [
        (4, [Layout(1, 4, 1), Layout(1, 2, 2)], dict(num_attention_heads=3)),
        (3, [Layout(1, 3, 1), Layout(1, 1, 3), Layout(3, 1, 1)], dict(tie_word_embeddings=True)),
    ],
)
@pytest.mark.parametrize("activation_checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_odd_sizes_are_cut_without_loss(float64, tmp_path, ranks, layouts, changes, activation_checkpointing):
    recipe = nano_recipe()
    hardware = replace(recipe.hardware, activation_checkpointing=activation_checkpointing)
    training = replace(recipe.training, sequences_per_step=12)
    recipe = replace(recipe, model=replace(SMALL, **changes), hardware=hardware, training=training)
    on_ranks(ranks, compare_layouts, layouts, recipe, alone(recipe, steps=3), tmp_path / "compared")
    assert (tmp_path / "compared").exists()


def muon_beside_one_process(layout: Layout, round_bytes: int) -> None:
    """The same gradients on both sides, so that nothing is summed."""
    scale.muon.ROUND_BYTES = round_bytes
    torch.manual_seed(0)
    plain = GLM(SMALL)
    mesh = make_mesh(layout, "cpu")
    spread = build(SMALL, mesh, torch.device("cpu"))
    held = parts(spread, mesh)
    for part in held:
        part.local.copy_(part.cut_out(plain.get_parameter(part.name).data))
    ours, theirs = ShardedMuonAdamW(spread, held, 1e-2), build_optimizer(plain, 1e-2)
    orthogonalised = {name for group in theirs.param_groups if group["method"] == "muon" for name in group["param_names"]}
    assert len(orthogonalised) > len(held) / 3
    for _ in range(3):
        for part in held:
            plain.get_parameter(part.name).grad = gradient = torch.randn(part.shape)
            parameter = spread.get_parameter(part.name)
            parameter.grad = torch.zeros_like(parameter)
            local(parameter.grad).copy_(part.cut_out(gradient))
        ours.step()
        theirs.step()
        for part in held:
            theirs_here = part.cut_out(plain.get_parameter(part.name).data)
            if part.name in orthogonalised:
                assert torch.equal(part.local, theirs_here), part.name
            else:  # PyTorch's fused AdamW works in vectors and rounds what is left over otherwise
                torch.testing.assert_close(part.local, theirs_here, rtol=1e-6, atol=1e-6)
        ours.zero_grad()
        assert all(p.grad is None for p in spread.parameters())


@pytest.mark.parametrize("round_bytes", [2**28, 1000], ids=["one round", "many rounds"])
@pytest.mark.parametrize("layout", [Layout(1, 4, 1), Layout(1, 2, 2), Layout(2, 1, 2)], ids=str)
def test_a_sharded_muon_update_has_the_bits_of_one_process(layout, round_bytes):
    on_ranks(4, muon_beside_one_process, layout, round_bytes)
