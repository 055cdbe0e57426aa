"""How fast this machine writes: minglm's engine beside transformers' `generate`, as ratios from one run.

Three workloads: one request, 32 at a time, and 32 whose prompts and answers differ in length. Greedy, same weights, no end
of text, so that everybody writes the same number of tokens. transformers runs with each of its implementations of experts
and each of its caches, but for those that are hopeless; it pads prompts and writes until the longest answer is done, and only
the tokens asked for count. Both also write with drafts by the MTP layer, where transformers can.
"""

import dataclasses
import statistics
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from minglm.bench import _transformers_model, measure_peak
from minglm.config import GLMConfig
from minglm.engine import exact
from minglm.engine.engine import Engine
from minglm.engine.sampling import SamplingParams
from minglm.model import GLM
from minglm.params import forward_flops_per_token
from minglm.train.recipe import find_config

# Who needs this many times the time of the fastest of transformers to the first token is out of the race.
HOPELESS = 6
EXPERTS = ("eager", "grouped_mm", "batched_mm")
CACHES = (None, "static")


@dataclass(frozen=True)
class Requests:
    """Prompt lengths and answer lengths in tokens, one each a request."""

    prompts: tuple[int, ...]
    answers: tuple[int, ...]

    def ids(self, vocab_size: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in self.prompts]


WORKLOADS = {
    "1 request": Requests((32,), (64,)),
    "32 concurrent": Requests((32,) * 32, (32,) * 32),
    # Lengths as chats have them: most are short, a few long.
    "32 of unequal lengths": Requests(
        tuple(8 + 2 * i for i in range(32)), tuple(4 + 92 * (i * 11 % 32) ** 3 // 31**3 for i in range(32))
    ),
}


def run(size: str, repeats: int = 3, workloads: dict[str, Requests] | None = None) -> dict:
    """Time all contestants on all workloads at size "nano" or "tiny", taking turns. -> for each workload and contestant the
    median tokens/s and seconds to the first token, the matrix-product peak in FLOP/s, why transformers does not draft (None:
    it does), and the lines of `minglm.engine.exact.report`. Raises RuntimeError if the contestants do not write the same first
    tokens."""
    config = GLMConfig.from_toml(find_config("model", size))
    torch.manual_seed(0)
    model = GLM(config).eval()
    trunk = GLM(dataclasses.replace(config, num_nextn_predict_layers=0)).eval()  # transformers keeps no MTP layer in memory
    trunk.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("mtp.")})
    contestants = {"minglm": _engine(trunk), "minglm, 1 draft": _engine(model, draft_tokens=1)}
    for experts in EXPERTS:
        twin = _transformers_model(trunk, experts).eval()
        for cache in CACHES:
            contestants[f"transformers {experts}, {cache or 'dynamic'} cache"] = _generate(twin, cache)
    peak = measure_peak(torch.device("cpu"))
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        drafting, no_drafts = _drafting(model, folder)
        for name, requests in (workloads or WORKLOADS).items():
            able = contestants | (drafting if len(requests.prompts) == 1 else {})  # it drafts for one request at a time
            results[name] = _race(name, requests, able, config.vocab_size, repeats)
    for name, requests in (workloads or WORKLOADS).items():
        length = sum(p + a / 2 for p, a in zip(requests.prompts, requests.answers, strict=True)) / len(requests.prompts)
        flops = forward_flops_per_token(trunk.config, int(length))
        for entry in results[name].values():
            entry["share_of_peak"] = entry["tokens_per_second"] * flops / peak
    return {
        "size": size,
        "threads": torch.get_num_threads(),
        "peak_flops": peak,
        "decoding": results,
        "transformers_does_not_draft": no_drafts,
        "log_probabilities": exact.report(model),
    }


