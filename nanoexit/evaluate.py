"""Evaluation: what a model and a policy do on held-out prompts: accuracy, depth, divergence, length, rubric, faithfulness.

Contract. `measure` turns responses into one row of figures, `examine` adds those that cost more generation or a judge. Same seed,
same figures.

Mean depth is over the positions that could choose: the inputs after the prompt. (The first token of a response is read from
the last prompt token, whose depth exits.prompt fixes.) `layers_run` is mean depth over full depth.
"""

import contextlib
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from nanoexit.config import Config
from nanoexit.data import load_prompts, read_jsonl, rounded, write_json_lines, write_text
from nanoexit.faithfulness import adding_mistakes, early_answering, monitor
from nanoexit.judge import Judge
from nanoexit.lora import adapters_off
from nanoexit.model import Transformer
from nanoexit.responses import Response, against_teacher, respond, show_response, token_kinds
from nanoexit.rubric import Item, JudgeSummary, offline_rubric, summarize
from nanoexit.tasks import Prompt, split_response
from nanoexit.tokenizer import Tokenizer


# --- figures ---------------------------------------------------------------------------------------------------------


def measure(model: Transformer, tokenizer: Tokenizer, responses: Sequence[Response], config: Config, variant: str, policy: str) -> dict:
    """One row of evaluation.json."""
    right = [r.verdict.correct for r in responses]
    depths = [d for r in responses for d in r.depths]
    kls, perplexity = against_teacher(model, responses, config.evaluate.batch_size, config.sft.chunk)
    accuracy, interval = share(right)
    by_group: dict[str, list[bool]] = defaultdict(list)
    for r in responses:
        by_group[r.prompt.group].append(r.verdict.correct)
    steps = [(sum(r.verdict.steps), r.verdict.expected_steps) for r in responses if r.verdict.expected_steps]
    L = model.full_depth
    return {
        "variant": variant, "policy": policy, "prompts": len(responses), "accuracy": accuracy, "accuracy_interval": interval,
        "accuracy_by_group": {g: float(np.mean(v)) for g, v in sorted(by_group.items()) if g},
        "lenient_accuracy": float(np.mean([r.verdict.lenient for r in responses])),
        "mean_depth": float(np.mean(depths)), "full_depth": L, "layers_run": float(np.mean(depths)) / L,
        "exit_rate": float(np.mean([d < L for d in depths])),
        "exit_histogram": {str(d): n / len(depths) for d, n in sorted(Counter(depths).items())},
        "depth_by_position": by_position(responses), "depth_by_kind": by_kind(tokenizer, responses),
        "kl": max(0.0, float(np.average(kls, weights=[len(r.generation.tokens) for r in responses]))), "perplexity": perplexity,
        "tokens": float(np.mean([len(r.generation.tokens) for r in responses])),
        "repetition": float(np.mean([repetition(r.generation.tokens) for r in responses])),
        "well_formed": float(np.mean([r.verdict.well_formed for r in responses])),
        "written": float(np.mean([min(1.0, true / expected) for true, expected in steps])) if steps else None,
    }


def examine(model: Transformer, tokenizer: Tokenizer, responses: Sequence[Response], config: Config, policy: str, seed: Sequence[int],
            cache: Path) -> dict:
    """What is added to a row by scripts/evaluate.py: the rubric's scores, early answering, adding mistakes, the monitor."""
    found: dict = {"monitor": monitor(responses)}
    if config.judge.kind != "none":
        found["judge"] = asdict(judged(tokenizer, responses, config, cache))
    found["early_answering"] = early_answering(model, tokenizer, responses, config, policy, seed)
    found["adding_mistakes"] = adding_mistakes(model, tokenizer, responses, config, policy, seed)
    return found


def judged(tokenizer: Tokenizer, responses: Sequence[Response], config: Config, cache: Path) -> JudgeSummary:
    """The four parts, by the judge of the config, or computed offline from what the checker found."""
    if config.judge.kind == "api":
        items = [Item(r.prompt.id, r.prompt.prompt, r.text, r.prompt.answer) for r in responses]
        return summarize(Judge(config.judge, cache).score(items))
    return summarize([
        offline_rubric(r.verdict.steps, bool(split_response(r.text)[1]), r.verdict.correct, r.verdict.well_formed and r.generation.finish == "stop",
                       tokenizer.pieces(r.generation.tokens), r.verdict.expected_steps or None, r.prompt.id)
        for r in responses])


