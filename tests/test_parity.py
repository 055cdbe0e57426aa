"""The model equals the published architecture: Hugging Face's Glm4MoeForCausalLM and MtpModel, through files, fp32."""

import tempfile
import warnings

import pytest
import torch
import transformers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM
from transformers.modeling_layers import MtpModel

from minglm.checkpoint import load_model, save_model
from minglm.config import GLMConfig
from minglm.model import GLM, KVCache, Router

transformers.logging.set_verbosity_error()  # it reports each MTP tensor that it leaves out
transformers.logging.disable_progress_bar()

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def configs(draw) -> GLMConfig:
    """Toy widths; everything that changes the computation is drawn."""
    kv_heads = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 3))
    n_group = draw(st.integers(1, 3))
    group_size = draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, n_group))
    head_dim = draw(st.sampled_from([4, 6, 8]))
    rotary_dim = draw(st.sampled_from([2, 4, head_dim]))
    return GLMConfig(
        vocab_size=draw(st.integers(2, 40)),
        hidden_size=draw(st.integers(8, 24)),
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        intermediate_size=draw(st.integers(1, 24)),
        num_attention_heads=kv_heads * draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attention_bias=draw(st.booleans()),
        use_qk_norm=draw(st.booleans()),
        partial_rotary_factor=rotary_dim / head_dim,
        rope_theta=draw(st.sampled_from([1e4, 1e6])),
        n_routed_experts=n_group * group_size,
        num_experts_per_tok=draw(st.integers(1, min(4, group_size * topk_group))),
        moe_intermediate_size=draw(st.integers(1, 12)),
        n_shared_experts=draw(st.integers(1, 3)),
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        num_nextn_predict_layers=draw(st.integers(0, 1)),
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
    )


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Weights that no part of the computation could ignore: norms off 1, all biases off 0, experts far apart."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            tensor.copy_(1 + 0.2 * noise)
        elif name.endswith("bias"):
            tensor.copy_(0.2 * noise)
        elif "embed_tokens" in name:
            tensor.copy_(noise)  # not small beside what the layers add: the norms would blow up the rounding of a near-zero sum
        else:
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    return model


