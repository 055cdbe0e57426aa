r"""Answers of mathematics: what stands in the last \boxed{...}, and when two of them are equal.

Two answers are equal if they are the same text once notation is made one, or the same value: both are read by a small parser
(fractions, roots, powers, constants, functions, variables; intervals, tuples and sets by parts) and computed in floating
point at fixed random values of their variables, which are positive unless there are bars (|x|). That settles identities such as
2(x+1) and 2x+2 without symbolic algebra, which model text could keep busy for ever; a wrong answer that agrees at all points
within 1e-9 is none that anybody writes.
MATH's own comparison is of texts alone. What it calls equal is equal here, but for doubled backslashes; and so are values, and
lists in another order.
"""

import cmath
import itertools
import math
import random
import re

POINTS, SIGNED_POINTS = 3, 8  # values of the variables at which two expressions are compared; with either sign
LONGEST = 400  # characters
MOST_PARTS = 32  # of a set or list
MOST_CHOSEN_FROM = 1000  # of binomial coefficients: those of more are no floats
TEXT = r"\\(?:text|mbox|mathrm|textbf)"
UNITS = re.compile(  # 5\text{cm}, 5\text{ cm}^2, \pi\text{ ft/s}, but not \text{east} or x\text{odd}
    rf"(?:(?<=[\d}}]) *{TEXT}\{{[a-zA-Z]+(?: [a-zA-Z^0-9]+)*\.? *\}}|(?<=\S) *{TEXT}\{{ [^{{}}]*\}})(?:\^\d|\^\{{\d\}})?$"
)
BETWEEN = re.compile(rf"{TEXT}\{{ *(?:and|or) *\}}|(?<=\s)(?:and|or)(?=\s)")
DROPPED = ("\\left", "\\right", "\\!", "\\,", "\\;", "\\:", "\\$", "$", "\\%", "%", "^\\circ", "^{\\circ}", "\\displaystyle")
ALIKE = {"tfrac": "frac", "dfrac": "frac", "cfrac": "frac", "times": "cdot", "leq": "le", "geq": "ge", "neq": "ne"}
CONSTANTS = {"pi": math.pi, "infty": math.inf, "e": math.e, "i": 1j}
FUNCTIONS = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "ln": cmath.log, "exp": cmath.exp, "log": cmath.log,
    "cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z),
    "arctan": cmath.atan, "arcsin": cmath.asin, "arccos": cmath.acos, "sinh": cmath.sinh, "cosh": cmath.cosh,
}  # fmt: skip
BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|[{}]")
MATRIX = re.compile(r"\\begin\{([pb]?)matrix\}(.*)\\end\{\1matrix\}")
MIXED = re.compile(r"\\frac\{\d+\}\{\d+\}")
TOKEN = re.compile(r"\s*(\d+\.?\d*|\.\d+|\\[a-zA-Z]+|[a-zA-Z]|.)")


