"""Every operation, in every gear, equals its naive definition: values and all gradients, over drawn shapes and dtypes.

A gear is tested by being registered: each (gear, operation) pair in `minglm.ops` runs through the same laws, and an
operation without a strategy of cases below fails the suite. The Triton gear takes part where Triton's interpreter is on; on
a GPU it has its tests in test_kernels.py.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import minglm.exact  # noqa: F401  # these two register their operations
import minglm.inference  # noqa: F401
from minglm import ops
from minglm.config import GLMConfig
from minglm.model import GLM, Rotary

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
    import kernels  # noqa: F401  # registers its operations

LAW = settings(deadline=None, derandomize=True, max_examples=30)
SHORT_LAW = settings(LAW, max_examples=12)  # the interpreter takes a tenth of a second and more for an example

# Times the largest value, or 1: inputs are of order 1, and sums of up to 20,000 terms go in different orders. bf16 sums
# in fp32 and rounds few times.
TOLERANCE_IN_EPS = {torch.float32: 256, torch.float64: 256, torch.bfloat16: 8, torch.float16: 8}
# These round to fp32 inside by definition: the statistic of the norm, the softmax.
FP32_INSIDE = {"rms_norm", "attention", "router_scores", "linear_cross_entropy", "token_log_probs"}
# The Triton gear refuses fp64, and the interpreter's products are garbage in bf16, without an error (triton#5424): the
# kernels are the same for all dtypes, and in bf16 they are only compiled.
DTYPES = {
    "torch": [torch.float32, torch.float64, torch.bfloat16],
    "exact": [torch.float32, torch.float64, torch.bfloat16],
    "inference": [torch.float32, torch.float64, torch.bfloat16],
    "triton": [torch.float32, torch.float16],
}

PAIRS = [(gear, name) for name, table in ops._implementations.items() for gear in table if gear != "naive"]


def cases_of(*gears: str) -> pytest.MarkDecorator:
    """One test for each operation of these gears and each dtype that the gear takes."""
    return pytest.mark.parametrize(
        ("gear", "name", "dtype"),
        [
            pytest.param(gear, name, dtype, id=f"{gear}-{name}-{str(dtype).removeprefix('torch.')}")
            for gear, name in PAIRS
            if gear in gears
            for dtype in DTYPES[gear]
        ],
    )


needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


# ------------------------------------------------------------------------------------------------------------ the cases


@dataclass
class Numbers:
    """Draws tensors: numbers from a seeded generator, memory layout from hypothesis."""

    draw: Callable
    dtype: torch.dtype

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.draw(st.integers(0, 2**32), label="seed"))

    def size(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def constant(self, *shape: int) -> Tensor:
        """Normal numbers in contiguous, transposed or strided memory."""
        layout = self.draw(st.sampled_from(["contiguous", "transposed", "every second"]))
        if layout == "transposed":
            return self._normal(*shape[::-1]).permute(*reversed(range(len(shape))))
        if layout == "every second":
            return self._normal(*shape, 2)[..., 0]
        return self._normal(*shape)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.dtype)

    def variable(self, *shape: int) -> Tensor:
        """The same, and its gradient is compared as well."""
        return self.constant(*shape).requires_grad_()

    def weight(self, *shape: int) -> Tensor:
        """A matrix, or a stack of them, that keeps the size of what it multiplies."""
        return (self.constant(*shape) / math.sqrt(shape[-1])).requires_grad_()

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def document_ids(self, b: int, t: int) -> Tensor:
        """Consecutive documents, single tokens among them, and padding of -1 at the end of some rows."""
        starts = torch.rand(b, t, generator=self.generator) < self.draw(st.sampled_from([0.0, 0.2, 1.0]))
        ids = starts.long().cumsum(1)
        padding = self.integers(0, t + 1, b, 1) if self.draw(st.booleans()) else torch.zeros(b, 1)
        return ids.masked_fill(torch.arange(t) >= t - padding, -1)


def linear_case(numbers: Numbers) -> tuple:
    leading = numbers.draw(st.lists(st.integers(0, 5), max_size=3))
    inside, outside = numbers.size(1, 20), numbers.size(1, 40)
    bias = numbers.variable(outside) if numbers.draw(st.booleans(), label="bias") else None
    return numbers.variable(*leading, inside), numbers.weight(outside, inside), bias


def rms_norm_case(numbers: Numbers) -> tuple:
    leading = numbers.draw(st.lists(st.integers(0, 5), max_size=3))
    d = numbers.size(2, 40)
    return numbers.variable(*leading, d), numbers.variable(d), 1e-5


def rotary_case(numbers: Numbers) -> tuple:
    b, t, heads, pairs = numbers.size(0, 3), numbers.size(0, 9), numbers.size(1, 4), numbers.size(1, 6)
    config = GLMConfig(head_dim=2 * pairs, partial_rotary_factor=1.0, rope_theta=1e4)
    turns = Rotary.at(torch.arange(t) + numbers.size(0, 1000), config)
    return numbers.variable(b, t, heads, 2 * pairs + numbers.size(0, 7)), *turns


def document_mask_case(numbers: Numbers) -> tuple:
    return (numbers.document_ids(numbers.size(0, 3), numbers.size(1, 20)),)


def attention_case(numbers: Numbers) -> tuple:
    b, kv, d = numbers.size(0, 3), numbers.size(1, 3), numbers.size(1, 24)
    # Tiles of queries are 64 rows high.
    t = numbers.draw(st.one_of(st.integers(0, 20), st.sampled_from([64, 65, 150])), label="tokens")
    s, visible = t, None
    kind = numbers.draw(st.sampled_from(["causal", "documents", "one query", "queries behind a cache"]))
    if kind == "documents":
        visible = ops.document_mask(numbers.document_ids(b, t))
    elif kind == "one query":
        s, t = max(1, t), 1
    elif kind == "queries behind a cache":
        s = t + numbers.draw(st.sampled_from([0, 1, 20]))
        visible = torch.ones(t, s, dtype=torch.bool).tril(s - t)[None, None]
    heads = kv * numbers.size(1, 5)
    return numbers.variable(b, t, heads, d), numbers.variable(b, s, kv, d), numbers.variable(b, s, kv, d), visible


def router_scores_case(numbers: Numbers) -> tuple:
    n, h, e = numbers.size(0, 40), numbers.size(1, 20), numbers.size(1, 20)
    return numbers.variable(n, h), numbers.weight(e, h)


def swiglu_case(numbers: Numbers) -> tuple:
    leading = numbers.draw(st.lists(st.integers(0, 5), max_size=3))
    h, i = numbers.size(1, 20), numbers.size(1, 20)
    return numbers.variable(*leading, h), numbers.weight(i, h), numbers.weight(i, h), numbers.weight(h, i)


def routed_experts_case(numbers: Numbers, widths: Sequence[int] = range(1, 17)) -> tuple:
    e, h, i = numbers.size(1, 6), numbers.draw(st.sampled_from(widths)), numbers.draw(st.sampled_from(widths))
    n, k = numbers.draw(st.sampled_from([0, 1, 5, 40]), label="tokens"), numbers.size(1, e)
    likes = torch.rand(n, e, generator=numbers.generator)
    if numbers.draw(st.booleans(), label="all tokens choose the same experts, the others stay empty"):
        likes = likes[:1].expand(n, e)
    weights = torch.rand(n, k, generator=numbers.generator, dtype=torch.float64)
    # The router's weights are fp32 even where the tokens are bf16.
    weights = weights.to(torch.float64 if numbers.dtype == torch.float64 else torch.float32).requires_grad_()
    return numbers.variable(n, h), likes.topk(k).indices, weights, numbers.weight(e, 2 * i, h), numbers.weight(e, h, i)


def linear_cross_entropy_case(numbers: Numbers) -> tuple:
    # On a CPU, 20,000 words make a chunk of 64 tokens: several chunks, the last one not full.
    n, h, v = numbers.size(0, 150), numbers.size(1, 16), numbers.draw(st.sampled_from([1, 2, 7, 50, 20_000]))
    labels = numbers.integers(0, v, n)
    ignored = torch.rand(n, generator=numbers.generator) < numbers.draw(st.sampled_from([0.0, 0.3, 1.0]))
    return numbers.variable(n, h), numbers.weight(v, h), labels.masked_fill(ignored, -100)


def token_log_probs_case(numbers: Numbers) -> tuple:
    n, h, v = numbers.size(0, 40), numbers.size(1, 16), numbers.draw(st.sampled_from([1, 2, 7, 50, 20_000]))
    temperatures = numbers.draw(st.sampled_from([None, numbers.integers(1, 4, n) / 2]))
    return numbers.variable(n, h), numbers.weight(v, h), numbers.integers(0, v, n), temperatures


CASES = {name.removesuffix("_case"): make for name, make in dict(globals()).items() if name.endswith("_case")}


# ------------------------------------------------------------------------------------------------------- running a case


def outcome(name: str, gear: str, arguments: tuple, dout: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The operation's value, and its gradients with respect to all variables where `dout` is the output's gradient."""
    arguments = tuple(x.detach().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x for x in arguments)
    with ops.using(gear):
        out = getattr(ops, name)(*arguments)
    variables = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    if variables:
        out.backward(dout)
    return out.detach(), [x.grad for x in variables]


