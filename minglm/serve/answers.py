"""The engine's outputs as OpenAI's response bodies and stream events.

A choice takes the outputs of one generation, one after the other, and says what is new; the whole answer is what was new,
put together. So an answer is the same streamed or not.
"""

import json
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

from minglm.chat import StreamParser
from minglm.engine.sequence import RequestOutput
from minglm.serve.protocol import ChatRequest, CompletionRequest
from minglm.tokenizer import Tokenizer


class ChatChoice:
    """One answer to a chat request. in_thinking: the prompt has opened `<think>`."""

    def __init__(self, index: int, request: ChatRequest, tokenizer: Tokenizer, in_thinking: bool):
        self.index = index
        self.finish_reason: str | None = None
        self.tokens = 0
        self._request, self._tokenizer = request, tokenizer
        self._parser = StreamParser(request.usable_tools, request.chat_template_kwargs.enable_thinking, in_thinking)
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._logprobs: list[dict] = []
        self._ids: list[int] = []
        self._experts: list = []
        self._errors: list[dict] = []
        self._calls: list[dict] = []

    def take(self, output: RequestOutput) -> dict[str, Any]:
        """What is new, as a member of a stream event's `choices`."""
        self.tokens += len(output.new_ids)
        deltas = self._parser.feed(output.text)
        if output.finish_reason is not None:
            deltas = [*deltas, *self._parser.finish()]
        delta, errors = self._read(deltas)
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            if self.finish_reason == "stop" and self._calls:
                self.finish_reason = "tool_calls"
        new = {"index": self.index, "delta": delta, "finish_reason": self.finish_reason}
        if self._request.logprobs:
            entries = logprob_entries(self._tokenizer, output, self._request.top_logprobs)
            self._logprobs += entries
            new["logprobs"] = {"content": entries}
        if self._request.return_token_ids:
            self._ids += output.new_ids
            new["token_ids"] = output.new_ids
        if self._request.return_experts:
            new["experts"] = _experts(output)
            self._experts += new["experts"]
        if errors:
            new["tool_call_errors"] = errors
        return new

    def whole(self) -> dict[str, Any]:
        """The finished answer, as a member of a response's `choices`."""
        message = dict(self._message)
        if self._calls:
            message["tool_calls"] = self._calls
        elif message["content"] is None:
            message["content"] = ""
        choice = {"index": self.index, "message": message, "finish_reason": self.finish_reason, "logprobs": None}
        if self._request.logprobs:
            choice["logprobs"] = {"content": self._logprobs}
        if self._request.return_token_ids:
            choice["token_ids"] = self._ids
        if self._request.return_experts:
            choice["experts"] = self._experts
        if self._errors:
            choice["tool_call_errors"] = self._errors
        return choice

    def _read(self, deltas: Sequence) -> tuple[dict[str, Any], list[dict]]:
        """The parser's deltas as one of OpenAI's, and calls that could not be read: each with its position."""
        new: dict[str, Any] = {}
        errors = []
        for delta in deltas:
            if delta.kind in ("reasoning", "content"):
                key = {"reasoning": "reasoning_content", "content": "content"}[delta.kind]
                new[key] = new.get(key, "") + delta.text
                self._message[key] = (self._message.get(key) or "") + delta.text
            elif delta.kind == "tool_call_start":
                function = {"name": delta.name, "arguments": ""}
                call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
                new.setdefault("tool_calls", []).append({"index": delta.index, **call, "function": dict(function)})
                self._calls.append(call)
            elif delta.kind == "tool_call_arguments":
                piece = {"index": delta.index, "function": {"arguments": delta.json_fragment}}
                new.setdefault("tool_calls", []).append(piece)
                self._calls[delta.index]["function"]["arguments"] += delta.json_fragment
            else:
                errors.append({"message": delta.message, "position": delta.position})
        self._errors += errors
        return new, errors


