"""Dates some days away, counted month by month."""

import calendar
import datetime
import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.reasoning.dates import FIRST_YEAR, LAST_YEAR, MONTHS, written_day
from minglm.tasks.reasoning.exact import Word
from minglm.tasks.task import Message, reply

WORDINGS = ("Which date is {} {} {}?", "What day and month is it {} {} {}?")
ALL_DAYS = tuple(written_day(datetime.date(2024, 1, 1) + datetime.timedelta(number)) for number in range(366))  # a leap year


@dataclass(frozen=True)
class Dates(Word):
    """Difficulty is the number of months that end on the way: none, one, up to four forwards, up to four backwards, and up
    to twelve either way. The answer is a day and a month: 7 March."""

    family = "dates"
    stands_for = "Reasoning on dates in synthetic reasoning data (section 2.3); BIG-bench's date understanding."
    difficulties = range(1, 6)

    date: tuple[int, int, int]
    """Year, month and day from which to count."""
    days: int
    """To go, backwards if negative."""

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        wording = rng.randrange(len(WORDINGS))
        year, month = rng.randint(FIRST_YEAR, LAST_YEAR), rng.randint(1, 12)
        length = calendar.monthrange(year, month)[1]
        day = rng.randint(1, length)
        match difficulty:
            case 1:
                day = rng.randint(1, 20)
                days = rng.randint(1, 8)
            case 2:
                days = rng.randint(length - day + 1, length - day + 28)
            case 3:
                days = rng.randint(30, 120)
            case 4:
                days = -rng.randint(30, 120)
            case _:
                days = rng.choice((-1, 1)) * rng.randint(121, 364)
        return cls(wording, (year, month, day), days)

    @property
    def question(self) -> str:
        count = f"{abs(self.days)} day{'s' if abs(self.days) > 1 else ''}"
        start = datetime.date(*self.date)
        way = "before" if self.days < 0 else "after"
        return WORDINGS[self.wording].format(count, way, f"{written_day(start)} {start.year}")

    @property
    def answer(self) -> str:
        return written_day(datetime.date(*self.date) + datetime.timedelta(self.days))

    @property
    def choices(self) -> tuple[str, ...]:
        return ALL_DAYS

    @property
    def thinking(self) -> str:
        return "\n".join(_forwards(*self.date, self.days) if self.days > 0 else _backwards(*self.date, -self.days))

    def near_miss(self, rng: random.Random) -> list[Message]:
        """Some days off, as when a month is taken for a day longer or shorter."""
        slip = rng.choice((-3, -2, -1, 1, 2, 3))
        return reply(written_day(datetime.date(*self.date) + datetime.timedelta(self.days + slip)))


def _forwards(year: int, month: int, day: int, days: int) -> list[str]:
    """What is left of each month is taken from the days, until they end within one."""
    lines = []
    while day + days > (length := calendar.monthrange(year, month)[1]):
        lines.append(f"{MONTHS[month - 1]} {length} - {day} = {length - day}, {days} - {length - day} = {days - length + day}")
        days -= length - day
        day = 0
        year, month = (year, month + 1) if month < 12 else (year + 1, 1)
    return [*lines, f"{MONTHS[month - 1]} {day} + {days} = {day + days}"]


def _backwards(year: int, month: int, day: int, days: int) -> list[str]:
    lines = []
    while days >= day:
        lines.append(f"{MONTHS[month - 1]} {days} - {day} = {days - day}")
        days -= day
        year, month = (year, month - 1) if month > 1 else (year - 1, 12)
        day = calendar.monthrange(year, month)[1]
    return [*lines, f"{MONTHS[month - 1]} {day} - {days} = {day - days}"]
