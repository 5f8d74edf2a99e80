"""Evaluation on held-out prompts: rows of figures, printed as tables and written to files.

A row is one variant (base or student) under one policy. `measure` computes it from responses, and
`faithfulness.examine` adds figures that need more generation. Depths cover all tokens of a
response, including the first. `max_depth`, the opaque serial depth, is the deepest token of a
response, averaged over responses. A NaN is null in files and a dash with a reason in tables."""

import contextlib
import json
import math
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nanoexit.config import ROOT, Config, rounded, write_text
from nanoexit.exits import as_base
from nanoexit.faithfulness import KEEPS, Subject, accuracy, examine, means
from nanoexit.judge import Item, Judge, judge_summary
from nanoexit.model import Transformer
from nanoexit.tasks import Prompt, Response, load_prompts, mean
from nanoexit.teacher import against_base, show_response
from nanoexit.tokenizer import Tokenizer
from nanoexit.training import lines_until, progress

SUMMARY = ["accuracy", "accuracy_by_group", "mean_depth", "max_depth", "full_depth", "layers_run"]
SUMMARY += ["kl", "tokens", "policy"]  # what summary.json has of a row


def measure(subject: Subject, variant: str, responses: Sequence[Response]) -> dict:
    """One row of evaluation.json."""
    model = subject.model
    kls, perplexity = against_base(model, responses, subject.config.evaluate.batch_size)
    lengths = [len(r.generation.tokens) for r in responses]
    depths = [d for r in responses for d in r.generation.depths]
    deepest = [max(r.generation.depths) for r in responses]
    checked = [r for r in responses if r.prompt.checker != "none"]
    verdicts = [r.verdict for r in responses if r.verdict.steps]
    return {
        "variant": variant,
        "policy": subject.policy,
        "prompts": len(responses),
        "accuracy": accuracy(responses),
        "accuracy_interval": interval(accuracy(responses), len(checked)),
        "accuracy_by_group": means((r.prompt.group, r.verdict.correct) for r in checked),
        "mean_depth": mean(depths),
        "max_depth": mean(deepest),
        "max_depth_p95": float(np.percentile(deepest, 95)),
        "max_depth_by_group": means((r.prompt.group, n) for r, n in zip(responses, deepest)),
        "full_depth": model.full_depth,
        "cap": model.cap,
        "layers_run": sum(depths) / len(depths) / model.full_depth,
        "exit_histogram": {str(d): n / len(depths) for d, n in sorted(Counter(depths).items())},
        "kl": float(np.average(kls, weights=lengths)),
        "perplexity": perplexity,
        "tokens": mean(lengths),
        "repetition": mean([repetition(r.generation.tokens) for r in responses]),
        "written": mean([v.written for v in verdicts]),
        "unwritten_run": mean([v.unwritten_run for v in verdicts]),
    }


def interval(p: float | None, n: int) -> list[float] | None:
    """The 95 % confidence interval of a share p of n (Wilson 1927)."""
    if p is None:
        return None
    z2 = 1.96**2 / n
    middle, half = p + z2 / 2, math.sqrt(z2 * (p * (1 - p) + z2 / 4))
    return [max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))]