def _race(
    name: str, requests: Requests, contestants: dict[str, Callable], vocab_size: int, repeats: int
) -> dict[str, dict[str, float]]:
    prompts = requests.ids(vocab_size)
    ones = (1,) * len(prompts)
    first = {who: write(prompts, ones) for who, write in contestants.items()}  # also warms up
    for who, tokens in first.items():
        agreeing = sum(a == b for a, b in zip(tokens, first["minglm"], strict=True))
        if agreeing < 0.9 * len(prompts):  # where two tokens are equally likely, rounding decides
            raise RuntimeError(f"{who} begins {agreeing} of {len(prompts)} answers as minglm does: it computes something else")
    once = {who: _timed(lambda write=write: write(prompts, ones)) for who, write in contestants.items()}
    slowest = HOPELESS * min(seconds for who, seconds in once.items() if who.startswith("transformers"))
    contestants = {who: write for who, write in contestants.items() if once[who] <= slowest}
    seconds: dict[str, list[float]] = {who: [] for who in contestants}
    to_first: dict[str, list[float]] = {who: [] for who in contestants}
    for _ in tqdm(range(repeats), desc=f"decoding, {name}", unit="round"):
        for who, write in contestants.items():
            to_first[who].append(_timed(lambda write=write: write(prompts, ones)))
            seconds[who].append(_timed(lambda write=write: write(prompts, requests.answers)))
    return {
        who: {
            "tokens_per_second": sum(requests.answers) / statistics.median(seconds[who]),
            "seconds_to_first_token": statistics.median(to_first[who]),
        }
        for who in contestants
    }


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


Writer = Callable[[list[list[int]], tuple[int, ...]], list[int]]


def _engine(model: GLM, draft_tokens: int = 0) -> Writer:
    """-> a function that writes answers of the given lengths, and returns the first token of each."""
    engine = Engine(model, None, draft_tokens=draft_tokens)

    def write(prompts: list[list[int]], lengths: tuple[int, ...]) -> list[int]:
        engine.blocks.forget_prefixes()  # the same prompts come again and again, and nobody else may remember them
        params = [SamplingParams(temperature=0, max_tokens=n) for n in lengths]
        return [answer.ids[0] for answer in engine.generate(prompts, params)]

    return write


def _drafting(model: GLM, folder: str) -> tuple[dict[str, Writer], str | None]:
    """transformers with `use_mtp=True`, which reads the MTP layer from a folder; or nobody, and the reason why it cannot."""
    from transformers import Glm4MoeForCausalLM, logging

    model.save_pretrained(folder)
    logging.set_verbosity_error()  # it would list the MTP layer's weights as unexpected
    twin = Glm4MoeForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    twin.set_experts_implementation("grouped_mm")
    write = _generate(twin, None, use_mtp=True)
    try:
        write([[0, 1, 2]], (2,))
    except (RuntimeError, ValueError) as error:
        return {}, str(error).partition("\n")[0]
    return {"transformers grouped_mm, use_mtp": write}, None


def _generate(twin: nn.Module, cache: str | None, **options) -> Writer:
    """The same by transformers: prompts padded on the left, as many steps as the longest answer has."""

    @torch.inference_mode()
    def write(prompts: list[list[int]], lengths: tuple[int, ...]) -> list[int]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        new = {"max_new_tokens": max(lengths), "min_new_tokens": max(lengths)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = twin.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                cache_implementation=cache,
                disable_compile=True,
                **new,
                **options,
            )
        return out[:, longest].tolist()

    return write


def report(result: dict) -> str:
    """The measured tables as text, each contestant as a ratio to the fastest of transformers."""
    lines = [
        f"{result['size']}, decoding: {result['threads']} threads, fp32 matrix-product peak "
        f"{result['peak_flops'] / 1e9:.0f} GFLOP/s"
    ]
    for name, entries in result["decoding"].items():
        fastest = max(entry["tokens_per_second"] for who, entry in entries.items() if who.startswith("transformers"))
        lines.append(f"{name:44}{'tokens/s':>10}{'x transformers':>16}{'of peak':>9}{'first token':>13}")
        for who, entry in entries.items():
            speed = entry["tokens_per_second"]
            lines.append(
                f"  {who:42}{speed:>10,.0f}{speed / fastest:>16.2f}{entry['share_of_peak']:>9.1%}"
                f"{entry['seconds_to_first_token'] * 1e3:>10,.1f} ms"
            )
    reason = result["transformers_does_not_draft"]
    if reason is not None:
        lines.append(f"transformers' generate(use_mtp=True) does not run at this size: {textwrap.shorten(reason, 160)}")
    return "\n".join([*lines, "", result["log_probabilities"]])
