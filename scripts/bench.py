"""Speed and memory, always against something. Read the ratios: times hold for this machine only.

    python scripts/bench.py decode --shape smollm2-135m --peer hf   full-depth decoding
    python scripts/bench.py exits --shape smollm2-135m              what early exits save
    python scripts/bench.py rollout                                 256 rows against one
    python scripts/bench.py train --shape smollm2-135m --peer hf    a LoRA step; a student step
    python scripts/bench.py update --shape smollm2-135m             REINFORCE: prompts computed once
    python scripts/bench.py memory                                  KL over 152,000 words, in chunks
    python scripts/bench.py load --shape smollm2-135m --peer hf     loading a folder
    python scripts/bench.py growth                                  cost against length, up to 4,096
    python scripts/bench.py table                                   data/bench/*.jsonl as tables

Shapes have random weights; --model loads a folder instead. Peers: hf is transformers and peft,
llama.cpp is llama-cpp-python. Every measurement ends with a line of JSON, which --save FILE keeps.
`spread` is the interquartile range of the rounds' ratios.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import _script
import torch
from bench_alone import ALONE, growth, loading, memory
from bench_measure import (
    PEERS,
    SHAPES,
    Times,
    in_turn,
    load,
    middle,
    peer,
    prompts,
    report,
    snapshot,
    write,
    write_table,
)
from torch import Tensor, nn

from nanoexit.config import ROOT, LoRAConfig, UserError
from nanoexit.exits import Asked, Policy, attach
from nanoexit.fast import FastModel
from nanoexit.lora import attach_lora
from nanoexit.model import Transformer
from nanoexit.score import align, readout_kl, readout_logprobs, score
from nanoexit.training import make_optimizer
from nanoexit.weights import DTYPES, pick_device

LOWEST = {"batch": 1, "prompt": 1, "new": 1, "length": 2, "longest": 16, "chunk": 1}
LOWEST |= {"rounds": 2, "threads": 1}


# --- decoding ---------------------------------------------------------------------------------


def decode(args: argparse.Namespace) -> None:
    """Greedy, full depth, prefill included; without a peer, against our own plain path."""
    model = load(args)
    ids = prompts(args.batch, args.prompt, model.shape.vocab)
    variants: dict[str, Callable[[], object]] = {}
    variants["nanoexit"] = lambda: write(model, ids, "full", args.new)
    if args.peer == "hf":
        hf, given = peer("hf"), torch.tensor(ids, device=args.device)
        theirs = hf.load(args.model, DTYPES[args.dtype], args.device)
        variants["hf dynamic cache"] = lambda: hf.decode(theirs, given, args.new, "dynamic")
        variants["hf static cache"] = lambda: hf.decode(theirs, given, args.new, "static")
    elif args.peer == "llama.cpp":
        sizes = args.batch, args.prompt + args.new, torch.get_num_threads()
        engine = peer("llama.cpp").Llama(args.model, args.dtype, *sizes)
        variants["llama.cpp"] = lambda: engine.decode(ids, args.new)
    else:
        variants["the plain path"] = lambda: write(model, ids, "full", args.new, fast=False)
    times = in_turn(variants, args.rounds, args.device)
    others = [name for name in variants if name != "nanoexit"]
    best = min(others, key=times.__getitem__)
    written = args.batch * args.new
    speed = {f"{name.replace(' ', '_')}_tokens_per_s": written / times[name] for name in others}
    speed["tokens_per_s"] = written / times["nanoexit"]
    if args.batch == 1:
        size = sum(p.nbytes for p in model.parameters())
        speed["gigabytes_read_per_s"] = size * args.new / times["nanoexit"] / 1e9
    report(args, "decode, full depth", best, *times.ratio(best, "nanoexit"), **speed)


class Mixed(Policy):
    """Exits by noise alone: each of three depths and full depth are equally likely."""

    def __init__(self, depths: tuple[int, ...]):
        super().__init__("mixed")
        self.depths = depths

    def layers(self, model: Transformer) -> tuple[int, ...]:
        return self.depths

    def exits(self, asked: Asked) -> Tensor:
        return asked.u < 1 / (len(self.depths) + 1 - self.depths.index(asked.depth))


def quarters(L: int) -> tuple[int, ...]:
    """Depths of a quarter, a half and three quarters of all blocks."""
    return tuple(sorted({max(1, L * i // 4) for i in (1, 2, 3)}))


def exits(args: argparse.Namespace) -> None:
    """Every token exits at one depth, against the ideal: the readout and its share of the blocks.

    Then rows exit at mixed depths, against full depth. A text has new + 1 tokens and as many steps.
    Prefill, the time for a text of one token less that of a step, is subtracted.
    """
    model, steps = load(args), args.new + 1
    L, ids = model.full_depth, prompts(args.batch, args.prompt, model.shape.vocab)
    h = torch.randn(args.batch, model.shape.width, device=args.device, dtype=model.dtype)
    engine = FastModel(model, args.batch)

    @torch.inference_mode()
    def readout() -> None:
        for _ in range(steps):
            engine.readout(h).float().argmax(-1)

    depths = {f"exit at {d} of {L}": d for d in quarters(L)}
    mixed = Mixed(quarters(L))
    policies: dict[str, str | Policy] = {name: f"fixed:{d}" for name, d in depths.items()}
    policies |= {"full": "full", "mixed": mixed}
    variants = {name: lambda p=p: write(model, ids, p, steps) for name, p in policies.items()}
    variants |= {"one token": lambda: write(model, ids, "full", 1), "readout": readout}
    times = in_turn(variants, args.rounds, args.device).rounds
    pairs = zip(times["one token"], times["full"])
    prefill = [one - (full - one) / args.new for one, full in pairs]
    rounds = {name: [a - b for a, b in zip(times[name], prefill)] for name in policies}
    for name, d in depths.items():
        parts = zip(times["readout"], rounds["full"], rounds[name])
        shares = [(head + d / L * (full - head)) / took for head, full, took in parts]
        faster = Times(rounds).ratio("full", name)[0]
        unit = "of the ideal speed-up"
        report(args, f"decode, {name}", "the ideal", *middle(shares), unit, times_faster=faster)
    mean = (sum(mixed.depths) + L) / (len(mixed.depths) + 1)
    work = f"decode, rows exit at mixed depths, mean {mean:.1f} of {L}"
    report(args, work, "full depth", *Times(rounds).ratio("full", "mixed"))


def rollout(args: argparse.Namespace) -> None:
    """What REINFORCE mostly does: many rows, exits sampled. Tokens per second, against one row."""
    if args.batch < 2:
        raise UserError(f"--batch: rollout expects at least 2 rows, found {args.batch}")
    model = load(args)
    attach(model, quarters(model.full_depth))
    ids = prompts(args.batch, args.prompt, model.shape.vocab)
    variants = {
        "one row": lambda: write(model, ids[:1], "head", args.new, 1.0),
        "all rows": lambda: write(model, ids, "head", args.new, 1.0),
    }
    times = in_turn(variants, args.rounds, args.device)
    ratio, spread = times.ratio("one row", "all rows")
    work, speed = f"rollout of {args.batch} rows, exits sampled", args.new / times["all rows"]
    ratios = args.batch * ratio, [args.batch * s for s in spread]
    report(args, work, "one row", *ratios, "x the tokens/s", tokens_per_s=args.batch * speed)


# --- training ---------------------------------------------------------------------------------


def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A function that makes one optimizer step."""
    optimizer = make_optimizer(model, 1e-4)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def train(args: argparse.Namespace) -> None:
    """A LoRA step on next-token loss; a student step with exits, against one without."""
    model = load(args)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(model.shape.vocab, (args.batch, args.length), generator=generator)
    ids = ids.to(args.device)
    if args.peer == "hf":
        lora_step(args, model, ids)
    L, size = model.full_depth, (ids.numel(), model.shape.width)
    teacher = torch.randn(size, device=args.device, dtype=model.dtype)
    attach(model, quarters(L), lora=LoRAConfig())
    choices = torch.tensor([*quarters(L), L])
    drawn = choices[torch.randint(len(choices), ids.shape, generator=generator)].to(args.device)

    def loss(depths: Tensor) -> Tensor:
        hidden = score(model, ids, depths, [1] * args.batch).hidden.flatten(0, 1)
        return readout_kl(model, teacher, hidden).mean()

    full = torch.full_like(ids, L)
    variants = {
        "full": stepper(model, lambda: loss(full)),
        "exits": stepper(model, lambda: loss(drawn)),
    }
    times = in_turn(variants, args.rounds, args.device)
    work = f"student step, mean depth {choices.float().mean() / L:.2f} of all"
    speed = ids.numel() / times["exits"]
    ratio = times.ratio("exits", "full")
    report(args, work, "full depth", *ratio, "of the time", tokens_per_s=speed)


