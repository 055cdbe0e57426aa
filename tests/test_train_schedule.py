import math

from hypothesis import given
from hypothesis import strategies as st

from minglm.train.schedule import learning_rate_factor, micro_batches_at


@st.composite
def schedules(draw) -> dict:
    steps = draw(st.integers(1, 400))
    warmup = draw(st.integers(0, steps))
    kind = draw(st.sampled_from(["cosine", "wsd"]))
    decay = draw(st.integers(1, steps - warmup)) if kind == "wsd" and warmup < steps else 0
    kind = kind if decay else "cosine"
    final = draw(st.floats(0, 1))
    return dict(steps=steps, kind=kind, warmup_steps=warmup, decay_steps=decay, final_fraction=final)


def curve(schedule: dict) -> list[float]:
    return [learning_rate_factor(step, **schedule) for step in range(1, schedule["steps"] + 1)]


@given(schedules())
def test_the_learning_rate_rises_to_its_peak_and_never_rises_again(schedule):
    factors, warmup = curve(schedule), schedule["warmup_steps"]
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(a < b for a, b in zip(factors[:warmup], factors[1:warmup], strict=False))
    assert all(a >= b for a, b in zip(factors[max(0, warmup - 1) :], factors[max(1, warmup) :], strict=False))
    if warmup:
        assert factors[warmup - 1] == 1 and math.isclose(factors[0], 1 / warmup)


@given(schedules())
def test_the_last_step_has_the_final_fraction(schedule):
    if schedule["warmup_steps"] < schedule["steps"]:
        assert math.isclose(curve(schedule)[-1], schedule["final_fraction"], abs_tol=1e-9)


@given(schedules())
def test_wsd_stays_at_the_peak_until_the_decay(schedule):
    if schedule["kind"] == "wsd":
        stable = curve(schedule)[schedule["warmup_steps"] : schedule["steps"] - schedule["decay_steps"]]
        assert all(factor == 1 for factor in stable)


def test_cosine_is_half_way_down_in_the_middle():
    assert math.isclose(learning_rate_factor(60, 100, "cosine", warmup_steps=20, final_fraction=0.2), 0.6)


@given(full=st.integers(1, 64), first=st.integers(1, 64), warmup=st.integers(0, 300))
def test_the_batch_grows_from_first_to_full_and_stays(full, first, warmup):
    first = min(first, full)
    counts = [micro_batches_at(step, full, first, warmup) for step in range(1, 400)]
    assert counts == sorted(counts)
    assert set(counts[max(0, warmup - 1) :]) == {full}
    if warmup > 1:
        assert counts[0] == first
        # linear: never more than one micro-batch from the straight line
        line = [first + (full - first) * (step - 1) / (warmup - 1) for step in range(1, warmup)]
        assert all(0 <= exact - count < 1 for exact, count in zip(line, counts, strict=False))