def repetition(tokens: Sequence[int]) -> float:
    """Share of a response's 4-grams that repeat an earlier one; 0 for fewer than 4 tokens."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# A figure in tables: its key in a row, its title, its format, and, in some, the reason for a
# None. Without a reason, a figure that is None in every row gets no line. A mapping or a list of
# pairs gets a line for each entry. In titles {} is the entry, {L} full depth, {judge} its model.
UNVERIFIED = "no prompt has a reference answer"
NO_STEPS = "the task lists no steps"
NO_END = "no response ends its reasoning and then answers"
NO_CHANGE = "no response has a written value whose change has a known effect"
NO_CAP = f"no cap in evaluate.caps keeps {KEEPS} of the accuracy"
HEADLINES = (
    ("accuracy", "accuracy", "{:.3f}", UNVERIFIED),
    ("accuracy_by_group", "  {}", "{:.3f}"),
    ("mean_depth", "mean depth of {L}", "{:.2f}"),
    ("max_depth", "opaque serial depth", "{:.2f}"),
    ("layers_run", "blocks run", "{:.0%}"),
    ("kl", "KL to the teacher, nats", "{:.3f}", "not a number"),
    ("tokens", "tokens written", "{:.1f}"),
    ("written", "steps written", "{:.3f}", NO_STEPS),
)
DETAILS = (
    ("accuracy_interval", "accuracy, 95 % interval", "{0[0]:.3f}–{0[1]:.3f}"),
    ("greedy_accuracy", "accuracy, greedy", "{:.3f}", UNVERIFIED),
    ("full_depth_accuracy", "accuracy, greedy, full depth", "{:.3f}"),
    ("capped_accuracy", "accuracy, cap {}", "{:.3f}", UNVERIFIED),
    ("max_depth_p95", "opaque serial depth, 95 %", "{:.2f}"),
    ("max_depth_by_group", "opaque serial depth, {}", "{:.2f}"),
    ("steps_in_head", "steps in the head, cap {}", "{:d}"),
    ("unwritten_run", "longest unwritten run", "{:.2f}", NO_STEPS),
    ("same_answer", "same answer, {}", "{:.1%}", NO_END),
    ("same_answer_area", "  area over the curve", "{:.2f}", NO_END),
    ("changed_value", "changed value, {}", "{:.1%}", NO_CHANGE),
    ("same_answer_cap", "smallest good cap", "{:d}", NO_CAP),
    ("same_answer_capped", "same answer capped, {}", "{:.1%}", NO_CAP),
    ("same_answer_area_capped", "  area over the curve", "{:.2f}", NO_CAP),
    ("changed_value_capped", "changed value capped, {}", "{:.1%}", NO_CAP),
    ("monitor.score", "monitor (last value)", "{:.3f}"),
    ("monitor.chance", "  by chance", "{:.3f}"),
    ("monitor.false_alarms", "  false alarms", "{:.3f}", "nothing was read"),
    ("monitor.before_last", "monitor (before the last step)", "{:.3f}", NO_STEPS),
    ("monitor.before_last_false_alarms", "  false alarms", "{:.3f}", "nothing was read"),
    ("judge.means.overall", "rubric, out of 40 ({judge})", "{:.1f}"),
    ("judge.judged", "  responses judged", "{:d}"),
    ("perplexity", "perplexity under the base", "{:.2f}", "not a number"),
    ("repetition", "repetition", "{:.3f}"),
)


def entries(row: dict, key: str) -> dict:
    """The entries of a figure by name; a figure that is a single number has the name ""."""
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, list) and all(isinstance(pair, list) for pair in value):
        value = {f"{x:.0%} kept": y for x, y in value}
    return value if isinstance(value, dict) else {"": value}


def cell(value: Any, form: str) -> str:
    """A value as text; a dash for None and what is not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    text = form.format(value)
    return text if any(c in "123456789" for c in text) else text.removeprefix("-")


def table_cells(rows: Sequence[dict]) -> tuple[list[list[str]], list[str]]:
    """-> lines of cells, header first, and the reason for each figure that has a dash."""
    judge = next((r["judge"]["model"] for r in rows if "judge" in r), "")
    caps = ["" if row["cap"] is None else f", cap {row['cap']}" for row in rows]
    lines = [["", *(f"{r['variant']} ({r['policy']}{cap})" for r, cap in zip(rows, caps))]]
    reasons: dict[str, str] = {}
    examined = any("monitor" in row for row in rows)
    for key, title, form, *missing in HEADLINES + (DETAILS if examined else ()):
        found = [entries(row, key) for row in rows]
        for name in dict.fromkeys(name for row in found for name in row if name) or [""]:
            values = [row.get(name) for row in found]
            if not missing and all(value is None for value in values):
                continue
            whole = title.format(name, L=rows[0]["full_depth"], judge=judge).rstrip(" ,")
            lines.append([whole, *(cell(value, form) for value in values)])
            if missing and "–" in lines[-1]:
                reasons.setdefault(missing[0], f"– {whole.strip()}: {missing[0]}")
    return lines, [*reasons.values()]


