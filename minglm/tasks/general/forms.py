"""Constraints on the form of the whole text, its case, and its edges; and all kinds by name."""

import json
import re

from minglm.tasks.general.constraints import Constraint, Kind
from minglm.tasks.general.draft import words_of
from minglm.tasks.general.keywords import KEYWORD_KINDS
from minglm.tasks.general.lengths import LENGTH_KINDS

# ---------------------------------------------------------------------------------------------------------------- form


class Parts(Kind):
    """The text in a number of parts; how, the kinds below say."""

    slot = "form"
    layout: str
    least = 2

    def draw(self, rng, draft):
        draft.layout, draft.parts = self.layout, rng.randint(self.least, 3)
        return Constraint(self.name, draft.parts)

    def seen(self, constraint, text):
        return str(constraint.number)


class Sentences(Parts):
    name, layout = "sentences", "sentences"

    def told(self, constraint):
        return f"Write exactly {constraint.number} sentences, each with a full stop."

    def kept(self, constraint, text):
        *sentences, rest = text.split(".")
        return len(sentences) == constraint.number and not words_of(rest) and all(map(words_of, sentences))


class Lines(Parts):
    name, layout = "lines", "lines"

    def told(self, constraint):
        return f"Write exactly {constraint.number} lines."

    def kept(self, constraint, text):
        lines = text.split("\n")
        return len(lines) == constraint.number and all(map(words_of, lines))


class Bullets(Parts):
    name, layout = "bullets", "bullets"

    def told(self, constraint):
        return f'Write a list of exactly {constraint.number} lines, each with "- " before it.'

    def kept(self, constraint, text):
        lines = text.split("\n")
        return len(lines) == constraint.number and all(line.startswith("- ") and words_of(line) for line in lines)


class Numbered(Parts):
    name, layout = "numbered", "numbers"

    def told(self, constraint):
        return f'Write a list of exactly {constraint.number} lines, numbered "1. " and so on.'

    def kept(self, constraint, text):
        lines = text.split("\n")
        marks = (f"{number}. " for number in range(1, constraint.number + 1))
        return len(lines) == constraint.number and all(
            line.startswith(mark) and words_of(line) for line, mark in zip(lines, marks, strict=True)
        )


class Stars(Parts):
    name, layout = "stars", "stars"

    def told(self, constraint):
        return f"Write {constraint.number} parts, with a line of *** between two parts."

    def kept(self, constraint, text):
        parts = text.split("\n***\n")
        return len(parts) == constraint.number and all("***" not in part and words_of(part) for part in parts)


class Json(Kind):
    name, slot = "json", "form"

    def draw(self, rng, draft):
        draft.before, draft.after = '{"text": "', '"}'
        return Constraint(self.name)

    def told(self, constraint):
        return 'Write JSON with one key, "text".'

    def kept(self, constraint, text):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and list(value) == ["text"] and isinstance(value["text"], str) and bool(value["text"])


class Commas(Kind):
    name, slot = "commas", "separator"

    def draw(self, rng, draft):
        draft.separator, draft.count = ", ", draft.count or rng.randint(3, 6)
        return Constraint(self.name)

    def told(self, constraint):
        return "Put a comma between any two words."

    def kept(self, constraint, text):
        return len(words_of(text)) > 1 and not re.search(r"[A-Za-z]\s+[A-Za-z]", text) and "," in text


class NoCommas(Kind):
    name, slot = "no_commas", "separator"

    def draw(self, rng, draft):
        return Constraint(self.name)

    def told(self, constraint):
        return "Do not use commas."

    def kept(self, constraint, text):
        return "," not in text


# ---------------------------------------------------------------------------------------------------------------- case


class Lowercase(Kind):
    name, slot = "lowercase", "case"

    def draw(self, rng, draft):
        draft.case = "lower"
        return Constraint(self.name)

    def told(self, constraint):
        return "Use small letters only."

    def kept(self, constraint, text):
        return text == text.lower()


class Capitals(Kind):
    name, slot = "capitals", "case"

    def draw(self, rng, draft):
        draft.case = "upper"
        return Constraint(self.name)

    def told(self, constraint):
        return "Use capital letters only."

    def kept(self, constraint, text):
        return text == text.upper()


class TitleCase(Kind):
    name, slot = "title_case", "case"

    def draw(self, rng, draft):
        draft.case = "title"
        return Constraint(self.name)

    def told(self, constraint):
        return "Begin every word with a capital letter, the rest small."

    def kept(self, constraint, text):
        return all(word == word.capitalize() for word in re.findall("[A-Za-z]+", text))


# ---------------------------------------------------------------------------------------------------------------- edge


class Quotes(Kind):
    name, slot = "quotes", "edge"

    def draw(self, rng, draft):
        draft.before, draft.after = '"' + draft.before, draft.after + '"'
        return Constraint(self.name)

    def told(self, constraint):
        return "Put the whole text in double quotes."

    def kept(self, constraint, text):
        return len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1]


class Title(Kind):
    name, slot = "title", "edge"

    def draw(self, rng, draft):
        draft.before = f"<<{draft.take(rng)}>>\n" + draft.before
        return Constraint(self.name)

    def told(self, constraint):
        return "The first line is a title in double angle brackets: <<title>>."

    def kept(self, constraint, text):
        first, line_break, rest = text.partition("\n")
        return first.startswith("<<") and first.endswith(">>") and bool(words_of(first)) and bool(words_of(rest))


class Postscript(Kind):
    name, slot = "postscript", "edge"

    def draw(self, rng, draft):
        draft.after += f"\nP.S. {draft.take(rng)}"
        return Constraint(self.name)

    def told(self, constraint):
        return 'The last line begins with "P.S.".'

    def kept(self, constraint, text):
        before, _, last = text.rpartition("\n")
        return bool(words_of(before)) and last.startswith("P.S. ") and bool(words_of(last[4:]))


class EndsWith(Kind):
    slot = "edge"
    mark: str

    def draw(self, rng, draft):
        draft.after += self.mark
        return Constraint(self.name)

    def told(self, constraint):
        return f"The last character is {self.mark}"

    def kept(self, constraint, text):
        return text.endswith(self.mark) and bool(words_of(text.removesuffix(self.mark)))


class Exclamation(EndsWith):
    name, mark = "exclamation", "!"


class Question(EndsWith):
    name, mark = "question", "?"


class Farewell(EndsWith):
    name, mark = "farewell", "\nThat is all."

    def told(self, constraint):
        return "The last line is: That is all."


FORM_KINDS: tuple[Kind, ...] = tuple(
    kind()
    for kind in (
        *(Sentences, Lines, Bullets, Numbered, Stars, Json, Commas, NoCommas),
        *(Lowercase, Capitals, TitleCase),
        *(Quotes, Title, Postscript, Exclamation, Question, Farewell),
    )
)

KINDS: dict[str, Kind] = {kind.name: kind for kind in (*LENGTH_KINDS, *KEYWORD_KINDS, *FORM_KINDS)}
"""All kinds by name, in the order in which they mark a draft: the words to choose from, how many, which, where, what form."""
