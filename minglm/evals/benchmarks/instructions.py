"""IFEval (arXiv 2311.07911): constraints that a program can check. Strict: the answer as it stands must keep all of them.

Two of the checks are near, not equal, to the published ones, which need nltk: sentences end at . ! or ? before a blank or the
end, but for titles and initials (where Punkt has learnt abbreviations), and `CAPITALS` parts words as nltk's rules do. Keywords
are texts, where published they are patterns. The published "loose" accuracy is not computed.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from minglm.evals.benchmarks.question import Question, asked, judged_text
from minglm.evals.benchmarks.records import Record
from minglm.tasks.task import reply

RELATIONS = {"less than": lambda count, limit: count < limit, "at least": lambda count, limit: count >= limit}
BULLETS = (r"^[^\S\n]*\*[^*].*$", r"^[^\S\n]*-.*$")
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b(?:Dr|Mr|Ms|St)\.)(?<!\bMrs\.)(?<!\b[A-Z]\.)[\"')\]}*]*(?:\s+|$)")
CAPITALS = re.compile(  # what stands between words: blanks and signs, or nothing, as in DO|N'T and CAN|NOT
    r"""[\s;@#$%&?!*\[\](){}<>"`«»“”‘’„\u2012-\u2015]+|-{2,}|\.{2,}|[:,](?!\d)"""
    r"""|(?<=\w)(?=(?:n't|N'T|'(?:[smdSMD]|ll|LL|re|RE|ve|VE))\b)|(?<=\bCAN)(?=NOT\b)"""
)
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


class Kind(NamedTuple):
    """keys: the arguments that it must have, with their types. holds: whether a text keeps it."""

    keys: Mapping[str, type]
    holds: Callable[[str, Mapping[str, Any]], bool]


def _compared(count: int, arguments: Mapping[str, Any], limit: str, relation: str = "relation") -> bool:
    return RELATIONS[arguments[relation]](count, arguments[limit])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _sentences(text: str) -> int:
    return len([part for part in SENTENCE_END.split(text) if re.search(r"\w", part)])