def assert_close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    tolerance = TOLERANCE_IN_EPS[dtype] * torch.finfo(dtype).eps
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * scale)


@cases_of("torch", "exact", "inference")
@given(data=st.data())
@LAW
def test_a_gear_equals_the_naive_definition(gear, name, dtype, data):
    check_against_the_naive_definition(gear, name, dtype, data)


@cases_of("triton")
@given(data=st.data())
@SHORT_LAW
def test_a_kernel_equals_the_naive_definition(gear, name, dtype, data):
    check_against_the_naive_definition(gear, name, dtype, data)


def check_against_the_naive_definition(gear: str, name: str, dtype: torch.dtype, data: st.DataObject) -> None:
    numbers = Numbers(data.draw, dtype)
    arguments = CASES[name](numbers)
    constants = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    assume(gear != "inference" or all(x.numel() for x in constants if isinstance(x, Tensor)))  # no engine asks for nothing
    with torch.no_grad():  # a gear may have another form there
        wanted, _ = outcome(name, "naive", constants, None)
        without_gradient, _ = outcome(name, gear, constants, None)
    if not wanted.is_floating_point():
        assert torch.equal(without_gradient, wanted)
        return
    # A summed loss hands down one number for all positions, in memory without extent.
    same_for_all = data.draw(st.booleans(), label="expanded gradient")
    dout = torch.randn(() if same_for_all else wanted.shape, generator=numbers.generator).to(wanted).expand(wanted.shape)
    _, wanted_gradients = outcome(name, "naive", arguments, dout)
    found, found_gradients = outcome(name, gear, arguments, dout)
    exact_to = torch.float32 if dtype == torch.float64 and name in FP32_INSIDE else dtype
    assert_close(without_gradient, wanted, exact_to)
    for one, other in zip([found, *found_gradients], [wanted, *wanted_gradients], strict=True):
        assert_close(one, other, exact_to)


