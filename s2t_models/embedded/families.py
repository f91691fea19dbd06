"""The families of problems: how each draws a plan of so many steps. Results stay between 2 and 99.

`HELD_OUT` families divide, which no other family does. They are in the corpus that the pair was trained on, and in
no split that labels, trains or calibrates.
"""

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from s2t_models.embedded import wording
from s2t_models.embedded.plan import Plan, PlanWriter, Ref

FAMILIES = ("events", "relations", "shopping", "work")
HELD_OUT = ("travel", "harvest")
SMALL_PACKS = (
    (2, 2),
    (2, 3),
    (2, 4),
    (3, 2),
    (3, 3),
    (4, 2),
)  # amounts stay single digits: learnable when tiny


def _days(rng: random.Random) -> Iterator[str]:
    start = rng.randrange(7)
    return (wording.DAYS[(start + i) % 7] for i in range(7))


def _events(rng: random.Random, steps: int) -> Plan:
    writer = PlanWriter(rng, "events")
    name, other = rng.sample(wording.NAMES, 2)
    days = _days(rng)
    words: dict[str, Any] = {
        "name": name,
        "other": other,
        "thing": rng.choice(wording.THINGS),
        "pack": rng.choice(wording.PACKS),
    }
    held: int | Ref = rng.randint(11, 79)
    writer.tell(wording.EVENT_START, n=held, day=next(days), **words)
    while len(writer.steps) < steps:
        words["day"] = next(days)
        gain = writer.rises(held)
        amount: int | Ref = rng.randint(2, 9)
        if steps - len(writer.steps) >= 2 and rng.random() < 0.35:
            count, size = rng.choice(SMALL_PACKS)
            writer.tell(wording.PACK_GAIN if gain else wording.PACK_LOSS, m=count, k=size, **words)
            amount = writer.step(count, "*", size, wording.PACK_STEP, **words)
        else:
            writer.tell(wording.GAIN if gain else wording.LOSS, k=amount, **words)
        said = wording.GAIN_STEP if gain else wording.LOSS_STEP
        held = writer.step(held, "+" if gain else "-", amount, said, k=writer.value(amount), **words)
    return writer.finish(wording.EVENT_ASK, **words)


def _relations(rng: random.Random, steps: int) -> Plan:
    writer = PlanWriter(rng, "relations")
    words: dict[str, Any] = {"thing": rng.choice(wording.THINGS), "box": rng.choice(wording.CONTAINERS)}
    held: int | Ref = rng.randint(3, 9) if rng.random() < 0.5 else rng.randint(11, 79)
    writer.tell(wording.RELATION_START, n=held, **words)
    for known, new in pairwise(wording.ORDINALS[: steps + 1]):
        words |= {"known": known, "new": new}
        if writer.value(held) <= 9:
            times = rng.randint(2, 5)
            words["m"] = wording.MULTIPLES[times]
            writer.tell(wording.TIMES, **words)
            held = writer.step(held, "*", times, wording.TIMES_STEP, **words)
            continue
        more = writer.rises(held)
        amount = rng.randint(2, 9)
        inverted = rng.random() < 0.3
        way = "more" if more != inverted else "fewer"
        writer.tell(wording.COMPARE_INVERTED if inverted else wording.COMPARE, k=amount, way=way, **words)
        said = wording.COMPARE_INVERTED_STEP if inverted else wording.COMPARE_STEP
        held = writer.step(held, "+" if more else "-", amount, said, inverted, k=amount, way=way, **words)
    return writer.finish(wording.RELATION_ASK, last=wording.ORDINALS[steps], **words)


def _shopping(rng: random.Random, steps: int) -> Plan:
    writer = PlanWriter(rng, "shopping")
    count, price = rng.randint(2, 9), rng.randint(2, 9)
    words: dict[str, Any] = {
        "name": rng.choice(wording.NAMES),
        "place": rng.choice(wording.PLACES),
        "good": rng.choice(wording.GOODS),
    }
    writer.tell(wording.BUY, nth="first", count=count, price=price, **words)
    spent = writer.step(count, "*", price, wording.BUY_STEP, nth="first", **words)
    for nth in wording.ORDINALS[1:steps]:
        more = writer.rises(spent)
        words |= {"nth": nth, "good": rng.choice(wording.GOODS)}
        amount = rng.randint(2, 9)
        writer.tell(wording.SPEND if more else wording.REFUND, k=amount, **words)
        said = wording.SPEND_STEP if more else wording.REFUND_STEP
        spent = writer.step(spent, "+" if more else "-", amount, said, k=amount, **words)
    return writer.finish(wording.SHOPPING_ASK, **words)