class CompletionChoice:
    """One continuation of a prompt of a completion request."""

    def __init__(self, index: int, request: CompletionRequest, tokenizer: Tokenizer):
        self.index = index
        self.finish_reason: str | None = None
        self.tokens = 0
        self._request, self._tokenizer = request, tokenizer
        self._new: list[dict[str, Any]] = []
        self._offset = 0

    def take(self, output: RequestOutput) -> dict[str, Any]:
        """What is new, as a member of a stream event's `choices`."""
        self.tokens += len(output.new_ids)
        self.finish_reason = output.finish_reason
        new = {"index": self.index, "text": output.text, "finish_reason": output.finish_reason, "logprobs": None}
        if self._request.logprobs is not None:
            new["logprobs"] = self._legacy_logprobs(output)
        if self._request.return_token_ids:
            new["token_ids"] = output.new_ids
        if self._request.return_experts:
            new["experts"] = _experts(output)
        self._new.append(new)
        return new

    def whole(self) -> dict[str, Any]:
        """The finished continuation, as a member of a response's `choices`."""
        choice = {"index": self.index, "text": "".join(new["text"] for new in self._new), "finish_reason": self.finish_reason}
        choice["logprobs"] = None
        if self._request.logprobs is not None:
            pieces = [new["logprobs"] for new in self._new]
            choice["logprobs"] = {key: [item for piece in pieces for item in piece[key]] for key in pieces[0]}
        for key in ("token_ids", "experts"):
            if key in self._new[0]:
                choice[key] = [item for new in self._new for item in new[key]]
        return choice

    def _legacy_logprobs(self, output: RequestOutput) -> dict[str, list]:
        entries = logprob_entries(self._tokenizer, output, self._request.logprobs)
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets,
        }


def logprob_entries(tokenizer: Tokenizer, output: RequestOutput, top: int) -> list[dict[str, Any]]:
    """OpenAI's form of the log-probabilities of the new tokens, each with its `top` likeliest."""
    entries = []
    if not output.new_ids:  # the prompt is still being read
        return entries
    for position, (id, logprob) in enumerate(zip(output.new_ids, output.logprobs, strict=True)):
        best = output.top_logprobs[position][:top] if top else []
        entries.append(
            _logprob_entry(tokenizer, id, logprob)
            | {"top_logprobs": [_logprob_entry(tokenizer, best_id, best_logprob) for best_id, best_logprob in best]}
        )
    return entries


def _experts(output: RequestOutput) -> list:
    """[position][MoE layer][choice]; nothing from a model without such layers."""
    return [] if output.experts is None else output.experts.tolist()


def _logprob_entry(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    # JSON has no -inf, which top-k and the like give to what they exclude.
    logprob = float(logprob) if math.isfinite(logprob) else -9999.0
    return {"token": tokenizer.decode([id]), "logprob": logprob, "bytes": list(tokenizer.decode_bytes([id]))}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


class Envelope:
    """What is around the choices of one response or of each of its stream events."""

    def __init__(self, kind: str, model: str, weights_version: int):
        id_prefix = {"chat.completion": "chatcmpl", "text_completion": "cmpl"}[kind]
        self.kind = kind
        self._fields = {
            "id": f"{id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            # The weights that wrote the answer began as this version.
            "system_fingerprint": f"weights-{weights_version}",
        }

    def whole(self, choices: list[dict], used: dict[str, int], **more: Any) -> dict[str, Any]:
        return {"object": self.kind, **self._fields, "choices": choices, "usage": used, **more}

    def event(self, choices: list[dict], **more: Any) -> str:
        kind = "chat.completion.chunk" if self.kind == "chat.completion" else self.kind
        return event({"object": kind, **self._fields, "choices": choices, **more})


def event(content: dict[str, Any]) -> str:
    """A server-sent event. JSON has no raw newline, so that one line holds it."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


END_OF_EVENTS = "data: [DONE]\n\n"
