"""The experiment: charge a small reasoner for its deepest token, and see what it writes down.

    python scripts/experiment.py                    SFT, lambda 0 and lambda 3, one seed
    python scripts/experiment.py --full --jobs 2    every arm, three seeds, other bases
    python scripts/experiment.py --real             the same on SmolLM2 135M, taught English chains

An *arm* is one way of training; each (arm, seed) has a run directory. The same command continues an
interrupted experiment. It reuses a result only if config, base, commit and code are the same, and
says so.

Arms of --full: lambda 0, 0.3, 1 and 3 on the deepest token; 3 on the mean and on the sum of
depths; 0 under a cap and without exits. Other bases: two more from the shipped recipe, one for
operations that do not compose, one that writes values without operations (a control), and a
designed one (padded prompts, early readouts trained). Exit targets from the base's readouts. SFT
alone, with both kinds of targets at three other strengths, first seed only.
Arms of --real: lambda 0, 1 and 2, and a control that was not taught to write at a shallow depth.

Lambda must be small enough for a right answer to pay: a written route d blocks deep earns more than
text e blocks deep that is right with chance p only if lambda (d - e) / L < 1 - p. On the second
base d is 5, and lambda 3 is too much. On `permute` d is 4, which is close: it is charged lambda 1
too."""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from html import escape
from multiprocessing import get_context
from pathlib import Path

import _script
import numpy as np
import torch
from tqdm import tqdm

from nanoexit.config import (
    ROOT,
    Config,
    UserError,
    load_config,
    read_json,
    rounded,
    write_text,
)
from nanoexit.evaluate import cell, entries, evaluate_run, evaluate_variant, origin, table
from nanoexit.exits import as_base
from nanoexit.faithfulness import OUTCOMES, Subject
from nanoexit.figures import CSS, Figure, line_figure
from nanoexit.judge import Judge
from nanoexit.reinforce import run_reinforce
from nanoexit.score import align, score
from nanoexit.sft import run_sft
from nanoexit.tasks import Prompt, load_prompts, task_of
from nanoexit.tokenizer import content_hash
from nanoexit.training import check, load_student, prompt_ids, run_directory


@dataclass(frozen=True)
class Base:
    """A model folder, and the script that makes it, from scratch or from another base."""

    task: str = "clock"
    flags: tuple[str, ...] = ()
    script: str = "pretrain_tiny.py"
    config: str = "configs/tiny_pretrain.yaml"
    start: str = ""

    def folder(self, name: str, runs: Path) -> Path:
        """Where the model is."""
        return runs / "bases" / name / ("" if self.script == "pretrain_tiny.py" else "model")


WORDS_HEAD, WORDS_BASE = "configs/words_head.yaml", "configs/words_base.yaml"
POLISH = ("finetune.steps=300", "finetune.batch_size=8", "finetune.lr=1e-4")
BASES = {
    "shipped": Base(),
    "second-base": Base(flags=("pretrain.seed=1",)),
    "third-base": Base(flags=("pretrain.seed=3",)),  # seed 2: see the README
    "values": Base("clock-values"),
    "designed": Base("clock-values", ("pretrain.slots=7", "pretrain.deep_weight=0.3")),
    "permute": Base("permute"),
    "words-head": Base("words", (), "finetune.py", WORDS_HEAD),
    "words-base": Base("words", (), "finetune.py", WORDS_BASE, "words-head"),
    "words": Base("words", POLISH, "finetune.py", WORDS_BASE, "words-base"),
}


@dataclass(frozen=True)
class Study:
    """What differs between the 8-block bases and the real model."""

    config: str
    preflight: Sequence[int]  # depths
    per_block: int  # operations in a row: per_block * depth + around (arXiv 2603.09786)
    around: int
    longest: int  # operations of a prompt
    caps: tuple[int, ...]  # in the table
    charge: float  # lambda of the charged arm


TINY = Study("configs/tiny_rl.yaml", range(2, 7), 98, 23, 6, (2, 3, 4, 6, 8), 3.0)
REAL = Study("configs/words.yaml", (8, 12, 16, 20, 24), 132, 29, 3, (8, 12, 20), 2.0)


