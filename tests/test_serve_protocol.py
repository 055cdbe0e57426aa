"""What a request may hold, and how it is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.serve.protocol import ApiError, ChatRequest, CompletionRequest, parse_body

MESSAGES = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
}


def chat(**keys: object) -> ChatRequest:
    return parse_body(ChatRequest, json.dumps({"messages": MESSAGES, **keys}).encode())


def refusal(body: bytes, kind: type = ChatRequest) -> ApiError:
    with pytest.raises(ApiError) as raised:
        parse_body(kind, body)
    assert raised.value.status == 400
    return raised.value


def test_what_is_not_given_has_openais_defaults():
    request = chat()
    found = (request.temperature, request.top_p, request.n, request.stream, request.stop, request.tool_choice, request.seed)
    assert found == (1.0, 1.0, 1, False, [], "auto", None)


def test_null_is_as_good_as_absent():
    nothing = dict.fromkeys(("temperature", "tools", "stop", "seed", "max_tokens", "stream_options", "logit_bias", "user"))
    assert chat(**nothing) == chat()


def test_tools_keep_their_bytes():
    tool = {"function": {"parameters": {"properties": {"b": {"x-note": 1}, "a": {}}, "type": "object"}, "name": "f"}} | TOOL
    assert json.dumps(chat(tools=[tool]).tools[0]) == json.dumps(tool)


@pytest.mark.parametrize("prompt", ["text", [1, 2], ["text", "more"], [[1], [2, 3]]])
def test_a_prompt_is_text_or_ids_or_a_list_of_them(prompt):
    request = parse_body(CompletionRequest, json.dumps({"prompt": prompt}).encode())
    assert request.prompt == (prompt if isinstance(prompt[0], str | list) and not isinstance(prompt, str) else [prompt])


@pytest.mark.parametrize(
    "keys, param, says",
    [
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0; found -0.1"),
        ({"temperature": "hot"}, "temperature", "found 'hot'"),
        ({"temperature": True}, "temperature", "found True"),
        ({"n": 10**9}, "n", "less than or equal to 128; found 1000000000"),
        ({"n": 1.5}, "n", "found 1.5"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"min_p": 1}, "min_p", "less than 1"),
        ({"seed": 2**70}, "seed", ""),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ({"stop": 7}, "stop", "list"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": 2}, "top_logprobs", "without logprobs"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": ["hello"]}, "messages[0]", "dictionary"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"presence_penalty": 0.5}, "presence_penalty", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"chat_template_kwargs": {"enable_thinkin": True}}, "chat_template_kwargs.enable_thinkin", "'enable_thinking'?"),
        ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs.enable_thinking", "found 'yes'"),
        ({"tools": [{"type": "search"}]}, "tools[0].type", "'function'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
            "'object'",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"required": ["x"]}}}]},
            "tools[0].function.parameters",
            "lacks",
        ),
        ({"tools": [TOOL, TOOL]}, "tools", "more than once"),
        ({"tool_choice": "required"}, "tool_choice", "without tools"),
        ({"tool_choice": "always", "tools": [TOOL]}, "tool_choice", "'always'"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice", "['f']"),
    ],
)
def test_a_wrong_key_is_named_with_what_was_found(keys, param, says):
    error = refusal(json.dumps({"messages": MESSAGES, **keys}).encode())
    assert error.param == param and says in error.message
    assert error.body()["error"].keys() == {"message", "type", "param", "code"}
    assert error.type == "invalid_request_error"


@pytest.mark.parametrize(
    "body, says",
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"messages": NaN}', "NaN is not JSON"),
        (b'{"messages": "\xff"}', "not UTF-8: byte 14 is 0xff"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "a JSON array; wanted an object"),
        (b'"x"', "a JSON string; wanted an object"),
        (b"null", "a JSON null; wanted an object"),
        (b'{"n": 1' + b"0" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body, says):
    assert says in refusal(body).message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from([ChatRequest, CompletionRequest]).flatmap(
        lambda kind: st.tuples(st.just(kind), st.dictionaries(st.sampled_from(sorted(kind.model_fields)), json_values))
    )
)
@settings(max_examples=1000)
def test_any_value_at_any_key_is_taken_or_refused_by_name(drawn):
    kind, keys = drawn
    body = {"messages": MESSAGES} if kind is ChatRequest else {"prompt": "x"}
    try:
        request = parse_body(kind, json.dumps(body | keys).encode())
    except ApiError as error:
        assert error.status == 400 and error.param.partition(".")[0].partition("[")[0] in keys
    else:
        assert isinstance(request, kind)


@given(st.binary(max_size=40))
@settings(max_examples=500)
def test_any_bytes_are_refused_in_openais_form(body):
    assert refusal(body, CompletionRequest).body()["error"]["message"]
