"""A needle in a haystack: can the model find one fact at any depth of a document of any length? A grid, and its picture.

The document states the passwords at several towns; the question is after one of them, and the others are the wrong answers
to choose from. So a model that only prefers what it has read, or the nearest password, stays at chance.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minglm.evals.likelihood import choose
from minglm.evals.measure import EvaluationError, Measure, scored
from minglm.evals.scoring import Passage, Scorer, split_at_choice
from minglm.tasks.general.long_document import LongDocument, needle_document
from minglm.tasks.general.passages import WORDS
from minglm.tasks.task import HELD_OUT, split_of
from minglm.tasks.text import ANSWER, answer_text, conversation_text, ended, prompt_text

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CANDIDATES = 4
EXACT_CHANCE = 1 / len(WORDS)
FEWEST_CHARACTERS = 220  # room for the facts and the question


@dataclass(frozen=True)
class Grid:
    """chosen, exact (lengths, depths, trials): whether the right password was the likeliest, and whether greedy decoding
    writes it.

    lengths in tokens, prompt and answer together.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    chosen: np.ndarray
    exact: np.ndarray

    def measures(self) -> list[Measure]:
        """For each length, over all depths."""
        found = []
        for number, length in enumerate(self.lengths):
            name = f"{length} tokens"
            found.append(
                scored("needle", name, f"chosen of {CANDIDATES}", self.chosen[number].ravel().tolist(), 1 / CANDIDATES)
            )
            found.append(scored("needle", name, "exact", self.exact[number].ravel().tolist(), EXACT_CHANCE))
        return found

    def details(self) -> dict[str, Any]:
        """Means of each cell, (lengths, depths), as JSON has them."""
        return {
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "chosen": self.chosen.mean(-1).tolist(),
            "exact": self.exact.mean(-1).tolist(),
            "trials": self.chosen.shape[-1],
        }


def needle_grid(scorer: Scorer, lengths: Sequence[int], trials: int, depths: Sequence[float] = DEPTHS, seed: int = 0) -> Grid:
    """Ask `trials` held-out questions in each cell. Raises EvaluationError for a length that has no room for a question."""
    if not lengths or trials < 1:
        raise EvaluationError(f"lengths = {list(lengths)}, trials = {trials}: wanted one of each at least")
    shortest = shortest_length(scorer)
    if min(lengths) < shortest:
        raise EvaluationError(f"needle lengths {list(lengths)}: a question alone takes {shortest} tokens; wanted as many")
    rng = random.Random(f"needle {seed}")
    cells = [(length, depth) for length in lengths for depth in depths]
    questions = [_question(scorer, rng, length, depth) for length, depth in cells for _ in range(trials)]
    scores = scorer.score(questions, "needles")
    shape = (len(lengths), len(depths), trials)
    chosen = [choose(one.continuations) for one in scores]
    exact = [float(one.continuations[0].exact) for one in scores]
    return Grid(tuple(lengths), tuple(depths), np.reshape(chosen, shape), np.reshape(exact, shape))


def shortest_length(scorer: Scorer) -> int:
    """Tokens that any question with its facts and an answer fits."""
    rng = random.Random(0)
    return max(
        as_choice(scorer, needle_document(rng, FEWEST_CHARACTERS, 0.5, others=CANDIDATES - 1), rng).longest for _ in range(20)
    )


def _question(scorer: Scorer, rng: random.Random, length: int, depth: float) -> Passage:
    """A held-out question whose prompt and answer together have at most `length` tokens, and nearly so many."""
    characters = 4 * length
    while True:
        problem = needle_document(rng, characters, depth, others=CANDIDATES - 1)
        if split_of(problem) != HELD_OUT:
            continue
        question = as_choice(scorer, problem, rng)
        if question.longest <= length:
            return question
        characters = min(characters - 8, int(characters * length / question.longest))


def as_choice(scorer: Scorer, problem: LongDocument, rng: random.Random) -> Passage:
    """The question as plain text, with the right password and the document's other ones, each as a whole answer."""
    begun = prompt_text(problem) + ANSWER
    right = answer_text(problem, thinking=False).removeprefix(ANSWER)
    wrong = [
        ended(conversation_text([{"role": "assistant", "content": content}])).removeprefix(ANSWER)
        for content in problem.candidates(rng, CANDIDATES)[1:]
    ]
    return split_at_choice(scorer.tokenizer, begun, [right, *wrong])


def plot_grids(grids: Mapping[str, Mapping[str, Any]], path: str | Path, what: str = "chosen") -> None:
    """Draw `Grid.details` of several models side by side into a PNG file, from chance (white) to always right."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from minglm.train.plots import STYLE

    low = 1 / CANDIDATES if what == "chosen" else 0.0
    with rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 3.1 * len(grids), 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        trials = max(grid["trials"] for grid in grids.values())
        figure.suptitle(f"needle {what}: {trials} questions a cell, chance {low:.2f}", x=0.01, ha="left", fontsize=11)
        for axes, (label, grid) in zip(np.ravel(figure.subplots(1, len(grids), squeeze=False)), grids.items(), strict=True):
            values = np.array(grid[what]).T  # (depths, lengths)
            image = axes.imshow(values, cmap="Greens", vmin=low, vmax=1, aspect="auto")
            for (row, column), value in np.ndenumerate(values):
                shade = "white" if value > (1 + low) / 2 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=8)
            axes.set_title(label)
            axes.set_xticks(range(len(grid["lengths"])), [f"{length:,}" for length in grid["lengths"]])
            axes.set_yticks(range(len(grid["depths"])), [f"{depth:.0%}" for depth in grid["depths"]])
            axes.set_xlabel("tokens")
            axes.grid(False)
        figure.axes[0].set_ylabel("depth of the needle")
        figure.colorbar(image, ax=figure.axes, pad=0.02)
        figure.savefig(path, dpi=110)
