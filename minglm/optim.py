"""The optimiser of GLM-4.5: Muon for the matrices, AdamW for everything else (report, section 2.4), as one object.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) steps along the momentum with all its singular values
made about 1: no direction of a matrix is left behind because its gradients are small. The scale 0.2 * sqrt(max(rows,
cols)) gives a step the root mean square of AdamW's (Moonlight, arXiv 2502.16982, section 2.2), so that one learning
rate and one weight decay serve both halves.

Reads top down: Newton-Schulz; which matrices a parameter holds; the optimiser; how a model's parameters are divided.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steep at 0, so that small singular values grow fast
SMALLEST_NORM = 1e-7  # a matrix with a smaller norm is noise or zero: it is not blown up to full size
UPDATE_RMS = 0.2

# Newton-Schulz takes at most so many numbers at once: the extra memory is bounded and, on a CPU, stays in the cache.
CHUNK_ELEMENTS_CPU = 2**19
CHUNK_ELEMENTS_GPU = 2**26


# ---------------------------------------------------------------- Newton-Schulz


def newton_schulz(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """Turn every matrix U S V^T of a stack into about U V^T: singular vectors kept, singular values brought near 1.

    matrices: (..., m, n), floating; the result has the same shape and dtype. Each step maps a singular value s to
    a s + b s^3 + c s^5. Five steps bring all those above 0.15% of the Frobenius norm into [0.68, 1.21] and multiply
    smaller ones by up to 485; zero stays zero. The arithmetic is done in `dtype`: by default bfloat16 on CUDA, as is
    the custom, and float32 elsewhere.

    The bits of a matrix's result do not depend on the stack around it (on a CPU), so that sharding cannot change them.
    Raises ValueError for a tensor that is no matrix or for steps < 1.
    """
    if matrices.ndim < 2 or steps < 1:
        raise ValueError(f"newton_schulz: shape {tuple(matrices.shape)}, steps {steps}; want (..., m, n), steps >= 1")
    dtype = dtype or (torch.bfloat16 if matrices.is_cuda else torch.float32)

    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices  # products are rows x rows: let the rows be the smaller side
    *stack, rows, cols = x.shape
    x = x.reshape(-1, rows, cols)
    x = (x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(SMALLEST_NORM)).to(dtype)

    # The sizes where blocks pay, measured on CPUs. Zeros are added because at odd sizes the bits of a product depend on
    # how each matrix of the stack happens to be aligned in memory.
    parts = 1 if dtype.itemsize < 4 or rows < 64 else 2 if rows < 192 else 4
    x = F.pad(x, (0, -cols % 8, 0, -rows % (8 * parts)))
    x = _iterate(x, steps) if parts == 1 else _iterate_in_blocks(x, steps, parts)
    x = x[:, :rows, :cols].reshape(*stack, rows, cols).to(matrices.dtype)
    return x.mT if tall else x


def _iterate(x: Tensor, steps: int) -> Tensor:
    """The textbook form. x: (k, m, n), m <= n, norms at most 1. 4 m^2 n + 2 m^3 operations a step and matrix."""
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a X + (b G + c G^2) X
    return x


# The upper blocks (i <= j) of a stack of symmetric matrices, each (k, m / parts, m / parts) and contiguous.
Blocks = dict[tuple[int, int], Tensor]


def _iterate_in_blocks(x: Tensor, steps: int, parts: int) -> Tensor:
    """The same iteration with up to 40% fewer operations, for float32. x: (k, m, n), m <= n, norms at most 1.

    With P = a I + b G + c G^2 for the Gram matrix G = X X^T, a step is X <- P X. Two savings:
    - G and P are symmetric and, as polynomials of one matrix, commute: all products but P X are symmetric and are
      computed in their upper blocks only;
    - G <- P G P needs no X, so that three steps go by with one product with X in place of three; this pays where X is
      wide. G drifts away from X X^T, though: five steps on it cost up to 300 times the textbook form's rounding
      error. So it is computed afresh after three: 1.2 times the textbook's error in the median over spectra, at worst 5
      times (6e-6 in place of 1e-6, where bfloat16 has 3e-2).
    """
    a, b, c = COEFFICIENTS
    count, rows, cols = x.shape
    steps_on_gram = 3 if cols >= 1.25 * rows else 1
    bands = x.chunk(parts, dim=1)  # (k, m / parts, n) each
    upper = [(i, j) for i in range(parts) for j in range(i, parts)]
    size = (count, rows // parts, rows // parts)
    gram, polynomial, total, spare = ({ij: x.new_empty(size) for ij in upper} for _ in range(4))
    for start in range(0, steps, steps_on_gram):
        stop = min(start + steps_on_gram, steps)
        for i, j in upper:
            torch.bmm(bands[i], bands[j].mT, out=gram[i, j])
        for step in range(start, stop):
            _multiply(gram, gram, polynomial, parts, alpha=c, beta=b, plus=gram)
            for i in range(parts):
                polynomial[i, i].diagonal(dim1=-2, dim2=-1).add_(a)
            if step + 1 < stop:
                _multiply(gram, polynomial, spare, parts)
                _multiply(spare, polynomial, gram, parts)
            if step == start:  # total: the product of the polynomials of these steps
                total, polynomial = polynomial, total
            else:
                _multiply(total, polynomial, spare, parts)
                total, spare = spare, total
        bands = [_row_of_product(total, bands, i) for i in range(parts)]
    return torch.cat(bands, dim=1)


def _block(matrix: Blocks, i: int, j: int) -> Tensor:
    return matrix[i, j] if i <= j else matrix[j, i].mT


def _multiply(left: Blocks, right: Blocks, out: Blocks, parts: int, alpha=1.0, beta=0.0, plus: Blocks | None = None):
    """out = beta * plus + alpha * left @ right, for symmetric matrices that commute. With beta 0 `plus` is not read."""
    plus = out if plus is None else plus
    for (i, j), block in out.items():
        torch.baddbmm(plus[i, j], _block(left, i, 0), _block(right, 0, j), beta=beta, alpha=alpha, out=block)
        for k in range(1, parts):
            block.baddbmm_(_block(left, i, k), _block(right, k, j), alpha=alpha)


def _row_of_product(matrix: Blocks, bands: Iterable[Tensor], i: int) -> Tensor:
    """Rows of block i of `matrix` times the matrix whose row bands are given."""
    first, *others = bands
    row = torch.bmm(_block(matrix, i, 0), first)
    for k, band in enumerate(others, start=1):
        row.baddbmm_(_block(matrix, i, k), band)
    return row


# ---------------------------------------------------------------- which matrices a parameter holds


def logical_matrices(name: str, tensor: Tensor) -> Tensor:
    """The matrices that a parameter (or its gradient, or its momentum) holds, as a view (matrices, rows, cols).

    Muon makes each of these orthogonal by itself. The first axis of every stack is the expert, so to shard it cuts no
    matrix. Raises ValueError for a stack of unknown layout: to guess would orthogonalise the wrong things silently.
    """
    if tensor.ndim == 2:
        return tensor[None]
    if tensor.ndim == 3 and name.endswith("experts.gate_up_proj"):  # two matrices an expert: gate, then up
        return rearrange(tensor, "e (two i) h -> (e two) i h", two=2)
    if tensor.ndim == 3 and name.endswith("experts.down_proj"):
        return tensor
    raise ValueError(
        f"{name}: shape {tuple(tensor.shape)} is neither a matrix nor one of the known stacks of matrices "
        "(experts.gate_up_proj, experts.down_proj); add its layout to logical_matrices"
    )


# ---------------------------------------------------------------- the optimiser


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one optimiser with one state dict.

    groups: dicts with "params", a list of (name, parameter), and "method", "muon" or "adamw"; a group may have its own
    value of any hyper-parameter. The learning rate is kept as "initial_lr", too: a schedule sets group["lr"] =
    multiplier * group["initial_lr"] in every group. Weight decay is decoupled: w <- w - lr weight_decay w.

    Muon (momentum, Nesterov as in torch.optim.Muon): m <- momentum m + (1 - momentum) g,
        w <- w - lr 0.2 sqrt(max(rows, cols)) newton_schulz(momentum m + (1 - momentum) g) for each logical matrix.
        `newton_schulz_dtype` names its dtype, None being newton_schulz's default. On a CPU with bfloat16 instructions
        (torch.cpu.get_capabilities()) "bfloat16" was three times as fast; on one without it can be unusably slow.
    AdamW (betas, eps): PyTorch's fused implementation.

    Parameters are the master weights, hence float32 (or float64); state tensors have their dtype. Raises ValueError for
    a hyper-parameter out of its range and for a parameter that the method cannot take.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        newton_schulz_dtype: Literal["float32", "bfloat16"] | None = None,
    ):
        # "fused" is read by torch.optim.Optimizer, which then loads AdamW's step count onto the parameter's device.
        defaults = dict(
            lr=lr,
            momentum=momentum,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            newton_schulz_dtype=newton_schulz_dtype,
            fused=True,
        )
        super().__init__(groups, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = self.defaults | param_group
        _check_hyperparameters(group)
        for name, parameter in group["params"]:
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name} is {parameter.dtype}: the optimiser's master weights are float32")
            if not parameter.is_contiguous():
                raise ValueError(f"{name} is not contiguous in memory: the optimiser updates it through views")
            if group["method"] == "muon":
                self._check_matrices(name, parameter)
        super().add_param_group(group | {"initial_lr": group["lr"]})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Returns what `closure`, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            named = [(n, p) for n, p in zip(group["param_names"], group["params"], strict=True) if p.grad is not None]
            if named:
                (self._step_muon if group["method"] == "muon" else self._step_adamw)(group, named)
        return loss

    def prepare(self) -> None:
        """Give every parameter the state that its first step would give it."""
        for group in self.param_groups:
            for p in group["params"]:
                self._state_of(group, p)

    def _state_of(self, group: dict[str, Any], p: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[p]
        if not state and group["method"] == "muon":
            state["momentum_buffer"] = torch.zeros_like(p)
        elif not state:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            state |= dict(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        return state

    def _check_matrices(self, name: str, parameter: nn.Parameter) -> None:
        logical_matrices(name, parameter)

    def _decay_and_average(self, group: dict[str, Any], named: list[tuple[str, nn.Parameter]]) -> list[Tensor]:
        """What of Muon's step is done number by number: weight decay, and the momenta, which are returned."""
        momenta = [self._state_of(group, p)["momentum_buffer"] for _, p in named]
        torch._foreach_lerp_(momenta, [p.grad for _, p in named], 1 - group["momentum"])
        torch._foreach_mul_([p for _, p in named], 1 - group["lr"] * group["weight_decay"])
        return momenta

    def _step_muon(self, group: dict[str, Any], named: list[tuple[str, nn.Parameter]]) -> None:
        momenta = self._decay_and_average(group, named)
        stacks = defaultdict(list)  # (rows, cols) -> (weights, gradients, momenta), each (k, rows, cols), by parameter
        for (name, p), m in zip(named, momenta, strict=True):
            views = tuple(logical_matrices(name, tensor) for tensor in (p, p.grad, m))
            stacks[views[0].shape[1:]].append(views)
        for (rows, cols), same_shape in stacks.items():
            elements = CHUNK_ELEMENTS_CPU if named[0][1].device.type == "cpu" else CHUNK_ELEMENTS_GPU
            for pieces in _in_chunks(same_shape, max(1, elements // (rows * cols))):
                weights, gradients, averages = zip(*pieces, strict=True)
                nesterov = torch.cat(torch._foreach_lerp(gradients, averages, group["momentum"]))
                updates = self._orthogonalise(group, nesterov).split([len(w) for w in weights])
                torch._foreach_add_(weights, updates, alpha=-self._rate(group, rows, cols))

    def _orthogonalise(self, group: dict[str, Any], matrices: Tensor) -> Tensor:
        dtype = group["newton_schulz_dtype"]
        return newton_schulz(matrices, dtype=None if dtype is None else getattr(torch, dtype))

    def _rate(self, group: dict[str, Any], rows: int, cols: int) -> float:
        return group["lr"] * UPDATE_RMS * math.sqrt(max(rows, cols))

    def _step_adamw(self, group: dict[str, Any], named: list[tuple[str, nn.Parameter]]) -> None:
        parameters = [p for _, p in named]
        states = [self._state_of(group, p) for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state dict of this class. Raises ValueError that lists the parameters which do not fit."""
        own, saved = _describe(self.state_dict()), _describe(state_dict)
        shapes = {n: p.shape for g in self.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
        complaints = {
            "not in the saved state": [n for n in own if n not in saved],
            "not in this model": [n for n in saved if n not in own],
            "updated by another method": [n for n in own if n in saved and own[n][0] != saved[n][0]],
            "of another shape": [n for n in own if n in saved and any(s != shapes[n] for s in saved[n][1])],
        }
        found = "; ".join(f"{what}: {', '.join(names)}" for what, names in complaints.items() if names)
        if not found and list(own) != list(saved):  # torch matches the state to parameters by position
            found = f"in another order: {', '.join(saved)}"
        if found:
            raise ValueError(f"the optimiser state belongs to other parameters; {found}")
        super().load_state_dict(state_dict)


def _check_hyperparameters(group: dict[str, Any]) -> None:
    if group.get("method") not in ("muon", "adamw"):
        raise ValueError(f'optimiser: method is {group.get("method")!r}, want "muon" or "adamw"')
    if group["newton_schulz_dtype"] not in (None, "float32", "bfloat16"):
        found = group["newton_schulz_dtype"]
        raise ValueError(f'optimiser: newton_schulz_dtype is {found!r}, want "float32", "bfloat16" or None')
    if not isinstance(group["betas"], tuple | list) or len(group["betas"]) != 2:
        raise ValueError(f"optimiser: betas is {group['betas']!r}, want two numbers in [0, 1)")
    numbers = {key: group[key] for key in ("lr", "momentum", "eps", "weight_decay")}
    numbers |= {f"betas[{i}]": beta for i, beta in enumerate(group["betas"])}
    for key, value in numbers.items():
        end = 1 if key == "momentum" or key.startswith("betas") else math.inf
        if not isinstance(value, int | float) or not 0 <= value < end:
            raise ValueError(f"optimiser: {key} is {value!r}, want a number in [0, {end})")


def _in_chunks(stacks: Iterable[tuple[Tensor, ...]], size: int) -> Iterator[list[list[Tensor]]]:
    """Cut stacks, tuples of tensors (k, rows, cols) each, and hand out lists of pieces with `size` matrices in all."""
    pieces, room = [], size
    for views in stacks:
        count, start = len(views[0]), 0
        while start < count:
            stop = min(start + room, count)
            pieces.append([view[start:stop] for view in views])
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces


def _describe(state_dict: dict[str, Any]) -> dict[str, tuple[str, list[torch.Size]]]:
    """Parameter name -> (its method, the shapes of its state tensors but counters), in the state dict's order."""
    described = {}
    for group in state_dict["param_groups"]:
        if "param_names" not in group or "method" not in group:
            raise ValueError("the optimiser state names no parameters: it was not saved by MuonAdamW")
        for name, index in zip(group["param_names"], group["params"], strict=True):
            tensors = state_dict["state"].get(index, {}).values()
            described[name] = (group["method"], [tensor.shape for tensor in tensors if tensor.ndim > 0])
    return described


# ---------------------------------------------------------------- dividing a model's parameters


def build_optimizer(
    model: nn.Module,
    lr: float,
    *,
    kind: Literal["muon", "adamw"] = "muon",
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    newton_schulz_dtype: Literal["float32", "bfloat16"] | None = None,
) -> MuonAdamW:
    """The optimiser for all trainable parameters of `model`, each in exactly one group (a tied one once).

    kind "muon": Muon for every matrix, the router's included, except embedding and head; AdamW for these two and for
    norms and biases, which have no weight decay. (The report names embedding, biases and norms; that the head is with
    them is ours, after Jordan.) kind "adamw": AdamW for all, for comparison.
    """
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return MuonAdamW(
        parameter_groups(trainable, kind),
        lr,
        momentum=momentum,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        newton_schulz_dtype=newton_schulz_dtype,
    )


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], kind: Literal["muon", "adamw"]) -> list[dict[str, Any]]:
    """The groups that `build_optimizer` describes, for `MuonAdamW`. Raises ValueError for an unknown kind."""
    if kind not in ("muon", "adamw"):
        raise ValueError(f'optimiser: kind is {kind!r}, want "muon" or "adamw"')
    matrices, tables, vectors = [], [], []
    for name, parameter in named:
        is_table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        kindred = vectors if parameter.ndim < 2 else tables if is_table else matrices
        kindred.append((name, parameter))
    groups = [
        {"params": matrices, "method": kind},
        {"params": tables, "method": "adamw"},
        {"params": vectors, "method": "adamw", "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
