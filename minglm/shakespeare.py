"""A race on tiny shakespeare by characters: minglm against GPT-2 in nanoGPT's CPU setting, side by side on this machine.

transformers' `GPT2LMHeadModel` trains as nanoGPT's README has it for CPUs: 4 layers, 4 heads, width 128, context 64, batch
12, 2,000 steps, no dropout, learning rate 1e-3 falling to 1e-4. The clock stops when it has finished; what counts is the
held-out loss (last 10% of the text) that `configs/recipe/shakespeare.toml` has reached by then, with no more activated
parameters. Both are also judged on windows of 64 characters, so that our longer context is no advantage there.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minglm.checkpoint import load_model
from minglm.config import ConfigError
from minglm.data.sources import TRAIN_SHARE_WITHIN_DOCUMENT
from minglm.params import count
from minglm.tokenizer import Tokenizer
from minglm.train.ablation import with_value
from minglm.train.metrics import read_metrics
from minglm.train.recipe import load_recipe
from minglm.train.trainer import train

GPT2_CONTEXT, GPT2_BATCH, GPT2_STEPS, GPT2_WARMUP = 64, 12, 2000, 100


def race(text_file: Path, folder: Path, seed: int = 1) -> dict:
    """Train both, GPT-2 first. -> seconds, held-out losses (nats per character) and parameters of each.

    Raises `ConfigError` for a folder that holds an earlier race: a resumed run would have no time of its own.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists; wanted a new folder: the clock of a race cannot be resumed")
    text = text_file.read_text(encoding="utf-8")
    result = {"seed": seed, "threads": torch.get_num_threads(), "gpt2": _train_gpt2(text, seed)}
    recipe = with_value(with_value(load_recipe("shakespeare"), "data.path", text_file), "seed", seed)
    outcome = train(recipe, folder)
    in_time = [
        record
        for record in read_metrics(folder / "metrics.jsonl")
        if record["kind"] == "held_out" and record["seconds"] <= result["gpt2"]["seconds"]
    ][-1]
    model = load_model(outcome.checkpoint).eval()
    ids = torch.tensor(Tokenizer.from_pretrained(outcome.checkpoint).encode(text[_train_length(text) :]))
    sizes = count(model.config)
    result["minglm"] = {
        "seconds": in_time["seconds"],
        "steps": in_time["step"],
        "held_out_loss": in_time["loss"],
        "held_out_loss_context_64": _windowed_loss(lambda x: model(x).logits, ids, GPT2_CONTEXT),
        "finished_in_time": in_time["step"] == outcome.step,
        "activated_parameters": sizes.activated,
        "parameters": sizes.total,
    }
    (folder / "race.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _train_length(text: str | Tensor) -> int:
    """Where the held-out part begins: nanoGPT's split, and that of minglm.data for a single document."""
    return int(TRAIN_SHARE_WITHIN_DOCUMENT * len(text))


def _train_gpt2(text: str, seed: int) -> dict:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text])
    train_ids, held_out_ids = ids.split([_train_length(ids), len(ids) - _train_length(ids)])
    config = GPT2Config(
        vocab_size=len(characters), n_positions=GPT2_CONTEXT, n_embd=128, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    window = torch.arange(GPT2_CONTEXT)
    start = time.perf_counter()
    for step in tqdm(range(GPT2_STEPS), desc="GPT-2", unit="step"):
        progress = max(0.0, (step - GPT2_WARMUP) / (GPT2_STEPS - GPT2_WARMUP))
        rate = 1e-4 + 0.5 * (1e-3 - 1e-4) * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / GPT2_WARMUP)
        starts = torch.randint(len(train_ids) - GPT2_CONTEXT, (GPT2_BATCH, 1))
        x = train_ids[starts + window]  # (batch, context)
        loss = torch.nn.functional.cross_entropy(model(x).logits.flatten(0, 1), train_ids[starts + window + 1].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - start
    model.eval()
    loss = _windowed_loss(lambda x: model(x).logits, held_out_ids, GPT2_CONTEXT)
    parameters = sum(p.numel() for p in model.parameters())
    return {"seconds": seconds, "held_out_loss": loss, "parameters": parameters}


@torch.no_grad()
def _windowed_loss(logits: Callable[[Tensor], Tensor], ids: Tensor, context: int) -> float:
    """Mean loss in nats over windows of `context` ids side by side; ids (n,), logits (b, t) -> (b, t, vocabulary)."""
    windows = (len(ids) - 1) // context
    x = ids[: windows * context].view(windows, context)
    y = ids[1 : windows * context + 1].view(windows, context)
    losses = [
        torch.nn.functional.cross_entropy(logits(x_part).flatten(0, 1), y_part.flatten(), reduction="sum")
        for x_part, y_part in zip(x.split(64), y.split(64), strict=True)
    ]
    return (torch.stack(losses).sum() / y.numel()).item()


def report(result: dict) -> str:
    """The result of a race as text."""
    theirs, ours = result["gpt2"], result["minglm"]
    late = [] if ours["finished_in_time"] else ["minglm finished after GPT-2: its loss at context 64 is that of its end"]
    return "\n".join(
        [
            f"{'':34}{'GPT-2':>12}{'minglm':>12}",
            f"{'seconds':34}{theirs['seconds']:>12.1f}{ours['seconds']:>12.1f}",
            f"{'held-out loss, own context':34}{theirs['held_out_loss']:>12.3f}{ours['held_out_loss']:>12.3f}",
            f"{'held-out loss, context 64':34}{theirs['held_out_loss']:>12.3f}{ours['held_out_loss_context_64']:>12.3f}",
            f"{'activated parameters':34}{theirs['parameters']:>12,}{ours['activated_parameters']:>12,}",
            *late,
        ]
    )
