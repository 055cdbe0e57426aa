"""General ability: instruction following, translation, long documents, safety, and style."""

from minglm.tasks.general.instructions import InstructionFollowing
from minglm.tasks.general.long_document import LongDocument, needle_document
from minglm.tasks.general.recall import recall, recall_text
from minglm.tasks.general.safety import Safety
from minglm.tasks.general.style import Preference, StyleAnswer, StylePreference, pair, style_score
from minglm.tasks.general.translation import Translation
from minglm.tasks.task import Problem

FAMILIES: tuple[type[Problem], ...] = (InstructionFollowing, Translation, LongDocument, Safety, StylePreference, StyleAnswer)

__all__ = [
    "FAMILIES",
    "InstructionFollowing",
    "LongDocument",
    "Preference",
    "Safety",
    "StyleAnswer",
    "StylePreference",
    "Translation",
    "needle_document",
    "pair",
    "recall",
    "recall_text",
    "style_score",
]
