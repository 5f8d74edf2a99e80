"""Responses: what a model wrote for a prompt, verified; and the forward that re-scores it, for losses and figures alike.

Contract. `respond` writes one response a prompt, at the config's generation settings. `rescore` puts responses through `score`;
`readout_places` says where in it each token was read out. KL(student || teacher) and perplexity under the base are per token, on
the student's own text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from nanoexit.config import Config
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
            prompt_exits: str | None = None, forced: Sequence[Sequence[int]] | None = None, show: str = "") -> list[Response]:
    """One response a prompt, at the config's generation settings. prompt_exits: default the config's. forced: the first tokens of
    each response. `show` names a progress bar."""
    g = config.generation
    ids = [tokenizer.prompt_ids(p.prompt, p.system) for p in prompts]
    with tqdm(total=len(prompts), desc=show, unit="response", disable=not show, dynamic_ncols=True) as bar:
        written = generate(model, ids, policy, g.max_new_tokens, g.temperature, g.top_p, g.top_k, seed,
                           batch_size=config.evaluate.batch_size, prompt_exits=prompt_exits or config.exits.prompt,
                           forced=forced, on_finish=lambda *_: bar.update(), pack=g.pack, cuda_graphs=g.cuda_graphs)
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


def token_kinds(pieces: Sequence[str]) -> list[str]:
    """`reasoning` up to </think>, `answer` after it, and `punctuation`: marks, tags and tokens without letter or digit."""
    kinds, kind = [], "reasoning" if any("</think>" in p for p in pieces) else "answer"
    for piece in pieces:
        mark = piece.strip().startswith("<") or not any(c.isalnum() for c in piece)
        kinds.append("punctuation" if mark else kind)
        kind = "answer" if "</think>" in piece else kind
    return kinds
