"""A shop's counter: a customer, rules, a database; the agent looks up, decides, changes, and says how it went.

Measure of difficulty: rules to weigh, then lookups, then wishes. That each problem can be solved is proven while it is
made: by `plan`, which finds the calls or exhausts them, in which case "cannot" is right.
"""

import functools
import random
from dataclasses import dataclass
from typing import Self

from minglm.tasks.agents.calling import Call, Tool
from minglm.tasks.agents.shop_rules import COLOURS, TOOLS, WRITES, Order, Rules, Shop, Wish, do, plan
from minglm.tasks.agents.world import AgentProblem, Move, Moves, World, word
from minglm.tasks.task import Message

CUSTOMERS = ("Anna", "Ben", "Clara", "David", "Emma")
ITEMS = ("lamp", "chair", "clock", "vase", "rug", "desk")
REFUNDS = range(1, 51)  # what a guess chooses from
VERBS = {"cancel": "cancel", "take_back": "return", "exchange": "exchange"}
PROTOCOL = 'Answer "done" when it is done, "cannot" if it cannot be done.'
LOOKUPS = (
    ("get_order",),
    ("get_order",),
    ("get_order", "get_customer", "get_stock"),
    ("get_order", "list_orders", "get_customer", "get_stock"),
    ("get_order", "list_orders", "get_customer", "get_stock"),
)


