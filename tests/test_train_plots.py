"""Plots are for people: what a test can hold is that they are drawn from whatever a run has recorded, and change with it."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from minglm.train.plots import _smooth, plot_overview


def records(steps: int, layers: int = 3, mtp: bool = True) -> list[dict]:
    found = [{"step": 0, "kind": "held_out", "loss": 7.0, "bits_per_byte": 4.0}]
    for step in range(1, steps + 1):
        found.append(
            {
                "step": step,
                "kind": "step",
                "sequences": 4 if step < 5 else 8,
                "learning_rate": 1e-3 / step,
                "loss": 9 / step**0.1,
                "lm_loss": 7 / step**0.1,
                "mtp_loss": 7.5 / step**0.1 if mtp else 0.0,
                "gradient_norm": 1 / step,
                "tokens_per_second": 1000.0 + step,
                "max_violation": [1 / (layer + step) for layer in range(layers)],
            }
        )
        if step % 10 == 0:
            found.append({"step": step, "kind": "held_out", "loss": 7 / step**0.1, "bits_per_byte": 4 / step**0.1})
            share, bias = np.full((layers, 4), 0.25), np.linspace(-1, 1, layers * 4).reshape(layers, 4)
            if layers:
                found.append({"step": step, "kind": "router", "expert_share": share.tolist(), "bias": bias.tolist()})
    return found


@pytest.mark.parametrize("steps", [1, 2, 9, 200])
@pytest.mark.parametrize("layers, mtp", [(3, True), (1, False), (0, False)])
def test_a_run_of_any_length_and_kind_has_an_overview(tmp_path, steps, layers, mtp):
    plot_overview(records(steps, layers, mtp), tmp_path / "overview.png", "a title")
    image = imread(tmp_path / "overview.png")
    assert image.shape[0] > 800 and image.shape[1] > 1200
    assert image[..., :3].std() > 0.05  # not a white page


def test_the_overview_changes_with_the_records(tmp_path):
    images = []
    for index, bits in enumerate((4.0, 2.0)):
        path = Path(tmp_path, f"{index}.png")
        found = records(20)
        found[0]["bits_per_byte"] = bits
        plot_overview(found, path)
        images.append(imread(path))
    assert images[0].shape == images[1].shape and not np.array_equal(*images)


def test_stages_and_domains_are_marked(tmp_path):
    images = []
    stages = [{"step": step, "kind": "stage", "name": f"stage {step}"} for step in (8, 20)]
    domains = [{"step": 8, "kind": "domain", "domain": name, "bits_per_byte": 3.0} for name in ("prose", "code")]
    for index, marks in enumerate(([], stages, stages + domains)):
        path = Path(tmp_path, f"{index}.png")
        plot_overview(records(20) + marks, path)
        images.append(imread(path))
    assert not np.array_equal(images[0], images[1]) and not np.array_equal(images[1], images[2])


def test_nothing_is_drawn_before_the_first_step(tmp_path):
    plot_overview(records(0), tmp_path / "overview.png")
    assert not (tmp_path / "overview.png").exists()


@pytest.mark.parametrize("length", [1, 2, 49, 50, 333])
def test_smoothing_keeps_constants_and_straight_lines(length):
    x = np.arange(length)
    assert np.allclose(_smooth(np.full(length, 3.0)), 3.0)
    half = length // 50
    inner = slice(half, length - half)
    assert np.allclose(_smooth(2.0 * x)[inner], 2.0 * x[inner])
