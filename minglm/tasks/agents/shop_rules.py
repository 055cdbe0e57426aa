"""A shop: its database, what its tools do to it, its rules, and a search for what the rules allow.

As in TAU-bench the tools do what they are told if it is possible at all; keeping the rules is the agent's part.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from minglm.tasks.agents.calling import Call, tool

COLOURS = ("red", "blue", "green", "white")
WRITES = ("cancel", "take_back", "exchange")
TOOLS = {
    "get_order": tool("get_order", "Look up an order", {"order": "string"}),
    "list_orders": tool("list_orders", "Orders of a customer", {"customer": "string"}),
    "get_customer": tool("get_customer", "Look up a customer", {"customer": "string"}),
    "get_stock": tool("get_stock", "What is in stock of an item", {"item": "string"}),
    "cancel": tool("cancel", "Cancel an order", {"order": "string"}),
    "take_back": tool("take_back", "Take back an order and refund", {"order": "string", "refund": "integer"}),
    "exchange": tool(
        "exchange", "Exchange for another colour", {"order": "string", "colour": {"type": "string", "enum": COLOURS}}
    ),
}


class Order(NamedTuple):
    """status: pending, delivered, cancelled, or returned. days: since delivery. refund: what was paid back."""

    number: str
    customer: str
    item: str
    colour: str
    price: int
    status: str
    days: int = 0
    refund: int = 0

    def __str__(self) -> str:
        status = f"delivered {self.days} days ago" if self.status == "delivered" else self.status
        return f"{self.number}: {self.colour} {self.item}, {self.price} euros, {status}, {self.customer}"


@dataclass(frozen=True)
class Shop:
    """The database. stock: item, colour, how many. gold: the customers who are gold members."""

    orders: tuple[Order, ...]
    stock: tuple[tuple[str, str, int], ...] = ()
    gold: tuple[str, ...] = ()

    def find(self, number: str) -> Order | None:
        return next((order for order in self.orders if order.number == number), None)

    def count(self, item: str, colour: str) -> int:
        return sum(count for *key, count in self.stock if key == [item, colour])

    def changed(self, order: Order) -> "Shop":
        return replace(self, orders=tuple(order if old.number == order.number else old for old in self.orders))

    def stocked(self, item: str, colour: str, more: int) -> "Shop":
        return replace(self, stock=tuple((i, c, n + more) if (i, c) == (item, colour) else (i, c, n) for i, c, n in self.stock))


def do(shop: Shop, call: Call) -> tuple[Shop, str]:
    """The shop after a call, and the result. Of what cannot be done the result begins with "error"."""
    name, arguments = call
    if name == "list_orders":
        found = [f"{order.number} {order.item}" for order in shop.orders if order.customer == arguments["customer"]]
        return shop, ", ".join(found) or "error: no orders"
    if name == "get_customer":
        customer = arguments["customer"]
        if all(order.customer != customer for order in shop.orders):
            return shop, "error: no such customer"
        return shop, f"{customer}: {'gold' if customer in shop.gold else 'normal'}"
    if name == "get_stock":
        found = [f"{colour} {count}" for item, colour, count in shop.stock if item == arguments["item"]]
        return shop, ", ".join(found) or "error: no such item"
    order = shop.find(arguments["order"])
    if order is None:
        return shop, "error: no such order"
    return (shop, str(order)) if name == "get_order" else _write(shop, call, order)


def _write(shop: Shop, call: Call, order: Order) -> tuple[Shop, str]:
    if order.status not in ("pending", "delivered"):
        return shop, f"error: {order.number} is {order.status}"
    if call.name == "cancel":
        return shop.changed(order._replace(status="cancelled")), "ok"
    if call.name == "take_back":
        return shop.changed(order._replace(status="returned", refund=call.arguments["refund"])), "ok"
    colour = call.arguments["colour"]
    if shop.count(order.item, colour) < 1:
        return shop, f"error: no {colour} {order.item} in stock"
    stocked = shop.stocked(order.item, colour, -1).stocked(order.item, order.colour, 1)
    return stocked.changed(order._replace(colour=colour)), "ok"


class Rules(NamedTuple):
    """What the shop allows. days, gold_days: for taking back. fee: off the refund of those who are not gold.
    asks: whether the customer has to be asked before a change. customer: whose orders alone may be changed, if not all."""

    days: int
    gold_days: int
    fee: int
    asks: bool = False
    customer: str = ""

    def text(self, writes: tuple[str, ...]) -> str:
        """The rules for these tools, a line each."""
        lines = ["Cancel an order only if it is pending."]
        if "take_back" in writes:
            longer = f" (gold members: {self.gold_days} days)" if self.gold_days != self.days else ""
            lines.append(f"Take back an order only if it was delivered, up to {self.days} days ago{longer}.")
            lines.append("Refund the price" + (f" less {self.fee} euros (gold members: all)." if self.fee else "."))
        if "exchange" in writes:
            lines.append("Exchange an order only if it was delivered.")
        if self.customer:
            lines.append("Change only orders of the customer who asks.")
        if self.asks:
            lines.append('If a wish can be met, ask "sure?" before you change anything.')
        return "\n".join(lines)

    def refund(self, shop: Shop, order: Order) -> int:
        return order.price if order.customer in shop.gold else order.price - self.fee

    def forbid(self, shop: Shop, call: Call) -> str:
        """Why a write is against the rules; empty if it is not."""
        order = shop.find(call.arguments["order"])
        if order is None:
            return "there is no such order"
        if self.customer not in ("", order.customer):
            return f"{order.number} is not of {self.customer}"
        if call.name == "cancel":
            return "" if order.status == "pending" else f"{order.number} is not pending"
        if order.status != "delivered":
            return f"{order.number} was not delivered"
        if call.name == "exchange":
            return ""
        limit = self.gold_days if order.customer in shop.gold else self.days
        if order.days > limit:
            return f"{order.days} days is more than {limit}"
        refund = self.refund(shop, order)
        return "" if call.arguments["refund"] == refund else f"the refund is {refund}"


class Wish(NamedTuple):
    """What a customer wants: one of WRITES for all of these orders, or for none. said: in the customer's words.
    is_fallback: said only if the wish before cannot be met. is_vague: the numbers are not said."""

    write: str
    orders: tuple[str, ...]
    colour: str
    said: str
    is_fallback: bool = False
    is_vague: bool = False

    def is_met(self, shop: Shop) -> bool:
        orders = [shop.find(number) for number in self.orders]
        if self.write == "exchange":
            return all(order is not None and order.colour == self.colour for order in orders)
        status = "cancelled" if self.write == "cancel" else "returned"
        return all(order is not None and order.status == status for order in orders)


def plan(shop: Shop, rules: Rules, wish: Wish) -> tuple[Call, ...] | None:
    """The shortest calls that the rules allow and that meet the wish; None proves that there are none.

    Breadth first over all writes to the orders of the wish. A write to another order cannot be part of it: none makes
    room for another, and none can be undone.
    """
    queue = deque([(shop, ())])
    seen = {shop}
    while queue:
        now, calls = queue.popleft()
        if wish.is_met(now):
            return calls
        for call in _writes(now, rules, wish):
            after, result = do(now, call)
            if not result.startswith("error") and not rules.forbid(now, call) and after not in seen:
                seen.add(after)
                queue.append((after, (*calls, call)))
    return None


def _writes(shop: Shop, rules: Rules, wish: Wish) -> Iterator[Call]:
    for number in wish.orders:
        order = shop.find(number)
        if order is not None:
            yield Call("cancel", {"order": number})
            yield Call("take_back", {"order": number, "refund": rules.refund(shop, order)})
            yield from (Call("exchange", {"order": number, "colour": colour}) for colour in COLOURS)
