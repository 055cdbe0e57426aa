"""Every fact of a long document asked for in a row: what a corpus is made of, since one question on a long document would
give a model some four tokens to learn retrieval from, after thousands of filler."""

import random

from minglm.tasks.general.long_document import NEEDLES, LongDocument
from minglm.tasks.task import TaskError
from minglm.tasks.text import answer_text, conversation_text, document


def recall(problem: LongDocument) -> list[LongDocument]:
    """One question of kind "needle" for each password in the document of a problem of kinds "needle" and "needles": first the
    problem's own, then the others in an order of no rule. They belong to the split of the problem given.

    Raises:
        TaskError: a question of another kind.
    """
    if problem.kind not in NEEDLES:
        raise TaskError(f'kind = {problem.kind!r}: wanted "needle" or "needles", whose documents state passwords')
    others = [town for town, _ in problem.facts if town != problem.asked[0]]
    random.Random(problem.document).shuffle(others)  # in the document's order, a model could copy without looking for the name
    towns = [problem.asked[0], *others]
    return [LongDocument(problem.document, "needle", (town,), problem.facts) for town in towns]


def recall_text(problem: LongDocument, thinking: bool) -> str:
    """The questions of `recall` as plain text, in the form of minglm.tasks.text; the document stands before the first one
    only."""
    first, *others = recall(problem)
    text = document(first, thinking)
    for other in others:
        text += conversation_text([{"role": "user", "content": other.question}], opens=True) + answer_text(other, thinking)
    return text
