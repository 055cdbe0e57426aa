"""Days of the week, and times of day."""

import calendar
import datetime
import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.reasoning.exact import Word
from minglm.tasks.task import Message, reply

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = tuple("January February March April May June July August September October November December".split())
FIRST_YEAR, LAST_YEAR = 1990, 2040
DAY = 24 * 60


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"


TIMES = tuple(map(_clock, range(DAY)))
WHOLE_HOURS = TIMES[::60]


@dataclass(frozen=True)
class Weekdays(Word):
    """Difficulty is the way: up to 3 days, up to a week, up to 60 days, all forwards; either way up to 400 days; and from a
    date to another of the same year, whose days are to be counted first."""

    family = "weekdays"
    stands_for = "Reasoning on dates in synthetic reasoning data (section 2.3); BIG-bench's date understanding."
    difficulties = range(1, 6)

    first_day: int
    """The day of the week, from Monday, 0."""
    days: int
    """To go, backwards if negative."""
    date: tuple[int, int, int] | None
    """Year, month and day of the start; None where it is a weekday alone."""

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        wording, first_day = rng.randrange(3), rng.randrange(7)
        if difficulty < 5:
            days = rng.randint(1, (3, 7, 60, 400)[difficulty - 1])
            return cls(wording, first_day, -days if difficulty == 4 and rng.random() < 0.5 else days, None)
        year = rng.randint(FIRST_YEAR, LAST_YEAR)
        first, last = sorted(rng.sample(range(1, 366), 2))
        date = datetime.date(year, 1, 1) + datetime.timedelta(first - 1)
        return cls(wording, date.weekday(), last - first, (date.year, date.month, date.day))

    @property
    def question(self) -> str:
        if self.date is None:
            count = f"{abs(self.days)} day{'s' if abs(self.days) > 1 else ''}"
            way = f"{count} {'before' if self.days < 0 else 'after'} {DAYS[self.first_day]}"
            return (f"What day is {way}?", f"Which day of the week is {way}?", f"Name the day {way}.")[self.wording]
        first = datetime.date(*self.date)
        last = first + datetime.timedelta(self.days)
        told = f"{written_day(first)} {first.year} is a {DAYS[self.first_day]}."
        asked = (f"What day is {written_day(last)} {last.year}?", f"Which day of the week is {written_day(last)} {last.year}?")
        return f"{told} {asked[self.wording % 2]}"

    @property
    def answer(self) -> str:
        return DAYS[(self.first_day + self.days) % 7]

    @property
    def choices(self) -> tuple[str, ...]:
        return DAYS

    @property
    def thinking(self) -> str:
        lines = [] if self.date is None else _counted(datetime.date(*self.date), self.days)
        days = abs(self.days)
        if days > 7:
            lines.append(f"{days} = 7 * {days // 7} + {days % 7}")
            days %= 7
        step = -1 if self.days < 0 else 1
        walk = [DAYS[(self.first_day + step * count) % 7] for count in range(days + 1)]
        return "\n".join([*lines, ", ".join(walk)])


@dataclass(frozen=True)
class Clock(Word):
    """Difficulty is the carrying: whole hours of one day, whole hours past midnight, minutes within the hour, minutes past
    the hour, and hours with minutes past midnight."""

    family = "clock"
    stands_for = "Reasoning on times in synthetic reasoning data (section 2.3); GSM8K's questions of durations."
    difficulties = range(1, 6)

    begin: int
    """Minutes from midnight."""
    minutes: int
    """How long it takes."""

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        wording, hour, minute = rng.randrange(3), rng.randint(0, 22), rng.randint(0, 59)
        match difficulty:
            case 1:
                return cls(wording, 60 * hour, 60 * rng.randint(1, min(9, 23 - hour)))
            case 2:
                return cls(wording, 60 * hour, 60 * rng.randint(2, 47))
            case 3:
                minute = rng.randint(0, 40)
                return cls(wording, 60 * hour + minute, rng.randint(1, 59 - minute))
            case 4:
                minute = rng.randint(1, 59)
                return cls(wording, 60 * hour + minute, rng.randint(60 - minute, 59))
            case _:
                return cls(wording, 60 * hour + minute, rng.randint(61, 60 * 24))

    @property
    def question(self) -> str:
        hours, minutes = divmod(self.minutes, 60)
        took = " ".join([f"{hours} h"] * (hours > 0) + [f"{minutes} min"] * (minutes > 0))
        return (
            f"What time is it {took} after {_clock(self.begin)}?",
            f"It is {_clock(self.begin)}. What time is it in {took}?",
            f"A train leaves at {_clock(self.begin)} and takes {took}. When does it arrive?",
        )[self.wording]

    @property
    def answer(self) -> str:
        return _clock((self.begin + self.minutes) % DAY)

    @property
    def choices(self) -> tuple[str, ...]:
        whole_hours = self.begin % 60 == self.minutes % 60 == 0
        return WHOLE_HOURS if whole_hours else TIMES

    @property
    def thinking(self) -> str:
        (hour, minute), (hours, minutes) = divmod(self.begin, 60), divmod(self.minutes, 60)
        lines = []
        if minutes:
            lines.append(f"{minute} + {minutes} = {minute + minutes}")
            minute += minutes
            if minute >= 60:
                lines.append(f"{minute} - 60 = {minute - 60}")
                lines.append(f"{hour} + 1 = {hour + 1}")
                hour, minute = hour + 1, minute - 60
        if hours:
            lines.append(f"{hour} + {hours} = {hour + hours}")
            hour += hours
        while hour >= 24:
            lines.append(f"{hour} - 24 = {hour - 24}")
            hour -= 24
        return "\n".join(lines)

    def near_miss(self, rng: random.Random) -> list[Message]:
        """An hour or some minutes off."""
        return reply(_clock((self.begin + self.minutes + rng.choice((-60, 60, -10, 10, -1, 1))) % DAY))


def written_day(date: datetime.date) -> str:
    """As in 7 March."""
    return f"{date.day} {MONTHS[date.month - 1]}"


def _counted(date: datetime.date, days: int) -> list[str]:
    """The days to the end of each month, and the sum."""
    last = date + datetime.timedelta(days)
    if date.month == last.month:
        return [f"{last.day} - {date.day} = {days}"]
    length = calendar.monthrange(date.year, date.month)[1]
    total = length - date.day
    lines = [f"{MONTHS[date.month - 1]} {length} - {date.day} = {total}"]
    for month in range(date.month + 1, last.month):
        more = calendar.monthrange(date.year, month)[1]
        lines.append(f"{MONTHS[month - 1]} {total} + {more} = {total + more}")
        total += more
    return [*lines, f"{MONTHS[last.month - 1]} {total} + {last.day} = {days}"]