@dataclass(frozen=True)
class ShopCounter(AgentProblem):
    """customer: who speaks. wishes: in the order in which they are said, from the first on."""

    shop: Shop
    rules: Rules
    customer: str
    wishes: tuple[Wish, ...]
    lookups: tuple[str, ...]
    writes: tuple[str, ...]

    family = "shop_counter"
    stands_for = "Multi-turn function-calling RL with a simulated user (section 3.4), and TAU-bench of section 4."
    difficulties = range(1, 6)

    @classmethod
    def sample(cls, rng: random.Random, difficulty: int) -> Self:
        cls.check_difficulty(difficulty)
        writes = WRITES[: min(difficulty, 3)]
        days = rng.choice((7, 10, 14, 20))
        has_gold = difficulty >= 3
        fee = rng.randint(1, 5) if has_gold else 0
        customer = rng.choice(CUSTOMERS)
        asks = difficulty >= 5 and rng.random() < 0.5
        rules = Rules(days, days + (10 if has_gold else 0), fee, asks, customer if difficulty >= 4 else "")
        shop = _draw_shop(rng, customer, count=(1, 2, 2, 3, 4)[difficulty - 1], days=days)
        wishes = _draw_wishes(rng, shop, customer, writes, difficulty)
        return cls(shop, rules, customer, wishes, LOOKUPS[difficulty - 1], writes)

    @property
    def messages(self) -> list[Message]:
        ask = ' To learn who the customer is, ask "name?".' if "list_orders" in self.lookups else ""
        rules = f"{self.rules.text(self.writes)}\n{PROTOCOL}{ask}"
        return [{"role": "system", "content": rules}, {"role": "user", "content": self.wishes[0].said}]

    @property
    def tools(self) -> list[Tool]:
        return [TOOLS[name] for name in (*self.lookups, *self.writes)]

    def start(self) -> "Counter":
        return Counter(self)

    @functools.cached_property
    def outcomes(self) -> tuple[tuple[Wish, tuple[Call, ...] | None, Shop], ...]:
        """The wishes that will be said, each with the right calls, or None, and the shop after it."""
        found, shop, was_met = [], self.shop, True
        for wish in self.wishes:
            if wish.is_fallback and was_met:
                continue
            calls = plan(shop, self.rules, wish)
            was_met = calls is not None
            for call in calls or ():
                shop, _ = do(shop, call)
            found.append((wish, calls, shop))
        return tuple(found)

    def solve(self) -> Moves:
        shop, known, has_list = self.shop, "", False
        if self.rules.customer:
            yield Move("Who is it? Ask.", content="name?")
            known = f"The customer is {self.customer}. "
        for wish, calls, after in self.outcomes:
            if wish.is_vague and not has_list:
                yield Move(f"{known}Find the order.", [Call("list_orders", {"customer": self.customer})])
                known, has_list = "", True
            yield Move(
                f"{known}Look up {', '.join(wish.orders)}.", [Call("get_order", {"order": number}) for number in wish.orders]
            )
            known = ""
            yield from self._look_further(shop, wish)
            verdict = self._weighed(shop, wish)
            if calls is None:
                yield Move(f"{verdict} Not allowed.", content="cannot")
            elif self.rules.asks:
                yield Move(f"{verdict} Allowed. Ask first.", content="sure?")
                yield Move("The customer is sure.", calls)
            else:
                yield Move(f"{verdict} Allowed.", calls)
            if calls is not None:
                yield Move("All is done.", content="done")
            shop = after

    def _look_further(self, shop: Shop, wish: Wish) -> Moves:
        """What the order does not say: whether its customer is gold, what is in stock."""
        orders = [order for number in wish.orders if (order := shop.find(number))]
        if any(order.status != "delivered" or self._is_strange(order) for order in orders):
            return
        if wish.write == "take_back" and "get_customer" in self.lookups:
            customer = orders[0].customer
            yield Move("Gold or not?", [Call("get_customer", {"customer": customer})])
        elif wish.write == "exchange":
            for item in sorted({order.item for order in orders}):
                yield Move(f"Is a {wish.colour} {item} in stock?", [Call("get_stock", {"item": item})])

    def _is_strange(self, order: Order) -> bool:
        return self.rules.customer not in ("", order.customer)

    def _weighed(self, shop: Shop, wish: Wish) -> str:
        """The reasons, a sentence an order: the rule that decides."""
        said = []
        for order in filter(None, map(shop.find, wish.orders)):
            text = f"{order.number} is {order.status}."
            if self._is_strange(order):
                text = f"{order.number} is of {order.customer}, not of {self.customer}."
            elif order.status == "delivered" and wish.write == "take_back":
                is_gold = order.customer in shop.gold
                limit = self.rules.gold_days if is_gold else self.rules.days
                sign = "more" if order.days > limit else "not more"
                text += f" {order.days} is {sign} than {limit}."
                if sign == "not more":
                    fee = 0 if is_gold else self.rules.fee
                    text += f" Refund {order.price} - {fee} = {order.price - fee}."
            elif order.status == "delivered" and wish.write == "exchange":
                text += f" {shop.count(order.item, wish.colour)} {wish.colour} in stock."
            said.append(text)
        return " ".join(said)

    def near_miss(self, rng: random.Random) -> list[Message]:
        """Right until the last wish; there a rule is broken, a wish is refused, or something else is done."""
        *others, (wish, calls, _) = self.outcomes
        writes = [name for name in self.writes if name != wish.write]

        def moves() -> Moves:
            for _, right, _ in others:
                if right is not None:
                    yield from self._sure()
                    yield Move("", right)
                yield Move("", content="cannot" if right is None else "done")
            if calls is None:
                yield Move("", [self._act(wish.write, wish.orders[0], wish.colour or COLOURS[0], rng)])
            elif rng.random() < 0.3:
                yield Move("", content="cannot")
                return
            elif self.rules.asks and rng.random() < 0.5:
                yield Move("", calls)  # unasked
            else:
                yield from self._sure()
                if writes:
                    yield Move("", [self._act(rng.choice(writes), wish.orders[0], rng.choice(COLOURS), rng)])
            yield Move("", content="done")

        return self.play(moves())

    def _sure(self) -> Moves:
        if self.rules.asks:
            yield Move("", content="sure?")

    def _act(self, write: str, number: str, colour: str, rng: random.Random) -> Call:
        extra = {"cancel": {}, "take_back": {"refund": rng.choice(REFUNDS)}, "exchange": {"colour": colour}}[write]
        return Call(write, {"order": number, **extra})

    def guess(self, rng: random.Random) -> list[Message]:
        """To each wish: "cannot", or one write to any order, with any refund or colour, and "done"; all as likely."""

        def moves() -> Moves:
            while True:
                write = rng.choice(("", *self.writes))
                if write:
                    number = rng.choice([order.number for order in self.shop.orders])
                    yield Move("", [self._act(write, number, rng.choice(COLOURS), rng)])
                yield Move("", content="done" if write else "cannot")

        return self.play(moves())

    @property
    def chance(self) -> float:
        chance = 1.0
        for _, calls, _ in self.outcomes:
            chance /= 1 + len(self.writes)
            if calls is not None:
                values = {"cancel": 1, "take_back": len(REFUNDS), "exchange": len(COLOURS)}[calls[0].name]
                is_possible = len(calls) == 1 and not self.rules.asks
                chance *= 1 / len(self.shop.orders) / values if is_possible else 0.0
        return chance


