"""Constraints on letters and on length."""

from minglm.tasks.general.constraints import Constraint, Kind, counted
from minglm.tasks.general.draft import words_of

# ------------------------------------------------------------------------------------------------------------- letters


class AvoidLetter(Kind):
    name, slot = "avoid_letter", "letters"

    def draw(self, rng, draft):
        letter = rng.choice("aeiostrnl")
        draft.pool = [word for word in draft.pool if letter not in word]
        return Constraint(self.name, words=(letter,))

    def told(self, constraint):
        return f"Do not use the letter {constraint.words[0]}."

    def kept(self, constraint, text):
        return constraint.words[0] not in text.lower()


class WordsBegin(Kind):
    name, slot = "words_begin", "letters"

    def draw(self, rng, draft):
        letter = rng.choice("bcdfghlmrstw")
        draft.pool = [word for word in draft.pool if word.startswith(letter)]
        return Constraint(self.name, words=(letter,))

    def told(self, constraint):
        return f"Begin every word with the letter {constraint.words[0]}."

    def kept(self, constraint, text):
        return all(word.startswith(constraint.words[0]) for word in words_of(text))


class ShortWords(Kind):
    name, slot = "short_words", "word_length"

    def draw(self, rng, draft):
        most = rng.randint(3, 5)
        draft.pool = [word for word in draft.pool if len(word) <= most]
        return Constraint(self.name, most)

    def told(self, constraint):
        return f"Use only words of at most {constraint.number} letters."

    def kept(self, constraint, text):
        return all(len(word) <= constraint.number for word in words_of(text))


class LongWords(Kind):
    name, slot = "long_words", "word_length"

    def draw(self, rng, draft):
        least = rng.randint(4, 6)
        draft.pool = [word for word in draft.pool if len(word) >= least]
        return Constraint(self.name, least)

    def told(self, constraint):
        return f"Use only words of at least {constraint.number} letters."

    def kept(self, constraint, text):
        return all(len(word) >= constraint.number for word in words_of(text))


# -------------------------------------------------------------------------------------------------------------- length


class WordsExactly(Kind):
    name, slot = "words_exactly", "length"

    def draw(self, rng, draft):
        draft.count = rng.randint(2, 8)
        return Constraint(self.name, draft.count)

    def told(self, constraint):
        return f"Use exactly {constraint.number} words."

    def kept(self, constraint, text):
        return len(words_of(text)) == constraint.number

    def seen(self, constraint, text):
        return counted(words_of(text))


class WordsAtLeast(WordsExactly):
    name, slot = "words_at_least", "length"

    def draw(self, rng, draft):
        least = rng.randint(3, 8)
        draft.count = least + rng.randint(0, 2)
        return Constraint(self.name, least)

    def told(self, constraint):
        return f"Use at least {constraint.number} words."

    def kept(self, constraint, text):
        return len(words_of(text)) >= constraint.number


class WordsAtMost(WordsExactly):
    name, slot = "words_at_most", "length"

    def draw(self, rng, draft):
        most = rng.randint(2, 6)
        draft.count = rng.randint(max(most - 2, 1), most)
        return Constraint(self.name, most)

    def told(self, constraint):
        return f"Use at most {constraint.number} words."

    def kept(self, constraint, text):
        return len(words_of(text)) <= constraint.number


class CharactersAtMost(Kind):
    name, slot = "characters_at_most", "length"

    def draw(self, rng, draft):
        return Constraint(self.name, 10 * rng.randint(2, 6))

    def told(self, constraint):
        return f"Use at most {constraint.number} characters."

    def kept(self, constraint, text):
        return len(text) <= constraint.number

    def seen(self, constraint, text):
        return f"{len(text)}"


LENGTH_KINDS: tuple[Kind, ...] = tuple(
    kind()
    for kind in (
        *(AvoidLetter, WordsBegin, ShortWords, LongWords),
        *(WordsExactly, WordsAtLeast, WordsAtMost, CharactersAtMost),
    )
)
