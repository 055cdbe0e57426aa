"""What workers and trainer send one another, as JSON: which problem to attempt, and what an attempt was.

A problem travels as the draw that makes it, so that both sides hold the same one. Floats survive JSON to the bit.
"""

import base64
import math
import random
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from minglm.data.sources import TRAIN
from minglm.rl.environment import Failure
from minglm.rl.rollout import Asked, End, Limits, Trajectory
from minglm.tasks import FAMILIES
from minglm.tasks.task import Problem, Verdict, problems


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Order(_Strict):
    """A problem of the training split, by what it is drawn with; seed: of the attempts at it; all else: their limits when it
    was drawn."""

    family: str
    level: int
    draw: int
    seed: int
    tokens: int
    temperature: float
    thinking: bool | None
    opens_thinking: bool

    def asked(self, attempt: int, limits: Limits) -> Asked:
        """One of the attempts; limits: what else the recipe says."""
        seed = random.Random(f"{self.seed} {attempt}").getrandbits(62)
        own = self.model_dump(include={"tokens", "temperature", "thinking", "opens_thinking"})
        return Asked(self.problem(), seed, replace(limits, **own))

    def problem(self) -> Problem:
        return next(problems(FAMILIES[self.family], TRAIN, self.draw, [self.level]))


class Experts(_Strict):
    """Of a trajectory's tokens: int16, little-endian, in base64."""

    shape: list[int]
    data: str

    @model_validator(mode="after")
    def _of_this_shape(self) -> "Experts":
        found = len(base64.b64decode(self.data, validate=True))
        if len(self.shape) != 3 or min(self.shape) < 0 or found != 2 * math.prod(self.shape):
            raise ValueError(f"experts of shape {self.shape} in {found} bytes; wanted (tokens, MoE layers, K), 2 bytes each")
        return self

    @classmethod
    def of(cls, experts: Tensor) -> "Experts":
        data = experts.cpu().numpy().astype("<i2").tobytes()
        return cls(shape=list(experts.shape), data=base64.b64encode(data).decode())

    def tensor(self) -> Tensor:
        found = np.frombuffer(base64.b64decode(self.data), "<i2").astype(np.int16)
        return torch.from_numpy(found.reshape(self.shape))


class Result(_Strict):
    """A `Trajectory` without its problem; reward None where the attempt has failed."""

    ids: list[int]
    sampled: list[bool]
    log_probs: list[float]
    versions: list[int]
    response: list[dict[str, Any]]
    reward: float | None
    reasons: list[str]
    end: Literal[get_args(End)]
    failure: dict[str, str] | None
    temperature: float
    experts: Experts | None
    parts: dict[str, float]

    @model_validator(mode="after")
    def _of_one_length(self) -> "Result":
        lengths = [len(self.ids), len(self.sampled), len(self.log_probs), len(self.versions)]
        if len(set(lengths)) > 1:
            raise ValueError(f"ids, sampled, log_probs and versions have lengths {lengths}; wanted one length")
        if self.experts is not None and self.experts.shape[0] >= len(self.ids):
            raise ValueError(f"experts of {self.experts.shape[0]} of {len(self.ids)} ids; wanted fewer: the last is never read")
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
            failure=one.failure and one.failure._asdict(),
            temperature=float(one.temperature),
            experts=None if one.experts is None else Experts.of(one.experts),
            parts={name: float(part) for name, part in one.parts.items()},
        )

    def trajectory(self, problem: Problem) -> Trajectory:
        verdict = None if self.reward is None else Verdict(self.reward, tuple(self.reasons))
        return Trajectory(
            problem,
            self.ids,
            self.sampled,
            self.log_probs,
            self.versions,
            self.response,
            verdict,
            self.end,
            self.failure and Failure(**self.failure),
            self.temperature,
            self.experts and self.experts.tensor(),
            self.parts,
        )

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