def update(args: argparse.Namespace) -> None:
    """8 rollouts per prompt that share it, against as many rows with different prompts.

    Use --prompt 40 --new 20 for the shape of short answers.
    """
    K, rows = 8, args.batch
    model = load(args)
    attach(model, quarters(model.full_depth), lora=LoRAConfig())
    apart = prompts(rows, args.prompt, model.shape.vocab)
    ids = {"shared": [row for row in apart[: rows // K] for _ in range(K)], "apart": apart}
    written = {name: write(model, ids[name], "head", args.new, 1.0) for name in ids}

    def rescore(name: str, together: int) -> None:
        tokens, depths = [g.tokens for g in written[name]], [g.depths for g in written[name]]
        a = align(model, ids[name], tokens, depths, together)
        h = score(model, a.ids, a.depths, a.prompt_lens, a.positions, a.sees).hidden
        readout_logprobs(model, h.flatten(0, 1)[a.at], a.tokens).mean().backward()

    variants: dict[str, Callable[[], object]] = {}
    for name, together in (("shared", K), ("apart", 1)):
        variants[name] = lambda x=name: write(model, ids[x], "head", args.new, 1.0)
        variants[f"rescore {name}"] = lambda x=name, n=together: rescore(x, n)
    times = in_turn(variants, args.rounds, args.device)
    work = f"{rows // K} x {K} x ({args.prompt} + {args.new})"
    report(args, f"rollouts, {work}", "prompts apart", *times.ratio("apart", "shared"))
    r = times.rounds
    whole = {x: [a + b for a, b in zip(r[x], r[f"rescore {x}"])] for x in ("shared", "apart")}
    ratio = Times(whole).ratio("apart", "shared")
    report(args, f"rollouts and re-scoring, {work}", "prompts apart", *ratio)


def lora_step(args: argparse.Namespace, model: Transformer, ids: Tensor) -> None:
    """Rank 8 on q, k, v and o, with AdamW, against transformers and peft."""
    hf = peer("hf")
    theirs = hf.load(args.model, DTYPES[args.dtype], args.device)
    theirs = hf.with_lora(theirs, LoRAConfig().targets)
    attach_lora(model.requires_grad_(False), LoRAConfig())
    targets = ids[:, 1:].reshape(-1)

    def loss() -> Tensor:
        h = model.run(ids).hidden[:, :-1].flatten(0, 1)
        return -readout_logprobs(model, h, targets).mean()

    variants = {
        "nanoexit": stepper(model, loss),
        "hf + peft": stepper(theirs, lambda: theirs(input_ids=ids, labels=ids).loss),
    }
    times = in_turn(variants, args.rounds, args.device)
    ratio, speed = times.ratio("hf + peft", "nanoexit"), ids.numel() / times["nanoexit"]
    report(args, "LoRA step, full depth", "hf + peft", *ratio, tokens_per_s=speed)


# --- the command line -------------------------------------------------------------------------

WORKS = {
    "decode": decode,
    "exits": exits,
    "rollout": rollout,
    "train": train,
    "update": update,
    "memory": memory,
    "load": loading,
    "growth": growth,
}


def command_line(argv: Sequence[str] | None) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    add = parser.add_argument
    add("work", choices=[*WORKS, "table"])
    add("--shape", choices=SHAPES, default="tiny", help="random weights (default: tiny)")
    add("--model", help="a model folder to use instead of a shape")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 elsewhere")
    add("--device", default="auto")
    add("--batch", type=int, help="rows (default: 1; train 4, update 64, rollout 256)")
    add("--peer", choices=PEERS, help="compare with this; llama.cpp: decode on a CPU only")
    add("--prompt", type=int, default=16, help="tokens in a prompt (default: 16)")
    add("--new", type=int, default=64, help="tokens to decode (default: 64)")
    add("--length", type=int, default=256, help="tokens per row in training (default: 256)")
    add("--longest", type=int, default=4096, help="growth: the longest text (default: 4096)")
    add("--chunk", type=int, default=128, help="tokens whose logits are held (default: 128)")
    add("--rounds", type=int, default=7, help="default: 7")
    add("--threads", type=int, help="CPU threads (default: torch's own choice)")
    add("--save", type=Path, help="append the lines of JSON to this file")
    add("--out", type=Path, help="folder for figures (runs/bench) or the table (data/bench)")
    add("--way", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, low in LOWEST.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name}: expected at least {low}, found {value}")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = pick_device(args.device)
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    args.out = args.out or ROOT / ("data/bench" if args.work == "table" else "runs/bench")
    args.batch = args.batch or {"train": 4, "rollout": 256, "update": 64}.get(args.work, 1)
    if args.peer == "llama.cpp" and (args.work != "decode" or args.device.type != "cpu"):
        raise UserError(f"--peer llama.cpp: expected decode on a CPU, found {args.work}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = command_line(argv)
    if args.work == "table":
        print(f"written to {write_table(args.out)}")
        return
    if args.way:
        print(json.dumps(ALONE[args.work](args)))
        return
    args.name = Path(args.model).name if args.model else args.shape
    if args.work == "memory":
        args.name = "152k x 896"
    with tempfile.TemporaryDirectory() as folder:
        if not args.model and args.work != "memory":
            args.model = folder
            snapshot(Path(folder), args.shape, DTYPES[args.dtype])
        WORKS[args.work](args)


if __name__ == "__main__":
    _script.run_main(main)
