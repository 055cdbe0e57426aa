"""A training step of one rank among many, at full size, on a laptop: the real launcher's code on tensors without memory.

The process group is PyTorch's fake one: it takes this process for rank r of W, and its collectives move nothing. Weights,
activations and optimiser state are fake tensors, which have shape and dtype but no memory. Everything that is run is what
`scale.train` runs: cutting the model, the dispatcher, FSDP's gathering and freeing, the loss, the backward pass, Muon's
exchanges. So a mesh, a shape or a collective that does not fit fails here and not after an hour in a queue.

Fake tensors have no values, but where tokens go decides the shapes. So whole numbers stay real, and the router's choice is
replaced: token n goes to experts n * k, n * k + 1, ... in turn, which is what a balanced router would do.

What is measured: the elements that this rank holds, the collectives with their bytes, and the peak of all tensors alive.
The peak is that of the CPU's gear under bf16 autocast, without what a GPU's libraries take for themselves.
"""

import time
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from minglm.config import GLMConfig
from minglm.data.stream import Batch
from minglm.params import count
from minglm.train.device import Device
from minglm.train.recipe import Hardware, Recipe, Training
from scale.learner import ShardedLearner
from scale.mesh import Layout, make_mesh


@dataclass(frozen=True)
class DryRun:
    """What one rank's step took."""

    rank: int
    main: int  # elements of the main stack's parameters that the rank holds
    mtp: int  # and of the MTP layer's
    state_bytes: int  # weights, gradients and optimiser state, from step to step
    peak_bytes: int  # of all tensors alive at one time
    collectives: dict[str, tuple[int, int]]  # by name: calls, and bytes of the larger side
    seconds: float


def dry_run(
    config: GLMConfig,
    layout: Layout,
    sequence_length: int,
    sequences_per_micro_batch: int = 1,
    activation_checkpointing: bool = True,
    ranks: Sequence[int] = (0,),
) -> list[DryRun]:
    """Take a training step as each of `ranks` of `layout`, each in a process of its own, up to three at a time.

    Raises `LayoutError` for a layout that does not fit, and whatever the step raises.
    """
    layout.check(config)
    arguments = (config, layout, sequence_length, sequences_per_micro_batch, activation_checkpointing)
    ranks = list(dict.fromkeys(ranks))
    with ProcessPoolExecutor(min(len(ranks), 3), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(step_as_rank, rank, *arguments) for rank in ranks]
        for _ in tqdm(as_completed(running), "dry run", len(running), unit="rank"):
            pass
    return [run.result() for run in running]


def report(runs: Sequence[DryRun], config: GLMConfig, layout: Layout) -> str:
    """The runs as a table for people."""
    parameters = count(config)
    lines = [f"Dry run of a training step, {layout}, {layout.world_size} ranks, as each of these ranks (GiB = 2^30 bytes)"]
    lines.append(f"  {'rank':>6}{'parameters':>16}{'of them MTP':>14}{'state GiB':>11}{'peak GiB':>10}{'seconds':>9}")
    for run in runs:
        gib = f"{run.state_bytes / 2**30:>11.2f}{run.peak_bytes / 2**30:>10.2f}"
        lines.append(f"  {run.rank:>6}{run.main + run.mtp:>16,}{run.mtp:>14,}{gib}{run.seconds:>9.0f}")
    lines.append(f"  {'model':>6}{parameters.total:>16,}{parameters.mtp:>14,}")
    lines.append(
        f"  collectives of rank {runs[0].rank}: "
        + ", ".join(
            f"{calls:,} {name} ({nbytes / 2**30:,.1f} GiB)" for name, (calls, nbytes) in sorted(runs[0].collectives.items())
        )
    )
    return "\n".join(lines)


