"""General ability: instruction following, translation, long documents, safety, and style."""

from minglm.tasks.general.long_document import LongDocument, needle_document
from minglm.tasks.task import Problem

FAMILIES: tuple[type[Problem], ...] = (LongDocument,)

__all__ = ["FAMILIES", "LongDocument", "needle_document"]