def random_ids(config: GLMConfig, seed: int, batch: int = 2, length: int = 13) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def smallest_routing_gap(model: GLM, ids: Tensor, mtp: bool = False) -> float:
    """How far the last chosen expert (or group) is ahead of the first one left out, at the closest of all choices.

    Where it is tiny, rounding decides which experts are chosen, and a jump in the output is no error of either side.
    """
    gaps = [torch.tensor(1.0)]

    def measure(router: Router, _inputs, outputs) -> None:
        config, scores = router.config, outputs[2] + router.e_score_correction_bias  # (N, E)
        if config.n_group > 1:
            grouped = scores.unflatten(1, (config.n_group, -1))
            group_scores = grouped.topk(2).values.sum(-1)
            order = group_scores.sort(descending=True)
            if config.topk_group < config.n_group:
                gaps.append(order.values[:, config.topk_group - 1] - order.values[:, config.topk_group])
            best = order.indices[:, : config.topk_group, None].expand(-1, -1, grouped.shape[-1])
            scores = grouped.gather(1, best).flatten(1)  # only the experts of the best groups
        if config.num_experts_per_tok < scores.shape[1]:
            ranked = scores.sort(descending=True).values
            gaps.append(ranked[:, config.num_experts_per_tok - 1] - ranked[:, config.num_experts_per_tok])

    hooks = [router.register_forward_hook(measure) for router in model.routers()]
    with torch.no_grad():
        model(ids, mtp=mtp)
    for hook in hooks:
        hook.remove()
    return min(gap.min().item() for gap in gaps)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, over the largest magnitude."""
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()


def load_with_hugging_face(folder: str) -> Glm4MoeForCausalLM:
    return Glm4MoeForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")


parity_settings = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@parity_settings
@given(configs(), SEEDS)
def test_hugging_face_gives_equal_logits_and_gradients_from_the_folder_that_we_save(config, seed):
    ours = randomise(GLM(config), seed)
    ids = random_ids(config, seed)
    assume(smallest_routing_gap(ours, ids) > 1e-5)
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, folder, max_shard_bytes=2000)
        theirs = load_with_hugging_face(folder)

    wanted = theirs(input_ids=ids, labels=ids)
    assert relative_error(ours(ids).logits, wanted.logits) < 1e-5

    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    loss = ours.loss(ids, labels, mtp_weight=0, balance_weight=0)
    assert relative_error(loss.total, wanted.loss) < 1e-5
    loss.total.backward()
    wanted.loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if not name.startswith("mtp.")}
    wanted_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == wanted_gradients.keys()
    largest = max(gradient.abs().max() for gradient in wanted_gradients.values())
    for name, gradient in wanted_gradients.items():
        if name.endswith("mlp.gate.weight") and config.norm_topk_prob and config.num_experts_per_tok == 1:
            # One expert, whose normalised weight is always 1: the router's gradient is zero, and rounding all there is.
            assert max(gradients[name].abs().max(), gradient.abs().max()) < 1e-6 * largest
        else:
            assert relative_error(gradients[name], gradient) < 1e-4, name


@parity_settings
@given(configs(), SEEDS)
def test_we_give_equal_logits_from_the_folder_that_hugging_face_saves(config, seed):
    theirs = Glm4MoeForCausalLM._from_config(
        Glm4MoeConfig(**config.to_dict()), attn_implementation="eager", experts_implementation="eager"
    )
    randomise(theirs, seed)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs.save_pretrained(folder, max_shard_size="4KB")
        ours = load_model(folder)
    assert ours.mtp is None and ours.config.num_nextn_predict_layers == 0  # Hugging Face never writes the MTP layer
    assert any("no MTP layer" in str(w.message) for w in caught) == bool(config.num_nextn_predict_layers)
    ids = random_ids(config, seed)
    assume(smallest_routing_gap(ours, ids) > 1e-5)
    assert relative_error(ours(ids).logits, theirs(input_ids=ids).logits) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dense_layers", [1, 46])
def test_mtp_logits_equal_those_of_hugging_faces_mtp_model(tmp_path, tied, dense_layers):
    # Hugging Face recognises an MTP layer by the published models' layer numbers, 46 and 92.
    config = GLMConfig(
        vocab_size=23,
        hidden_size=12,
        num_hidden_layers=46,
        first_k_dense_replace=dense_layers,
        intermediate_size=8,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=6,
        routed_scaling_factor=2.5,
        tie_word_embeddings=tied,
    )
    ours = randomise(GLM(config), seed=7)
    ids = random_ids(config, seed=8)
    assert smallest_routing_gap(ours, ids, mtp=True) > 1e-5  # else choose other seeds
    save_model(ours, tmp_path / "model")
    main = load_with_hugging_face(tmp_path / "model")
    mtp = MtpModel.from_pretrained(main)

    trunk = main.model(input_ids=ids).last_hidden_state
    positions = torch.arange(1, ids.shape[1])[None]
    hidden = mtp.forward_layer(0, trunk[:, :-1], positions, None, input_ids=ids[:, 1:])
    out = ours(ids, mtp=True)
    assert relative_error(out.logits, main.lm_head(trunk)) < 1e-5
    assert relative_error(out.mtp_logits, mtp._project_to_logits(hidden)) < 1e-5


@settings(max_examples=40, deadline=None)
@given(configs(), SEEDS, st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_decoding_with_a_cache_in_any_chunks_equals_the_full_forward_pass(config, seed, chunks):
    model = randomise(GLM(config), seed)
    ids = random_ids(config, seed, length=sum(chunks))
    assume(smallest_routing_gap(model, ids) > 1e-5)
    with torch.no_grad():
        full = model(ids)
        cache = KVCache(config, batch=2, max_length=sum(chunks))
        parts = [model(chunk, cache=cache) for chunk in ids.split(chunks, dim=1)]
    assert cache.length == sum(chunks)
    assert relative_error(torch.cat([part.logits for part in parts], dim=1), full.logits) < 1e-5
    assert relative_error(torch.cat([part.hidden_states for part in parts], dim=1), full.hidden_states) < 1e-5