FP64_PAIRS = [
    (gear, name) for gear, name in PAIRS if torch.float64 in DTYPES[gear] and name not in FP32_INSIDE | {"document_mask"}
]


@pytest.mark.parametrize(("gear", "name"), FP64_PAIRS)
@given(data=st.data())
@settings(LAW, max_examples=5)
def test_gradients_are_the_derivative_of_the_value(gear, name, data):
    """By finite differences, where the arithmetic is fp64 throughout."""
    arguments = CASES[name](Numbers(data.draw, torch.float64))
    if all(x.numel() for x in arguments if isinstance(x, Tensor)):
        with ops.using(gear):
            torch.autograd.gradcheck(getattr(ops, name), arguments, fast_mode=True)


def test_every_operation_has_cases():
    assert CASES.keys() == ops._implementations.keys()


def test_the_torch_gear_is_the_default():
    assert ops._gear == "torch"


# --------------------------------------------------------------------------------------- what single operations promise


def all_gears(name: str) -> list[str]:
    return list(ops._implementations[name])


@pytest.mark.parametrize("gear", all_gears("document_mask"))
@given(data=st.data())
@LAW
def test_a_query_sees_the_earlier_tokens_of_its_own_document(gear, data):
    ids = Numbers(data.draw, torch.float32).document_ids(2, 12)
    with ops.using(gear):
        mask = ops.document_mask(ids)
    assert mask.shape == (2, 1, 12, 12)
    for row, mask_of_row in zip(ids.tolist(), mask[:, 0].tolist(), strict=True):
        assert mask_of_row == [[key <= query and row[key] == row[query] for key in range(12)] for query in range(12)]


