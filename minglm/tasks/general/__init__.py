"""General ability: instruction following, translation, long documents, safety, and style."""

from minglm.tasks.general.instructions import InstructionFollowing
from minglm.tasks.general.long_document import LongDocument, needle_document
from minglm.tasks.general.translation import Translation
from minglm.tasks.task import Problem

FAMILIES: tuple[type[Problem], ...] = (InstructionFollowing, Translation, LongDocument)

__all__ = ["FAMILIES", "InstructionFollowing", "LongDocument", "Translation", "needle_document"]
