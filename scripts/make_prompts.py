"""Write data/reasoning.jsonl: reasoning prompts of four kinds with answers that are right by construction.

    python scripts/make_prompts.py [FILE]

arithmetic: word problems; dates: calendar and clock; objects: who has what, where is it; beliefs: where somebody who missed a
move will look (after the Sally-Anne test of Baron-Cohen, Leslie & Frith 1985). Every prompt ends with the form that its answer
must have, the one that tasks.check_exact reads. The same seed gives the same file, byte for byte; numbers stay below 1,000, where
nobody writes a comma. tests/test_prompts.py reads the English again and solves it another way.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanoexit.config import ROOT
from nanoexit.data import write_json_lines
from nanoexit.errors import run_script

SEED, EACH = 0, 120
NAMES = ["Ada", "Ben", "Chloe", "Daniel", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mara", "Nikhil", "Olga", "Pedro",
         "Quinn", "Rosa", "Samir", "Tessa", "Uma", "Viktor", "Wendy", "Yusuf"]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"]
Question = tuple[str, str, str]  # text, the answer's form, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", default=ROOT / "data" / "reasoning.jsonl", type=Path)
    path = parser.parse_args().file
    rows = make_rows(SEED, EACH)
    write_json_lines(path, rows)
    print(f"{len(rows)} prompts written to {path}")


def make_rows(seed: int, each: int) -> list[dict]:
    """`each` rows of every group, no prompt twice; groups in turn, and within each its kinds, so that any part of the file has all."""
    rows, seen = [], set()
    for group, kinds in GROUPS.items():
        rng, done = Random(f"{seed} {group}"), 0
        while done < each:
            text, form, answer = kinds[done % len(kinds)](rng)
            if text in seen:
                continue
            seen.add(text)
            done += 1
            prompt = f'{text}\n\nThink it through, then finish with a line that reads "Answer: " and {form}.'
            rows.append({"id": f"{group}-{done:03d}", "group": group, "prompt": prompt, "answer": answer, "checker": "exact"})
    return sorted(rows, key=lambda row: row["id"][-3:])


def one_of(words: Sequence[str]) -> str:
    return f"one of these words: {listed(words, 'or')}"


def listed(words: Sequence[str], conjunction: str = "and") -> str:
    return f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# --- arithmetic word problems ----------------------------------------------------------------------------------------


def number(text: str, answer: int) -> Question:
    assert 0 < answer < 1000, text
    return text, "then the number alone", str(answer)


def change(rng: Random) -> Question:
    name, (x, y) = rng.choice(NAMES), rng.sample(["notebooks", "pens", "folders", "brushes", "stamps", "cards"], 2)
    n, m, p, q = rng.randrange(2, 9), rng.randrange(2, 9), rng.randrange(2, 10), rng.randrange(2, 10)
    paid = (n * p + m * q) // 10 * 10 + rng.choice([10, 20, 50])
    return number(f"{name} buys {n} {x} at ${p} each and {m} {y} at ${q} each, and pays with ${paid}. How many dollars does {name} get back?",
                  paid - n * p - m * q)


def tulips(rng: Random) -> Question:
    flower = rng.choice(["tulips", "roses", "lilies", "sunflowers", "dahlias"])
    rows, each, times = rng.randrange(6, 15), rng.randrange(8, 16), rng.choice([2, 3])
    sold, more = rng.randrange(4, rows * each // 4), "twice" if times == 2 else "three times"
    return number(f"A gardener plants {rows} rows of {each} {flower}. On Monday {sold} of them are sold, and on Tuesday {more} as many "
                  f"as on Monday. How many {flower} are left?", rows * each - sold - times * sold)


def bus(rng: Random) -> Question:
    off, on, after = rng.randrange(3, 12), rng.randrange(2, 15), rng.randrange(8, 30)
    start, last = 2 * after + off - on, rng.randrange(2, 10)
    if start <= off:
        return bus(rng)
    return number(f"A bus sets out with {start} passengers. At the first stop {off} get off and {on} get on. At the second stop half of the "
                  f"passengers get off and {last} get on. How many passengers are on the bus now?", after + last)


def tank(rng: Random) -> Question:
    drain, net, minutes = rng.randrange(2, 12), rng.randrange(3, 15), rng.randrange(6, 40)
    return number(f"A tap lets {drain + net} litres a minute into an empty tank, and a leak lets {drain} litres a minute out of it. The tank holds "
                  f"{net * minutes} litres. After how many minutes is it full?", minutes)


def biscuits(rng: Random) -> Question:
    name, friends, share, kept = rng.choice(NAMES), rng.randrange(3, 10), rng.randrange(4, 16), rng.randrange(2, 12)
    total = friends * share + kept
    trays = [t for t in range(2, 10) if total % t == 0 and total // t > 5]
    if not trays:
        return biscuits(rng)
    t = rng.choice(trays)
    return number(f"{name} bakes {t} trays of {total // t} biscuits, keeps {kept} biscuits, and shares the others equally among {friends} friends. "
                  "How many biscuits does each friend get?", share)


def ages(rng: Random) -> Question:
    (old, young), years, age = rng.sample(NAMES, 2), rng.randrange(2, 12), rng.randrange(4, 30)
    return number(f"{old} is {age + years} years older than {young}. In {years} years {old} will be twice as old as {young} will be then. "
                  f"How old is {young} now?", age)


def wages(rng: Random) -> Question:
    name, base, extra, limit, over = rng.choice(NAMES), rng.randrange(9, 16), rng.randrange(2, 8), rng.choice([20, 25, 30, 35]), rng.randrange(2, 12)
    return number(f"{name} earns ${base} an hour for the first {limit} hours of a week and ${base + extra} for each further hour. This week {name} "
                  f"worked {limit + over} hours. How many dollars did {name} earn?", base * limit + (base + extra) * over)


def sale(rng: Random) -> Question:
    thing, price = rng.choice(["coat", "lamp", "bicycle", "chair", "tent"]), rng.randrange(3, 24) * 20
    percent, coupon = rng.choice([10, 15, 20, 25, 30, 40]), rng.randrange(2, 15)
    return number(f"{a(thing).capitalize()} costs ${price}. In a sale its price is cut by {percent} percent, and then a coupon takes ${coupon} off. "
                  f"How many dollars does the {thing} cost in the end?", price * (100 - percent) // 100 - coupon)


def trip(rng: Random) -> Question:
    name, h, k = rng.choice(NAMES), rng.randrange(2, 5), rng.randrange(2, 5)
    v, w, rest = rng.randrange(8, 18) * 5, rng.randrange(6, 18) * 5, rng.randrange(10, 150)
    return number(f"{name} drives for {h} hours at {v} kilometres an hour and then for {k} hours at {w} kilometres an hour. The whole way is "
                  f"{h * v + k * w + rest} kilometres long. How many kilometres remain?", rest)


def book(rng: Random) -> Question:
    name, first, more, days, left = rng.choice(NAMES), rng.randrange(8, 30), rng.randrange(2, 9), rng.randrange(4, 8), rng.randrange(10, 120)
    return number(f"{name} reads {first} pages of a book on the first day, and every day after that {more} pages more than on the day before. The "
                  f"book has {sum(first + more * i for i in range(days)) + left} pages. How many pages are left after {days} days?", left)


def farm(rng: Random) -> Question:
    hens, rabbits = rng.randrange(4, 40), rng.randrange(4, 40)
    return number(f"A farmer keeps hens, with two legs each, and rabbits, with four legs each. Together they have {hens + rabbits} heads and "
                  f"{2 * hens + 4 * rabbits} legs. How many rabbits are there?", rabbits)


def stickers(rng: Random) -> Question:
    (x, y, z), things, left = rng.sample(NAMES, 3), rng.choice(["stickers", "marbles", "shells", "coins"]), rng.randrange(3, 30) * 3
    had = 2 * left  # a third given leaves two thirds, a quarter of that given leaves half of all
    return number(f"{x} has {had} {things}. {x} gives a third of them to {y}, and a quarter of the others to {z}. How many {things} does {x} "
                  "have then?", had // 2)


# --- dates -----------------------------------------------------------------------------------------------------------


def day(rng: Random, first: int = 1998, last: int = 2031) -> date:
    return date(rng.randrange(first, last + 1), 1, 1) + timedelta(rng.randrange(365))


def say(d: date) -> str:
    return f"{d.day} {MONTHS[d.month - 1]} {d.year}"


def weekday_later(rng: Random) -> Question:
    today, days, ago = rng.randrange(7), rng.randrange(9, 100), rng.random() < 0.4
    asked = f"was it {days} days ago" if ago else f"will it be in {days} days"
    return f"Today is {WEEKDAYS[today]}. Which day of the week {asked}?", "the day of the week", WEEKDAYS[(today - days if ago else today + days) % 7]


def date_later(rng: Random) -> Question:
    today, days = day(rng), rng.randrange(10, 75)
    ago = rng.random() < 0.4
    then = today - timedelta(days) if ago else today + timedelta(days)
    asked = f"was {days} days ago" if ago else f"is {days} days from now"
    return f"Today is {say(today)}. Which date {asked}?", "the date as YYYY-MM-DD", then.isoformat()


def days_between(rng: Random) -> Question:
    start = day(rng)
    days = rng.randrange(15, 200)
    return number(f"How many days after {say(start)} is {say(start + timedelta(days))}?", days)


def weekday_of(rng: Random) -> Question:
    known = day(rng)
    asked = known + timedelta(rng.randrange(12, 120))
    text = f"{say(known)} is a {WEEKDAYS[known.weekday()]}. Which day of the week is {say(asked)}?"
    return text, "the day of the week", WEEKDAYS[asked.weekday()]


def every_days(rng: Random) -> Question:
    first, every, times = day(rng), rng.randrange(5, 13), rng.randrange(3, 8)
    what = rng.choice(["A plant is watered", "A filter is cleaned", "A newsletter is sent", "A bin is emptied"])
    asked = ["third", "fourth", "fifth", "sixth", "seventh"][times - 3]
    text = f"{what} every {every} days, for the first time on {say(first)}. On which date does this happen for the {asked} time?"
    return text, "the date as YYYY-MM-DD", (first + timedelta(every * (times - 1))).isoformat()


def clock_time(rng: Random) -> Question:
    start, first, pause, second = rng.randrange(17 * 60, 24 * 60, 5), rng.randrange(35, 95), rng.randrange(10, 30), rng.randrange(35, 95)
    end = (start + first + pause + second) % (24 * 60)
    text = (f"A play starts at {start // 60:02d}:{start % 60:02d}. Its first act takes {first} minutes, then comes a break of {pause} minutes, "
            f"and the second act takes {second} minutes. At what time does the play end?")
    return text, "the time as HH:MM on the 24-hour clock", f"{end // 60:02d}:{end % 60:02d}"


def age_on(rng: Random) -> Question:
    name, born, years = rng.choice(NAMES), day(rng, 1948, 2010), rng.randrange(8, 20)
    then = day(rng, born.year + years, born.year + years)
    if (born.month, born.day) == (2, 29):  # whose birthdays are a matter of law
        return age_on(rng)
    age = years - ((then.month, then.day) < (born.month, born.day))
    return number(f"{name} was born on {say(born)}. How many years old is {name} on {say(then)}?", age)


# --- objects ---------------------------------------------------------------------------------------------------------


def swaps(rng: Random) -> Question:
    people = rng.sample(NAMES, rng.randrange(3, 6))
    things = rng.sample(["red ball", "blue kite", "green book", "yellow hat", "white cup", "black umbrella", "silver whistle"], len(people))
    has = dict(zip(people, things))
    text = [f"{listed([f'{p} has the {t}' for p, t in has.items()])}."]
    for _ in range(rng.randrange(3, 7)):
        x, y = rng.sample(people, 2)
        has[x], has[y] = has[y], has[x]
        text.append(f"{x} and {y} swap what they have.")
    who = rng.choice(people)
    return " ".join([*text, f"Who has the {has[who]} now?"]), one_of(people), who


def cups(rng: Random) -> Question:
    places, thing = ["left", "middle", "right"], rng.choice(["coin", "pea", "ring", "button"])
    at = rng.choice(places)
    text = [f"Three cups stand in a row, and a {thing} lies under the {at} cup. Every cup that is moved takes along what is under it."]
    for _ in range(rng.randrange(3, 8)):
        x, y = sorted(rng.sample(places, 2), key=places.index)
        at = {x: y, y: x}.get(at, at)
        text.append(f"The {x} cup and the {y} cup trade places.")
    return " ".join([*text, f"Under which cup is the {thing} now?"]), one_of(places), at


def boxes(rng: Random) -> Question:
    colours, things = rng.sample(["red", "blue", "green", "white", "black"], 4), rng.sample(["key", "pen", "spoon", "candle", "thimble", "ribbon"], 3)
    where = dict(zip(things, rng.sample(colours, 3)))
    text = [f"There are four boxes: {listed(colours)}.", *(f"The {t} is in the {c} box." for t, c in where.items())]
    for _ in range(rng.randrange(3, 6)):
        if rng.random() < 0.5:
            thing = rng.choice(things)
            to = rng.choice([c for c in colours if c != where[thing]])
            text.append(f"Somebody puts the {thing} into the {to} box.")
            where[thing] = to
        else:
            source = where[rng.choice(things)]
            to = rng.choice([c for c in colours if c != source])
            text.append(f"Somebody empties the {source} box into the {to} box.")
            where = {t: to if c == source else c for t, c in where.items()}
    thing = rng.choice(things)
    return " ".join([*text, f"In which box is the {thing} now?"]), one_of(colours), where[thing]


def walk(rng: Random) -> Question:
    compass, name = ["north", "east", "south", "west"], rng.choice(NAMES)
    facing = rng.randrange(4)
    text = [f"{name} stands in a field and faces {compass[facing]}."]
    for _ in range(rng.randrange(3, 7)):
        turn, quarter = rng.choice([("turns right", 1), ("turns left", -1), ("turns around", 2)])
        facing = (facing + quarter) % 4
        text.append(f"{name} {turn} and walks {rng.randrange(2, 30)} steps.")
    return " ".join([*text, f"Which way does {name} face now?"]), one_of(compass), compass[facing]


# --- beliefs ---------------------------------------------------------------------------------------------------------


class Scene:
    """A thing in closed containers, people who come and go, and where each of them believes it to be."""

    def __init__(self, rng: Random):
        self.rng, self.people = rng, rng.sample(NAMES, 3)
        self.containers = rng.sample(["basket", "box", "drawer", "suitcase", "cupboard", "bucket", "oven", "backpack"], 3)
        self.thing = rng.choice(["marble", "chocolate bar", "ticket", "toy car", "letter", "apple", "camera", "scarf"])
        self.room = rng.choice(["kitchen", "workshop", "classroom", "attic", "garage", "office"])
        self.present = set(self.people)
        self.at = rng.choice(self.containers)
        self.belief = dict.fromkeys(self.people, self.at)
        self.text = [(f"{listed(self.people)} are in the {self.room}. There are {listed([a(c) for c in self.containers])} in it, all closed, "
                      f"so that nobody sees what is inside. {self.people[0]} puts the {self.thing} into the {self.at} while all three watch.")]

    def leave(self, who: str) -> None:
        self.present.discard(who)
        self.text.append(f"{who} leaves the {self.room}.")

    def come_back(self, who: str) -> None:
        self.present.add(who)
        self.text.append(f"{who} comes back.")

    def move(self, who: str, secretly_seen_by: str | None = None) -> None:
        self.at = self.rng.choice([c for c in self.containers if c != self.at])
        self.text.append(f"{who} moves the {self.thing} into the {self.at}.")
        if secretly_seen_by:
            self.text.append(f"Through the window {secretly_seen_by} sees this, but nobody in the {self.room} notices {secretly_seen_by} there.")
        self.belief.update(dict.fromkeys([*self.present, *([secretly_seen_by] if secretly_seen_by else [])], self.at))

    def ask(self, question: str, answer: str) -> Question:
        return " ".join([*self.text, question]), one_of(self.containers), answer

    def ask_where_looks(self, who: str) -> Question:
        return self.ask(f"{who} wants the {self.thing}. Where will {who} look for it first?", self.belief[who])


def missed(rng: Random) -> Question:
    """One person misses the last move, perhaps not the first."""
    s = Scene(rng)
    mover, away, other = rng.sample(s.people, 3)
    if rng.random() < 0.5:
        s.move(other)
    s.leave(away)
    s.move(mover)
    if rng.random() < 0.5:
        s.move(other)
    s.come_back(away)
    return s.ask_where_looks(away)


def was_there(rng: Random) -> Question:
    """Somebody leaves, but the one who is asked about saw it all; or everybody is back before the last move."""
    s = Scene(rng)
    mover, away, other = rng.sample(s.people, 3)
    s.leave(away)
    s.move(mover)
    s.come_back(away)
    if rng.random() < 0.5:
        s.move(other)
        return s.ask_where_looks(away)
    return s.ask_where_looks(other)


def both_away(rng: Random) -> Question:
    """Two leave one after the other, with a move before each return: each saw another part."""
    s = Scene(rng)
    mover, first, second = rng.sample(s.people, 3)
    s.leave(first)
    s.move(mover)
    s.leave(second)
    s.move(mover)
    s.come_back(first)
    if rng.random() < 0.5:
        s.move(mover)
    s.come_back(second)
    return s.ask_where_looks(rng.choice([first, second]))


def secret(rng: Random) -> Question:
    """Somebody outside sees the move unnoticed: where they look, and where the mover expects them to look, differ."""
    s = Scene(rng)
    mover, away = rng.sample(s.people, 2)
    before = s.at
    s.leave(away)
    s.move(mover, secretly_seen_by=away)
    s.come_back(away)
    if rng.random() < 0.5:
        return s.ask_where_looks(away)
    return s.ask(f"{away} wants the {s.thing}. Where does {mover} think that {away} will look for it first?", before)


def expects(rng: Random) -> Question:
    """One who was there all the time knows what the other missed."""
    s = Scene(rng)
    mover, away, other = rng.sample(s.people, 3)
    s.leave(away)
    s.move(mover)
    s.move(other)
    s.come_back(away)
    watcher = rng.choice([mover, other])
    return s.ask(f"{away} wants the {s.thing}. Where does {watcher} think that {away} will look for it first?", s.belief[away])


def really(rng: Random) -> Question:
    """The plain fact, in a story about beliefs."""
    s = Scene(rng)
    mover, away, other = rng.sample(s.people, 3)
    s.leave(away)
    s.move(mover)
    s.move(other)
    s.come_back(away)
    return s.ask(f"{away} wants the {s.thing}. Where is it really?", s.at)


GROUPS: dict[str, list[Callable[[Random], Question]]] = {
    "arithmetic": [change, tulips, bus, tank, biscuits, ages, wages, sale, trip, book, farm, stickers],
    "dates": [weekday_later, date_later, days_between, weekday_of, every_days, clock_time, age_on],
    "objects": [swaps, cups, boxes, walk],
    "beliefs": [missed, was_there, missed, both_away, secret, expects, missed, really],
}


if __name__ == "__main__":
    run_script(main)