class _Unreadable(ValueError):
    """Not an expression of this grammar."""


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} or \fbox{...}, braces matched; None if there is none that is closed."""
    open: list[tuple[int, bool]] = []  # behind which brace, and whether it is a box's
    last = slice(0, 0)
    for match in BRACE.finditer(text):  # once through the text, however many boxes are never closed
        if match[0] != "}":
            open.append((match.end(), match[0] != "{"))
        elif open:
            start, is_box = open.pop()
            if is_box and start > last.start:
                last = slice(start, match.start())
    return text[last] if last.start else None


def integer(text: str) -> int | None:
    """A whole number as people write it: 025, 1,000, 7.0; None for anything else."""
    plain = re.sub(r"(?<=\d)(?:,|\{,\}|\\,|\\!| )(?=\d{3}\b)", "", normal(text))
    match = re.fullmatch(r"([+-]?\d{1,100})(?:\.0*)?", plain)
    return int(match.group(1)) if match else None


def normal(answer: str) -> str:
    """The answer in one notation: no spacing that means nothing, no units, no `x =`, one kind of fraction."""
    text = answer.strip().removesuffix(".").strip()
    text = BETWEEN.sub(",", text).replace("{,}", ",")
    for dropped in DROPPED:
        text = text.replace(dropped, " ")
    text = re.sub(r"(?<!\\)\\ ", " ", text).strip()
    text = UNITS.sub("", text)
    text = re.sub(r"_(\d)", r"_{\1}", text)  # one digit belongs to it
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\([a-zA-Z]+)", lambda match: "\\" + ALIKE.get(match.group(1), match.group(1)), text)
    text = re.sub(r"^[a-zA-Z]{1,2}(?:\([a-zA-Z]\))?\s*(?:=|\\in)\s*(?=.)", "", text)
    text = re.sub(r"\\(frac|sqrt)\s*(\d)\s*(\d)?", lambda m: f"\\{m[1]}{{{m[2]}}}" + (f"{{{m[3]}}}" if m[3] else ""), text)
    return re.sub(r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])|\s+", lambda m: f"{m[1]} " if m[1] else "", text)  # \pi r is no \pir


def equal(found: str, wanted: str) -> bool:
    """Whether two answers say the same. Never raises, whatever they hold."""
    a, b = normal(found), normal(wanted)
    if a == b or a.lower() == b.lower() and re.fullmatch(r"[^\\\d]{2,}", a):  # words: \text{Evelyn}
        return bool(a)
    if max(len(a), len(b)) > LONGEST or not a or not b:
        return False
    matrices = [MATRIX.fullmatch(one) for one in (a, b)]
    if all(matrices):
        return _same_matrix(*(match[2] for match in matrices))
    a, b = (re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", one) if not re.search(r"^[\[({\\]", one) else one for one in (a, b))
    left, right = _parts(a), _parts(b)
    if len(left[1]) != len(right[1]) or left[0] != right[0] or len(left[1]) > MOST_PARTS:
        return False
    if len(left[1]) > 1:
        pairs = [left[1], right[1]]
        if not left[0]:  # a set, or a list without an order
            return _same_set(*pairs)
        return all(equal(x, y) for x, y in zip(*pairs, strict=True))
    return _same_value(a, b)


def _same_matrix(left: str, right: str) -> bool:
    """Whether rows between \\\\, of cells between &, are the same, cell by cell."""
    a, b = ([row.split("&") for row in text.removesuffix("\\\\").split("\\\\")] for text in (left, right))
    return list(map(len, a)) == list(map(len, b)) and all(map(equal, itertools.chain(*a), itertools.chain(*b)))


def _same_set(left: list[str], right: list[str]) -> bool:
    rest = list(right)
    for one in left:
        match = next((other for other in rest if equal(one, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return not rest


def _parts(text: str) -> tuple[str, list[str]]:
    """The brackets around a list of parts, "" for those of a set; and the parts between commas outside of brackets, where one
    with \\pm is two. ("", [text]) for one value."""
    text = text.replace("\\{", "{").replace("\\}", "}").replace("\\cup", ",∪,")
    brackets, inner = "", text
    if len(text) > 1 and text[0] in "([{" and text[-1] in ")]}" and _closes_at_the_end(text):
        brackets, inner = "" if text[0] == "{" else text[0] + text[-1], text[1:-1]
    parts, depth, start = [], 0, 0
    for place, character in enumerate(inner):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(inner[start:place])
            start = place + 1
    parts.append(inner[start:])
    if not brackets:
        parts = [part.replace("\\pm", sign) for part in parts for sign in ("+-" if "\\pm" in part else "+")]
    return (brackets, parts) if len(parts) > 1 else ("", [text])


def _closes_at_the_end(text: str) -> bool:
    depth = 0
    for place, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return place == len(text) - 1
    return False


def _same_value(a: str, b: str) -> bool:
    for relation in ("\\le", "\\ge", "<", ">", "="):
        if relation in a or relation in b:
            left, right = a.split(relation), b.split(relation)
            return len(left) == len(right) > 1 and all(equal(x, y) for x, y in zip(left, right, strict=True))
    try:
        signed = "|" in a + b
        for point in range(SIGNED_POINTS if signed else POINTS):
            x, y = _Value(a, point, signed).read(), _Value(b, point, signed).read()
            if cmath.isinf(x) or cmath.isinf(y):
                return x == y
            if not cmath.isclose(x, y, rel_tol=1e-9, abs_tol=1e-14):
                return False
    except (ValueError, OverflowError, ZeroDivisionError, RecursionError):  # _Unreadable is a ValueError
        return False
    return True


class _Value:
    """Recursive descent over one expression, computed at a point: sum, product (also by juxtaposition), power, atom."""

    def __init__(self, text: str, point: int, signed: bool):
        self.tokens = TOKEN.findall(text.replace("**", "^"))
        self.place, self.point, self.signed = 0, point, signed

    def read(self) -> complex:
        value = self._sum()
        if self.place != len(self.tokens):
            raise _Unreadable
        return complex(value)

    @property
    def _next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def _take(self, wanted: str | None = None) -> str:
        token = self._next
        if not token or (wanted is not None and token != wanted):
            raise _Unreadable
        self.place += 1
        return token

    def _sum(self) -> complex:
        value = self._product()
        while self._next in ("+", "-"):
            value = value + self._product() if self._take() == "+" else value - self._product()
        return value

    def _product(self) -> complex:
        if self._next in ("+", "-"):
            return -self._product() if self._take() == "-" else self._product()
        value = self._power()
        while self._next and self._next not in "+-)]},|=":
            if self._next in ("*", "\\cdot"):
                self._take()
                value *= self._signed()
            elif self._next in ("/", "\\div"):
                self._take()
                value /= self._signed()
            else:
                value = self._juxtaposed(value)
        return value

    def _signed(self) -> complex:
        if self._next in ("+", "-"):
            return -self._signed() if self._take() == "-" else self._signed()
        return self._power()

    def _juxtaposed(self, value: complex) -> complex:
        """A product, but 1\\frac{1}{2} is a mixed number: of whole numbers alone, the first of which is no exponent."""
        start, before = self.place, "".join(self.tokens[max(0, self.place - 2) : self.place])
        following = self._power()
        mixed = MIXED.fullmatch("".join(self.tokens[start : self.place])) and re.fullmatch(r"[^^_]?\d+", before)
        return value + following if mixed else value * following

    def _power(self) -> complex:
        base = self._atom()
        while self._next == "!":
            self._take()
            if base != int(base.real) or not 0 <= base.real <= 100:
                raise _Unreadable
            base = complex(math.factorial(int(base.real)))
        if self._next == "^":
            self._take()
            exponent = self._group() if self._next == "{" else self._signed()
            return complex(base) ** exponent
        return base

    def _group(self) -> complex:
        opening = self._take()
        value = self._sum()
        self._take({"{": "}", "(": ")", "[": "]", "|": "|"}[opening])
        return abs(value) if opening == "|" else value

    def _argument(self) -> complex:
        return self._group() if self._next in ("{", "(") else self._power()

    def _of_function(self) -> complex:
        """Of \\sin 2x all of it: numbers and letters side by side, up to a sign, a bracket or a function."""
        if self._next in ("{", "("):
            return self._group()
        value = self._power()
        while re.fullmatch(r"[\d.]+|[a-zA-Z]|\\pi", self._next):
            value *= self._power()
        return value

    def _atom(self) -> complex:
        if self._next in ("{", "(", "[", "|"):
            return self._group()
        token = self._take()
        if token[0].isdigit() or token[0] == "." and len(token) > 1:
            return complex(float(token))
        name = token.removeprefix("\\")
        if token == "\\frac":
            top = self._argument()
            return top / self._argument()
        if token == "\\sqrt":
            degree = 2 + 0j
            if self._next == "[":
                degree = self._group()
            return complex(self._argument()) ** (1 / degree)
        if token == "\\binom":
            n, k = self._argument(), self._argument()
            if abs(n) > MOST_CHOSEN_FROM or abs(k) > MOST_CHOSEN_FROM:
                raise _Unreadable
            return complex(math.comb(int(n.real), int(k.real)))
        if token.startswith("\\") and name in FUNCTIONS:
            if name == "log" and self._next == "_":
                self._take()
                base = self._argument()
                return cmath.log(self._argument()) / cmath.log(base)
            if self._next != "^":
                return FUNCTIONS[name](self._of_function())
            self._take()  # \\sin^2 x
            power = self._group() if self._next == "{" else self._atom()
            if power == -1:  # the inverse function, or one over it
                raise _Unreadable
            return FUNCTIONS[name](self._of_function()) ** power
        if name in CONSTANTS:
            return complex(CONSTANTS[name])
        if name.isalpha() and (token.startswith("\\") or len(name) == 1):
            draws = random.Random(f"{name} {self.point}")
            value = draws.uniform(0.3, 1.7)
            return complex(draws.choice((-value, value)) if self.signed else value)
        raise _Unreadable
