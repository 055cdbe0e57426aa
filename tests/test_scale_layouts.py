"""One process is the oracle: every layout of ranks takes the same ten steps and ends with the same model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spread import CPU, STEPS, nano_recipe, on_ranks, spread_learner, take_steps

from minglm.train.learner import Learner
from minglm.train.recipe import Recipe
from scale.mesh import Layout

LAYOUTS = {
    2: [Layout(2, 1, 1), Layout(1, 2, 1), Layout(1, 1, 2)],
    4: [Layout(4, 1, 1), Layout(1, 4, 1), Layout(1, 1, 4), Layout(2, 2, 1), Layout(2, 1, 2), Layout(1, 2, 2)],
}


def alone(recipe: Recipe):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    learner = Learner(recipe, recipe.model, CPU)
    numbers, biases = take_steps(learner, range(STEPS))
    return numbers, biases, {name: p.detach() for name, p in learner.model.named_parameters()}


def take_steps_in_layouts(layouts, recipe, reference, folder):
    torch.set_default_dtype(torch.float64)
    for layout in layouts:
        learner = spread_learner(layout, recipe)
        numbers, biases = take_steps(learner, range(STEPS))
        gaps = {}
        for part in learner.parts:
            if part.local.numel():
                gaps[part.name] = (part.local - part.cut_out(reference[part.name])).abs().max().item()
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, gaps)
        gaps = {name: max(some.get(name, 0.0) for some in everybody) for name in reference}
        if dist.get_rank() == 0:
            torch.save((numbers, biases, gaps), folder / f"{layout}.pt")


if __name__ == "__main__":
    import sys, time
    recipe = nano_recipe()
    t = time.time(); numbers, biases, reference = alone(recipe); print("alone", time.time() - t)
    folder = Path("/tmp/lay"); folder.mkdir(exist_ok=True)
    for n, layouts in LAYOUTS.items():
        t = time.time()
        on_ranks(n, take_steps_in_layouts, layouts, recipe, reference, folder)
        print(n, time.time() - t)
        for layout in layouts:
            a, b, gaps = torch.load(folder / f"{layout}.pt")
            worst = max(gaps, key=gaps.get)
            print(layout, "numbers", ((a - numbers).abs() / numbers.abs().clamp(min=1e-3)).max(0).values.tolist(), "bias", torch.equal(b, biases), worst, gaps[worst])
            print((a-numbers).abs().max(1).values)
