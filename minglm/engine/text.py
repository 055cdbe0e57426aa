"""Ids to text, piece by piece: only whole characters, and nothing that may turn out to belong to a stop string."""

import codecs
from collections.abc import Sequence

from minglm.tokenizer import Tokenizer


class TextStream:
    """The text of one answer. `feed` each id, `finish` once; all that they return, joined, is the answer's text.

    Without stop strings that is `tokenizer.decode` of all ids. Without a tokenizer it is empty.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""  # decoded, but a stop string could begin in it
        self.stopped_by: str | None = None

    def feed(self, id: int) -> str:
        """-> the text that is finished. After it, `stopped_by` is the stop string that the text now holds, if any."""
        if self._tokenizer is None:
            return ""
        return self._release(self._decoder.decode(self._tokenizer.decode_bytes([id])))

    def finish(self) -> str:
        """-> the rest: what was held back, and a replacement character for half a character. Nothing behind a stop."""
        if self.stopped_by is not None or self._tokenizer is None:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        return text if self.stopped_by is not None else text + self._held

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        found = [(text.index(stop), -len(stop), stop) for stop in self._stop if stop in text]
        if found:
            start, _, self.stopped_by = min(found)  # the earliest; of several at one place the longest
            self._held = ""
            return text[:start]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
