"""Responses to prompts, how the base scores them, and the traces that SFT learns from.

The teacher is the base model: adapters off, full depth. Its traces are JSONL files in a folder
named by a hash of everything they depend on: token ids of the prompts (so prompts, tokenizer and
template), weights and settings. A chunk of traces is a function of (seed, chunk number), so
interrupted work ends with the same traces, and processes can divide the chunks."""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoexit.config import Config, UserError, read_json_lines, write_json_lines
from nanoexit.exits import Watch, as_base, exit_depths
from nanoexit.generate import Generation, Sampling, generate
from nanoexit.model import Transformer
from nanoexit.score import Aligned, Score, align, batches, readout_kl, readout_logprobs, score
from nanoexit.tasks import Prompt, Response, load_prompts, task_of
from nanoexit.tokenizer import Tokenizer
from nanoexit.training import barrier, is_main, mine, progress, prompt_ids, remove_leftovers, stream


def respond(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: Config,
    policy: str,
    seed: Sequence[int],
    show: str = "",
    **changes: Any,
) -> list[Response]:
    """One verified response per prompt, generated as the config says, except for `changes` to the
    temperature or generate.Sampling. show: the name of a progress bar, "" for none."""
    given = asdict(config.generation) | changes
    most, temperature = given.pop("max_new_tokens"), given.pop("temperature")
    ids = [prompt_ids(tokenizer, prompt, config) for prompt in prompts]
    with progress(len(ids), show) as bar:
        settings = Sampling(**given, on_finish=bar.update)
        written = generate(model, ids, policy, most, temperature, seed, settings)
    return [read_response(tokenizer, *row) for row in zip(prompts, ids, written)]


def read_response(
    tokenizer: Tokenizer, prompt: Prompt, ids: Sequence[int], generation: Generation
) -> Response:
    """Decode and verify what was generated for a prompt; the end token is not in the text."""
    tokens = generation.tokens[:-1] if generation.finish == "stop" else generation.tokens
    text = tokenizer.decode(tokens)
    return Response(prompt, list(ids), generation, text, task_of(prompt).verify(prompt, text))


def rescore(
    model: Transformer, responses: Sequence[Response], together: int = 1
) -> tuple[Aligned, Score]:
    """One forward that re-scores these responses, at the depths at which they were written. Prompt
    tokens run only as deep as the deepest readout of their row: no token reads them in later
    blocks, so the scores are the same. together: see score.align."""
    tokens = [r.generation.tokens for r in responses]
    depths = [r.generation.depths for r in responses]
    a = align(model, [r.prompt_ids for r in responses], tokens, depths, together)
    deepest = torch.tensor([max(row) for row in depths], device=model.device)
    a.depths = a.depths.minimum(deepest.view(-1, together).amax(1, keepdim=True))
    return a, score(model, a.ids, a.depths, a.prompt_lens, a.positions, a.sees)


@torch.no_grad()
def against_base(
    model: Transformer, responses: Sequence[Response], rows: int
) -> tuple[list[float], float]:
    """-> KL(teacher || student) of each response, in nats per token; the base's perplexity on all.
    `rows` responses are read in one forward."""
    kls, nll, count = [], 0.0, 0
    for batch in batches(responses, rows):
        a, scored = rescore(model, batch)
        student = scored.hidden.flatten(0, 1)[a.at]
        with as_base(model):
            teacher = model.run(a.ids).hidden.flatten(0, 1)[a.at]
        kl = readout_kl(model, teacher, student)
        kls += [row.mean().item() for row in kl.split(a.counts)]
        nll -= readout_logprobs(model, teacher, a.tokens).sum().item()
        count += len(a.tokens)
    return kls, math.exp(nll / count)


@torch.no_grad()
def show_response(model: Transformer, tokenizer: Tokenizer, response: Response, name: str) -> dict:
    """One line of samples.jsonl: every token with its depth, exit chances and alternatives."""
    g, prompt, layers = response.generation, response.prompt, exit_depths(model)
    a, scored = rescore(model, [response])
    top = model.readout(scored.hidden[0, a.at]).float().softmax(-1).topk(min(5, model.shape.vocab))
    chances = scored.head_logits[0, a.at].sigmoid().tolist()
    found = tokenizer.pieces(g.tokens), g.depths, chances, top.indices.tolist(), top.values.tolist()
    tokens = []
    for piece, depth, heads, ids, shares in zip(*found):
        exits = [round(p, 4) if depth >= d else None for d, p in zip(layers, heads)]
        likely = [[tokenizer.decode([t]), round(p, 4)] for t, p in zip(ids, shares)]
        tokens.append({"text": piece, "depth": depth, "exit_probs": exits, "top": likely})
    correct = None if prompt.checker == "none" else response.verdict.correct
    row: dict = {"id": prompt.id, "prompt": prompt.prompt, "answer": prompt.answer}
    row |= {"variant": name, "text": response.text, "correct": correct, "finish": g.finish}
    row |= {"tokens": tokens, "full_depth": model.full_depth}
    return row | {"exit_layers": list(layers), "cap": model.cap}


