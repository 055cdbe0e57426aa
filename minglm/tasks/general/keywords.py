"""Constraints on which words there are, and where."""

from minglm.tasks.general.constraints import Constraint, Kind, counted
from minglm.tasks.general.draft import words_of

# ------------------------------------------------------------------------------------------------------------ keywords


class AvoidWord(Kind):
    name, slot = "avoid_word", "avoided"

    def draw(self, rng, draft):
        return Constraint(self.name, words=(draft.take(rng),))

    def told(self, constraint):
        return f'Do not use the word "{constraint.words[0]}".'

    def kept(self, constraint, text):
        return constraint.words[0] not in words_of(text)


class IncludeWord(Kind):
    name, slot = "include_word", "keyword"

    def draw(self, rng, draft):
        draft.required.append(draft.take(rng))
        return Constraint(self.name, words=(draft.required[-1],))

    def told(self, constraint):
        return f'Use the word "{constraint.words[0]}".'

    def kept(self, constraint, text):
        return constraint.words[0] in words_of(text)


class IncludeTwo(Kind):
    name, slot = "include_two", "keyword"

    def draw(self, rng, draft):
        pair = (draft.take(rng), draft.take(rng))
        draft.required += pair
        return Constraint(self.name, words=pair)

    def told(self, constraint):
        return f'Use the words "{constraint.words[0]}" and "{constraint.words[1]}".'

    def kept(self, constraint, text):
        return set(constraint.words) <= set(words_of(text))


class WordTimes(Kind):
    name, slot = "word_times", "keyword"

    def draw(self, rng, draft):
        word, times = draft.take(rng), rng.randint(2, 3)
        draft.required += [word] * times
        return Constraint(self.name, times, (word,))

    def told(self, constraint):
        return f'Use the word "{constraint.words[0]}" exactly {constraint.number} times.'

    def kept(self, constraint, text):
        return words_of(text).count(constraint.words[0]) == constraint.number

    def seen(self, constraint, text):
        return counted([word for word in words_of(text) if word == constraint.words[0]])


class OneOf(Kind):
    name, slot = "one_of", "keyword"

    def draw(self, rng, draft):
        pair = [draft.take(rng), draft.take(rng)]
        draft.required.append(rng.choice(pair))
        return Constraint(self.name, words=tuple(pair))

    def told(self, constraint):
        return f'Use either "{constraint.words[0]}" or "{constraint.words[1]}", but not both.'

    def kept(self, constraint, text):
        return len(set(constraint.words) & set(words_of(text))) == 1


class IncludeNumber(Kind):
    name, slot = "include_number", "digits"

    def draw(self, rng, draft):
        number = rng.randint(10, 99)
        draft.insertions.append(str(number))
        return Constraint(self.name, number)

    def told(self, constraint):
        return f"Use the number {constraint.number}."

    def kept(self, constraint, text):
        digits = "".join(character if character.isdecimal() else " " for character in text)
        return str(constraint.number) in digits.split()


class NoDigits(Kind):
    name, slot = "no_digits", "digits"

    def draw(self, rng, draft):
        return Constraint(self.name)

    def told(self, constraint):
        return "Do not use digits."

    def kept(self, constraint, text):
        return not any(character.isdecimal() for character in text)


class Placeholders(Kind):
    name, slot = "placeholders", "placeholders"

    def draw(self, rng, draft):
        number = rng.randint(1, 2)
        draft.insertions += ["[name]"] * number
        return Constraint(self.name, number)

    def told(self, constraint):
        return f"Write [name] {'once' if constraint.number == 1 else 'twice'}."

    def kept(self, constraint, text):
        return text.lower().count("[name]") == constraint.number


# ------------------------------------------------------------------------------------------------------------ position


class FirstWord(Kind):
    name, slot = "first_word", "first"
    place, label = 0, "first"

    def draw(self, rng, draft):
        draft.fixed[self.place] = draft.take(rng)
        return Constraint(self.name, words=(draft.fixed[self.place],))

    def told(self, constraint):
        return f'The {self.label} word is "{constraint.words[0]}".'

    def kept(self, constraint, text):
        words = words_of(text)
        return len(words) > self.place and bool(words) and words[self.place] == constraint.words[0]


class SecondWord(FirstWord):
    name, slot = "second_word", "second"
    place, label = 1, "second"


class ThirdWord(FirstWord):
    name, slot = "third_word", "second"
    place, label = 2, "third"


class LastWord(FirstWord):
    name, slot = "last_word", "last"
    place, label = -1, "last"


class SameEnds(Kind):
    name, slot = "same_ends", "last"

    def draw(self, rng, draft):
        draft.fixed[-1] = draft.fixed[0] = draft.fixed.get(0) or draft.take(rng)
        return Constraint(self.name)

    def told(self, constraint):
        return "The last word is the first word again."

    def kept(self, constraint, text):
        words = words_of(text)
        return len(words) > 1 and words[0] == words[-1]


class Alphabetical(Kind):
    name, slot = "alphabetical", "order"

    def draw(self, rng, draft):
        draft.order = "alphabetical"
        return Constraint(self.name)

    def told(self, constraint):
        return "Put the words in the order of the alphabet."

    def kept(self, constraint, text):
        words = words_of(text)
        return words == sorted(words)


class Growing(Kind):
    name, slot = "growing", "order"

    def draw(self, rng, draft):
        draft.order = "growing"
        return Constraint(self.name)

    def told(self, constraint):
        return "No word is shorter than the word before it."

    def kept(self, constraint, text):
        lengths = [len(word) for word in words_of(text)]
        return lengths == sorted(lengths)

    def seen(self, constraint, text):
        return ", ".join(f"{word} {len(word)}" for word in words_of(text))


class NoRepeat(Kind):
    name, slot = "no_repeat", "repeat"

    def draw(self, rng, draft):
        return Constraint(self.name)

    def told(self, constraint):
        return "Do not use any word twice."

    def kept(self, constraint, text):
        words = words_of(text)
        return len(words) == len(set(words))


KEYWORD_KINDS: tuple[Kind, ...] = tuple(
    kind()
    for kind in (
        *(AvoidWord, IncludeWord, IncludeTwo, WordTimes, OneOf, IncludeNumber, NoDigits, Placeholders),
        *(FirstWord, SecondWord, ThirdWord, LastWord, SameEnds, Alphabetical, Growing, NoRepeat),
    )
)
