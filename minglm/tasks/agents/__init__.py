"""Problems that are solved with tools, in a world that answers."""

from minglm.tasks.task import Problem

FAMILIES: tuple[type[Problem], ...] = ()
