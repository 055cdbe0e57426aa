"""A short text while its constraints are drawn: each constraint leaves its mark on the draft, then the text is written."""

import random
import re
from dataclasses import dataclass, field

WORDS = (
    "apple arm ball barn bean bell bird boat book bread brook cake calm cat clay cloud cold corn crow dance dark dawn deep "
    "door dust earth east egg fair farm field fish flame fog forest garden gate gold grass green hand harbour hat hill honey "
    "horse house ice island jar joy king lake lamp leaf light lion long meadow milk mill moon morning nest night north oak "
    "ocean old orange owl path pear plain quiet rain red ring river road rock rose salt sand sea seed shadow shell ship silver "
    "sky sleep snow song south spring star stone storm summer sun tall tea tree valley village wall water west wheat wind "
    "window winter wolf wood yellow young"
).split()

WORD = re.compile(r"[A-Za-z]+")


class Unfit(Exception):
    """These constraints do not go together in this draft: draw others."""


@dataclass
class Draft:
    """What is settled of a text so far.

    Attributes:
        pool: the words that may be used.
        count: how many words; None: any.
        required: words that must be there, at any place.
        fixed: words by place; -1 is the last.
        parts: into how many parts the words are cut.
        layout: how parts become text: plain, sentences, lines, bullets, numbers, stars.
        separator: between the words of a part.
        order: "", alphabetical, or growing.
        case: "", lower, upper, or title.
        before, after: what stands around it all, as it is.
        insertions: what else stands among the words, at any place but the ends.
    """

    pool: list[str] = field(default_factory=lambda: list(WORDS))
    count: int | None = None
    required: list[str] = field(default_factory=list)
    fixed: dict[int, str] = field(default_factory=dict)
    parts: int = 1
    layout: str = "plain"
    separator: str = " "
    order: str = ""
    case: str = ""
    before: str = ""
    after: str = ""
    insertions: list[str] = field(default_factory=list)

    def take(self, rng: random.Random) -> str:
        """A word of the pool that then will not come again by chance."""
        if not self.pool:
            raise Unfit
        return self.pool.pop(rng.randrange(len(self.pool)))

    def write(self, rng: random.Random) -> str:
        """The text. Raises Unfit if there is none."""
        words = self._words(rng)
        parts = self._cut(rng, words)
        for insertion in self.insertions:
            part = rng.choice(parts)
            part.insert(rng.randint(min(1, len(part)), len(part)), insertion)
        text = _laid_out([self.separator.join(part) for part in parts], self.layout)
        return f"{self.before}{_cased(text, self.case)}{self.after}"

    def _words(self, rng: random.Random) -> list[str]:
        least = max(len(self.required) + len(self.fixed), self.parts, 1)
        count = self.count or least + rng.randint(0, 2)
        free = count - len(self.required) - len(self.fixed)
        if count < least or free > len(self.pool):
            raise Unfit
        words = self.required + rng.sample(self.pool, free)
        rng.shuffle(words)
        for place, word in sorted(self.fixed.items(), key=lambda item: item[0] % count):
            words.insert(place % count, word)
        if self.order == "alphabetical":
            words.sort()
        elif self.order == "growing":
            words.sort(key=len)
        return words

    def _cut(self, rng: random.Random, words: list[str]) -> list[list[str]]:
        cuts = [0, *sorted(rng.sample(range(1, len(words)), self.parts - 1)), len(words)]
        return [words[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]


def _laid_out(parts: list[str], layout: str) -> str:
    match layout:
        case "sentences":
            return " ".join(part[:1].upper() + part[1:] + "." for part in parts)
        case "lines":
            return "\n".join(parts)
        case "bullets":
            return "\n".join(f"- {part}" for part in parts)
        case "numbers":
            return "\n".join(f"{number}. {part}" for number, part in enumerate(parts, start=1))
        case "stars":
            return "\n***\n".join(parts)
    return " ".join(parts)


def _cased(text: str, case: str) -> str:
    match case:
        case "lower":
            return text.lower()
        case "upper":
            return text.upper()
        case "title":
            return WORD.sub(lambda word: word.group().capitalize(), text)
    return text


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters: what stands between other characters than A to Z and a to z."""
    return [word.lower() for word in WORD.findall(text)]
