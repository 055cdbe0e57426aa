"""An answer of one message, as a verifier reads it."""

from typing import Any


def hear(response: Any) -> tuple[str, str | None]:
    """The content of a response, stripped, and what is wrong with its form: None if it is one message of the assistant's
    with text in it and no calls. Takes anything, raises nothing."""
    if not isinstance(response, list | tuple) or len(response) != 1 or not isinstance(response[0], dict):
        return "", "wanted one message"
    message = response[0]
    content = message.get("content")
    if message.get("role") != "assistant":
        return "", "wanted a message of the assistant's"
    if message.get("tool_calls"):
        return "", "calls a tool, and there is none"
    if not isinstance(content, str) or not content.strip():
        return "", "the answer is empty"
    return content.strip(), None


def bare(content: str) -> str:
    """Without white space at the ends and without one full stop: how an exact answer is compared."""
    return content.strip().removesuffix(".").rstrip()


def shown(content: str) -> str:
    """What was found, short enough for a reason."""
    return repr(content if len(content) <= 60 else content[:57] + "...")
