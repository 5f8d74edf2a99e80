"""Evaluation: what a model and a policy do on held-out prompts: accuracy, depth, divergence, length.

Contract. `respond` writes one response a prompt; `measure` turns responses into one row of figures. Same seed, same figures.

Mean depth is over the positions that could choose: the inputs after the prompt. (The first token of a response is read from
the last prompt token, whose depth exits.prompt fixes.) `layers_run` is mean depth over full depth. KL(student || teacher) and
perplexity under the base are per token, on the student's own text.
"""

import contextlib
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nanoexit.config import Config
from nanoexit.data import load_prompts, read_jsonl, rounded, write_json_lines, write_text
from nanoexit.generate import Generation, generate
from nanoexit.lora import adapters_off
from nanoexit.model import Transformer
from nanoexit.score import Score, divergence, pad, score, token_logprob
from nanoexit.tasks import Prompt, Verdict, check
from nanoexit.tokenizer import Tokenizer


@dataclass
class Response:
    prompt: Prompt
    prompt_ids: list[int]
    generation: Generation
    text: str  # decoded, without the token that ended it
    verdict: Verdict

    @property
    def depths(self) -> list[int]:
        """Depths of the positions that could choose; of the one readout, where there is no other."""
        return self.generation.depths[1:] or self.generation.depths


def respond(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], config: Config, policy: str, seed: Sequence[int],
            prompt_exits: str | None = None, show: str = "") -> list[Response]:
    """One response a prompt, at the config's generation settings. prompt_exits: default the config's. `show` names a progress bar."""
    g = config.generation
    ids = [tokenizer.prompt_ids(p.prompt, p.system) for p in prompts]
    with tqdm(total=len(prompts), desc=show, unit="response", disable=not show, dynamic_ncols=True) as bar:
        written = generate(model, ids, policy, g.max_new_tokens, g.temperature, g.top_p, g.top_k, seed,
                           batch_size=config.evaluate.batch_size, prompt_exits=prompt_exits or config.exits.prompt, on_finish=lambda *_: bar.update())
    return [read_response(tokenizer, p, i, w) for p, i, w in zip(prompts, ids, written)]


def read_response(tokenizer: Tokenizer, prompt: Prompt, ids: list[int], generation: Generation) -> Response:
    tokens = generation.tokens[:-1] if generation.finish == "stop" else generation.tokens
    text = tokenizer.decode(tokens)
    return Response(prompt, ids, generation, text, check(prompt, text))


# --- re-scoring ------------------------------------------------------------------------------------------------------


def rescore(model: Transformer, responses: Sequence[Response], prompt_exits: bool = False) -> Score:
    """The forward that re-scores what was generated (score.py has the alignment)."""
    ids = pad([r.prompt_ids + r.generation.tokens[:-1] for r in responses], model.device)
    depths = pad([r.generation.prompt_depths + r.generation.depths[1:] for r in responses], model.device)
    return score(model, ids, depths, [len(r.prompt_ids) for r in responses], prompt_exits=prompt_exits)


def readout_places(responses: Sequence[Response], width: int, device: torch.device) -> Tensor:
    """[n] flat positions in B*T whose readouts produced the responses' tokens, row after row."""
    rows = ((row * width + len(r.prompt_ids) - 1, len(r.generation.tokens)) for row, r in enumerate(responses))
    return torch.cat([torch.arange(start, start + n, device=device) for start, n in rows])


@torch.no_grad()
def against_teacher(model: Transformer, responses: Sequence[Response], rows: int, chunk: int) -> tuple[list[float], float]:
    """-> each response's mean KL(student || teacher) in nats a token, and the perplexity of all the text under the base."""
    kls, nll, count = [], 0.0, 0
    for start in range(0, len(responses), rows):
        batch = responses[start : start + rows]
        student = rescore(model, batch).hidden.flatten(0, 1)
        ids = pad([r.prompt_ids + r.generation.tokens[:-1] for r in batch], model.device)
        with adapters_off(model):
            base = model.run(ids).hidden.flatten(0, 1)
        at = readout_places(batch, ids.shape[1], model.device)
        tokens = torch.tensor([t for r in batch for t in r.generation.tokens], device=model.device)
        kl = []
        for piece, target in zip(at.split(chunk), tokens.split(chunk)):
            teacher = model.readout(base[piece])
            kl.append(divergence(model.readout(student[piece]), teacher))
            nll -= token_logprob(teacher, target).sum().item()
        kls += [row.mean().item() for row in torch.cat(kl).split([len(r.generation.tokens) for r in batch])]
        count += len(tokens)
    return kls, math.exp(nll / count)


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
        "kl": float(np.average(kls, weights=[len(r.generation.tokens) for r in responses])), "perplexity": perplexity, "tokens": float(np.mean([len(r.generation.tokens) for r in responses])),
        "repetition": float(np.mean([repetition(r.generation.tokens) for r in responses])),
        "well_formed": float(np.mean([r.verdict.well_formed for r in responses])),
        "written": float(np.mean([min(1.0, true / expected) for true, expected in steps])) if steps else None,
    }


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


