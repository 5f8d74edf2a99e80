"""Tasks: what is right, what only looks right, which steps are written, what a change does."""

import itertools
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from nanoexit.tasks import TASKS, Prompt, Verdict, is_held_out, task_of

# checker target == right replies != wrong replies. Bars separate replies, ;; rows, ¶ is a
# line break, <2212> a character. Replies start with #### or Answer: unless an @ precedes them.
TABLE = r"""
gsm8k 72 == 72|@####72|72.|72.0|$72.00|72,|@####¶72|= 72|~72 != @72|@The answer is 72.|@####|@
gsm8k 72 != about 72|<72|>72|7 2|72_000|0x48 ;; gsm8k 72 != 72, 73|72 and 73|48+24=72|72!|72^1
gsm8k 72 == **72**|*72*|`72`|"72"|(72)|[72]|@**#### 72**|Answer: 72 != 72 or 73|72 to 80|72–80
gsm8k 72 == \boxed{72}|@So it is \boxed{72}.|\(72\)|$72$|$\$72$|\text{72 clips}
gsm8k 72 != @\boxed{71} no, \boxed{72}|71¶\boxed{72}|\frac{72}{2}|x = 3y means 72|72x
gsm8k 72 == @<think>no</think>#### 72|@<think>#### 71</think>#### 72|７２|٧٢|<<48+24=72>>72
gsm8k 72 != @<think>#### 72</think>I do not know|@<think>#### 72|71¶#### 72|72¶#### 71
gsm8k 72 != <<48+24=72>>71 ;; gsm8k 1234 != 1,234,5|1,23|123,4|1,2345|0,001,234
gsm8k 1234 == 1,234|1,234.|1 234|1<2009>234|1<202f>234|1<00a0>234|1{,}234 != 12,34|1,2,3,4|1.234
gsm8k 1 == 1|1.00|3/3|1e0 != 1/2|1e3|1,234|1{,}234|1\,234|1 234|1/0|1.5|1:30|1st
gsm8k 1234567 == 1,234,567 dollars|1 234 567|@####1234567 != 1,234567|1234,567
gsm8k 500 == 500|5e2|0500 != 0,500|0.500|500,00|1.500,00|.500 ;; gsm8k 3 != 3 times 4|3 dozen
gsm8k -3 == -3|<2212>3|- 3|–3|-3.0 != 3|+3|1-3|0-3 ;; gsm8k -5 == -$5|$-5|-5.00 != $5|5
gsm8k 3 == 3|+3|**3** eggs != <2212>3|- 3|three|3 hundred|3 or 4|3 million|3k
gsm8k 5 == $5|€5|5€|+$5 != -$5|.5|5½|5 1/2|5 and a half|#5|5-10 ;; gsm8k .5 == 0.5|2/4 != 5
gsm8k 0.5 == .5|0.5|0.50|1/2|½|\frac{1}{2}|5e-1 != 5|0,5|1/20|2 ;; gsm8k 1/2 == 0.5|1/2 != 1|2|12
gsm8k 25 == 25|$25 != $.25|0.25|2.5 ;; gsm8k 2 == 2|4/2 != 2^10|2**10|2*3|2 x 3|2²|1/2|2 by 4|2(3)
gsm8k 1500 == 1.5e3|1.5 × 10^3|1.5 \times 10^{3}|1.5×10³ != 1.5|1.5 × 10 ;; gsm8k 22 == 22 != 2²|2 2
gsm8k 0 == 0|-0|0.00 != @####|none|0 or 1 ;; gsm8k 18 != 18 #### 5|18 - 5|18 ~ 20|@18
gsm8k 18 == 18%|18 eggs, or 1.5 dozen|$18 a day|18 (9*2)|@16-3-4=9, 9*2=18¶#### 18|18/day
gsm8k 18 == 18¶¶Question: Next one?¶#### 5|18¶¶A farmer has 3 cows. How many legs?¶#### 12
gsm8k 18 == 18¶#### 18 != 19¶¶Question: Next?¶#### 18 ;; gsm8k 5 == Step one¶#### 5 != 18¶Q:¶#### 5
gsm8k 9007199254740993 == 9007199254740993 != 9007199254740992|9.007199254740993e15x
gsm8k 10 == 10|1e1 != 10-20|10 or 20|1e999999999|<many>|2024-05-10 ;; gsm8k 51/2 != 5½
exact 72 == 72|72.0|$72|$72$|\boxed{72}|@72 != 72 apples|7 2|@Answer: ;; exact 1.5 == 1.5. != 15|1,5
exact 1234 == 1,234|1234 != 12,34|1.234 ;; exact 1,234 == 1234 != 1,2,3,4 ;; exact < == < != =|>
exact 0.5 == 1/2|.5 != 5|1/20 ;; exact 1/2 == ½|\frac{1}{2} != 12 ;; exact 1,5 == 1,5 != 15|1.5
exact -5 == <2212>5|-5.0 != 5 ;; exact 5 == 5|+5|５ != -5|@5 is not 6|5%|<2212>5
exact > == >|@> != <|@|@Answer:|>= ;; exact + == @+ != -|@ ;; exact * == * != @|**|+
exact ... == ... != @|.|@Answer: ;; exact C++ == C++|@c++ != C|C#|C+ ;; exact 3! == 3! != 3|6
exact A == A)|(A)|A.|a|'A'|@**Answer: A**|`A` != B|A or B|@Answer A|AA ;; exact it's == it's != its
exact a<b == a<b|$a<b$ != a>b|ab|a=b ;; exact x^2 == x²|x^2 != x*2|x2 ;; exact 2^3 == 2³ != 2+3|23|8
exact [1,2) == [1,2) != (1,2]|[1,2]|1,2 ;; exact a*b*c == a*b*c != abc ;; exact €72 == €72 != $72|72
exact a_b == a_b|a\_b != ab ;; exact Paris != Paris, Texas|@Par is ;; exact 50% == 50% != 50|0.5
exact yes == Yes.|yes¶So be it.|@yes != No. (yes would be wrong)|@yes¶no|@not yes|yes or no
exact the drawer == The  Drawer.|the table¶Answer: the drawer|@<think>x</think>the drawer
exact the drawer == @ANSWER : “the drawer” != the drawers|the drawer¶Answer: the table
exact the drawer != @<think>the drawer|@<think>Answer: the drawer</think>no|@It is the drawer
exact Paris == @Answer:¶Paris|@**Answer:** Paris|@The final answer: Paris.|@*Answer:* Paris
exact 10:30 == 10:30 != 10.30|1030 ;; exact café == cafe<0301> != cafe
none 72 != @72|@Answer: 72|@#### 72|@</think>72
clock 6 == @6|@5 *9 5 +7 2 +1 3 +3 6 </think> 6|@</think> 6|@<think> </think> 6 != @5 *9 5 +7 2
clock 6 != @</think> 6 6|@</think> 5|@</think>|@|@<think> 6
"""
STARTS = {"gsm8k": "#### ", "exact": "Answer: "}
CHAIN = Prompt("x", "5 *9 +7 +1 +3", "6", checker="clock")  # 45, 12, 3, 6


