"""Families whose answers are Python code, judged by hidden tests in the sandbox."""

from minglm.tasks.code.finish import FinishFile
from minglm.tasks.code.fix import FixFunction
from minglm.tasks.code.write import WriteFunction

FAMILIES = (WriteFunction, FixFunction, FinishFile)