def token_kinds(pieces: Sequence[str]) -> list[str]:
    """`reasoning` up to </think>, `answer` after it, and `punctuation`: marks, tags and tokens without letter or digit."""
    kinds, kind = [], "reasoning" if any("</think>" in p for p in pieces) else "answer"
    for piece in pieces:
        mark = piece.strip().startswith("<") or not any(c.isalnum() for c in piece)
        kinds.append("punctuation" if mark else kind)
        kind = "answer" if "</think>" in piece else kind
    return kinds


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of a text's n-grams that it has written before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# --- what samples.jsonl and the report show --------------------------------------------------------------------------


@torch.no_grad()
def show_response(model: Transformer, tokenizer: Tokenizer, response: Response, variant: str) -> dict:
    """One response as the report reads it: every token with its depth, exit chances and likeliest alternatives."""
    g, layers = response.generation, [] if model.exits is None else list(model.exits.layers)
    scored = rescore(model, [response])
    at = readout_places([response], scored.hidden.shape[1], model.device)
    top = model.readout(scored.hidden[0, at]).float().softmax(-1).topk(min(5, model.shape.vocab), -1)
    chances = [[]] * len(at) if scored.head_logits is None else scored.head_logits[0, at].sigmoid().tolist()
    pieces = tokenizer.pieces(g.tokens)
    tokens = [
        {"text": piece, "depth": depth, "kind": kind, "exit_probs": [round(p, 4) if depth >= d and i else None for d, p in zip(layers, ps)],
         "top": [[tokenizer.pieces([t])[0], round(p, 4)] for t, p in zip(ids, probs)]}
        for i, (piece, depth, kind, ps, ids, probs) in enumerate(zip(
            pieces, g.depths, token_kinds(pieces), chances, top.indices.tolist(), top.values.tolist()))
    ]
    return {"id": response.prompt.id, "prompt": response.prompt.prompt, "answer": response.prompt.answer, "variant": variant,
            "text": response.text, "correct": None if response.prompt.checker == "none" else response.verdict.correct,
            "finish": g.finish, "full_depth": model.full_depth, "exit_layers": layers, "tokens": tokens}


def table_lines(rows: Sequence[dict]) -> list[tuple[str, list[str]]]:
    """(name, a cell for each row) of the figures that people compare."""
    groups = sorted({g for row in rows for g in row["accuracy_by_group"]})
    lines = [("", [f"{row['variant']} ({row['policy']})" for row in rows]),
             ("accuracy", [f"{row['accuracy']:.3f}" for row in rows])]
    lines += [(f"  {g}", [f"{row['accuracy_by_group'].get(g, float('nan')):.3f}" for row in rows]) for g in groups]
    return lines + [(f"mean depth of {rows[0]['full_depth']}", [f"{row['mean_depth']:.2f}" for row in rows]),
                    ("layers skipped", [f"{1 - row['layers_run']:.0%}" for row in rows]),
                    ("KL to the teacher", [f"{row['kl']:.3f} nats" for row in rows]),
                    ("tokens written", [f"{row['tokens']:.1f}" for row in rows])]


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


def evaluate_run(model: Transformer, tokenizer: Tokenizer, config: Config, folder: Path) -> list[dict]:
    """The base and the student under each policy of the config -> a row each; writes what a run directory promises of it:
    summary.json, evaluation.json, evaluation.md and the responses in samples.jsonl (rollouts of training there are kept)."""
    started = time.time()
    prompts = load_prompts(config.data, "held_out", config.evaluate.count, config.run.seed)
    rows, samples = [], _rollouts(folder / "samples.jsonl")
    for variant, policy in [("base", "full"), *(("student", p) for p in config.evaluate.policies)]:
        with adapters_off(model) if variant == "base" else contextlib.nullcontext():
            responses = respond(model, tokenizer, prompts, config, policy, [config.run.seed, 5], "full" if variant == "base" else None,
                                f"evaluate {variant} ({policy})")
            rows.append(measure(model, tokenizer, responses, config, variant, policy))
            samples += [show_response(model, tokenizer, r, f"{variant} ({policy})") for r in responses[: config.evaluate.samples]]
    write_json_lines(folder / "samples.jsonl", samples)
    write_text(folder / "evaluation.json", json.dumps({"rows": rounded(rows), "seed": config.run.seed}, indent=1))
    write_text(folder / "evaluation.md", markdown(rows))
    summary = {**_summary(rows[1]), "teacher": _summary(rows[0]), "seconds": round(time.time() - started, 1)}
    write_text(folder / "summary.json", json.dumps(summary, indent=2))
    return rows


def _rollouts(path: Path) -> list[dict]:
    """What training kept there: rows that say their step."""
    return [row for _, row in read_jsonl(path) if "step" in row] if path.is_file() else []


def _summary(row: dict) -> dict:
    return {key: row[key] for key in ("accuracy", "accuracy_by_group", "mean_depth", "full_depth", "layers_run", "kl", "tokens", "policy")}
