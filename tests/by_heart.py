"""A model that has learnt a few conversations by heart, in seconds: so that tests of server, page and terminal can ask real
weights for an answer that they know."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

from minglm.chat import render, render_tokens
from minglm.config import GLMConfig
from minglm.engine.engine import Engine
from minglm.model import GLM
from minglm.serve.app import Settings, build_app, uvicorn_server
from minglm.serve.worker import EngineWorker
from minglm.tokenizer import Tokenizer, train_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
SCRIPT = 'See <b>this</b>: <script>window.hacked = "yes"</script> & `code`.'
CODE = "Here:\n\n```python\nprint(1 < 2)\n```\n\nThat is all."
THOUGHT, CONCLUSION = "Two and two are four, of course.", "It is four."
ENDLESS = "la " * 40


@dataclass(frozen=True)
class Learnt:
    """`question` in mode `thinking` gives `message`; without an end, if `endless`."""

    question: str
    message: dict
    thinking: bool | None = None
    tools: tuple = ()
    endless: bool = False

    @property
    def messages(self) -> list[dict]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", **self.message}]


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 3}}}
CONVERSATIONS = (
    Learnt("hello", {"content": "Hello! How are you?"}),
    Learnt("2+2?", {"reasoning_content": THOUGHT, "content": CONCLUSION}),
    Learnt("2+2?", {"content": CONCLUSION}, thinking=False),
    Learnt("script", {"content": SCRIPT}),
    Learnt("code", {"content": CODE}),
    Learnt("sing", {"content": ENDLESS}, endless=True),
    Learnt("rain?", {"content": "", "tool_calls": [CALL]}, tools=(WEATHER,)),
)


SMALL_SHAPE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=64,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
)


@cache
def learnt() -> tuple[GLM, Tokenizer]:
    """The same for everybody in a process: nobody may change the weights."""
    texts = [render(one.messages, one.tools) for one in CONVERSATIONS] * 4  # long tokens, short conversations
    tokenizer = train_tokenizer(texts, 640, show_progress=False)
    torch.manual_seed(0)
    config = GLMConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=1024, num_nextn_predict_layers=1, **SMALL_SHAPE)
    model = GLM(config)
    ids, labels = _batch(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loss = torch.inf
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 20)
        out = model.loss(ids, labels)
        optimizer.zero_grad()
        out.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss = out.lm.item()
        if loss < 0.004:
            break
    assert loss < 0.02, f"the conversations were not learnt: loss {loss:.3f}"
    return model.eval(), tokenizer


def _batch(tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels (conversations, longest) int64; -100 where the model is not to write."""
    rows = []
    for one in CONVERSATIONS:
        rendered = render_tokens(tokenizer, one.messages, one.tools, one.thinking, end_of_turn=not one.endless)
        rows.append((rendered.ids, rendered.assistant_mask))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), tokenizer.end_of_document_id)
    labels = torch.full((len(rows), longest), -100)
    for row, (own, mask) in enumerate(rows):
        ids[row, : len(own)] = torch.tensor(own)
        for position, is_own in enumerate(mask):
            if is_own:
                labels[row, position - 1] = own[position]
    return ids[:, :-1], labels[:, :-1]


@dataclass
class Served:
    url: str
    worker: EngineWorker
    engine: Engine


@contextlib.contextmanager
def serving(engine: Engine, tokenizer: Tokenizer, **settings: object) -> Iterator[Served]:
    """A server of our own on a free port, as uvicorn runs it, in a thread."""
    app = build_app(engine, tokenizer, Settings(**{"model_name": "parrot", **settings}))
    server = uvicorn_server(app, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended while it started"
            threading.Event().wait(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", app.state.worker, engine)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"
