"""What workers and trainer send one another, as JSON: which problem to attempt, and what an attempt was.

A problem travels as the draw that makes it, so that both sides hold the same one. Floats survive JSON to the bit.
"""

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from minglm.data.sources import TRAIN
from minglm.rl.rollout import End, Trajectory
from minglm.tasks import FAMILIES
from minglm.tasks.task import Problem, Verdict, problems


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Order(_Strict):
    """A problem of the training split, by what it is drawn with; seed: of the attempts at it."""

    family: str
    level: int
    draw: int
    seed: int

    def problem(self) -> Problem:
        return next(problems(FAMILIES[self.family], TRAIN, self.draw, [self.level]))


class Result(_Strict):
    """A `Trajectory` without its problem; reward None where the environment failed."""

    ids: list[int]
    sampled: list[bool]
    log_probs: list[float]
    versions: list[int]
    response: list[dict[str, Any]]
    reward: float | None
    reasons: list[str]
    end: Literal[get_args(End)]

    @model_validator(mode="after")
    def _of_one_length(self) -> "Result":
        lengths = [len(self.ids), len(self.sampled), len(self.log_probs), len(self.versions)]
        if len(set(lengths)) > 1:
            raise ValueError(f"ids, sampled, log_probs and versions have lengths {lengths}; wanted one length")
        return self

    @classmethod
    def of(cls, trajectory: Trajectory) -> "Result":
        one, verdict = trajectory, trajectory.verdict
        return cls(
            ids=one.ids,
            sampled=one.sampled,
            log_probs=one.log_probs,
            versions=one.versions,
            response=one.response,
            reward=None if verdict is None else float(verdict.reward),
            reasons=[] if verdict is None else list(verdict.reasons),
            end=one.end,
        )

    def trajectory(self, problem: Problem) -> Trajectory:
        verdict = None if self.reward is None else Verdict(self.reward, tuple(self.reasons))
        return Trajectory(problem, self.ids, self.sampled, self.log_probs, self.versions, self.response, verdict, self.end)

    def oldest(self, version: int) -> int:
        """The oldest version of a sampled token; `version` where none was sampled."""
        return min((v for v, own in zip(self.versions, self.sampled, strict=True) if own), default=version)


class Span(_Strict):
    """What somebody did from one second to another (since the epoch, or virtual), for the timeline."""

    who: str
    what: str
    start: float
    end: float


class Poll(_Strict):
    """A worker's: it samples with `version` (-1: has none yet), has the leases `held` under way, and takes `room` more."""

    worker: str
    version: int
    room: int
    held: list[int]
    spans: list[Span]


class Delivery(_Strict):
    """version: of the lease."""

    worker: str
    lease: int
    version: int
    result: Result