@dataclass
class Trace:
    """One response of the teacher, as SFT reads it; `completion` includes the end token."""

    id: str
    prompt: str
    completion: str
    prompt_ids: list[int]
    tokens: list[int]
    finish: str


def make_traces(model: Transformer, tokenizer: Tokenizer, config: Config) -> list[Trace]:
    """Let the teacher write the traces that are missing, then read them all."""
    prompts = load_prompts(config, "train")
    jobs = [prompt for prompt in prompts for _ in range(config.teacher.traces)]
    folder = traces_folder(model, tokenizer, config, jobs)
    chunks = batches(jobs, config.teacher.chunk)
    paths = [folder / f"{number:05d}.jsonl" for number in range(len(chunks))]
    missing = [number for number in mine(range(len(chunks))) if not paths[number].is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, seconds=60)  # newer ones may belong to a run that shares the traces
    with progress(len(missing), "teacher writes traces", "chunk") as bar, as_base(model):
        for number in missing:
            seed, show = stream("traces", config.run.seed, number), f"chunk {number}"
            written = respond(model, tokenizer, chunks[number], config, "full", seed, show=show)
            write_json_lines(paths[number], [trace_row(tokenizer, r) for r in written])
            bar.update()
    barrier()
    vocab = model.shape.vocab
    return [t for path, chunk in zip(paths, chunks) for t in read_traces(path, chunk, vocab)]


def trace_row(tokenizer: Tokenizer, r: Response) -> dict:
    """A response as a line of a chunk's file."""
    g, text = r.generation, tokenizer.decode(r.generation.tokens)
    return asdict(Trace(r.prompt.id, r.prompt.prompt, text, r.prompt_ids, g.tokens, g.finish))


def read_traces(path: Path, prompts: Sequence[Prompt], vocab: int) -> list[Trace]:
    """The traces of one chunk. Raises UserError if the file is damaged or of other prompts."""
    try:
        traces = [Trace(**row) for _, row in read_json_lines(path)]
        rows = [row for trace in traces for row in (trace.prompt_ids, trace.tokens)]
        whole = all(rows) and all(type(i) is int and 0 <= i < vocab for row in rows for i in row)
    except (TypeError, UserError):
        whole, traces = False, []
    if not whole or [trace.id for trace in traces] != [prompt.id for prompt in prompts]:
        raise UserError(f"{path}: damaged, or not the traces of these prompts; delete it")
    return traces


def traces_folder(
    model: Transformer, tokenizer: Tokenizer, config: Config, jobs: Sequence[Prompt]
) -> Path:
    """The folder of the traces of these prompts, named by a hash of all that they depend on."""
    base = Path(config.data.traces or Path(config.run.dir) / "traces")
    ids = json.dumps([[job.id, *prompt_ids(tokenizer, job, config)] for job in jobs])
    origin: dict = {"model": model.content, "seed": config.run.seed}
    origin |= {"prompts": hashlib.sha256(ids.encode()).hexdigest(), "chunk": config.teacher.chunk}
    origin |= asdict(config.generation)
    del origin["batch_size"]  # it affects no trace
    folder = base / hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]
    if is_main() and base.is_dir() and any(base.iterdir()) and not folder.is_dir():
        other = f"{base} holds traces of other prompts or settings"
        print(f"{other}; new ones go to {folder.name}/", file=sys.stderr)
    return folder


class Teacher:
    """The base's residuals at the readouts of traces; kept if they fit into teacher.keep_mb."""

    def __init__(self, model: Transformer, traces: Sequence[Trace], config: Config):
        self.model, self.traces = model, traces
        self.depths = exit_depths(model) if config.sft.targets == "base" else ()
        self.kept: list[Sequence[Tensor]] = []  # by trace
        tokens, rows = sum(len(trace.tokens) for trace in traces), config.sft.micro_batch
        if tokens * model.shape.width * model.dtype.itemsize > config.teacher.keep_mb * 1e6:
            return
        with progress(len(traces), "teacher reads traces", "trace") as bar:
            for piece in batches(range(len(traces)), rows):
                a, known = self(piece)
                self.kept += zip(*(x.split(a.counts) for x in known))
                bar.update(len(a.counts))

    @torch.no_grad()
    def __call__(self, piece: Sequence[int]) -> tuple[Aligned, list[Tensor]]:
        """-> some traces as one batch; the residuals at their readouts [n, D] and, with
        sft.targets=base, the divergences of the base's early readouts [n, E]."""
        batch = [self.traces[i] for i in piece]
        a = align(self.model, [t.prompt_ids for t in batch], [t.tokens for t in batch])
        if len(self.kept) == len(self.traces):
            return a, [torch.cat(parts) for parts in zip(*(self.kept[i] for i in piece))]
        watch = Watch(self.depths)
        with as_base(self.model):
            teacher = self.model.run(a.ids, stop=watch).hidden.flatten(0, 1)[a.at]
        kl = [readout_kl(self.model, teacher, watch.seen[depth][a.at]) for depth in self.depths]
        return a, [teacher, torch.stack(kl, -1)] if kl else [teacher]