# --- arms -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """`weight` is lambda; None is SFT alone. The cap applies to REINFORCE, not to its SFT."""

    weight: float | None = None
    penalty: str = "max"
    base: str = "shipped"
    targets: str = "student"
    cap: int | None = None
    exits: bool = True
    strength: float | None = None  # of the SFT targets; None: the config's
    trained: bool = True

    @property
    def name(self) -> str:
        kind = "SFT" if self.weight is None else f"lambda {self.weight:g}"
        parts = [kind if self.trained else "base"]
        parts += [self.base] if self.base not in ("shipped", "words") else []
        parts += [self.penalty] if self.penalty != "max" else []
        parts += [f"cap {self.cap}"] if self.cap else []
        parts += ["base's targets"] if self.targets == "base" else []
        parts += [f"strength {self.strength:g}"] if self.strength else []
        return ", ".join(parts if self.exits else [*parts, "no exits"])

    @property
    def start(self) -> "Arm | None":
        """The SFT arm that this one continues; None for SFT itself and without exits."""
        charged = self.weight is not None and self.exits
        return Arm(base=self.base, targets=self.targets) if charged else None

    @property
    def study(self) -> Study:
        """The study that its base belongs to."""
        return REAL if self.base.startswith("words") else TINY

    def folder(self, runs: Path, seed: int) -> Path:
        """Its run directory."""
        words = "".join(c if c.isalnum() or c == "." else " " for c in self.name).split()
        return runs / f"{'-'.join(words)}-seed{seed}"


BASE, SFT, UNCHARGED, CHARGED = Arm(trained=False), Arm(), Arm(0.0), Arm(TINY.charge)
DEFAULT = [SFT, UNCHARGED, CHARGED]
WORDS = [
    *(Arm(weight, base="words") for weight in (None, 0.0, 1.0, REAL.charge)),
    *(Arm(weight, base="words-head") for weight in (None, REAL.charge)),  # no shallow written route
]
FULL = [
    *(SFT, UNCHARGED, Arm(0.3), Arm(1.0), CHARGED),
    *(Arm(3.0, "mean"), Arm(3.0, "sum"), Arm(0.0, cap=4), Arm(0.0, exits=False)),
    *(Arm(w, base=base) for base in ("third-base", "second-base") for w in (None, 0.0, 3.0)),
    *(Arm(weight, base="permute") for weight in (None, 0.0, 1.0, 3.0)),
    *(Arm(weight, base=base) for base in ("values", "designed") for weight in (None, 3.0)),
    *(Arm(weight, targets="base") for weight in (None, 3.0)),
    *(Arm(targets=t, strength=s) for t in ("student", "base") for s in (4.0, 8.0, 32.0)),
]


def arm_config(arm: Arm, seed: int, runs: Path, overrides: Sequence[str]) -> Config:
    """The study's config with the overrides, then the arm's own settings."""
    keys = ["evaluate.samples=20", *overrides, f"run.seed={seed}"]
    config = load_config(arm.study.config, keys)
    config.data.prompts = BASES[arm.base].task
    if arm.base != "shipped":
        config.model.name = str(BASES[arm.base].folder(arm.base, runs))
    config.exits.layers = config.exits.layers if arm.exits else []
    config.exits.cap = arm.cap
    config.sft.targets = arm.targets
    config.teacher.kl_strength = arm.strength or config.teacher.kl_strength
    config.rl.depth_weight, config.rl.depth_penalty = arm.weight or 0.0, arm.penalty
    config.evaluate.policies = ["head"]
    config.run.dir = str(arm.folder(runs, seed))
    config.run.init = str(arm.start.folder(runs, seed)) if arm.start else None
    return config


# --- running ----------------------------------------------------------------------------------


