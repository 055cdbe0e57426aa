"""Muon where no rank holds a whole matrix: each is gathered on one rank, made orthogonal there, and handed back.

FSDP cuts matrices by rows. AdamW does not mind, for it works number by number, and neither do the momentum and the weight
decay of Muon. Newton-Schulz needs the whole matrix. So every matrix has an owner among the ranks that hold its rows: each
rank sends its rows of the averaged gradient to the owner, which runs Newton-Schulz and sends each rank its rows of the
update. Every rank owns about the same work and sends and receives about as much as it holds, in two all-to-alls. Stacks of
experts that are cut between experts need none of this.

The update of a matrix has the same bits as on one process: the numbers are only moved, and `newton_schulz` gives a matrix
the same bits whatever is beside it (on a CPU).

Bytes a step and rank: twice what the rank holds of the cut matrices, in fp32, sent and received. Copies (`dp`) all do the same.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minglm.model import GLM
from minglm.optim import CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_GPU, MuonAdamW, logical_matrices, parameter_groups
from scale.mesh import rows_of_rank
from scale.shard import Part, local

ROUND_BYTES = 2**28  # so much of the matrices a rank owns at a time: bounds the buffers, which are about four times as large


class ShardedMuonAdamW(MuonAdamW):
    """`MuonAdamW` for the parts that a rank holds of each parameter; it steps on plain tensors in the parameters' memory."""

    def __init__(self, model: GLM, parts: list[Part], lr: float, *, kind: str = "muon", **hyperparameters: Any):
        """`hyperparameters`: those of `MuonAdamW`."""
        self._parts = {part.name: part for part in parts}
        self._parameters = dict(model.named_parameters())
        self._locals = {part.name: nn.Parameter(part.local) for part in parts}
        trainable = [(name, held) for name, held in self._locals.items() if self._parameters[name].requires_grad]
        super().__init__(parameter_groups(trainable, kind), lr, **hyperparameters)
        self.prepare()
        cut = [part for group in self.param_groups if group["method"] == "muon" for part in self._cut_parts(group)]
        self._rounds = [
            Round(matrices, group)
            for group in dict.fromkeys(part.group for part in cut)
            for matrices in _in_rounds(_matrices([part for part in cut if part.group is group]), group.size())
        ]

    def step(self, closure=None):
        """Update every parameter's part; all ranks must call it."""
        for name, held in self._locals.items():
            gradient = self._parameters[name].grad
            held.grad = None if gradient is None else local(gradient)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for parameter in self._parameters.values():
            parameter.grad = None

    def state_parts(self) -> Iterator[tuple[str, str, Tensor, Part | None]]:
        """Every tensor of the state as (parameter, key, tensor, its part); part None: the same on all ranks."""
        for name, held in self._locals.items():
            for key, tensor in self.state[held].items():
                yield name, key, tensor, self._parts[name] if tensor.ndim else None

    def _cut_parts(self, group: dict[str, Any]) -> list[Part]:
        return [self._parts[name] for name in group["param_names"] if _is_cut(self._parts[name])]

    def _check_matrices(self, name: str, parameter: nn.Parameter) -> None:
        logical_matrices(name, torch.empty(self._parts[name].shape, device="meta"))

    def _step_muon(self, group: dict[str, Any], named: list[tuple[str, nn.Parameter]]) -> None:
        whole = [(name, p) for name, p in named if not _is_cut(self._parts[name])]
        cut = [(name, p) for name, p in named if _is_cut(self._parts[name])]
        if whole:
            super()._step_muon(group, whole)
        if cut:
            momenta = dict(zip((name for name, _ in cut), self._decay_and_average(group, cut), strict=True))
            for round in self._rounds:
                self._step_round(group, round, momenta)

    def _step_round(self, group: dict[str, Any], round: "Round", momenta: dict[str, Tensor]) -> None:
        def nesterov(matrix: "Matrix") -> Tensor:
            gradient, average = matrix.rows_here(self._locals[matrix.name].grad), matrix.rows_here(momenta[matrix.name])
            return torch.lerp(gradient, average, group["momentum"])

        owned = round.gather(nesterov)
        stacks = defaultdict(list)
        for matrix in round.owned[round.rank]:
            stacks[matrix.shape].append(matrix)
        some = next(iter(momenta.values()))
        elements = CHUNK_ELEMENTS_CPU if some.device.type == "cpu" else CHUNK_ELEMENTS_GPU
        updates = {}
        for (rows, cols), same_shape in stacks.items():
            at_once = max(1, elements // (rows * cols))
            for start in range(0, len(same_shape), at_once):
                matrices = same_shape[start : start + at_once]
                stack = torch.stack([owned.pop(matrix) for matrix in matrices])
                updates |= zip(matrices, self._orthogonalise(group, stack), strict=True)
        for matrix, update in round.scatter(updates, some.new_empty(0)):
            rows = matrix.rows_here(self._locals[matrix.name])
            rows.data.add_(update, alpha=-self._rate(group, *matrix.shape))


def _is_cut(part: Part) -> bool:
    """Whether the part's matrices have rows on other ranks, too."""
    return part.group.size() > 1 and not (part.is_expert and part.dim == 0)


@dataclass(frozen=True)
class Matrix:
    """One logical matrix (see `minglm.optim.logical_matrices`) of a parameter that is cut by rows over `ranks` ranks."""

    name: str
    shape: tuple[int, int]
    expert: int | None  # its place in a stack, among this ep rank's experts
    first: int  # its first row among the rows that are cut: a gate's 0, an up projection's the width of an expert
    cut_rows: int  # how many rows are cut: those of the parameter, or of one expert's entry in its stack
    rank: int
    ranks: int

    def span(self, rank: int) -> tuple[int, int]:
        """Which of this matrix's rows are on `rank`: (start, end), empty where start == end."""
        start, end = rows_of_rank(self.cut_rows, rank, self.ranks)
        rows = self.shape[0]
        return min(max(start - self.first, 0), rows), min(max(end - self.first, 0), rows)

    def numel(self, rank: int) -> int:
        start, end = self.span(rank)
        return (end - start) * self.shape[1]

    def rows_here(self, held: Tensor) -> Tensor:
        """Of a tensor like the parameter's part on this rank, the rows of this matrix: a view (rows, columns)."""
        start, end = self.span(self.rank)
        offset = rows_of_rank(self.cut_rows, self.rank, self.ranks)[0] - self.first
        entry = held if self.expert is None else held[self.expert]
        return entry[start - offset : end - offset] if end > start else entry[:0]

    @property
    def operations(self) -> int:
        """In proportion to those of Newton-Schulz."""
        rows, cols = sorted(self.shape)
        return rows * rows * (2 * cols + rows)


def _matrices(parts: Iterable[Part]) -> Iterator[Matrix]:
    for part in parts:
        rank, ranks = part.group.rank(), part.group.size()
        if not part.is_expert:
            rows, cols = part.shape
            yield Matrix(part.name, (rows, cols), None, 0, rows, rank, ranks)
            continue
        experts, cut_rows, cols = part.local.shape[0], *part.shape[1:]
        stack = torch.empty(1, cut_rows, cols, device="meta")
        for expert in range(experts):
            first = 0
            for matrix in logical_matrices(part.name, stack):
                yield Matrix(part.name, tuple(matrix.shape), expert, first, cut_rows, rank, ranks)
                first += matrix.shape[0]


def _in_rounds(matrices: Iterable[Matrix], ranks: int) -> Iterator[list[Matrix]]:
    """Cut the list where the matrices of a round would take more than `ROUND_BYTES` a rank."""
    round, size = [], 0
    for matrix in matrices:
        nbytes = 4 * matrix.shape[0] * matrix.shape[1]
        if round and size + nbytes > ROUND_BYTES * ranks:
            yield round
            round, size = [], 0
        round.append(matrix)
        size += nbytes
    if round:
        yield round


class Round:
    """Some matrices, who owns which, and the two exchanges. All ranks of the group make the same one."""

    def __init__(self, matrices: list[Matrix], group: dist.ProcessGroup):
        self.group, self.rank, self.ranks = group, group.rank(), group.size()
        self.owned: list[list[Matrix]] = [[] for _ in range(self.ranks)]
        busy = [(0, rank) for rank in range(self.ranks)]
        for matrix in sorted(matrices, key=lambda matrix: -matrix.operations):  # the dearest first, each to the least busy
            operations, owner = heapq.heappop(busy)
            self.owned[owner].append(matrix)
            heapq.heappush(busy, (operations + matrix.operations, owner))
        here = self.owned[self.rank]
        self.numel_to_owner = [sum(matrix.numel(self.rank) for matrix in owned) for owned in self.owned]
        self.numel_from_rank = [sum(matrix.numel(rank) for matrix in here) for rank in range(self.ranks)]

    def gather(self, rows_here) -> dict[Matrix, Tensor]:
        """Each matrix that this rank owns, whole, from everybody's `rows_here(matrix)`."""
        sent = torch.cat([rows_here(matrix).reshape(-1) for owned in self.owned for matrix in owned])
        arrived = sent.new_empty(sum(self.numel_from_rank))
        dist.all_to_all_single(arrived, sent, self.numel_from_rank, self.numel_to_owner, group=self.group)
        pieces = [iter(piece.split([m.numel(rank) for m in self.owned[self.rank]])) for rank, piece in self._by_rank(arrived)]
        return {matrix: torch.cat([next(piece) for piece in pieces]).view(matrix.shape) for matrix in self.owned[self.rank]}

    def scatter(self, updates: dict[Matrix, Tensor], nothing: Tensor) -> Iterator[tuple[Matrix, Tensor]]:
        """This rank's rows of every matrix, from the owners' `updates`. nothing: an empty tensor, from who owns none."""
        here = self.owned[self.rank]
        rows = [updates[matrix][slice(*matrix.span(rank))].reshape(-1) for rank in range(self.ranks) for matrix in here]
        sent = torch.cat([nothing, *rows])
        arrived = sent.new_empty(sum(self.numel_to_owner))
        dist.all_to_all_single(arrived, sent, self.numel_to_owner, self.numel_from_rank, group=self.group)
        matrices = [matrix for owned in self.owned for matrix in owned]
        for matrix, piece in zip(matrices, arrived.split([m.numel(self.rank) for m in matrices]), strict=True):
            yield matrix, piece.view(-1, matrix.shape[1])

    def _by_rank(self, arrived: Tensor) -> Iterator[tuple[int, Tensor]]:
        return enumerate(arrived.split(self.numel_from_rank))
