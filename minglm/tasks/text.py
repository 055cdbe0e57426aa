r"""Problems as plain text, for models that know no chat template: mid-training text, and evaluation of base models.

    Question: What is 3 + 4?                      Tools: weather(city: string): The weather of today.
    Thinking: 3 + 4 = 7                           Question: Is it raining in Paris?
    Answer: 7                                     Call: weather {"city": "Paris"}
                                                  Result: rain
                                                  Answer: Yes.

A line begins with a label and a colon; an empty line ends the text. Where a content has line breaks, the lines after
the first are indented by one blank, so that no content can look like a label or an end, and all can be read back:
`read_answer(answer_text(problem, thinking))` is the demonstration.

A model's turn is read up to one of `STOPS`: the end, or where the world would speak.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minglm.tasks.task import Message, Problem

THINKING, ANSWER, CALL, RESULT = "Thinking:", "Answer:", "Call:", "Result:"
QUESTION, USER, SYSTEM, TOOLS = "Question:", "User:", "System:", "Tools:"
LABELS = (THINKING, ANSWER, CALL, RESULT, QUESTION, USER, SYSTEM, TOOLS)
END = "\n\n"
STOPS = (END, f"\n{RESULT}", f"\n{USER}")


def prompt_text(problem: Problem) -> str:
    """Tools and messages, up to where the model answers; the model itself then chooses to think or to answer at once.

    To have it think, or not, append `THINKING` or `ANSWER`.
    """
    return _tools_text(problem.tools) + conversation_text(problem.messages, opens=True)


def answer_text(problem: Problem, thinking: bool) -> str:
    """The demonstration, results of tools included, up to and with `END`."""
    return ended(conversation_text(problem.demonstrate(thinking)))


def document(problem: Problem, thinking: bool) -> str:
    return prompt_text(problem) + answer_text(problem, thinking)


def ended(conversation: str) -> str:
    """The text of a conversation, whose last line is ended, with the empty line that says that no more comes."""
    return conversation + "\n"


def conversation_text(messages: Iterable[Message], opens: bool = False) -> str:
    """Messages as lines, each ended. opens: the first message of a user's is the question."""
    lines = []
    for message in messages:
        message = in_one_form(message)
        content = message["content"]
        match message["role"]:
            case "system":
                lines.append(_line(SYSTEM, content))
            case "user":
                lines.append(_line(QUESTION if opens else USER, content))
                opens = False
            case "tool":
                lines.append(_line(RESULT, content))
            case _:
                lines += _assistant_lines(message)
    return "".join(lines)


def in_one_form(message: Message) -> Message:
    """The message as `read_answer` gives it, so that two can be compared.

    An assistant's has the four keys that `minglm.chat.parse` gives, with the arguments of calls as mappings; any other
    one has role and content. Identities of calls are dropped: results come in the order of the calls.
    """
    content = message.get("content") or ""
    if message["role"] != "assistant":
        return {"role": message["role"], "content": content}
    return {
        "role": "assistant",
        "reasoning_content": message.get("reasoning_content") or "",
        "content": content,
        "tool_calls": [_call(call.get("function", call)) for call in message.get("tool_calls") or ()],
    }


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _arguments(arguments)
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _assistant_lines(message: Message) -> list[str]:
    lines = []
    if message["reasoning_content"]:
        lines.append(_line(THINKING, message["reasoning_content"]))
    if message["content"] or not message["tool_calls"]:
        lines.append(_line(ANSWER, message["content"]))
    for call in message["tool_calls"]:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        lines.append(_line(CALL, f"{name} {written}"))
    return lines


def _line(label: str, content: str) -> str:
    return f"{label} " + content.replace("\n", "\n ") + "\n"


def _tools_text(tools: Sequence[Mapping[str, Any]]) -> str:
    return _line(TOOLS, "\n".join(_signature(tool.get("function", tool)) for tool in tools)) if tools else ""


def _signature(function: Mapping[str, Any]) -> str:
    """`name(argument: type, optional?: this | that): description`."""
    schema = function.get("parameters") or {}
    required = schema.get("required", ())
    arguments = ", ".join(
        f"{name}{'' if name in required else '?'}: {_type(argument)}" for name, argument in schema.get("properties", {}).items()
    )
    description = function.get("description")
    return f"{function['name']}({arguments})" + (f": {description}" if description else "")


def _type(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    kind = schema.get("type", "any")
    return f"{kind} of {_type(schema['items'])}" if kind == "array" and "items" in schema else str(kind)


# ---- text to messages


def read_answer(text: str) -> list[Message]:
    """What a model wrote after a prompt, as messages of the forms of `in_one_form`; never raises.

    Reading ends at `END` or where the text asks a new question. What does not fit stays in place for a verifier to judge:
    a line without label belongs to the line before it, text before the first label is an answer, and arguments that are
    no JSON object stay a string. Without a label there is one message, whose content is the text.
    """
    messages: list[Message] = []
    for label, content in _labelled(text.split(END, 1)[0]) or [(ANSWER, "")]:
        if label in (RESULT, USER):
            messages.append({"role": "tool" if label == RESULT else "user", "content": content})
            continue
        if not messages or not _takes(messages[-1], label):
            messages.append({"role": "assistant", "reasoning_content": "", "content": "", "tool_calls": []})
        if label == CALL:
            name, _, arguments = content.partition(" ")
            messages[-1]["tool_calls"].append(_call({"name": name, "arguments": arguments}))
        else:
            messages[-1]["reasoning_content" if label == THINKING else "content"] = content
    return messages


def _labelled(text: str) -> list[tuple[str, str]]:
    """(label, content) of each line with those that belong to it."""
    found: list[tuple[str, str]] = []
    for line in text.removesuffix("\n").split("\n"):
        label = next((label for label in LABELS if line.startswith(label)), None)
        if label in (QUESTION, SYSTEM, TOOLS):
            break
        if label:
            found.append((label, line.removeprefix(label).removeprefix(" ")))
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + "\n" + line.removeprefix(" "))
        else:
            found.append((ANSWER, line.removeprefix(" ")))
    return found


def _takes(message: Message, label: str) -> bool:
    """Whether a line is part of the message before it: one message is thinking, answer and calls, in this order."""
    if message["role"] != "assistant" or label == THINKING:
        return False
    if label == CALL:
        return True
    return not message["content"] and not message["tool_calls"]


def _arguments(text: str) -> dict[str, Any] | str:
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: lists in lists in lists
        return text
    return arguments if isinstance(arguments, dict) else text
