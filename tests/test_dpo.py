"""The loss of DPO against its closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.posttrain.dpo import dpo_loss

LAW = settings(max_examples=60, derandomize=True, deadline=None)
numbers = st.floats(-30, 30)
pairs = st.lists(st.tuples(numbers, numbers, numbers, numbers), min_size=1, max_size=5)


def tensors(rows: list[tuple]) -> list[torch.Tensor]:
    return list(torch.tensor(rows, dtype=torch.float64).unbind(1))


@LAW
@given(pairs, st.floats(0.01, 2))
def test_loss_and_gradient_are_the_closed_forms(rows, beta):
    values = [value.requires_grad_() for value in tensors(rows)]
    found = dpo_loss(*values, beta)
    margins = [beta * ((a - c) - (b - d)) for a, b, c, d in rows]
    assert found.margins.tolist() == pytest.approx(margins)
    wanted = sum(math.log1p(math.exp(-abs(m))) + max(-m, 0) for m in margins) / len(rows)
    assert found.loss.item() == pytest.approx(wanted)
    found.loss.backward()
    gradient = [-beta / (1 + math.exp(m)) / len(rows) for m in margins]
    assert values[0].grad.tolist() == pytest.approx(gradient)
    assert values[1].grad.tolist() == pytest.approx([-g for g in gradient])


@LAW
@given(pairs, st.floats(0.01, 2))
def test_the_gradient_is_the_numeric_one(rows, beta):
    values = [value.requires_grad_() for value in tensors(rows)]
    assert torch.autograd.gradcheck(lambda *inputs: dpo_loss(*inputs, beta).loss, values)


@LAW
@given(st.floats(0.05, 0.95), st.floats(0.1, 2))
def test_where_people_prefer_one_response_with_probability_p_the_best_margin_is_its_logit(p, beta):
    """Bradley-Terry (the paper's eq. 6): the loss under preferences that are drawn is least there."""

    def expected(margin: float) -> float:
        zero, chosen = torch.zeros(1, dtype=torch.float64), torch.tensor([margin / beta], dtype=torch.float64)
        return p * dpo_loss(chosen, zero, zero, zero, beta).loss + (1 - p) * dpo_loss(zero, chosen, zero, zero, beta).loss

    best = math.log(p / (1 - p))
    assert expected(best) < min(expected(best - 0.1), expected(best + 0.1))


@LAW
@given(pairs, st.floats(-20, 20), st.floats(0.01, 2))
def test_what_policy_and_reference_share_does_not_count(rows, shift, beta):
    chosen, rejected, *reference = tensors(rows)
    shifted = dpo_loss(chosen + shift, rejected, reference[0] + shift, reference[1], beta)
    torch.testing.assert_close(shifted.loss, dpo_loss(chosen, rejected, *reference, beta).loss)


@pytest.mark.parametrize("shape, beta", [((0,), 0.1), ((2, 2), 0.1), ((2,), 0.0), ((2,), float("nan"))])
def test_what_has_no_loss_is_refused(shape, beta):
    with pytest.raises(ValueError, match="wanted four of one shape"):
        dpo_loss(*[torch.zeros(shape)] * 4, beta)


def test_half_precision_is_summed_in_full():
    assert dpo_loss(*[torch.zeros(2, dtype=torch.bfloat16)] * 4).loss.dtype == torch.float32