def _work(rng: random.Random, steps: int) -> Plan:
    writer = PlanWriter(rng, "work")
    days = _days(rng)
    rate, hours = rng.randint(2, 9), rng.randint(2, 9)
    words: dict[str, Any] = {
        "name": rng.choice(wording.NAMES),
        "thing": rng.choice(wording.MADE),
        "day": next(days),
    }
    worked: int | Ref = hours
    if steps >= 3 and rng.random() < 0.4:
        hours, more = rng.randint(2, 5), rng.randint(2, 4)
        writer.tell(wording.LONG_DAY, rate=rate, hours=hours, more=more, **words)
        worked = writer.step(hours, "+", more, wording.LONG_DAY_STEP, **words)
    else:
        writer.tell(wording.WORK_DAY, rate=rate, hours=hours, **words)
    made = writer.step(worked, "*", rate, wording.WORK_STEP, rate=rate, **words)
    while len(writer.steps) < steps:
        words["day"] = next(days)
        gain = writer.rises(made)
        amount = rng.randint(2, 9)
        writer.tell(wording.ARRIVE if gain else wording.LEAVE, k=amount, **words)
        said = wording.GAIN_STEP if gain else wording.LOSS_STEP
        made = writer.step(made, "+" if gain else "-", amount, said, k=amount, **words)
    return writer.finish(wording.WORK_ASK, **words)


Wordings = tuple[Sequence[str], Sequence[str]]  # of a change: as the question tells it, and of its step


def _change(
    writer: PlanWriter,
    held: Ref,
    steps: int,
    labels: Iterator[str],
    words: dict[str, Any],
    more: Wordings,
    less: Wordings,
) -> None:
    """Adds and takes away single digits until there are `steps`, as the held-out families do once they have divided."""
    while len(writer.steps) < steps:
        words["nth"] = next(labels)
        up = writer.rises(held)
        told, said = more if up else less
        amount = writer.rng.randint(2, 9)
        writer.tell(told, k=amount, **words)
        held = writer.step(held, "+" if up else "-", amount, said, k=amount, **words)


def _travel(rng: random.Random, steps: int) -> Plan:
    writer = PlanWriter(rng, "travel")
    hours, speed = rng.randint(2, 9), rng.randint(2, 9)
    labels = iter(wording.ORDINALS)
    words: dict[str, Any] = {"name": rng.choice(wording.NAMES), "road": rng.choice(wording.ROADS), "nth": next(labels)}
    writer.tell(wording.TRAVEL_START, n=hours * speed, hours=hours, **words)
    pace = writer.step(hours * speed, "/", hours, wording.PACE_STEP, **words)
    held = pace
    if steps >= 3:
        words["nth"] = next(labels)
        hours = rng.randint(2, 9)
        writer.tell(wording.SAME_PACE, hours=hours, **words)
        held = writer.step(pace, "*", hours, wording.SAME_PACE_STEP, hours=hours, **words)
    more, less = (wording.FURTHER, wording.FURTHER_STEP), (wording.SHORTER, wording.SHORTER_STEP)
    _change(writer, held, steps, labels, words, more, less)
    return writer.finish(wording.TRAVEL_ASK, **words)


def _harvest(rng: random.Random, steps: int) -> Plan:
    writer = PlanWriter(rng, "harvest")
    rows, trees = rng.randint(2, 9), rng.randint(2, 9)
    picked = rows * trees
    shares = rng.choice([n for n in range(2, 10) if picked % n == 0 and 2 <= picked // n <= 20])
    labels = iter(wording.ORDINALS)
    words: dict[str, Any] = {
        "name": rng.choice(wording.NAMES),
        "crop": rng.choice(wording.CROPS),
        "crate": rng.choice(wording.CRATES),
        "nth": next(labels),
    }
    writer.tell(wording.PICK, rows=rows, trees=trees, **words)
    total = writer.step(rows, "*", trees, wording.PICK_STEP, **words)
    writer.tell(wording.SHARE, n=shares, **words)
    held = writer.step(total, "/", shares, wording.SHARE_STEP, **words)
    more, less = (wording.PUT_IN, wording.PUT_IN_STEP), (wording.TAKE_OUT, wording.TAKE_OUT_STEP)
    _change(writer, held, steps, labels, words, more, less)
    return writer.finish(wording.HARVEST_ASK, **words)


DRAW = {
    "events": _events,
    "relations": _relations,
    "shopping": _shopping,
    "work": _work,
    "travel": _travel,
    "harvest": _harvest,
}