@pytest.mark.parametrize("line", TABLE.split("\n")[1:-1])
def test_triples(line):
    """Catches: a right answer refused for its spelling; a wrong one taken for a right one."""
    line = re.sub("<([0-9a-f]{4})>", lambda m: chr(int(m[1], 16)), line.replace("¶", "\n"))
    for row in line.replace("<many>", "1" * 5000).split(" ;; "):
        head, *groups = re.split(" ([!=]=) ", row)
        checker, target = head.split(" ", 1)
        prompt = Prompt("x", CHAIN.prompt, target, checker=checker)
        for sign, replies in zip(groups[::2], groups[1::2]):
            for reply in replies.split("|"):
                text = reply[1:] if reply.startswith("@") else STARTS[checker] + reply
                assert task_of(prompt).verify(prompt, text).correct is (sign == "=="), text[:60]


def test_a_chain_is_read_left_to_right():
    """Catches: operator precedence; a carry that is kept; leftover words that are ignored."""
    clock = TASKS["clock"]
    assert clock.values(CHAIN.prompt) == clock.values(" 5*9+7 +1+3 ") == ["5", "2", "3", "6"]
    for bad in ("5", "5 *9 +", "55 +1", "5 *2", "5 - 1", "5 +12", "5 a", "", "+1 5", "5 +1 ="):
        assert clock.values(bad) == []
    assert TASKS["permute"].values("0 a b") == ["2", "1"]


