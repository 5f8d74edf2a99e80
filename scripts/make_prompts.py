"""Write a file of prompts: reasoning of four kinds, with computed answers, or everyday requests.

    python scripts/make_prompts.py data/reasoning.jsonl
    python scripts/make_prompts.py data/everyday.jsonl --count 320 20 20 20 20 1200 \\
        --kinds everyday arithmetic dates tracking belief subjects

arithmetic: word problems of two or three steps, in the format of GSM8K, worked answers included.
dates: days of the week and of the calendar.   tracking: who holds what after some swaps.
belief: where a person looks for an object that was moved, with or without seeing it moved (after
Wimmer and Perner 1983).   everyday: requests as people type them, with no single right answer.
subjects: requests about one of many subjects, likewise.
The same seed writes the same file.
"""

import argparse
import datetime
import random
from collections.abc import Callable
from pathlib import Path

import _script

from nanoexit.config import UserError, write_json_lines

NAMES = "Ada Ben Chloe Dan Emma Farid Grace Hugo Iris Jonas Kira Leo Mina Noah Olga Paul"
THINGS = ["apples", "stamps", "marbles", "books", "postcards", "shells", "pencils", "cookies"]
COLORS = ["red", "blue", "green", "yellow", "white", "black", "purple"]
PLACES = ["box", "basket", "drawer", "cupboard", "bag", "suitcase", "bucket", "jar"]
OBJECTS = ["key", "ball", "book", "coin", "watch", "letter", "ring", "toy car"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
ASK = "\n\nThink it through, then end with a line of the form\n"
SIGNS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
}
Made = tuple[str, str, str]  # the story, the form of the last line, the answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", help="the file to write, such as data/reasoning.jsonl")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, metavar="KIND", default=list(KINDS)[:4]
    )
    parser.add_argument(
        "--count",
        type=int,
        nargs="+",
        metavar="N",
        default=[100],
        help="prompts of each kind (100)",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = args.count * (len(args.kinds) if len(args.count) == 1 else 1)
    if len(counts) != len(args.kinds):
        raise UserError(f"--count: expected 1 or {len(args.kinds)} numbers, found {len(counts)}")
    rows = prompts(dict(zip(args.kinds, counts)), args.seed)
    write_json_lines(Path(args.out), rows)
    print(f"{len(rows)} prompts written to {args.out}")


def prompts(counts: dict[str, int], seed: int) -> list[dict]:
    """As many different prompts of each kind as `counts` says."""
    rows = []
    for kind, count in counts.items():
        rng, made = random.Random(f"{kind} {seed}"), {}
        for _ in range(100 * count):
            if len(made) == count:
                break
            text, form, answer = KINDS[kind](rng)
            made.setdefault(text + ASK + form if form else text, answer)
        if len(made) < count:
            raise UserError(f"--count: there are fewer than {count} {kind} prompts")
        checker = "gsm8k" if kind == "arithmetic" else "exact"
        for i, (prompt, answer) in enumerate(made.items()):
            row = {"id": f"{kind}-{i}", "group": kind, "prompt": prompt}
            rows.append({**row, "answer": answer, "checker": checker} if answer else row)
    return rows


def two_names(rng: random.Random) -> list[str]:
    return rng.sample(NAMES.split(), 2)


# --- arithmetic -------------------------------------------------------------------------------


def arithmetic(rng: random.Random) -> Made:
    while True:
        text, steps = rng.choice(STORIES)(rng)
        worked = []
        results: list[int] = []
        for left, sign, right in steps:  # an operand below 0 is the result of an earlier step
            a = left if left >= 0 else results[left]
            b = right if right >= 0 else results[right]
            results.append(SIGNS[sign](a, b))
            mark = f"{a}{sign}{b}"
            worked.append(f"{mark}=<<{mark}={results[-1]}>>{results[-1]}")
        if min(results) > 0:
            return text, "#### NUMBER", "\n".join([*worked, f"#### {results[-1]}"])


def sizes(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(12, 60), rng.randint(3, 9), rng.randint(2, 9)


def times_as_many(rng: random.Random) -> tuple[str, list]:
    (a, b), thing, (n, m, k) = two_names(rng), rng.choice(THINGS), sizes(rng)
    text = f"{a} has {n} {thing}. {b} has {m} times as many. Together they give away {k}."
    return f"{text} How many {thing} are left?", [(n, "*", m), (n, "+", -1), (-1, "-", k)]


def bags(rng: random.Random) -> tuple[str, list]:
    (a, b), thing, (n, m, k) = two_names(rng), rng.choice(THINGS), sizes(rng)
    text = f"{a} buys {m} bags with {n} {thing} each, and then loses {k} {thing}."
    text += f" {b} gives {a} another {n}. How many {thing} does {a} have?"
    return text, [(m, "*", n), (-1, "-", k), (-1, "+", n)]


def train_seats(rng: random.Random) -> tuple[str, list]:
    n, m, k = sizes(rng)
    text = f"A train has {m} cars with {n} seats each. {10 * k} seats are taken. At the next stop"
    text += f" {k} more people find a seat. How many seats are free?"
    return text, [(m, "*", n), (-1, "-", 10 * k), (-1, "-", k)]


def pages(rng: random.Random) -> tuple[str, list]:
    (a, b), (n, m, k) = two_names(rng), sizes(rng)
    text = f"{a} reads {n} pages a day for {m} days, {b} reads {k} pages a day for as long."
    text += f" How many more pages than {b} has {a} read?"
    return text, [(n, "*", m), (k, "*", m), (-2, "-", -1)]


def savings(rng: random.Random) -> tuple[str, list]:
    (a, _), (n, m, k) = two_names(rng), sizes(rng)
    text = f"{a} saves {n} coins a week. After {m} weeks a third of {3 * k} coins is spent on a"
    return f"{text} gift. How many coins are left?", [(n, "*", m), (3 * k, "/", 3), (-2, "-", -1)]


def sharing(rng: random.Random) -> tuple[str, list]:
    (a, b), thing, (n, m, k) = two_names(rng), rng.choice(THINGS), sizes(rng)
    text = f"{m} friends share {m * n} {thing} equally. {a}, one of them, then gives {k} to {b},"
    text += f" another of them. How many {thing} does {b} have?"
    return text, [(m * n, "/", m), (-1, "+", k)]


STORIES = [times_as_many, bags, train_seats, pages, savings, sharing]


# --- the other kinds --------------------------------------------------------------------------


def dates(rng: random.Random) -> Made:
    day = datetime.date(2001, 1, 1) + datetime.timedelta(days=rng.randrange(9000))
    n = rng.randint(5, 120)
    after, before = day + datetime.timedelta(days=n), day - datetime.timedelta(days=n)
    today = rng.randrange(7)
    words, later = (f"{d:%B} {d.day}, {d.year}" for d in (day, after))
    between = f"How many days lie between {words} and {later}, if the first day is not counted"
    question, form, answer = rng.choice(
        [
            (
                f"Today is {DAYS[today]}. Which day of the week is it in {n} days?",
                "DAY",
                DAYS[(today + n) % 7],
            ),
            (
                f"{words} is a {DAYS[day.weekday()]}. Which day of the week is {n} days before it?",
                "DAY",
                DAYS[before.weekday()],
            ),
            (f"Which date is {n} days after {words}?", "YYYY-MM-DD", after.isoformat()),
            (f"{between} and the last one is?", "NUMBER", str(n)),
        ]
    )
    return question, f"Answer: {form}", answer


def tracking(rng: random.Random) -> Made:
    people = rng.sample(NAMES.split(), rng.randint(3, 5))
    holds = dict(zip(people, rng.sample(COLORS, len(people))))
    story = [f"{person} has the {color} ball." for person, color in holds.items()]
    for _ in range(rng.randint(3, 6)):
        a, b = rng.sample(people, 2)
        holds[a], holds[b] = holds[b], holds[a]
        story.append(f"{a} and {b} swap balls.")
    who = rng.choice(people)
    story.append(f"Which colour is the ball that {who} has now?")
    return " ".join(story), "Answer: COLOUR", holds[who]


def belief(rng: random.Random) -> Made:
    """The answer is the last place where the person in question knows the object to be."""
    (a, b), thing, places = two_names(rng), rng.choice(OBJECTS), rng.sample(PLACES, 3)
    story = [f"{a} and {b} are in a room. {a} puts the {thing} into the {places[0]}."]
    believed = where = places[0]
    present = True
    for place in places[1 : rng.randint(2, 3)]:
        if present and rng.random() < 0.6:
            story.append(f"{a} leaves the room.")
            present = False
        story.append(f"{b} moves the {thing} to the {place}.")
        where = place
        believed = place if present else believed
        if not present and rng.random() < 0.4:
            story.append(f"{a} comes back. The {thing} is not mentioned.")
            present = True
    if not present and rng.random() < 0.3:
        story.append(f"{b} calls {a} and says truthfully where the {thing} is.")
        believed = where
    if not present:
        story.append(f"{a} comes back.")
    story.append(f"Where does {a} look for the {thing} first?")
    return " ".join(story), "Answer: PLACE", believed


# --- everyday requests ------------------------------------------------------------------------

FILLERS = {
    "dish": "pancakes|tomato soup|fried rice|apple pie|lentil curry|a Greek salad|banana bread|"
    "an omelette|vegetable lasagne|hummus|potato gratin|oatmeal cookies",
    "place": "Lisbon|Kyoto|Iceland|the Alps|Mexico City|Morocco|Edinburgh|Vietnam|New York|Crete",
    "topic": "the moon|rain in the city|an old bicycle|autumn leaves|a sleeping cat|the sea|"
    "a morning coffee|my grandmother's garden|a late train|the first snow",
    "why": "the sky is blue|leaves change colour|the sea is salty|we dream|ice floats on water|"
    "cats purr|the moon has phases|bread rises|we yawn|stars twinkle|onions make us cry",
    "pair": "weather and climate|a frog and a toad|a virus and a bacterium|speed and velocity|"
    "a comet and an asteroid|butter and margarine|a simile and a metaphor|jam and marmalade",
    "task": "remove a coffee stain|sharpen a kitchen knife|change a bicycle tyre|boil an egg|"
    "fold a fitted sheet|clean a window without streaks|water plants while away|wrap a gift|"
    "learn ten words a day|keep bread fresh|tie a bow tie|start a compost heap",
    "person": "a child of six|my grandfather|a tourist|a tired student|a chef|a new neighbour",
    "mail": "asks a landlord to repair the heating|thanks a colleague for covering a shift|"
    "cancels a gym membership|invites the neighbours to a barbecue|declines a job offer|"
    "asks a teacher for a meeting|reminds a client of an unpaid invoice|reports a lost parcel",
    "occasion": "a rainy Sunday with two children|a friend's birthday|a picnic in the park|"
    "a first week in a new job|a long train ride|an evening without screens|a school fair",
    "thing": "rivers in Europe|string instruments|spices|trees that keep their leaves in winter|"
    "inventions of the 19th century|kinds of clouds|board games|birds that cannot fly",
}
REQUESTS = """How do I {task}?|Give me a short recipe for {dish}.|Explain to {person} why {why}.
What is the difference between {pair}?|Write a polite e-mail that {mail}.|Why is it that {why}?
Write four lines of verse about {topic}.|What should I see in {place} in three days?
Suggest a plan for {occasion} in {place}.|Name three {thing} and say one thing about each.
I have an hour. Teach me how to {task}.|What goes well with {dish}?|Describe {topic} to {person}.
What should I pack for a week in {place} in {month}?|Give me five ideas for {occasion}."""


def everyday(rng: random.Random) -> Made:
    request = rng.choice(REQUESTS.replace("\n", "|").split("|"))
    words = {name: rng.choice(text.split("|")) for name, text in FILLERS.items()}
    month = f"{datetime.date(2001, rng.randint(1, 12), 1):%B}"
    return request.format(month=month, **words), "", ""


SUBJECTS = """bees|wolves|octopuses|owls|whales|camels|ants|penguins|spiders|horses|elephants|bats
dolphins|tigers|eagles|hedgehogs|sharks|snails|dogs|turtles|roses|oak trees|mushrooms|cacti|moss
bamboo|tulips|seaweed|apples|tomatoes|rice|bread|cheese|chocolate|coffee|tea|honey|salt|olive oil
pasta|soup|sugar|garlic|eggs|potatoes|volcanoes|earthquakes|glaciers|rivers|deserts|rainbows
thunderstorms|tides|caves|islands|mountains|waterfalls|comets|planets|eclipses|black holes
satellites|telescopes|gravity|magnets|atoms|sound|light|heat|electricity|batteries|bicycles|trains
bridges|ships|aeroplanes|elevators|clocks|cameras|radios|computers|printers|mirrors|windmills|dams
lighthouses|castles|pyramids|cathedrals|libraries|museums|theatres|markets|railway stations|maps
calendars|money|banks|taxes|insurance|elections|laws|newspapers|schools|hospitals|farms|factories
the heart|the brain|the lungs|bones|muscles|skin|teeth|memory|sleep|dreams|laughter|fear|habits
vaccines|exercise|stress|allergies|glasses|music|the piano|the violin|drums|dancing|painting
poetry|novels|films|photography|chess|football|swimming|running|tennis|sailing|hiking|gardening
knitting|cooking|camping|yoga|friendship|honesty|patience|courage|kindness|silence|teamwork|luck
curiosity|time|holidays|weddings|birthdays|neighbours|grandparents|first jobs|job interviews
public speaking|saving water|recycling|plastic|solar power|wool|cotton|paper|glass|steel|wood
concrete|rubber|gold|perfume|soap|candles|umbrellas|shoes|hats|pockets|ancient Rome|the Vikings
the Silk Road|the printing press|the Moon landing|the Olympic Games|the alphabet|numbers|zero
fractions|prime numbers|probability|statistics|codes|grammar|translation|accents|proverbs"""
ABOUT = """Tell me about {}.|What should everyone know about {}?|Write a short story about {}.
Explain {} to a child.|Give me three surprising facts about {}.|Write a short paragraph on {}.
Why are people interested in {}?|What is a common mistake about {}?
Write a poem of six lines about {}.|Ask me three quiz questions about {}, with answers.
What is the best way to learn about {}?|I have to give a talk about {}. How should I begin?
Describe {} in one sentence.|What would the world be like without {}?
Write a dialogue in which two friends talk about {}.
Suggest a title and an outline for an article about {}."""


def subjects(rng: random.Random) -> Made:
    about, subject = (rng.choice(text.replace("\n", "|").split("|")) for text in (ABOUT, SUBJECTS))
    return about.format(subject), "", ""


KINDS = {"arithmetic": arithmetic, "dates": dates, "tracking": tracking, "belief": belief}
KINDS |= {"everyday": everyday, "subjects": subjects}

if __name__ == "__main__":
    _script.run_main(main)