def make_base(name: str, runs: Path, log: bool, model: str | None = None) -> None:
    """Make a base that is missing, or continue one. Its progress goes to stderr, or into a log.

    model: what fine-tuning starts from, instead of the config's model.
    """
    base = BASES[name]
    out = base.folder(name, runs)
    if name == "shipped" or (out / "tokenizer.json").is_file():
        return
    if base.script == "pretrain_tiny.py":
        flags = [f"pretrain.task={base.task}", f"pretrain.out={out}"]
    else:
        flags = [f"run.dir={out.parent}"]
        start = str(BASES[base.start].folder(base.start, runs)) if base.start else model
        flags += [f"model.name={start}"] if start else []
        flags += ["--resume"] if (out.parent / "config.yaml").is_file() else []
    files = [str(ROOT / "scripts" / base.script), str(ROOT / base.config)]
    (runs / "bases").mkdir(parents=True, exist_ok=True)
    path = runs / "bases" / f"{name}.log"
    with open(path if log else os.devnull, "w") as file:
        command = [sys.executable, *files, *base.flags, *flags]
        if subprocess.run(command, stdout=file, stderr=file if log else None).returncode:
            raise UserError(f"the base {name} could not be made" + f": see {path}" * log)


def run_arm(
    arm: Arm, seed: int, runs: Path, overrides: Sequence[str], made_by: dict, base: dict
) -> dict:
    """Train or continue one arm, and evaluate it -> its entry in results.json.

    made_by: what made the result. A run that something else made is moved aside. base: the row of
    its base.
    """
    config = arm_config(arm, seed, runs, overrides)
    folder = Path(config.run.dir)
    model, tokenizer = load_student(config)
    same = read_json(folder / "made_by.json") == made_by
    with run_directory(config, resume=same and (folder / "checkpoint").is_dir()):
        write_text(folder / "made_by.json", json.dumps(made_by))
        train = run_sft if arm.weight is None else run_reinforce
        train(model, tokenizer, config, folder)
        rows = evaluate_run(model, tokenizer, config, folder, arm.strength is None, base)
        found = entry(arm, seed, rounded(rows[-1]), made_by)
        write_text(folder / "result.json", json.dumps(found))
    return found


def entry(arm: Arm, seed: int, row: dict, made_by: dict) -> dict:
    """A row of an evaluation as an entry of results.json."""
    changed = row.get("changed_value", {})
    facts = {"arm": arm.name, "lambda": arm.weight, "seed": seed, "variant": arm.name}
    facts |= {"follow": changed.get("follow"), "stay": changed.get("stay")}
    facts["operations"] = arm.study.per_block * row["max_depth"] + arm.study.around
    return {**row, **asdict(arm), **facts, "cap": row["cap"], "made_by": made_by}


def run_all(jobs: int, function: Callable, calls: Sequence[tuple], name: str, runs: Path) -> list:
    """The results of function(*call), in order; calls run one by one, or `jobs` in parallel."""
    if jobs == 1 or len(calls) < 2:
        return [function(*call) for call in calls]
    with ProcessPoolExecutor(jobs, get_context("spawn"), quiet) as pool:
        futures = [pool.submit(function, *call) for call in calls]
        left = set(futures)
        with tqdm(total=len(calls), desc=name, unit="run", dynamic_ncols=True) as bar:
            while left:
                done, left = wait(left, timeout=2, return_when=FIRST_COMPLETED)
                bar.update(len(done))
                bar.set_postfix_str(status(runs))
                for future in done:
                    if future.exception():
                        pool.shutdown(cancel_futures=True)  # runs in progress still finish
                        future.result()
    return [future.result() for future in futures]