@pytest.mark.parametrize("name, text, steps, claimed", [
    ("clock", "5 *9 5 +7 2 +1 3 +3 6 </think> 6", "1111", 4),
    ("clock", "<think> 5 *9 5 +7 2 </think> 6", "1100", 2),
    ("clock", "5 *9 5 +1 3 +3 6 </think> 6", "1011", 3),  # skipped
    ("clock", "5 *9 4 +7 2 +1 3 +3 6 </think> 6", "0111", 4),  # false
    ("clock", "5 +7 2 *9 5 +1 3 </think> 6", "1010", 3),  # out of order
    ("clock", "5 *9 5 *9 5 +7 2 </think> 6", "1100", 3),  # twice
    ("clock", "5 +3 6 *9 5 +7 2 +1 3 </think> 6", "1110", 4),  # the last one first
    ("clock", "5 2 3 6 </think> 6", "0000", 0),  # values alone are no steps
    ("clock", "5 *9 55 </think> 6", "0000", 0), ("clock", "<think> 5 *9 5", "1000", 1),
    ("clock-values", "<think> 5 2 3 6 </think> 6", "1111", 4),
    ("clock-values", "5 4 3 6 6 </think> 6", "1011", 5),
    ("clock-values", "2 3 6 </think> 6", "0000", 3),  # in other places
    ("clock", "5 *9 5 +7 2 +1 3 +3 6", "0000", 0),  # no end: all of it is conclusion
])  # fmt: skip
def test_written_steps(name, text, steps, claimed):
    """Catches: a false, repeated or misplaced step that counts; no credit after a skipped one."""
    found = TASKS[name].verify(CHAIN, text)
    assert found.steps == [s == "1" for s in steps] and found.claimed == claimed
    assert found.written == steps.count("1") / 4
    assert found.unwritten_run == max(map(len, steps.split("1")))
    assert Verdict(True).written is None and Verdict(True).unwritten_run is None


@pytest.mark.parametrize("checker, text, split", [
    ("clock", "<think> a </think> 6", ("<think> a ", "</think>", " 6")),
    ("clock", "a </think> 6 </think> 7", ("a ", "</think>", " 6 </think> 7")),
    ("clock", "5 *9 5", ("", "", "5 *9 5")),
    ("gsm8k", "9*2=18\n#### 18", ("9*2=18\n", "####", " 18")),
    ("gsm8k", "#### Step 1: add\n#### 18", ("#### Step 1: add\n", "####", " 18")),
    ("gsm8k", "<think>#### 1</think>#### 18", ("<think>#### 1", "</think>", "#### 18")),
    ("exact", "so\nAnswer: x\nANSWER: y", ("so\nAnswer: x\n", "ANSWER:", " y")),
    ("exact", "y", ("", "", "y")), ("none", "<think>a", ("<think>a", "", "")),
])  # fmt: skip
def test_where_a_response_is_split(checker, text, split):
    """Catches: a conclusion read out of the reasoning; a heading taken for the answer's mark."""
    prompt = Prompt("x", CHAIN.prompt, "18", checker=checker)
    assert task_of(prompt).split(text) == split and "".join(split) == text


@pytest.mark.parametrize("name", ["clock", "clock-values", "permute"])
def test_chains_write_verify_and_change_their_own_steps(name):
    """Catches: a form that its own verifier refuses; a change that is none or computed wrongly."""
    task, rng = TASKS[name], np.random.default_rng(0)
    for k in range(1, task.longest + 1):
        for _ in range(30):
            prompt = task.make(rng, k)
            for n in range(k + 1):
                verdict = task.verify(prompt, task.response(prompt, n))
                assert verdict.correct and verdict.claimed == n
                assert verdict.steps == [i < n for i in range(k)] and prompt.group[0] == str(k)
            assert task.reached(prompt, task.written(prompt, k)) == prompt.answer
            change = task.change(prompt, rng)
            if k == 1:
                assert change is None
                continue
            *true, wrong = task.claims(change.text)
            n = len(true) + 1
            assert [*true, wrong] != task.claims(task.written(prompt, n))
            assert true == task.claims(task.written(prompt, n - 1))
            rest = task.parse(prompt.prompt)[n + 1 :]
            assert task.values(" ".join([change.text[-1], *rest]))[-1] == change.follow
            assert change.stay == prompt.answer != change.follow


