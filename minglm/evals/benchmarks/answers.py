"""Questions with one short answer: mathematics, letters of choices, exact texts. The forms in which they are asked, how the
answer is found in what a model writes, and how it is judged."""

import random
import re
from collections.abc import Sequence

from minglm.evals.benchmarks.mathematics import boxed, equal, integer
from minglm.evals.benchmarks.question import Question, asked, digest, judged_text
from minglm.evals.benchmarks.records import Record
from minglm.tasks.task import reply

LETTERS = "ABCDEFGHIJ"
BOXED = "\n\nReason step by step, and put the final answer into \\boxed{}."
CHOOSE = '\n\nEnd with a line of the form "Answer: LETTER", with the letter of the one right choice.'
MARKS = r"(?:\\(?:boxed|text|textbf|mathbf|mathrm)\{|\\[(\[]|[(\[$*`\s])*"  # in front of a letter
ASKED_FOR = re.compile(rf"^[^\w\n]*answer[ *]{{0,4}}[:：]{MARKS}([A-J])[^\w\n]*$", re.IGNORECASE | re.MULTILINE)
LETTER = re.compile(rf"(?i:answer(?: is|[ *]{{0,4}})[:：]?){MARKS}(?:([B-HJ])\b|([AI])\b(?!['’]|[^\S\n]+\w))")
BARE_LETTER = re.compile(rf"{MARKS}([A-J])[^\w\n]*")
EXACT = re.compile(r"^[^\w\n]*Exact Answer\W*:\**\s*(\S.*)$", re.IGNORECASE | re.MULTILINE)


def chosen_letter(content: str, letters: str = LETTERS) -> str | None:
    """The last of the letters that the answer names as its choice in the form that was asked for, or else in other words, or
    that it is or has in a box; None if there is none. Stricter than published: no letter is taken from other words (A and I are
    words, too), or drawn, where an answer names none."""
    asked_for = [letter.upper() for letter in ASKED_FOR.findall(content)]
    said = ["".join(found) for found in LETTER.findall(content)]
    named = [letter for letter in asked_for or said if letter in letters]
    bare = BARE_LETTER.fullmatch((boxed(content) or content).strip())
    return named[-1] if named else bare and bare.group(1)


def exact_answer(content: str) -> str | None:
    """What stands behind the last "Exact Answer:"; None if there is none."""
    found = EXACT.findall(content)
    return found[-1].strip().strip("*").strip() if found else None


def choice_question(suite: str, id: str, record: Record, text: str, options: Sequence[str], right: int) -> Question:
    """A question with lettered options. right: the index of the right one. Raises RecordError for an index beyond them."""
    if not 2 <= len(options) <= len(LETTERS) or not 0 <= right < len(options):
        raise record.fail("options", list(options), f"2 to {len(LETTERS)} of them, the right one (index {right}) among them")
    lines = [text, "", *(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))]
    messages = asked("\n".join(lines) + CHOOSE)
    wanted = LETTERS[right]

    def why_wrong(content: str) -> str | None:
        found = chosen_letter(content, LETTERS[: len(options)])
        return None if found == wanted else f"chose {found}; right is {wanted}"

    gold = reply(f"Answer: {wanted}")
    return Question(suite, id, messages, judged_text(why_wrong), gold, chance=1 / len(options), published=text)


def aime(record: Record) -> Question:
    """Exact integers from 0 to 999."""
    text = record.take(("problem", "Problem", "question"), str)
    answer = record.take(("answer", "Answer"), str)
    wanted = integer(answer)
    if wanted is None or not 0 <= wanted <= 999:
        raise record.fail("answer", answer, "a whole number from 0 to 999")

    def why_wrong(content: str) -> str | None:
        found = boxed(content)
        if found is None:
            return "no \\boxed{} answer"
        return None if integer(found) == wanted else f"the answer is {found[:60]}; right is {wanted}"

    id = record.take(("id", "ID", "unique_id"), str, digest(text))
    gold = reply(f"\\boxed{{{wanted}}}")
    return Question("aime", id, asked(text + BOXED), judged_text(why_wrong), gold, published=text)


def math_500(record: Record) -> Question:
    """Answers in LaTeX, equal as text or as value."""
    wanted = record.take("answer", str)

    def why_wrong(content: str) -> str | None:
        found = boxed(content)
        if found is None:
            return "no \\boxed{} answer"
        return None if equal(found, wanted) else f"the answer is {found[:60]}; right is {wanted[:60]}"

    text, gold = record.take("problem", str), reply(f"\\boxed{{{wanted}}}")
    id = record.take("unique_id", str, digest(text))
    return Question("math_500", id, asked(text + BOXED), judged_text(why_wrong), gold, published=text)


def gpqa(record: Record) -> Question:
    """Four choices, in an order that the question itself decides."""
    text = record.take("Question", str)
    right = record.take("Correct Answer", str)
    options = [right, *(record.take(f"Incorrect Answer {number}", str) for number in (1, 2, 3))]
    order = random.Random(text).sample(range(4), 4)
    id = record.take("Record ID", str, digest(text))
    return choice_question("gpqa", id, record, text, [options[place].strip() for place in order], order.index(0))


def mmlu_pro(record: Record) -> Question:
    """Up to ten choices; the answer as a letter and as an index, which must agree."""
    options = [option for option in record.take_texts("options", 2) if option != "N/A"]
    answer = record.take("answer", str)
    right = record.take("answer_index", int, LETTERS.find(answer))
    if right < 0 or LETTERS[right : right + 1] != answer:
        raise record.fail("answer", answer, f"the letter of answer_index {right}")
    id = str(record.take(("question_id",), int))
    return choice_question("mmlu_pro", id, record, record.take("question", str), options, right)


def safety_bench(record: Record) -> Question:
    """Two to four choices. The answers of the test split lie in a file of their own, by id, which the loader joins."""
    options = record.take_texts("options", 2)
    right = record.take("answer", int)
    text = record.take("question", str)
    return choice_question("safety_bench", digest(text), record, text, options, right)
