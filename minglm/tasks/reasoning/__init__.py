"""Reasoning: a question, steps of thought, and one answer that is right or wrong."""

from minglm.tasks.reasoning.arithmetic import Arithmetic
from minglm.tasks.reasoning.calendar_dates import Dates
from minglm.tasks.reasoning.countdown import Countdown
from minglm.tasks.reasoning.dates import Clock, Weekdays
from minglm.tasks.reasoning.equations import LinearEquations
from minglm.tasks.reasoning.expressions import Expressions
from minglm.tasks.reasoning.knights import Knights
from minglm.tasks.reasoning.modular import ModularArithmetic
from minglm.tasks.reasoning.ordering import Ordering
from minglm.tasks.reasoning.science import Science
from minglm.tasks.reasoning.units import Units
from minglm.tasks.task import Problem

FAMILIES: tuple[type[Problem], ...] = (
    Arithmetic,
    Expressions,
    Countdown,
    LinearEquations,
    ModularArithmetic,
    Ordering,
    Knights,
    Weekdays,
    Dates,
    Clock,
    Units,
    Science,
)
