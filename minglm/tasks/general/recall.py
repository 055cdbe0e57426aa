"""Every fact of a long document asked for: what a corpus is made of, since one question on a long document would give a model
some four tokens to learn retrieval from, after thousands of filler."""

import random
from dataclasses import replace

from minglm.tasks.general.long_document import NEEDLES, LongDocument
from minglm.tasks.task import TaskError
from minglm.tasks.text import answer_text, conversation_text, document


def recall(problem: LongDocument) -> list[LongDocument]:
    """The problem, of kind "needle" or "needles", and if its document has further passwords, a question on these in an order
    of no rule. They belong to the split of the problem given.

    Raises:
        TaskError: a question of another kind.
    """
    if problem.kind not in NEEDLES:
        raise TaskError(f'kind = {problem.kind!r}: wanted "needle" or "needles", whose documents state passwords')
    others = [town for town, _ in problem.facts if town not in problem.asked]
    random.Random(problem.document).shuffle(others)  # in the document's order, a model could copy without looking for the name
    if not others:
        return [problem]
    return [problem, replace(problem, kind=NEEDLES[len(others) > 1], asked=tuple(others))]


def recall_text(problem: LongDocument, thinking: bool) -> str:
    """The questions of `recall` as plain text, in the form of minglm.tasks.text; the document stands before the first one
    only."""
    first, *others = recall(problem)
    text = document(first, thinking)
    for other in others:
        text += conversation_text([{"role": "user", "content": other.question}], opens=True) + answer_text(other, thinking)
    return text
