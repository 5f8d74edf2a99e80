"""Write data/reasoning.jsonl: reasoning prompts of four kinds, each with an answer that was worked out, not guessed.

    python scripts/make_prompts.py data/reasoning.jsonl

arithmetic: word problems of two or three steps.   dates: days of the week and of the calendar.   tracking: who holds what after some
swaps.   belief: where somebody who did or did not see a thing moved will look for it (after Wimmer & Perner 1983). The same seed
writes the same file.
"""

import argparse
import datetime
import random
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanoexit.data import write_json_lines
from nanoexit.errors import run_script

NAMES = ["Ada", "Ben", "Chloe", "Dan", "Emma", "Farid", "Grace", "Hugo", "Iris", "Jonas", "Kira", "Leo", "Mina", "Noah", "Olga", "Paul"]
THINGS = ["apples", "stamps", "marbles", "books", "postcards", "shells", "pencils", "cookies"]
COLORS = ["red", "blue", "green", "yellow", "white", "black", "purple"]
PLACES = ["box", "basket", "drawer", "cupboard", "bag", "suitcase", "bucket", "jar"]
OBJECTS = ["key", "ball", "book", "coin", "watch", "letter", "ring", "toy car"]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ASK = "\n\nThink it through, then end with a line of the form\nAnswer: {form}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the file to write, such as data/reasoning.jsonl")
    parser.add_argument("--count", type=int, default=100, help="prompts of each kind (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = prompts(args.count, args.seed)
    write_json_lines(Path(args.out), rows)
    print(f"{len(rows)} prompts written to {args.out}")


def prompts(count: int, seed: int) -> list[dict]:
    """`count` different prompts of each kind."""
    rows = []
    for kind, make in KINDS.items():
        rng, texts = random.Random(f"{kind} {seed}"), {}
        while len(texts) < count:
            text, form, answer = make(rng)
            texts.setdefault(text, (form, answer))
        rows += [{"id": f"{kind}-{i}", "group": kind, "prompt": text + ASK.format(form=form), "answer": answer, "checker": "exact"}
                 for i, (text, (form, answer)) in enumerate(texts.items())]
    return rows


def arithmetic(rng: random.Random) -> tuple[str, str, str]:
    a, b = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    n, m, k = rng.randint(12, 60), rng.randint(3, 9), rng.randint(2, 9)
    stories: list[tuple[str, int]] = [
        (f"{a} has {n} {thing}. {b} has {m} times as many. Together they give away {k}. How many {thing} are left?", n + n * m - k),
        (f"{a} buys {m} bags with {n} {thing} each, and then loses {k} {thing}. {b} gives {a} another {n}. How many {thing} does {a} have?", m * n - k + n),
        (f"A train has {m} cars with {n} seats each. {k * 10} seats are taken. At the next stop {k} more people find a seat. How many seats are free?", m * n - 11 * k),
        (f"{a} reads {n} pages a day for {m} days, {b} reads {k} pages a day for as long. How many more pages than {b} has {a} read?", (n - k) * m),
        (f"{a} saves {n} coins a week. After {m} weeks a third of {3 * k} coins is spent on a gift. How many coins are left?", n * m - k),
        (f"{m} friends share {m * n} {thing} equally. {a}, one of them, then gives {k} to {b}, another of them. How many {thing} does {b} have?", n + k),
    ]
    text, answer = rng.choice([s for s in stories if s[1] > 0])
    return text, "NUMBER", str(answer)


def dates(rng: random.Random) -> tuple[str, str, str]:
    day = datetime.date(2001, 1, 1) + datetime.timedelta(days=rng.randrange(9000))
    n = rng.randint(5, 120)
    after, before = day + datetime.timedelta(days=n), day - datetime.timedelta(days=n)
    weekday = WEEKDAYS[rng.randrange(7)]
    words = f"{day:%B} {day.day}, {day.year}"
    return rng.choice([
        (f"Today is {weekday}. Which day of the week is it in {n} days?", "DAY", WEEKDAYS[(WEEKDAYS.index(weekday) + n) % 7]),
        (f"{words} is a {WEEKDAYS[day.weekday()]}. Which day of the week is {n} days before it?", "DAY", WEEKDAYS[before.weekday()]),
        (f"Which date is {n} days after {words}?", "YYYY-MM-DD", after.isoformat()),
        (f"How many days lie between {words} and {after:%B} {after.day}, {after.year}, if the first day is not counted and the last one is?", "NUMBER", str(n)),
    ])


def tracking(rng: random.Random) -> tuple[str, str, str]:
    people = rng.sample(NAMES, rng.randint(3, 5))
    holds = dict(zip(people, rng.sample(COLORS, len(people))))
    story = [" ".join(f"{p} has the {c} ball." for p, c in holds.items())]
    for _ in range(rng.randint(3, 6)):
        a, b = rng.sample(people, 2)
        holds[a], holds[b] = holds[b], holds[a]
        story.append(f"{a} and {b} swap balls.")
    who = rng.choice(people)
    return " ".join(story) + f" Which colour is the ball that {who} has now?", "COLOUR", holds[who]


def belief(rng: random.Random) -> tuple[str, str, str]:
    """The last place where the one who is asked about knows the thing to be. Two moves at most; the one who moves is there."""
    a, b = rng.sample(NAMES, 2)
    thing, places = rng.choice(OBJECTS), rng.sample(PLACES, 3)
    story, believed, present = [f"{a} and {b} are in a room. {a} puts the {thing} into the {places[0]}."], places[0], True
    for place in places[1 : rng.randint(2, 3)]:
        if present and rng.random() < 0.6:
            story.append(f"{a} leaves the room.")
            present = False
        story.append(f"{b} moves the {thing} to the {place}.")
        believed = place if present else believed
        if not present and rng.random() < 0.4:
            story.append(f"{a} comes back; nobody says a word about the {thing}.")
            present = True
    where = places[len([s for s in story if " moves " in s])]
    if not present and rng.random() < 0.3:
        story.append(f"{b} calls {a} and says truthfully where the {thing} is.")
        believed = where
    if not present:
        story.append(f"{a} comes back.")
    return " ".join(story) + f" Where does {a} look for the {thing} first?", "PLACE", believed


KINDS: dict[str, Callable[[random.Random], tuple[str, str, str]]] = {
    "arithmetic": arithmetic, "dates": dates, "tracking": tracking, "belief": belief,
}

if __name__ == "__main__":
    run_script(main)
