"""The families shop_counter and search: what a search over the database or the facts finds is the one right answer."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from minglm.tasks.agents.calling import Call
from minglm.tasks.agents.search import Search
from minglm.tasks.agents.shop import ShopCounter
from minglm.tasks.agents.shop_rules import COLOURS, TOOLS, Order, Rules, Shop, Wish, do, plan
from minglm.tasks.agents.world import Move


def drawn(family, each=10, seed=0):
    rng = random.Random(f"{family.family} {seed}")
    return [family.sample(rng, difficulty) for difficulty in family.difficulties for _ in range(each)]


# ---- shop_counter


def allowed_by_the_letter(problem, shop, wish):
    """The rules read out once more, without a search."""
    rules, customers = problem.rules, shop.gold
    for number in wish.orders:
        order = next(order for order in shop.orders if order.number == number)
        if wish.write == "cancel":
            fits = order.status == "pending"
        elif wish.write == "take_back":
            limit = rules.gold_days if order.customer in customers else rules.days
            fits = order.status == "delivered" and order.days <= limit
        else:
            fits = order.status == "delivered" and (order.item, wish.colour, 0) not in shop.stock
        if not fits or (problem.rules.customer and order.customer != problem.customer):
            return False
    return True


def test_orders_of_others_are_left_alone_where_the_rules_say_so():
    strange = [
        problem
        for problem in drawn(ShopCounter, 60)
        if problem.rules.customer and problem.shop.find(problem.wishes[0].orders[0]).customer != problem.customer
    ]
    assert len(strange) > 10
    for problem in strange:
        assert problem.outcomes[0][1] is None
        contents = [message["content"] for message in problem.demonstrate(False)]
        assert contents[:2] == ["name?", f"{problem.customer}."] and "cannot" in contents


def test_a_plan_is_found_exactly_where_the_rules_allow_each_part_of_the_wish():
    found = {True: 0, False: 0}
    for problem in drawn(ShopCounter, 60):
        shop = problem.shop
        for wish, calls, after in problem.outcomes:
            assert (calls is not None) == allowed_by_the_letter(problem, shop, wish), (problem, wish)
            found[calls is not None] += 1
            for call in calls or ():
                assert problem.rules.forbid(shop, call) == ""
                shop, result = do(shop, call)
                assert result == "ok"
            assert shop == after and (calls is None or wish.is_met(after))
    assert min(found.values()) > 50


def test_two_exchanges_share_the_stock():
    orders = (Order("A1", "Anna", "lamp", "red", 10, "delivered", 1), Order("A2", "Anna", "lamp", "green", 10, "delivered", 1))
    wish = Wish("exchange", ("A1", "A2"), "blue", "")
    rules = Rules(10, 10, 0)
    assert plan(Shop(orders, (("lamp", "blue", 1), ("lamp", "red", 0))), rules, wish) is None
    assert len(plan(Shop(orders, (("lamp", "blue", 2), ("lamp", "red", 0))), rules, wish)) == 2


def test_right_words_with_one_write_too_many_or_too_few_have_nothing():
    for problem in drawn(ShopCounter, 15):
        outcomes = problem.outcomes
        orders = [order.number for order in problem.shop.orders if order.status == "pending"]

        def moves(extra, skip, outcomes=outcomes, asks=problem.rules.asks):
            for index, (_, calls, _) in enumerate(outcomes):
                if asks and calls:
                    yield Move("", content="sure?")
                if calls and not (skip and index == len(outcomes) - 1):
                    yield Move("", calls)
                if extra and index == len(outcomes) - 1:
                    yield Move("", [extra])
                yield Move("", content="cannot" if calls is None else "done")

        assert problem.verify(problem.play(moves(None, False))).reward == 1
        if outcomes[-1][1]:
            assert problem.verify(problem.play(moves(None, True))).reward == 0
        for number in orders:
            touched = {call.arguments["order"] for _, calls, _ in outcomes for call in calls or ()}
            if number not in touched:
                assert problem.verify(problem.play(moves(Call("cancel", {"order": number}), False))).reward == 0


def test_a_change_before_the_customer_was_asked_has_nothing_where_the_rules_say_ask():
    seen = 0
    for problem in drawn(ShopCounter, 60):
        right = problem.demonstrate(False)
        asked = [index for index, message in enumerate(right) if message["content"] == "sure?"]
        assert bool(asked) == (problem.rules.asks and any(calls for _, calls, _ in problem.outcomes))
        for index in asked:
            seen += 1
            assert right[index + 1] == {"role": "user", "content": "Yes."}
            assert problem.verify([*right[:index], *right[index + 2 :]]).reward == 0
            assert problem.verify([*right[: index + 2], *right[index:]]).reward == 1  # twice does no harm
    assert seen > 10


@st.composite
def shop_calls(draw):
    name = draw(st.sampled_from(sorted(TOOLS)))
    values = {
        "order": st.sampled_from(["A1", "A2", "A3", "A9"]),
        "customer": st.sampled_from(["Anna", "Ben", "Nobody"]),
        "item": st.sampled_from(["lamp", "rug", "moon"]),
        "refund": st.integers(0, 50),
        "colour": st.sampled_from(COLOURS),
    }
    return Call(name, {key: draw(values[key]) for key in TOOLS[name]["function"]["parameters"]["properties"]})


@given(st.lists(shop_calls(), max_size=12))
@settings(max_examples=100)
def test_tools_lose_no_goods_and_errors_change_nothing(calls):
    shop = Shop(
        (Order("A1", "Anna", "lamp", "red", 10, "delivered", 3), Order("A2", "Ben", "rug", "blue", 20, "pending")),
        tuple((item, colour, 1) for item in ("lamp", "rug") for colour in COLOURS),
    )

    def goods(shop):
        return sorted(
            [(order.item, order.colour) for order in shop.orders]
            + [(item, colour) for item, colour, count in shop.stock for _ in range(count)]
        )

    before = goods(shop)
    for call in calls:
        after, result = do(shop, call)
        assert goods(after) == before
        if result.startswith("error") or call.name.startswith(("get", "list")):
            assert after == shop
        shop = after


# ---- search


def test_a_question_has_one_answer_and_the_first_page_does_not_give_it():
    for problem in drawn(Search, 15):
        encyclopedia = problem.encyclopedia
        facts = {(relation, subject): found for relation, subject, found in encyclopedia.facts}
        assert len(facts) == len(encyclopedia.facts)  # each relation leads to one thing
        end = problem.start_name
        for relation in problem.chain:
            end = facts[relation, end]
        if problem.employer:
            fits = [
                name
                for name in encyclopedia.of_kind("person")
                if facts["birthplace", name] == end and facts["employer", name] == problem.employer
            ]
            assert fits == [problem.answer]
        else:
            assert problem.answer == end
        assert problem.answer in problem.candidates and problem.answer not in problem.messages[0]["content"]
        if len(problem.chain) > 1 or problem.employer:
            first = encyclopedia.page(encyclopedia.order.index(problem.start_name) + 1)
            assert problem.answer not in first.replace(".", "").split() or problem.employer


def test_search_finds_each_page_first_by_its_title():
    for problem in drawn(Search, 2):
        for number, title in enumerate(problem.encyclopedia.order, start=1):
            assert problem.encyclopedia.search(title.upper()).split("; ")[0] == f"{number} {title}"


def test_harder_searches_take_more_calls():
    def mean_calls(difficulty):
        rng = random.Random(difficulty)
        return sum(len(Search.sample(rng, difficulty).demonstrate(False)) for _ in range(20)) / 20

    means = [mean_calls(difficulty) for difficulty in (1, 2, 4, 5, 6)]
    assert means == sorted(means) and means[-1] > 3 * means[0]
