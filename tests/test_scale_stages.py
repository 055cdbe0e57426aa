"""Recipes of several stages on many ranks: refused where a stage's batch cannot be shared, else the steps of one process."""

from dataclasses import replace

import pytest
from small_run import run_small
from test_train_stages import STAGES, staged, write_folder

from minglm.train.metrics import read_metrics
from scale.mesh import Layout, LayoutError
from scale.train import check, train


def test_every_stages_batch_must_be_shared_evenly(tmp_path):
    recipe = staged(tmp_path)  # 4, 4 and 2 sequences a step
    check(recipe, Layout(2, 1, 1))
    with pytest.raises(LayoutError, match=r"stages.long.sequences_per_step = 2: 4 ranks .*--stages.2.sequences-per-step 4"):
        check(replace(recipe, training=replace(recipe.training, sequences_per_micro_batch=1)), Layout(4, 1, 1))


def test_one_rank_records_what_the_trainer_does_across_a_border(tmp_path):
    recipe = staged(write_folder(tmp_path / "text"), stages=(*STAGES[1:],))
    run_small(recipe, tmp_path / "alone")
    train(recipe, tmp_path / "ranks", Layout(1, 1, 1))
    steps = [
        [
            (r["step"], r["sequences"], r["tokens"], r["lm_loss"])
            for r in read_metrics(folder / "metrics.jsonl")
            if "lm_loss" in r
        ]
        for folder in (tmp_path / "alone", tmp_path / "ranks")
    ]
    for ours, theirs in zip(*steps, strict=True):
        assert ours[:3] == theirs[:3] and ours[3] == pytest.approx(theirs[3], rel=1e-4)
