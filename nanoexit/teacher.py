"""The teacher: the base model, adapters off, full depth. It writes the traces, and says what each early exit would lose.

For every response position and exit depth, with P the final distribution and Q_d the early readout, kl_d = KL(P || Q_d). The
target chance to exit at d where d is reached is exits.teacher_chance(kl_d, kl_strength); the strength is not baked into the traces.

Each chunk of traces is a pure function of (config, seed, chunk number), so interrupted work goes on to the same traces, and the
processes of torchrun take every world-th chunk.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanoexit.config import Config
from nanoexit.data import Trace, has_chunk, load_prompts, read_traces, replace, write_chunk
from nanoexit.errors import UserError
from nanoexit.generate import Watch, generate
from nanoexit.lora import adapters_off
from nanoexit.model import Transformer
from nanoexit.score import divergence, pad
from nanoexit.tasks import Prompt
from nanoexit.tokenizer import Tokenizer
from nanoexit.training import barrier, is_main, rank, world


def traces_folder(config: Config) -> Path:
    return Path(config.data.traces or Path(config.run.dir) / "traces")


def make_traces(model: Transformer, tokenizer: Tokenizer, config: Config) -> list[Trace]:
    """Write the traces that are missing, then read them all."""
    folder = traces_folder(config)
    prompts = load_prompts(config.data, "train", config.data.count, config.run.seed)
    _same_origin(folder, origin(model, config))
    jobs = [p for p in prompts for _ in range(config.teacher.traces)]
    chunks = range(0, len(jobs), config.teacher.chunk)
    missing = [n for n in range(rank(), len(chunks), world()) if not has_chunk(folder, n)]
    todo = sum(len(jobs[chunks[n] : chunks[n] + config.teacher.chunk]) for n in missing)
    with tqdm(total=todo, desc="teacher writes traces", unit="trace", disable=not (is_main() and todo), dynamic_ncols=True) as bar:
        for n in missing:
            batch = jobs[chunks[n] : chunks[n] + config.teacher.chunk]
            write_chunk(folder, n, write_traces(model, tokenizer, batch, config, [config.run.seed, 3, n], bar.update))
    barrier()
    return read_traces(folder)


def write_traces(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], config: Config, seed: Sequence[int],
                 tick: Callable[[int], object] = lambda n: None) -> list[Trace]:
    """One trace a prompt, with the divergences of all its exits."""
    g = config.generation
    ids = [tokenizer.prompt_ids(p.prompt, p.system) for p in prompts]
    with adapters_off(model):
        written = generate(model, ids, "full", g.max_new_tokens, g.temperature, g.top_p, g.top_k, seed, batch_size=g.batch_size,
                           on_finish=lambda *_: tick(1), pack=g.pack, cuda_graphs=g.cuda_graphs)
    traces = [Trace(p.id, p.prompt, tokenizer.decode(w.tokens), i, w.tokens, w.finish) for p, i, w in zip(prompts, ids, written)]
    by_length = sorted(range(len(traces)), key=lambda i: len(ids[i]) + len(traces[i].tokens))
    for start in range(0, len(traces), g.batch_size):  # rows of like length together: little padding
        exit_divergences(model, [traces[i] for i in by_length[start : start + g.batch_size]], config)
    return traces


@torch.no_grad()
def exit_divergences(model: Transformer, traces: Sequence[Trace], config: Config) -> None:
    """Fill trace.kl: the base's KL(P || Q_d) at each exit depth, [len(tokens), E], or all input positions if prompts exit too.

    Logits are made for config.sft.chunk positions at a time: nothing of size [B, T, E, V] ever exists.
    """
    layers = sorted(config.exits.layers)
    rows = [t.prompt_ids + t.tokens[:-1] for t in traces]
    counts = [len(row) if config.exits.prompt == "head" else len(t.tokens) for row, t in zip(rows, traces)]
    ids = pad(rows, model.device)
    watch = Watch(layers)
    with adapters_off(model):
        final = model.run(ids, stop=watch).hidden.flatten(0, 1)
    width = ids.shape[1]
    at = torch.cat([torch.arange(i * width + len(row) - n, i * width + len(row)) for i, (row, n) in enumerate(zip(rows, counts))])
    kl = [_divergences(model, final, watch.seen, layers, piece) for piece in at.to(ids.device).split(config.sft.chunk)]
    for trace, piece in zip(traces, torch.cat(kl).cpu().split(counts)):
        trace.kl = piece


def _divergences(model: Transformer, final: Tensor, early: dict[int, Tensor], layers: Sequence[int], at: Tensor) -> Tensor:
    """[n, E] at the flat positions `at` [n]."""
    p = model.readout(final[at])
    return torch.stack([divergence(p, model.readout(early[depth][at])) for depth in layers], -1)


def origin(model: Transformer, config: Config) -> dict:
    """What the traces depend on. A change of any of it makes them other traces."""
    g = asdict(config.generation)
    return {"model": config.model.name, "revision": model.revision, "prompts": config.data.prompts, "count": config.data.count,
            "held_out": config.data.held_out, "system": config.data.system, "layers": sorted(config.exits.layers),
            "all_positions": config.exits.prompt == "head", "traces": config.teacher.traces, "chunk": config.teacher.chunk,
            "seed": config.run.seed, **{k: g[k] for k in ("max_new_tokens", "temperature", "top_p", "top_k")}}


def _same_origin(folder: Path, now: dict) -> None:
    path = folder / "origin.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for key, value in now.items():
            if before.get(key) != value:
                raise UserError(f"{folder}: these traces were written with {key} = {before.get(key)!r}, the config says {value!r}; "
                                "set it back, or choose another folder with data.traces=... or run.dir=...")
    elif is_main():
        replace(path, lambda p: p.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8"))
    barrier()