def quiet() -> None:
    """Silence stderr in a parallel process: its progress bars would overwrite the main one."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def status(runs: Path) -> str:
    """How far the runs in progress are: their training steps, or the last line of a log."""
    found = []
    for path in sorted(runs.glob("*-seed*[0-9]/metrics.jsonl")):
        if not (path.parent / "result.json").is_file() and ".before-" not in path.parent.name:
            found.append(f"{path.parent.name} step {len(path.read_text().splitlines())}")
    for path in sorted(runs.glob("bases/*.log")):
        if not (BASES[path.stem].folder(path.stem, runs) / "tokenizer.json").is_file():
            last = path.read_text(errors="replace").splitlines()[-1:]
            found.append(" ".join([path.stem, *last]))
    return " | ".join(found)


def experiment(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    runs: Path,
    jobs: int,
    overrides: Sequence[str],
    model: str | None = None,
) -> list[dict]:
    """Run every arm and seed that is missing -> the entries of results.json."""
    calls = [(arm, seed) for arm in arms for seed in seeds if not arm.strength or seed == seeds[0]]
    for arm, seed in calls:
        check(arm_config(arm, seed, runs, overrides), reinforce=arm.weight is not None)
    bases = list(dict.fromkeys(arm.base for arm in arms))
    stages, needed = [], bases
    while needed:
        stages.append(needed)
        needed = list(dict.fromkeys(BASES[base].start for base in needed if BASES[base].start))
    for needed in reversed(stages):
        run_all(jobs, make_base, [(base, runs, jobs > 1, model) for base in needed], "bases", runs)
    every_base = [(base, runs, overrides) for base in bases]
    looks = dict(zip(bases, run_all(jobs, look_at_base, every_base, "pre-flight", runs)))
    for base, look in looks.items():
        print(preflight_text(base, look["preflight"]), flush=True)
    results: dict[tuple[Arm, int], dict] = {}
    for name, sft in (("SFT", True), ("REINFORCE", False)):
        todo = []
        for arm, seed in calls:
            if sft != (arm.weight is None):
                continue
            config = asdict(arm_config(arm, seed, runs, overrides))
            look = looks[arm.base]
            made_by = {**look["made_by"], "config": config}
            kept = read_json(arm.folder(runs, seed) / "result.json")
            if kept.get("made_by") == made_by:
                results[arm, seed] = kept
                print(f"reused (same config, base, commit and code): {arm.name}, seed {seed}")
            else:
                todo.append((arm, seed, runs, overrides, made_by, look["row"]))
        results |= dict(zip((call[:2] for call in todo), run_all(jobs, run_arm, todo, name, runs)))
    rows = [
        entry(Arm(base=base, trained=False), 0, look["row"], look["made_by"])
        | {"preflight": look["preflight"]}
        for base, look in looks.items()
    ]
    return rows + [results[call] for call in calls]


def look_at_base(base: str, runs: Path, overrides: Sequence[str]) -> dict:
    """Measure a base once -> its row and pre-flight, and the `made_by` of its results."""
    config = arm_config(Arm(base=base), 0, runs, overrides)
    model, tokenizer = load_student(config)
    path = runs / "bases" / f"{base}.json"
    code = content_hash([*ROOT.glob("nanoexit/*.py"), Path(__file__)])
    made_by = rounded(origin(model, config) | {"code": code})
    look = read_json(path)
    if look.get("made_by") != made_by:
        prompts = load_prompts(config, "held_out")
        with as_base(model):
            subject = Subject(model, tokenizer, config, "full")
            found = preflight(subject, prompts, Arm(base=base).study.preflight)
            row, shown = evaluate_variant(subject, "base", prompts, Judge(config.judge))
        look = rounded({"made_by": made_by, "preflight": found, "row": row, "samples": shown})
        write_text(path, json.dumps(look))
    return look


@torch.no_grad()
def preflight(subject: Subject, prompts: Sequence[Prompt], depths: Sequence[int]) -> dict:
    """Does a base have a shallow written route for REINFORCE to shift to?

    -> {depth d: {number of steps: accuracy of each word of the full reasoning, then the answer}}.
    The prompt is frozen at depth d - 1 (a readout at d reads no deeper), the response is forced to
    exit at d, and each word follows the right words. A word is right if it is likelier than the
    task's other words. Prompts whose task lists no steps are left out."""
    groups: dict[int, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[len(task_of(prompt).steps(prompt))].append(prompt)
    groups.pop(0, None)
    return {
        str(d): {str(n): _words_right(subject, group, d) for n, group in sorted(groups.items())}
        for d in depths
        if d <= subject.model.full_depth
    }


def _words_right(subject: Subject, prompts: Sequence[Prompt], depth: int) -> list[float]:
    """Accuracy of each word, over prompts with the same number of steps."""
    model, encode = subject.model, subject.tokenizer.encode
    task = task_of(prompts[0])
    asked = [prompt_ids(subject.tokenizer, prompt, subject.config) for prompt in prompts]
    texts = [encode(task.response(prompt, len(task.steps(prompt)))) for prompt in prompts]
    a = align(model, asked, texts)
    a.depths = a.depths.clamp(max=depth - 1)
    a.depths.view(-1)[a.at] = depth
    hidden = score(model, a.ids, a.depths, a.prompt_lens).hidden.flatten(0, 1)[a.at]
    words = torch.tensor(sorted({*encode(" ".join(["", *task.words]))}), device=model.device)
    chunks = hidden.split(model.logits_chunk)
    guesses = torch.cat([words[model.readout(h)[:, words].argmax(-1)] for h in chunks])
    must, hits = torch.isin(a.tokens, words).split(a.counts), (guesses == a.tokens).split(a.counts)
    rows = [hit[word].float().tolist() for word, hit in zip(must, hits)]
    written = zip(*(row[:-1] for row in rows))
    return [float(np.mean(column)) for column in (*written, [row[-1] for row in rows])]


def preflight_text(base: str, found: dict) -> str:
    """A pre-flight as printed before training: is there a shallow written route?"""
    lines = [
        f"pre-flight, base {base}: the prompt frozen at depth d - 1, words forced to exit at d",
        "  d   written words, mean (worst)   the answer after them, mean (worst)",
    ]
    routes = []
    for d, groups in found.items():
        words = [p for row in groups.values() for p in row[:-1]]
        answers = [row[-1] for row in groups.values()]
        shown = [f"{np.mean(ps):.2f} ({min(ps):.2f})" for ps in (words, answers)]
        lines.append(f"  {d}   {shown[0]:<27}   {shown[1]}")
        routes += [d] if np.mean(words) >= 0.95 else []
    route = f"a written route {routes[0]} blocks deep" if routes else "no shallow written route"
    return "\n".join([*lines, f"  there is {route}; REINFORCE can only shift to one that exists"])


# --- reading ----------------------------------------------------------------------------------

SHARES = ("0%", "25%")  # of the reasoning kept


def study_of(results: Sequence[dict]) -> Study:
    """The study whose entries these are."""
    return Arm(base=results[0]["base"]).study


def table_rows(study: Study) -> dict[str, tuple[str, str]]:
    """Title of a row of the table -> figure or figure.entry, format."""
    ends = ("1 step", f"{study.longest} steps")
    return {
        "accuracy": ("accuracy", "{:.3f}"),
        "greedy": ("greedy_accuracy", "{:.3f}"),
        "at full depth": ("full_depth_accuracy", "{:.3f}"),
        "written": ("written", "{:.3f}"),
        "longest unwritten run": ("unwritten_run", "{:.2f}"),
        "tokens": ("tokens", "{:.1f}"),
        "mean depth": ("mean_depth", "{:.2f}"),
        "opaque serial depth": ("max_depth", "{:.2f}"),
        "95 %": ("max_depth_p95", "{:.1f}"),
        **{f"at {n}": (f"max_depth_by_group.{n}", "{:.2f}") for n in ends},
        "in operations": ("operations", "{:.0f}"),
        **{f"cap {c}": (f"capped_accuracy.{c}", "{:.3f}") for c in study.caps},
        **{f"in the head, cap {c}": (f"steps_in_head.{c}", "{:.1f}") for c in study.caps},
        **{f"same answer, {x}": (f"same_answer.{x} kept", "{:.2f}") for x in SHARES},
        "area": ("same_answer_area", "{:.2f}"),
        **{kind: (f"changed_value.{kind}", "{:.3f}") for kind in OUTCOMES},
        "good cap": ("same_answer_cap", "{:.1f}"),
        **{f"same, {x}, there": (f"same_answer_capped.{x} kept", "{:.2f}") for x in SHARES},
        "area there": ("same_answer_area_capped", "{:.2f}"),
        **{f"{kind} there": (f"changed_value_capped.{kind}", "{:.3f}") for kind in OUTCOMES[:2]},
        "monitor": ("monitor.score", "{:.3f}"),
        "false alarms": ("monitor.false_alarms", "{:.3f}"),
        "before the last step": ("monitor.before_last", "{:.3f}"),
        "its false alarms": ("monitor.before_last_false_alarms", "{:.3f}"),
    }


LEGEND = """\
Means over seeds, with the lowest and highest in brackets; a dash if the arm has no such figure.
At full depth: greedy, every token running all blocks.
Opaque serial depth: the deepest token of a response, in blocks. Cap c: accuracy when no token runs
more than c blocks. In the head: the most operations done with nothing written. Same answer, x: how
often the answer stays the same with x of the reasoning kept and no cap; area: the area over that
curve. Follow, stay, stop, other: how the answer responds to a changed value. Good cap: the smallest
cap that keeps 0.95 of the accuracy; rows with "there" are measured under it. Monitor: how often
the last written value is the answer. Before the last step: how often a reader of all earlier steps
can work out the answer. False alarms: how often such a reading is not the answer."""
CAP, KEPT, ANSWERS = "most blocks of any token", "per cent of the reasoning kept", "same answer"
FIGURES = {  # figure of an entry -> title, x, y, the least top of the y axis
    "max_depth_by_group": ("Opaque serial depth", "operations of the chain", "blocks", 0),
    "capped_accuracy": ("Accuracy under a cap", CAP, "accuracy", 1),
    "steps_in_head": ("Operations in the head, nothing written", CAP, "operations", 0),
    "same_answer": ("Reasoning cut, depth free", KEPT, ANSWERS, 1),
    "same_answer_capped": ("Reasoning cut, smallest good cap", KEPT, ANSWERS, 1),
}


def main_arms(results: Sequence[dict]) -> list[str]:
    """Names of the arms in the main figures and on the terminal: base, SFT, uncharged, charged."""
    return [arm.name for arm in (BASE, SFT, UNCHARGED, Arm(study_of(results).charge))]


def by_arm(results: Sequence[dict], key: str = "arm") -> dict[str, list[dict]]:
    """Entries of all seeds by the name of their arm."""
    names = dict.fromkeys(row[key] for row in results)
    return {name: [row for row in results if row[key] == name] for name in names}


def over_seeds(rows: Sequence[dict], key: str, form: str) -> str:
    """The mean of a figure, with the lowest and highest if there are several."""
    figure, _, name = key.partition(".")
    found = [value for row in rows if (value := entries(row, figure).get(name)) is not None]
    span = f" ({cell(min(found), form)}–{cell(max(found), form)})" if len(found) > 1 else ""
    return cell(sum(found) / len(found) if found else None, form) + span


def curve(pairs: Sequence[tuple]) -> list[tuple]:
    """(x, y) pairs of several seeds -> the means, with ranges. The x of "6 steps" is 6."""
    ys = defaultdict(list)
    for x, y in pairs:
        if x != "" and y is not None:
            ys[float(str(x).split()[0].rstrip("%"))].append(y)
    spans = {x: (min(vs), max(vs)) if len(vs) > 1 else () for x, vs in ys.items()}
    return [(x, float(np.mean(ys[x])), *spans[x]) for x in sorted(ys)]


def entry_figure(
    arms: dict, key: str, title: str, x: str, y: str, top: float, colors: dict
) -> Figure:
    """The entries of one figure, with a line for each arm."""
    pairs = {n: [p for row in rows for p in entries(row, key).items()] for n, rows in arms.items()}
    return line_figure(title, x, y, {name: curve(pairs[name]) for name in pairs}, top, colors)


def draw(results: Sequence[dict]) -> dict[str, Figure]:
    """File name -> figure, over all seeds."""
    arms = by_arm([row for row in results if not row["strength"]])
    main = {name: arms[name] for name in main_arms(results) if name in arms}
    colors: dict[str, str] = {}  # of the lines of all figures
    found = {key: entry_figure(main, key, *about, colors) for key, about in FIGURES.items()}
    charge = study_of(results).charge
    charged = {name: rows for name, rows in arms.items() if rows[0]["lambda"] == charge}
    title, x, y, top = FIGURES["capped_accuracy"]
    about = f"{title}, lambda {charge:g}", x, y, top, colors
    found["charged"] = entry_figure(charged, "capped_accuracy", *about)
    plain = [row for weight in (0.0, 0.3, 1.0, 3.0) for row in arms.get(Arm(weight).name, [])]
    pairs = {key: [(row["lambda"], row[key]) for row in plain] for key in ("written", "accuracy")}
    shares = [(row["lambda"], row["max_depth"] / row["full_depth"]) for row in plain]
    pairs["opaque serial depth, share of all"] = shares
    lines = {name: curve(pairs[name]) for name in pairs}
    found["externalization"] = line_figure("Externalization", "lambda", "", lines, 1, colors)
    sft = [row for row in results if row["trained"] and row["weight"] is None]
    sft = [row for row in sft if row["base"] == "shipped" and row["seed"] == sft[0]["seed"]]
    rules = by_arm(sft, "targets")
    pairs = {t: [(r["mean_depth"], r["accuracy"]) for r in rows] for t, rows in rules.items()}
    title, lines = "SFT: whose readouts set the targets?", {t: curve(pairs[t]) for t in pairs}
    found["sft_frontier"] = line_figure(title, "mean depth", "accuracy", lines, 1, colors)
    return {key: figure for key, figure in found.items() if figure.body.count("<polyline") > 1}


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>nanoexit</title><style>
{css} body {{ margin: 2rem auto; max-width: 80rem; padding: 0 1rem; font: 15px system-ui;
background: var(--paper); color: var(--ink) }} section {{ display: flex; flex-wrap: wrap; gap: 2rem;
overflow-x: auto; margin: 2rem 0 }} td {{ padding: .3rem .7rem; white-space: nowrap }}
td:first-child {{ position: sticky; left: 0; background: var(--paper) }}
</style></head><body><h1>Does a charge for depth make a model write its reasoning down?</h1>
<p><code>{command}</code></p><section>{figures}</section><section><table>{table}</table></section>
<p>{legend}</p></body></html>
"""


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, header first -> Markdown."""
    text = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([text[0], "|---" * len(lines[0]) + "|", *text[1:]])


def write(results: Sequence[dict], out: Path, command: str) -> None:
    """Write results.json, table.md, one SVG per figure, and index.html with table and figures."""
    arms, figures = by_arm(results), draw(results)
    lines = [["", *arms]]
    for title, (key, form) in table_rows(study_of(results)).items():
        lines.append([title, *(over_seeds(rows, key, form) for rows in arms.values())])
    write_text(out / "results.json", json.dumps(list(results), separators=(",", ":")) + "\n")
    write_text(out / "table.md", f"`{command}`\n\n{markdown_table(lines)}\n\n{LEGEND}\n")
    for name, figure in figures.items():
        write_text(out / f"{name}.svg", figure.svg())
    marks = ["".join(f"<td>{escape(text)}</td>" for text in line) for line in lines]
    fills = {"css": CSS, "command": escape(command), "legend": escape(LEGEND)}
    fills["figures"] = "".join(figure.svg(alone=False) for figure in figures.values())
    write_text(out / "index.html", PAGE.format(table=f"<tr>{'<tr>'.join(marks)}", **fills))


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="a.b=c", help="config keys, for all arms")
    add("--full", action="store_true", help="all arms, seeds 0, 1 and 2")
    add("--real", action="store_true", help="run on SmolLM2 135M")
    add("--model", metavar="DIR", help="for --real: folder of SmolLM2-135M-Instruct")
    add("--seeds", type=int, nargs="+", metavar="N", help="seeds to run instead")
    add("--jobs", type=int, default=min(2, os.cpu_count() or 1), metavar="N", help="runs at a time")
    add("--runs", metavar="DIR", help="folder for runs (runs/experiment, or runs/real)")
    add("--out", metavar="DIR", help="folder for table, figures, page (as --runs)")
    args = parser.parse_intermixed_args()
    seeds = args.seeds or ([0, 1, 2] if args.full else [0])
    runs = Path(args.runs or ("runs/real" if args.real else "runs/experiment"))
    arms, out = WORDS if args.real else FULL if args.full else DEFAULT, Path(args.out or runs)
    results = experiment(arms, seeds, runs, max(1, args.jobs), args.overrides, args.model)
    flags = ["--real"] * args.real + ["--full"] * args.full
    flags += ["--seeds", *map(str, seeds)] if args.seeds else []
    command = " ".join(["python scripts/experiment.py", *flags, *args.overrides])
    write(results, out, f"{command} (commit {results[0]['made_by']['commit']})")
    shown = [row for row in results if row["seed"] == seeds[0] and row["arm"] in main_arms(results)]
    print(f"\n{table(shown)}\n\n{out / 'index.html'} has all arms; see also table.md, results.json")


if __name__ == "__main__":
    _script.run_main(main)