@pytest.mark.parametrize("gear", all_gears("attention"))
def test_a_document_of_one_token_attends_to_itself_alone(gear):
    q, k, v = (torch.randn(1, 5, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    with ops.using(gear):
        out = ops.attention(q, k, v, ops.document_mask(torch.arange(5)[None]))
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("gear", all_gears("attention"))
def test_attention_leaves_its_inputs_as_they_were(gear):
    """One sequence, one head and one whole tile: no reordering is needed there, so nothing copies them by the way."""
    q, k, v = (torch.randn(1, 64, 1, 8, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3))
    before = [x.detach().clone() for x in (q, k, v)]
    with ops.using(gear):
        ops.attention(q, k, v, None).sum().backward()
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


@pytest.mark.parametrize("gear", [gear for gear in all_gears("attention") if gear != "naive"])
@pytest.mark.parametrize("mask", ["causal", "documents", "one mask for the batch"])
@pytest.mark.parametrize(("b", "t", "heads", "kv_heads"), [(2, 2100, 2, 1), (3, 200, 24, 2)])
def test_attention_over_many_tokens_and_heads(gear, mask, b, t, heads, kv_heads):
    """Gears may choose another kernel by length, or work on a few sequences at a time."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, t, n, 4, generator=generator).requires_grad_() for n in (heads, kv_heads, kv_heads))
    starts = torch.rand(1 if mask.startswith("one") else b, t, generator=generator) < 0.02
    visible = None if mask == "causal" else ops.document_mask(starts.long().cumsum(1))
    dout = torch.randn(q.shape, generator=generator)
    wanted, wanted_gradients = outcome("attention", "naive", (q, k, v, visible), dout)
    found, found_gradients = outcome("attention", gear, (q, k, v, visible), dout)
    for one, other in zip([found, *found_gradients], [wanted, *wanted_gradients], strict=True):
        assert_close(one, other, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(data=st.data())
@LAW
def test_the_grouped_products_meant_for_gpus_equal_the_naive_definition(dtype, data):
    """PyTorch has them on CPUs, too; they want rows of a multiple of 16 bytes."""
    numbers = Numbers(data.draw, dtype)
    x, experts, weights, *matrices = routed_experts_case(numbers, widths=[8, 16, 40])
    x, *matrices = (y.detach().contiguous().requires_grad_() for y in (x, *matrices))
    arguments = x, experts, weights.detach().to(dtype).requires_grad_(), *matrices
    dout = torch.randn(x.shape, generator=numbers.generator).to(dtype)
    wanted, wanted_gradients = outcome("routed_experts", "naive", arguments, dout)
    found = ops._grouped_products(*arguments)
    found_gradients = torch.autograd.grad(found, [x for x in arguments if x.requires_grad], dout)
    for one, other in zip([found, *found_gradients], [wanted, *wanted_gradients], strict=True):
        assert_close(one.detach(), other, dtype)


@pytest.mark.parametrize("gear", all_gears("routed_experts"))
def test_an_expert_without_tokens_gets_a_zero_gradient(gear):
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(5, 3, generator=generator), torch.rand(5, 2, generator=generator)
    gate_up, down = (torch.randn(s, generator=generator).requires_grad_() for s in [(3, 4, 3), (3, 3, 2)])
    with ops.using(gear):
        ops.routed_experts(x, torch.tensor([[0, 2]] * 5), weights, gate_up, down).square().sum().backward()
    for parameter in (gate_up, down):
        assert parameter.grad[1].count_nonzero() == 0
        assert parameter.grad[0].count_nonzero() > 0 and parameter.grad[2].count_nonzero() > 0


@pytest.mark.parametrize("gear", all_gears("linear_cross_entropy"))
def test_without_a_target_the_loss_is_zero_and_so_are_its_gradients(gear):
    """And not NaN, as the mean over no targets would be (nanochat#590)."""
    hidden, weight = torch.randn(4, 3).requires_grad_(), torch.randn(9, 3).requires_grad_()
    with ops.using(gear):
        loss = ops.linear_cross_entropy(hidden, weight, torch.full((4,), -100))
    loss.backward()
    assert loss.item() == 0 and hidden.grad.count_nonzero() == 0 and weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("label", [-1, 9])
@pytest.mark.parametrize("gear", all_gears("linear_cross_entropy"))
def test_a_label_outside_the_vocabulary_is_an_error(gear, label):
    with ops.using(gear), pytest.raises((IndexError, RuntimeError), match=f"{label} is out of bounds"):
        ops.linear_cross_entropy(torch.randn(2, 3), torch.randn(9, 3), torch.tensor([0, label]))


@pytest.mark.parametrize("gear", all_gears("linear_cross_entropy"))
def test_large_logits_do_not_overflow(gear):
    hidden = torch.full((2, 1), 1e4).requires_grad_()
    weight = torch.tensor([[1.0], [-1.0]]).requires_grad_()
    with ops.using(gear):
        loss = ops.linear_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 2e4  # certain and right costs nothing, certain and wrong the gap
    assert torch.equal(hidden.grad, torch.tensor([[0.0], [2.0]]))


# ------------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("name", ["routed_experts", "swiglu", "linear_cross_entropy"])
@given(data=st.data())
@settings(LAW, max_examples=10)
def test_autocast_runs_the_products_in_bf16_and_gives_fp32_gradients(name, data):
    """Autocast does not look into an autograd function, so the function itself must follow it."""
    arguments = CASES[name](Numbers(data.draw, torch.float32))
    cast = tuple(x.detach().bfloat16().requires_grad_() if x.is_floating_point() else x for x in arguments)
    dout = torch.ones(()) if name == "linear_cross_entropy" else torch.ones_like(cast[0])
    with torch.autocast("cpu", torch.bfloat16):
        found, found_gradients = outcome(name, "torch", arguments, dout)
    wanted, wanted_gradients = outcome(name, "torch", cast, dout)
    assert torch.equal(found, wanted) and found.dtype == wanted.dtype
    for one, other in zip(found_gradients, wanted_gradients, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other.float())


# --------------------------------------------------------------------------------------------------- the choice of gear


def test_an_unknown_gear_is_refused_and_the_known_ones_named():
    with pytest.raises(ValueError, match="'cuda' does not exist; wanted one of naive, torch, triton, exact"):
        with ops.using("cuda"):
            pass
    with pytest.raises(ValueError, match="'cuda' does not exist"):
        ops.register("rms_norm", "cuda")


def test_an_unknown_operation_is_refused_and_the_known_ones_named():
    with pytest.raises(ValueError, match="'layer_norm' is not defined; operations are linear, rms_norm, "):
        ops.register("layer_norm", "torch")


def test_the_gear_before_comes_back_even_after_an_error():
    with ops.using("naive"):
        with pytest.raises(RuntimeError, match="inside"):
            with ops.using("torch"):
                raise RuntimeError("inside")
        assert ops._gear == "naive"
    assert ops._gear == "torch"


@needs_triton
def test_an_operation_that_a_gear_lacks_runs_in_the_gear_before(monkeypatch):
    ran = []
    table = {gear: lambda gear=gear: ran.append(gear) for gear in ("naive", "torch")}
    monkeypatch.setitem(ops._implementations, "rms_norm", table)
    for gear in ("naive", "torch", "triton"):
        with ops.using(gear):
            ops.rms_norm()
    del table["torch"]
    with ops.using("triton"):
        ops.rms_norm()
    assert ran == ["naive", "torch", "torch", "naive"]


def test_the_exact_gear_falls_back_to_no_other(monkeypatch):
    monkeypatch.delitem(ops._implementations["rms_norm"], "exact")
    with ops.using("exact"), pytest.raises(ops.GearError, match="'exact' has no operation 'rms_norm'"):
        ops.rms_norm(torch.ones(2, 3), torch.ones(3), 1e-5)


def test_every_operation_has_an_exact_form():
    assert [name for name, table in ops._implementations.items() if "exact" not in table] == []


def test_the_exact_gear_refuses_to_be_compiled():
    with ops.using("exact"), pytest.raises(Exception, match="leave compile off"):
        torch.compile(lambda x: ops.rms_norm(x, torch.ones(3), 1e-5))(torch.ones(2, 3))


@pytest.fixture
def without_kernels(monkeypatch):
    """As in a process that has not asked for the Triton gear yet."""
    for name, table in ops._implementations.items():
        rest = {gear: implementation for gear, implementation in table.items() if gear != "triton"}
        monkeypatch.setitem(ops._implementations, name, rest)
    loaded = [module for module in sys.modules if module.partition(".")[0] == "kernels"]
    for module in loaded:
        monkeypatch.delitem(sys.modules, module)
    yield
    for module in [module for module in sys.modules if module.partition(".")[0] == "kernels"]:
        del sys.modules[module]  # what the test has loaded; then monkeypatch brings back the others


@needs_triton
def test_the_first_use_of_the_triton_gear_loads_the_kernels(without_kernels):
    assert "triton" not in all_gears("rms_norm")
    with ops.using("triton"):
        assert "triton" in all_gears("rms_norm") and "triton" in all_gears("routed_experts")


def test_where_triton_does_not_exist_the_gear_is_refused_and_another_named(without_kernels, monkeypatch):
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ops.GearError, match="needs the package triton.*use gear 'torch'"):
        with ops.using("triton"):
            pass
    assert ops._gear == "torch"


@needs_triton
def test_another_package_of_that_name_is_found_out(without_kernels, monkeypatch, tmp_path):
    """Hugging Face has one, too, and transformers looks for it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ops.GearError, match="is not minglm's"):
        with ops.using("triton"):
            pass


# ------------------------------------------------------------------------------------------------------ the whole model


@st.composite
def small_configs(draw) -> GLMConfig:
    group_size, n_group = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    topk_group = draw(st.integers(1, n_group))
    kv_heads = draw(st.integers(1, 2))
    return GLMConfig(
        vocab_size=draw(st.integers(5, 60)),
        hidden_size=draw(st.integers(3, 20)),
        num_hidden_layers=draw(st.integers(1, 3)),
        first_k_dense_replace=draw(st.integers(0, 3)),
        intermediate_size=24,
        num_attention_heads=kv_heads * draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        head_dim=8,
        attention_bias=draw(st.booleans()),
        use_qk_norm=draw(st.booleans()),
        n_routed_experts=group_size * n_group,
        num_experts_per_tok=draw(st.integers(1, group_size * topk_group)),
        moe_intermediate_size=12,
        n_shared_experts=draw(st.integers(1, 2)),
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        num_nextn_predict_layers=draw(st.integers(0, 1)),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=0.1,
    )


@given(config=small_configs(), data=st.data())
@settings(LAW, max_examples=25)
def test_loss_and_gradients_of_a_whole_model_are_the_same_in_the_torch_gear(config, data):
    check_a_whole_model("torch", config, data)


@pytest.mark.skipif("triton" not in ops._implementations["rms_norm"], reason="Triton's interpreter is not on")
@given(config=small_configs(), data=st.data())
@settings(LAW, max_examples=4)
def test_loss_and_gradients_of_a_whole_model_are_the_same_in_the_triton_gear(config, data):
    check_a_whole_model("triton", config, data)


def check_a_whole_model(gear: str, config: GLMConfig, data: st.DataObject) -> None:
    numbers = Numbers(data.draw, torch.float32)
    b, t = numbers.size(1, 3), numbers.size(1, 16)
    input_ids = numbers.integers(0, config.vocab_size, b, t)
    document_ids = data.draw(st.sampled_from([None, numbers.document_ids(b, t)]))
    labels = input_ids.roll(-1, 1).masked_fill(numbers.integers(0, 4, b, t) == 0, -100)
    torch.manual_seed(numbers.size(0, 1000))
    model = GLM(config)
    results = []
    for one in ("naive", gear):
        model.zero_grad()
        with ops.using(one):
            loss = model.loss(input_ids, labels, document_ids, balance_weight=0.1)
            loss.total.backward()
        results.append((torch.stack(loss).detach(), {n: p.grad for n, p in model.named_parameters()}))
    (wanted, wanted_gradients), (found, found_gradients) = results
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for name, gradient in wanted_gradients.items():
        if gradient is None:  # the MTP layer in a sequence of one token
            assert found_gradients[name] is None
        else:
            scale = max(1e-3, gradient.abs().max().item())
            torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=1e-4 * scale, msg=name)