def step_as_rank(
    rank: int,
    config: GLMConfig,
    layout: Layout,
    sequence_length: int,
    sequences_per_micro_batch: int,
    activation_checkpointing: bool,
) -> DryRun:
    """One step as rank `rank`, in this process, which must not have a process group yet."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        hardware = Hardware(device="cpu", activation_checkpointing=activation_checkpointing)
        training = Training(sequence_length, layout.world_size * sequences_per_micro_batch, sequences_per_micro_batch, steps=1)
        device = Device(torch.device("cpu"), bf16=True, why="numbers without values")
        mesh = make_mesh(layout, "cpu")
        with FakeTensorMode(allow_non_fake_inputs=True), _Watch() as watch, patch("minglm.model.Router.choose", _in_turn):
            learner = ShardedLearner(mesh, Recipe(config, training, hardware=hardware), config, device)
            for group in learner.optimizer.param_groups:
                group["newton_schulz_dtype"] = "bfloat16"  # as on a GPU
            learner.step([_any_batch(config, sequence_length, sequences_per_micro_batch)], 1.0)
        mtp = sum(part.local.numel() for part in learner.parts if part.name.startswith("mtp."))
        total = sum(part.local.numel() for part in learner.parts)
        optimizer = sum(tensor.nbytes for _, _, tensor, _ in learner.optimizer.state_parts())
        state = 2 * sum(part.local.nbytes for part in learner.parts) + optimizer
        seconds = time.perf_counter() - start
        return DryRun(rank, total - mtp, mtp, state, watch.peak, dict(watch.collectives), seconds)
    finally:
        dist.destroy_process_group()


def _any_batch(config: GLMConfig, length: int, sequences: int) -> Batch:
    ids = torch.arange(sequences * (length + 1)).view(sequences, length + 1) % config.vocab_size
    documents = torch.zeros(sequences, length, dtype=torch.int32)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents)


def _in_turn(router, scores_NE: Tensor) -> Tensor:
    """In place of `Router.choose`: every expert in turn, (N, K) int64."""
    n, k = scores_NE.shape[0], router.config.num_experts_per_tok
    return torch.arange(n * k).view(n, k) % router.config.n_routed_experts


def _tensors(values: Iterable) -> Iterator[Tensor]:
    """Those among some arguments of an operation, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


class _Watch(TorchDispatchMode):
    """Decides what is fake, and keeps account of memory and collectives.

    Fake: every floating-point tensor that would take memory. Real: whole numbers, and the meta device's tensors, on which
    the model is cut before it has memory.
    """

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.collectives: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        self._sizes: dict[int, int] = {}

    def __enter__(self):
        self._patch = patch.object(torch.UntypedStorage, "resize_", self._resizing(torch.UntypedStorage.resize_))
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self._patch.stop()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
        if self._is_fake(func, tensors, kwargs):
            out = func(*args, **kwargs)
        else:
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        for tensor in _tensors([out]):
            if isinstance(tensor, FakeTensor):
                self._count(tensor.untyped_storage())
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::").strip("_")
            calls, nbytes = self.collectives[name]
            self.collectives[name] = (calls + 1, nbytes + max((tensor.nbytes for tensor in tensors), default=0))
        return out

    @staticmethod
    def _is_fake(func, tensors: list[Tensor], kwargs: dict) -> bool:
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return True
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        if tensors:  # of a meta tensor, memory is asked for; all else of real tensors stays real
            return tensors[0].is_meta and device is not None and device.type != "meta"
        if device is not None and device.type == "meta":
            return False
        counts = func is torch.ops.aten.arange.default or (dtype is not None and not dtype.is_floating_point)
        return not counts

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._forget, key)
        self._change(key, storage.nbytes())

    def _change(self, key: int, nbytes: int) -> None:
        self.alive += nbytes - self._sizes[key]
        self._sizes[key] = nbytes
        self.peak = max(self.peak, self.alive)

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)

    def _resizing(self, resize):
        """FSDP frees a layer's parameters by resizing their memory to nothing."""

        def resize_and_count(storage: torch.UntypedStorage, size: int):
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._change(storage._cdata, storage.nbytes())
            return result

        return resize_and_count