class Counter(World):
    """The customer says one wish after another. After each the shop must be as it should, and be told so."""

    def __init__(self, problem: ShopCounter):
        super().__init__(problem.tools, turn_limit=4 + 8 * len(problem.wishes))
        self.shop = problem.shop
        self.rules = problem.rules
        self.customer = problem.customer
        self.waiting = list(problem.outcomes)
        self.was_asked = False
        self.unasked: list[str] = []  # writes before the customer was asked

    def call(self, call: Call) -> str:
        if call.name in WRITES and self.rules.asks and not self.was_asked:
            self.unasked.append(call.name)
        self.shop, result = do(self.shop, call)
        return result

    def hear(self, content: str) -> str | None:
        said = word(content)
        if said == "name?":
            return f"{self.customer}."
        if said == "sure?":
            self.was_asked = True
            return "Yes."
        wish, calls, after = self.waiting.pop(0)
        right = "cannot" if calls is None else "done"
        if said != right:
            self.end(f"said {content[:40]!r} to {wish.said!r}; wanted {right!r}")
        elif self.shop != after:
            self.end(f"{wish.said!r}: the orders are not as they should be after it")
        elif self.unasked:
            self.end(f"{wish.said!r}: {self.unasked[0]} before the customer was asked")
        self.was_asked = False
        return self.waiting[0][0].said if self.waiting and not self.done else None


def _draw_shop(rng: random.Random, customer: str, count: int, days: int) -> Shop:
    """count orders of the customer's, as many of others; items of a customer differ."""
    numbers = rng.sample(range(10, 100), 2 * count)
    others = [name for name in CUSTOMERS if name != customer]
    items = [*rng.sample(ITEMS, count), *rng.sample(ITEMS, count)]
    orders = []
    for index, (number, item) in enumerate(zip(numbers, items, strict=True)):
        status = rng.choice(("pending", "delivered"))
        orders.append(
            Order(
                number=f"A{number}",
                customer=customer if index < count else rng.choice(others),
                item=item,
                colour=rng.choice(COLOURS),
                price=rng.randint(10, 50),
                status=status,
                days=rng.randint(1, days + 15) if status == "delivered" else 0,
            )
        )
    rng.shuffle(orders)
    stock = tuple((item, colour, rng.choice((0, 1, 2))) for item in sorted(set(items)) for colour in COLOURS)
    gold = tuple(sorted({order.customer for order in orders if rng.random() < 0.5}))
    return Shop(tuple(orders), stock, gold)


def _draw_wishes(rng: random.Random, shop: Shop, customer: str, writes: tuple[str, ...], difficulty: int) -> tuple[Wish, ...]:
    """One wish; at the highest difficulty up to three: for other orders, or where the first cannot be met. Where only the
    customer's own orders may be changed, numbers are now and then those of others."""
    orders = [order for order in shop.orders if order.customer == customer]
    is_vague = difficulty >= 4 and rng.random() < 0.6
    asked_for = list(shop.orders) if difficulty >= 4 and not is_vague and rng.random() < 0.8 else orders
    if difficulty < 5:
        return (_wish(rng, rng.choice(writes), [rng.choice(asked_for)], "Please {}.", is_vague),)
    some = rng.sample(asked_for, rng.choice((1, 1, 2)))
    write = rng.choice(writes)
    wishes = [_wish(rng, write, some, "Please {}.", is_vague)]
    if rng.random() < 0.6:
        other = rng.choice([name for name in writes if name != write])
        wishes.append(_wish(rng, other, some[:1], "Then {}.", is_vague, is_fallback=True))
    left = [order for order in orders if order not in some]
    if left and rng.random() < 0.5:
        wishes.append(_wish(rng, rng.choice(writes), [rng.choice(left)], "Also {}.", is_vague))
    return tuple(wishes)


def _wish(rng: random.Random, write: str, orders: list[Order], form: str, is_vague: bool, is_fallback: bool = False) -> Wish:
    colour = ""
    if write == "exchange":
        colour = rng.choice([colour for colour in COLOURS if all(colour != order.colour for order in orders)])
    names = " and ".join(f"my {order.item}" if is_vague else f"order {order.number}" for order in orders)
    said = form.format(f"{VERBS[write]} {names}" + (f" for {colour}" if colour else ""))
    return Wish(write, tuple(order.number for order in orders), colour, said, is_fallback, is_vague)