def _paragraphs(text: str, arguments: Mapping[str, Any]) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    if any(not part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == arguments["num_paragraphs"]


def _nth_paragraph(text: str, arguments: Mapping[str, Any]) -> bool:
    parts = text.split("\n\n")
    count, nth = sum(bool(part.strip()) for part in parts), arguments["nth_paragraph"]
    if count != arguments["num_paragraphs"] or nth > count or not parts[nth - 1].strip():
        return False
    word = parts[nth - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == arguments["first_word"].lower()


def _highlights(text: str, arguments: Mapping[str, Any]) -> bool:
    found = [*re.findall(r"\*[^\n*]*\*", text), *re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(bool(one.strip("*").strip()) for one in found) >= arguments["num_highlights"]


def _bullets(text: str, arguments: Mapping[str, Any]) -> bool:
    return sum(len(re.findall(line, text, re.MULTILINE)) for line in BULLETS) == arguments["num_bullets"]


def _placeholders(text: str) -> int:
    """Matches of `\\[.*?\\]`, in linear time."""
    return sum("[" in part for line in text.split("\n") for part in line.split("]")[:-1])


def _title(text: str, arguments: Mapping[str, Any]) -> bool:
    """A match of `<<[^\\n]+>>` that has more than blanks, in linear time."""
    lines = ((line, line.find("<<"), line.rfind(">>")) for line in text.split("\n"))
    return any(0 <= start < end - 2 and line[start : end + 2].lstrip("<").rstrip(">").strip() for line, start, end in lines)


def _postscript(text: str, arguments: Mapping[str, Any]) -> bool:
    marker = arguments["postscript_marker"].strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(patterns.get(marker, re.escape(marker.lower())), text.lower()))


def _json(text: str, arguments: Mapping[str, Any]) -> bool:
    inner = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(inner)
    except (ValueError, RecursionError):
        return False
    return True


def _two_responses(text: str, arguments: Mapping[str, Any]) -> bool:
    parts = text.split("******")
    if any(not part.strip() for part in parts[1:-1]):
        return False
    found = [part.strip() for part in parts if part.strip()]
    return len(found) == 2 and found[0] != found[1]


def language_of(text: str) -> str | None:
    """ISO 639-1, as the published scorer finds it; None where a text has too little to tell."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0  # it draws
    try:
        return detect(text)
    except LangDetectException:
        return None


def _in_language(text: str, language: str) -> bool:
    return language_of(text) in (language, None)  # as published: what cannot be told is let pass


def _with_case(is_case: Callable[[str], bool]) -> Callable[[str, Mapping[str, Any]], bool]:
    return lambda text, arguments: is_case(text) and _in_language(text, "en")


def _found(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.IGNORECASE))


def _capital_words(text: str) -> int:
    return sum(word.isupper() for word in CAPITALS.split(text))


KINDS: dict[str, Kind] = {
    "keywords:existence": Kind({"keywords": list}, lambda t, a: all(_found(re.escape(word), t) for word in a["keywords"])),
    "keywords:frequency": Kind(
        {"keyword": str, "frequency": int, "relation": str},
        lambda t, a: _compared(_found(re.escape(a["keyword"].strip()), t), a, "frequency"),
    ),
    "keywords:forbidden_words": Kind(
        {"forbidden_words": list}, lambda t, a: not any(_found(rf"\b{re.escape(w)}\b", t) for w in a["forbidden_words"])
    ),
    "keywords:letter_frequency": Kind(
        {"letter": str, "let_frequency": int, "let_relation": str},
        lambda t, a: _compared(t.lower().count(a["letter"].strip().lower()), a, "let_frequency", "let_relation"),
    ),
    "language:response_language": Kind({"language": str}, lambda t, a: _in_language(t, a["language"])),
    "length_constraints:number_sentences": Kind(
        {"num_sentences": int, "relation": str}, lambda t, a: _compared(_sentences(t), a, "num_sentences")
    ),
    "length_constraints:number_paragraphs": Kind({"num_paragraphs": int}, _paragraphs),
    "length_constraints:number_words": Kind(
        {"num_words": int, "relation": str}, lambda t, a: _compared(len(_words(t)), a, "num_words")
    ),
    "length_constraints:nth_paragraph_first_word": Kind(
        {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}, _nth_paragraph
    ),
    "detectable_content:number_placeholders": Kind(
        {"num_placeholders": int}, lambda t, a: _placeholders(t) >= a["num_placeholders"]
    ),
    "detectable_content:postscript": Kind({"postscript_marker": str}, _postscript),
    "detectable_format:number_bullet_lists": Kind({"num_bullets": int}, _bullets),
    "detectable_format:constrained_response": Kind({}, lambda t, a: any(option in t for option in OPTIONS)),
    "detectable_format:number_highlighted_sections": Kind({"num_highlights": int}, _highlights),
    "detectable_format:multiple_sections": Kind(
        {"section_spliter": str, "num_sections": int},
        lambda t, a: len(re.findall(rf"{re.escape(a['section_spliter'].strip())}\s?\d+", t)) >= a["num_sections"],
    ),
    "detectable_format:json_format": Kind({}, _json),
    "detectable_format:title": Kind({}, _title),
    "combination:two_responses": Kind({}, _two_responses),
    "combination:repeat_prompt": Kind(
        {"prompt_to_repeat": str}, lambda t, a: t.strip().lower().startswith(a["prompt_to_repeat"].strip().lower())
    ),
    "startend:end_checker": Kind(
        {"end_phrase": str}, lambda t, a: t.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower())
    ),
    "startend:quotation": Kind({}, lambda t, a: bool(re.fullmatch(r'".*"', t.strip(), re.DOTALL))),
    "change_case:capital_word_frequency": Kind(
        {"capital_frequency": int, "capital_relation": str},
        lambda t, a: _compared(_capital_words(t), a, "capital_frequency", "capital_relation"),
    ),
    "change_case:english_capital": Kind({}, _with_case(str.isupper)),
    "change_case:english_lowercase": Kind({}, _with_case(str.islower)),
    "punctuation:no_comma": Kind({}, lambda t, a: "," not in t),
}


def ifeval(record: Record) -> Question:
    """A prompt with some constraints: instruction_id_list names them, kwargs has the arguments of each. No gold is published;
    hand-written records may have `response`."""
    ids = record.take_texts("instruction_id_list")
    arguments = record.take_json("kwargs", list)
    if len(arguments) != len(ids):
        raise record.fail("kwargs", arguments, f"arguments for each of the {len(ids)} instructions")
    for id, own in zip(ids, arguments, strict=True):
        if id not in KINDS:
            raise record.fail("instruction_id_list", id, f"one of {', '.join(KINDS)}")
        for key, kind in KINDS[id].keys.items():
            value = (own or {}).get(key)
            if kind is int and isinstance(value, float) and value.is_integer():
                own[key] = value = int(value)  # parquet fills columns up with floats
            if not isinstance(value, kind) or (key.endswith("relation") and value not in RELATIONS):
                wanted = f"one of {list(RELATIONS)}" if key.endswith("relation") else f"a value of type {kind.__name__}"
                raise record.fail(f"kwargs of {id}: {key}", value, wanted)

    def why_wrong(content: str) -> str | None:
        broken = [id for id, own in zip(ids, arguments, strict=True) if not KINDS[id].holds(content, own or {})]
        return f"does not keep {', '.join(broken)}" if broken else None

    gold = reply(record.values["response"]) if record.values.get("response") else ()
    return Question("ifeval", str(record.take("key", int)), asked(record.take("prompt", str)), judged_text(why_wrong), gold)