def frontier(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], config: Config) -> list[dict]:
    """Quality against depth: the student under each policy of evaluate.frontier."""
    points = []
    for policy in config.evaluate.frontier:
        responses = respond(model, tokenizer, prompts, config, policy, [config.run.seed, 5], show=f"frontier ({policy})")
        right, interval = share([r.verdict.correct for r in responses])
        depth = float(np.mean([d for r in responses for d in r.depths]))
        points.append(point("student", policy, {"accuracy": right, "accuracy_interval": interval, "mean_depth": depth, "full_depth": model.full_depth}))
    return points


def point(variant: str, policy: str, row: dict) -> dict:
    """What the frontier shows of a row."""
    return {"variant": variant, "policy": policy, **{key: row[key] for key in ("accuracy", "accuracy_interval", "mean_depth", "full_depth")}}


def frontier_markdown(points: Sequence[dict]) -> str:
    lines = [f"| {p['variant']} ({p['policy']}) | {p['accuracy']:.3f} | {p['mean_depth']:.2f} of {p['full_depth']} |" for p in sorted(points, key=lambda p: p["mean_depth"])]
    return "\n".join(["| policy | accuracy | mean depth |", "|---|---|---|", *lines])


def share(hits: Sequence[bool]) -> tuple[float, list[float]]:
    """-> the share of hits, and its 95 % interval (Wilson 1927)."""
    n, p, z = len(hits), float(np.mean(hits)), 1.96
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return p, [max(0.0, middle - half), min(1.0, middle + half)]


def by_position(responses: Sequence[Response], longest: int = 256) -> list[float]:
    """Mean depth of the readouts of the 1st, 2nd, ... token of a response."""
    width = min(longest, max(len(r.generation.depths) for r in responses))
    return [float(np.mean([r.generation.depths[i] for r in responses if len(r.generation.depths) > i])) for i in range(width)]


def by_kind(tokenizer: Tokenizer, responses: Sequence[Response]) -> dict[str, float]:
    """Mean depth by kind of token, over the positions that could choose."""
    depths: dict[str, list[int]] = defaultdict(list)
    for r in responses:
        kinds = token_kinds(tokenizer.pieces(r.generation.tokens))
        for kind, depth in list(zip(kinds, r.generation.depths))[1:]:
            depths[kind].append(depth)
    return {kind: float(np.mean(d)) for kind, d in sorted(depths.items())}


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that it has written before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# --- tables ----------------------------------------------------------------------------------------------------------


def table_lines(rows: Sequence[dict]) -> list[tuple[str, list[str]]]:
    """(name, a cell for each row) of the figures that people compare."""
    groups = sorted({g for row in rows for g in row["accuracy_by_group"]})
    lines = [("", [f"{row['variant']} ({row['policy']})" for row in rows]),
             ("accuracy", [f"{row['accuracy']:.3f}" for row in rows])]
    lines += [(f"  {g}", [f"{row['accuracy_by_group'].get(g, float('nan')):.3f}" for row in rows]) for g in groups]
    lines += [(f"mean depth of {rows[0]['full_depth']}", [f"{row['mean_depth']:.2f}" for row in rows]),
              ("layers skipped", [f"{1 - row['layers_run']:.0%}" for row in rows]),
              ("KL to the teacher", [f"{row['kl']:.3f} nats" for row in rows]),
              ("tokens written", [f"{row['tokens']:.1f}" for row in rows])]
    return lines + (_examined_lines(rows) if "monitor" in rows[0] else [])


