"""Problems that are solved with tools, in a world that answers."""

from minglm.tasks.agents.chained_calls import ChainedCalls
from minglm.tasks.agents.function_calling import FunctionCalling
from minglm.tasks.agents.repository import Repository
from minglm.tasks.agents.search import Search
from minglm.tasks.agents.shop import ShopCounter
from minglm.tasks.agents.terminal import Terminal
from minglm.tasks.task import Problem

FAMILIES: tuple[type[Problem], ...] = (FunctionCalling, ChainedCalls, ShopCounter, Terminal, Search, Repository)