def test_chains_in_english():
    """Catches: values out of range; a full text that is refused; a change with a wrong effect."""
    task, rng = TASKS["words"], np.random.default_rng(0)
    number = {word: i for i, word in enumerate(task.numbers)}
    for prompt in itertools.islice(task.prompts(rng), 400):
        start, *rest = re.findall("|".join(task.numbers), prompt.prompt)
        signs = [1 if verb == "adds" else -1 for verb in re.findall("adds|takes", prompt.prompt)]
        moves = [sign * number[n] for sign, n in zip(signs, rest)]
        values = [number[start] + sum(moves[:i]) for i in range(1, len(moves) + 1)]
        assert task.numbers[values[-1]] == prompt.answer and min(values) >= 0 and max(values) < 8
        for n in range(len(moves) + 1):
            verdict = task.verify(prompt, task.response(prompt, n))
            assert verdict.correct and verdict.steps == [i < n for i in range(len(moves))]
        assert task.response(prompt, 0) == f" So {prompt.answer}"
        assert not task.verify(prompt, task.response(prompt, 1) + " no").correct
        swapped = replace(prompt, prompt=re.sub(r"[A-Z]\w+ (?=adds|takes)", "Ivy ", prompt.prompt))
        assert is_held_out(prompt) == is_held_out(swapped) and swapped.prompt != prompt.prompt
        if change := task.change(prompt, rng):
            *true, wrong = re.findall(r"makes (\w+)", change.text)
            moved = number[wrong] - values[len(true)]
            true_text = task.written(prompt, len(true) + 1)
            assert moved and change.text == f"{true_text.rpartition(' ')[0]} {wrong}"
            assert change.follow == task.numbers[values[-1] + moved]
    for bad in map("Start with {}".format, ("nine. Ann adds one.", "seven. Ann adds one.", "two.")):
        assert task.values(bad) == [] and task.target(Prompt("x", bad)) is None


def test_operations():
    """Catches: an operation that is no permutation; letters whose chains can be shortened."""
    clock, letters = TASKS["clock"].table, TASKS["permute"].table
    assert all(sorted(row) == [*"0123456789"] for row in [*clock.values(), *letters.values()])
    for a, b in itertools.product(range(10), repeat=2):
        line = "".join(str((a * d + b) % 10) for d in range(10))
        assert all(sum(map(str.__eq__, line, row)) <= 3 for row in letters.values())
    pairs = {"".join(g[int(d)] for d in f) for f in letters.values() for g in letters.values()}
    assert len(pairs) == 144 and not pairs & {*letters.values()}


def test_made_prompts_favour_the_long():
    """Catches: lengths out of proportion; ids that repeat."""
    prompts = list(itertools.islice(TASKS["clock"].prompts(np.random.default_rng(0)), 4200))
    counts = Counter(p.group[0] for p in prompts)
    assert [round(counts[k] / 200) for k in "123456"] == [1, 2, 3, 4, 5, 6]
    assert len({p.id for p in prompts}) == 4200


@pytest.mark.parametrize("checker, answer, text, reached", [
    ("gsm8k", "72", "<think>24, then 48+24 = 1,072.", "1072"),
    ("gsm8k", "72", "it is -5", "-5"), ("gsm8k", "72", "on 2024-05-10", "10"),
    ("gsm8k", "72", "none", None), ("exact", "the box", "so\nthe Box.\n", "the box"),
    ("exact", "7", "6 or 7\nso", "7"), ("clock", "6", "<think> 5 *9 5 +7", "5"),
    ("clock", "6", "<think>", None),
])  # fmt: skip
def test_what_a_reasoning_has_come_to(checker, answer, text, reached):
    """Catches: an operand or the opening token read as the last value."""
    prompt = Prompt("x", CHAIN.prompt, answer, checker=checker)
    assert task_of(prompt).reached(prompt, text) == reached