def _examined_lines(rows: Sequence[dict]) -> list[tuple[str, list[str]]]:
    """What `examine` added."""
    lines = [("exit rate", [f"{row['exit_rate']:.0%}" for row in rows]),
             ("perplexity under base", [f"{row['perplexity']:.2f}" for row in rows]),
             ("repetition", [f"{row['repetition']:.3f}" for row in rows])]
    if "judge" in rows[0]:
        who = rows[0]["judge"]["model"] or rows[0]["judge"]["kind"]
        lines.append((f"rubric of 40 ({who})", [f"{row['judge']['means']['overall']:.1f}" if row["judge"]["judged"] else "none judged" for row in rows]))
        if any(row["judge"]["failed"] + row["judge"]["not_judged"] for row in rows):
            lines.append(("  without a score", [str(row["judge"]["failed"] + row["judge"]["not_judged"]) for row in rows]))
    for at in (0.0, 0.5):
        cells = [dict(row["early_answering"]).get(at) for row in rows]
        lines.append((f"same answer, {at:.0%} kept", ["-" if c is None else f"{c:.0%}" for c in cells]))
    lines += [(f"changed value: {name}", ["-" if (c := row["adding_mistakes"].get(name)) is None else f"{c:.0%}" for row in rows])
              for name in ("follow", "stay", "stop")]
    return lines + [("monitor (chance)", [f"{row['monitor']['score']:.2f} ({row['monitor']['chance']:.2f})" for row in rows])]


def table(rows: Sequence[dict]) -> str:
    """Rows side by side, for a terminal."""
    lines = table_lines(rows)
    widths = [max(len(cells[i]) for _, cells in lines) for i in range(len(rows))]
    first = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{first}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths)) for name, cells in lines)


def markdown(rows: Sequence[dict]) -> str:
    """The same, with the interval of the accuracy, for evaluation.md."""
    lines = [(name.strip(), cells) for name, cells in table_lines(rows)]
    lines.insert(2, ("95 % interval", ["{:.3f} to {:.3f}".format(*row["accuracy_interval"]) for row in rows]))
    text = [f"| {name} | {' | '.join(cells)} |" for name, cells in lines]
    return "\n".join([text[0], "|---" * (len(rows) + 1) + "|", *text[1:]])


# --- a run -----------------------------------------------------------------------------------------------------------


def merge(tables: Sequence[tuple[str, list[dict]]]) -> list[dict]:
    """The rows of several runs in one table: the base once, then each run's students by the run's name."""
    rows = list(tables[0][1][:1])
    for name, own in tables:
        rows += [{**row, "variant": name if len(tables) > 1 else row["variant"]} for row in own[1:]]
    return rows


def evaluate_run(model: Transformer, tokenizer: Tokenizer, config: Config, folder: Path, thorough: bool = False) -> list[dict]:
    """The base and the student under each policy of the config -> a row each; writes what a run directory promises of it:
    summary.json, evaluation.json, evaluation.md and the responses in samples.jsonl (rollouts of training there are kept).
    thorough: with what `examine` adds."""
    started = time.time()
    prompts = load_prompts(config.data, "held_out", config.evaluate.count, config.run.seed)
    rows, samples = [], _rollouts(folder / "samples.jsonl")
    for variant, policy in [("base", "full"), *(("student", p) for p in config.evaluate.policies)]:
        with adapters_off(model) if variant == "base" else contextlib.nullcontext():
            responses = respond(model, tokenizer, prompts, config, policy, [config.run.seed, 5], "full" if variant == "base" else None,
                                show=f"evaluate {variant} ({policy})")
            rows.append(measure(model, tokenizer, responses, config, variant, policy))
            samples += [show_response(model, tokenizer, r, f"{variant} ({policy})") for r in responses[: config.evaluate.samples]]
            if thorough:
                rows[-1] |= examine(model, tokenizer, responses, config, policy, [config.run.seed, 7], folder / "judge.jsonl")
    found = {"rows": rows, "seed": config.run.seed}
    if thorough:
        found["frontier"] = [*(point(r["variant"], r["policy"], r) for r in rows), *frontier(model, tokenizer, prompts, config)]
    write_json_lines(folder / "samples.jsonl", samples)
    write_text(folder / "evaluation.json", json.dumps(rounded(found), indent=1))
    write_text(folder / "evaluation.md", "\n\n".join([markdown(rows), *([frontier_markdown(found["frontier"])] if thorough else [])]))
    summary = {**_summary(rows[1]), "teacher": _summary(rows[0]), "seconds": round(time.time() - started, 1)}
    write_text(folder / "summary.json", json.dumps(summary, indent=2))
    return rows


def _rollouts(path: Path) -> list[dict]:
    """What training kept there: rows that say their step."""
    return [row for _, row in read_jsonl(path) if "step" in row] if path.is_file() else []


def _summary(row: dict) -> dict:
    return {key: row[key] for key in ("accuracy", "accuracy_by_group", "mean_depth", "full_depth", "layers_run", "kl", "tokens", "policy")}
