"""Learning from preferences: a reward model, or DPO. The loop is the trainer's, the data pairs of answers.

Held-out pairs judge by accuracy and by calibration: of the pairs that the model prefers with probability p, a share p should
be right (reliability; DeGroot and Fienberg, 1983).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minglm.evals.interval import Estimate, share
from minglm.posttrain.pair_learner import learner_of, right
from minglm.posttrain.preferences import preference_data
from minglm.posttrain.recipe import RewardRecipe, load_reward_recipe, resolve_paths, save_reward_recipe
from minglm.posttrain.reward_plots import plot_run
from minglm.posttrain.sft import SFTTrainer, run_trainer
from minglm.train.metrics import read_metrics
from minglm.train.run_folder import RunFolder
from minglm.train.trainer import Outcome

BINS = 10


def train_on_preferences(recipe: RewardRecipe, run_folder: str | Path, must_resume: bool = False) -> Outcome:
    """Train by `recipe` in `run_folder`, going on from its newest checkpoint if it has any. Signals and errors as in `sft`."""
    recipe = resolve_paths(recipe)

    def open_folder(folder: RunFolder) -> Path | None:
        return folder.open(recipe, must_resume, load_reward_recipe, save_reward_recipe)

    return run_trainer(PairTrainer, learner_of(recipe), recipe, run_folder, preference_data, open_folder)


class PairTrainer(SFTTrainer):
    """The trainer on pairs; a held-out record says how well the model tells the preferred answer."""

    together = 2

    def judge(self) -> dict[str, Any]:
        census, margins = self.dataset.held_out, self.learner.margins(self.held_out)
        sources = [census.conversations[number].source for number in self._packed(census).order[::2]]
        found = {**reliability(margins.numpy()), "by_source": {}}
        for name in sorted(set(sources)):
            own = share([score for score, source in zip(right(margins).tolist(), sources, strict=True) if source == name])
            found["by_source"][name] = own.numbers
        self.standing = f"held-out accuracy {Estimate(*found['accuracy'], len(margins)).text()}"
        if self.step == 0 or self.plan.is_border(self.step):
            self.bar.write(f"step {self.step}: {self.standing} of {len(margins)} pairs")
        return found

    def draw(self) -> None:
        plot_run(read_metrics(self.folder.metrics), self.folder.overview, f"minglm: {self.folder.path.name}")
        self.read_at = self.drawn_at = self._seconds()


def reliability(margins: Sequence[float]) -> dict[str, Any]:
    """How good and how honest the log-odds (pairs,) are, with which the chosen answers are preferred.

    loss: -log sigmoid(margin), nats a pair. accuracy: with a 95% interval; a margin of 0 is half right. bins: of pairs by the
    confidence of the model in the answer that it prefers, sigmoid(|margin|), in tenths of 0.5 to 1: [mean confidence, share
    that is right, pairs], empty ones left out. calibration_error: the mean distance of the two over pairs (ECE; Naeini et
    al., 2015).
    """
    margins = np.asarray(margins, np.float64)
    confidence, scores = 1 / (1 + np.exp(-np.abs(margins))), right(torch.from_numpy(margins)).numpy()
    accuracy = share(scores)
    which = np.minimum((2 * BINS * (confidence - 0.5)).astype(int), BINS - 1)
    bins = [(confidence[which == b], scores[which == b]) for b in range(BINS) if (which == b).any()]
    return {
        "loss": float(np.logaddexp(0, -margins).mean()),
        "accuracy": accuracy.numbers,
        "calibration_error": float(sum(abs(c.mean() - s.mean()) * len(c) for c, s in bins) / len(margins)),
        "bins": [[float(c.mean()), float(s.mean()), len(c)] for c, s in bins],
        "pairs": len(margins),
    }
