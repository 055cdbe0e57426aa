"""Grammar-constrained writing: which tokens may follow. A thin wrapper around llguidance.

Grammars are in its dialect of Lark, as `minglm.chat.tool_grammar` writes them. Special tokens are themselves there, never
the bytes of their names. Where a grammar is complete and nothing more may follow, only the end-of-turn ids are left.
"""

import numpy as np
import torch
from torch import Tensor

from minglm.tokenizer import Tokenizer


class GrammarCompiler:
    """Makes matchers for the vocabulary of `tokenizer`. The library's tables are built when the first grammar comes."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._tables = None

    def matcher(self, grammar: str) -> "Matcher":
        """Raises ValueError, with the library's words, for a grammar that it does not take."""
        from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

        if self._tables is None:
            wrapper = TokenizerWrapper(_Vocabulary(self._tokenizer))
            self._tables = LLTokenizer(wrapper, eos_token=list(self._tokenizer.end_of_turn_ids))
        matcher = LLMatcher(self._tables, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"the grammar does not compile: {matcher.get_error()}")
        return Matcher(matcher, self._tokenizer)


class _Vocabulary:
    """The form in which llguidance asks for a vocabulary."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.decode_bytes([id]) for id in range(tokenizer.vocab_size)]
        self.special_token_ids = list(tokenizer.special_ids.values())
        self.eos_token_id, self.bos_token_id = tokenizer.end_of_document_id, None

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher, tokenizer: Tokenizer):
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._bits = np.zeros((tokenizer.vocab_size + 31) // 32, dtype=np.int32)

    def fork(self) -> "Matcher":
        """The same place, to try something. (The library's own rollback fails behind a token that ends the answer.)"""
        return Matcher(self._matcher.deep_copy(), self._tokenizer)

    def hide(self, logits: Tensor) -> None:
        """Put -inf where a token may not follow: logits (v,), in place."""
        if self._matcher.is_stopped():
            allowed = np.zeros(logits.shape[0], dtype=bool)
            allowed[list(self._tokenizer.end_of_turn_ids)] = True
        else:
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
            allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: logits.shape[0]].astype(bool)
        self._check()
        logits.masked_fill_(torch.from_numpy(~allowed).to(logits.device), float("-inf"))

    def advance(self, id: int) -> None:
        """`id` follows. Raises RuntimeError for one that may not: `hide` was not obeyed."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(id)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RuntimeError(f"the grammar's matcher has failed: {self._matcher.get_error()}")
