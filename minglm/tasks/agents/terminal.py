"""A terminal: a question about a small file system, or a change to make in it, by commands of a small shell.

Judged by the final files and folders, which must be as they should and nothing else, and by the answer. Measure of
difficulty: from one command on a file that is named, to files that have to be found first and several commands.
"""

import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.agents.calling import Call, Tool, tool
from minglm.tasks.agents.files import FileSystem
from minglm.tasks.agents.shell import run
from minglm.tasks.agents.terminal_chores import CHORES, Chore, draw_tree
from minglm.tasks.agents.world import AgentProblem, Move, Moves, World, word
from minglm.tasks.task import Message

DONE = "done"
RUN = tool("run", "Run a command", {"command": "string"})


@dataclass(frozen=True)
class Terminal(AgentProblem):
    """files and folders: those at first. chore: what is asked for, and how it is done."""

    files: tuple[tuple[str, str], ...]
    folders: tuple[str, ...]
    chore: Chore

    family = "terminal"
    stands_for = "Agentic RL of section 3.3 with an execution environment, and Terminal-Bench of section 4."
    difficulties = range(1, 6)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        chores = CHORES[difficulty]
        while True:
            files, folders = draw_tree(rng, difficulty)
            chore = rng.choice(chores)(rng, files, folders)
            if chore is not None:
                return cls(tuple(sorted(files.items())), folders, chore)

    @property
    def messages(self) -> list[Message]:
        form = f"Answer with the {self.chore.form} only." if self.chore.form else f'Answer "{DONE}".'
        return [{"role": "user", "content": f"{self.chore.question} {form}"}]

    @property
    def tools(self) -> list[Tool]:
        return [RUN]

    def start(self) -> "Session":
        return Session(self)

    def solve(self) -> Moves:
        for thinking, command in self.chore.commands:
            yield Move(thinking, [Call("run", {"command": command})])
        yield Move(self.chore.conclusion, content=self.chore.answer)

    def near_miss(self, rng: random.Random) -> list[Message]:
        """A question gets another answer. Of a change the last command is missing, or one too many file goes with it."""
        commands = [command for _, command in self.chore.commands]

        def moves() -> Moves:
            done, answer = commands, DONE
            if self.chore.form:
                answer = rng.choice([other for other in self.chore.pool if other != self.chore.answer])
            elif len(commands) == 1 or rng.random() < 0.5:
                done = commands[:-1]
            else:
                after = [path for path, _ in self.chore.files_after]
                done = [*commands, f"rm {rng.choice(after)}"]
            for command in done:
                yield Move("", [Call("run", {"command": command})])
            yield Move("", content=answer)

        return self.play(moves())

    def guess(self, rng: random.Random) -> list[Message]:
        """An answer of the form that is asked for, and no command."""
        return [{"role": "assistant", "content": rng.choice(self.chore.pool) if self.chore.form else DONE}]

    @property
    def chance(self) -> float:
        return 1 / len(self.chore.pool) if self.chore.form else 0.0


class Session(World):
    """The terminal lives until the assistant says something."""

    def __init__(self, problem: Terminal):
        super().__init__(problem.tools, turn_limit=4 + 3 * len(problem.chore.commands))
        self.chore = problem.chore
        self.system = FileSystem(dict(problem.files), problem.folders)

    def call(self, call: Call) -> str:
        return run(self.system, call.arguments["command"]) or "(no output)"

    def hear(self, content: str) -> str | None:
        chore = self.chore
        said = content.strip() if chore.form == "path" else word(content)
        if chore.form == "path":
            said = said.removeprefix("./").removeprefix("/")
        if said != chore.answer:
            self.end(f"answered {content[:40]!r}; wanted {chore.answer!r}")
        wanted = dict(chore.files_after)
        for path in sorted(self.system.files.keys() | wanted.keys()):
            if self.system.files.get(path) != wanted.get(path):
                self.end(f"{path[:100]} is {'not ' if path in wanted else ''}there, or has other content than wanted")
        if self.system.folders != {"/", *chore.folders_after}:
            self.end("there are other folders than wanted")
        return None