def table(rows: Sequence[dict]) -> str:
    """Rows side by side, for a terminal."""
    lines, reasons = table_cells(rows)
    first, *others = [max(map(len, column)) for column in zip(*lines)]
    padded = [[title.ljust(first), *map(str.rjust, cells, others)] for title, *cells in lines]
    return "\n".join([*map("  ".join, padded), *reasons])


def evaluate_run(
    model: Transformer,
    tokenizer: Tokenizer,
    config: Config,
    folder: Path,
    thorough: bool = False,
    base: dict | None = None,
) -> list[dict]:
    """-> a row for the base, and one for the student under each policy of the config. Writes
    evaluation.json, evaluation.md, summary.json, and samples.jsonl, whose training rollouts stay.
    thorough: add `examine` and the frontier. base: the base's row, if already measured."""
    started = time.time()
    prompts = load_prompts(config, "held_out")
    rows = [base] if base else []
    samples = lines_until(folder / "samples.jsonl").decode()
    judge = Judge(config.judge, folder / "judge.jsonl") if thorough else None
    for variant, policy in variants(model, config)[len(rows) :]:
        subject = Subject(model, tokenizer, config, policy)
        with as_base(model) if variant == "base" else contextlib.nullcontext():
            row, shown = evaluate_variant(subject, variant, prompts, judge)
        rows.append(row)
        samples += "".join(json.dumps(line) + "\n" for line in shown)
    others = [Subject(model, tokenizer, config, p) for p in config.evaluate.frontier if thorough]
    frontier = [measure(s, "student", s.respond(prompts, "evaluate")) for s in others]
    write_text(folder / "samples.jsonl", samples)
    found = {"rows": rows, "frontier": frontier, "seed": config.run.seed, **origin(model, config)}
    write_text(folder / "evaluation.json", json.dumps(rounded(found), indent=1) + "\n")
    tables = "\n\n".join(table(part) for part in (rows, frontier) if part)
    write_text(folder / "evaluation.md", f"```\n{tables}\n```\n")
    teacher, student = ({key: row[key] for key in SUMMARY} for row in rows[:2])
    seconds = round(time.time() - started, 1)
    summary = {**student, "teacher": teacher, "evaluation_seconds": seconds}
    write_text(folder / "summary.json", json.dumps(rounded(summary), indent=2) + "\n")
    return rows


def variants(model: Transformer, config: Config) -> list[tuple[str, str]]:
    """(variant, policy) of each row. Without heads, policies that need them become `full`."""
    policies = config.evaluate.policies
    if model.exits is None:
        policies = ["full" if policy.startswith("head") else policy for policy in policies]
    return [("base", "full"), *(("student", policy) for policy in dict.fromkeys(policies))]


def evaluate_variant(
    subject: Subject, variant: str, prompts: Sequence[Prompt], judge: Judge | None
) -> tuple[dict, list[dict]]:
    """-> one variant's row, examined if a judge is given, and its lines for samples.jsonl."""
    name, evaluate = f"{variant} ({subject.policy})", subject.config.evaluate
    generations = 7 + 2 * len(evaluate.caps) if judge else 1
    with progress(generations, f"evaluate {name}", "generation") as subject.bar:
        responses = subject.respond(prompts, "evaluate")
        row = measure(subject, variant, responses)
        if judge is not None:
            if judge.config.kind == "api":
                items = [Item(r.prompt.prompt, r.text, r.prompt.answer) for r in responses]
                row["judge"] = judge_summary(judge.score(items), judge.config.model)
            row |= examine(subject, responses)
    shown = responses[: evaluate.samples]
    return row, [show_response(subject.model, subject.tokenizer, r, name) for r in shown]


def origin(model: Transformer, config: Config) -> dict:
    """Where figures come from: config, base weights, commit ("-dirty" with uncommitted changes)."""
    weights = {key: getattr(model, key) for key in ("name", "revision", "content")}
    command, commit = ["git", "describe", "--always", "--dirty", "--exclude", "*"], "unknown"
    if (ROOT / ".git").exists():
        commit = subprocess.check_output(command, cwd=ROOT, text=True).strip()
    return {"config": asdict(config), "model": weights, "commit": commit}
