"""What bench.py measures in fresh processes: memory, loading, and what grows with length.

Memory freed earlier would hide a peak, and a loaded package would hide a slow start. So `alone`
starts a separate process for each way, which prints bytes and seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from bench_measure import in_turn, load, middle, peak, peer, prompts, report, snapshot, write

from nanoexit.config import LoRAConfig, write_text
from nanoexit.exits import attach
from nanoexit.figures import line_figure
from nanoexit.score import divergence, readout_kl, score
from nanoexit.weights import DTYPES, load_model


def alone(args: argparse.Namespace, way: str) -> tuple[float, float]:
    """Bytes and seconds of `way`, measured in a fresh process."""
    names = ("dtype", "device", "chunk", "longest")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    flags += [f"--threads={torch.get_num_threads()}", f"--way={way}"]
    flags += [f"--model={args.model}"] if args.model else []
    script = Path(__file__).with_name("bench.py")
    command = [sys.executable, str(script), args.work, *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    size, seconds = json.loads(done.stdout)
    return size, seconds


def memory(args: argparse.Namespace) -> None:
    """Forward and backward of a KL on 1,600 x 152,000 logits, in chunks against all at once."""
    runs = [(alone(args, "chunked"), alone(args, "whole")) for _ in range(args.rounds)]
    ratios = middle([chunked[0] / whole[0] for chunked, whole in runs])
    more = {
        "time_against_whole": middle([chunked[1] / whole[1] for chunked, whole in runs])[0],
        "gigabytes": middle([chunked[0] / 1e9 for chunked, _ in runs])[0],
        "gigabytes_whole": middle([whole[0] / 1e9 for _, whole in runs])[0],
    }
    unit = "of the extra memory"
    report(args, "KL over 152k tokens, in chunks", "logits held whole", *ratios, unit, **more)


def memory_alone(args: argparse.Namespace, vocab: int = 151936, tokens: int = 1600) -> tuple:
    """-> bytes and seconds of --way chunked or whole."""
    sizes = {"vocab_size": vocab, "hidden_size": 896, "intermediate_size": 8, "head_dim": 8}
    with tempfile.TemporaryDirectory() as folder:
        snapshot(Path(folder), "tiny", DTYPES[args.dtype], num_hidden_layers=1, **sizes)
        model = load_model(folder, "cpu", args.dtype)
        model.logits_chunk = args.chunk
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(2, tokens, 896, generator=generator).to(model.dtype)
        teacher, student = drawn[0], drawn[1].requires_grad_()

        def kl(n: int) -> None:
            if args.way == "chunked":
                value = readout_kl(model, teacher[:n], student[:n])
            else:
                value = divergence(model.readout(teacher[:n]), model.readout(student[:n]))
            value.mean().backward()

        kl(8)  # warm-up: a first call sets things up
        return peak(lambda: kl(tokens), torch.device("cpu"))


def loading(args: argparse.Namespace) -> None:
    """Load a folder and run one token (mapped weights may not be read before that)."""
    ways = ["nanoexit", *([args.peer] if args.peer else [])]
    if args.peer:
        peer(args.peer)
    runs = [{way: alone(args, way) for way in ways} for _ in range(args.rounds)]
    size = sum(path.stat().st_size for path in Path(args.model).glob("*.safetensors"))
    more = {f"peak_over_size_{way}": middle([r[way][0] / size for r in runs])[0] for way in ways}
    more["seconds"] = middle([r["nanoexit"][1] for r in runs])[0]
    ratio = middle([r[ways[-1]][1] / r["nanoexit"][1] for r in runs])
    report(args, "load and read a token", ways[-1], *ratio, megabytes=size / 1e6, **more)


def load_alone(args: argparse.Namespace) -> tuple[float, float]:
    hf = peer("hf") if args.way == "hf" else None

    @torch.no_grad()
    def run() -> None:
        dtype = DTYPES[args.dtype]
        model = load(args) if hf is None else hf.load(args.model, dtype, args.device)
        model(torch.tensor([[1]], device=args.device))

    return peak(run, args.device)


# --- growth -----------------------------------------------------------------------------------


def growth(args: argparse.Namespace) -> None:
    """A token's time by context length, a student step's by text length, and memory of both."""
    lengths, new = [args.longest // 2**i for i in (4, 3, 2, 1, 0)], 32
    write_after, student = growing(args)
    variants = {str(n): lambda n=n: write_after(n, 1 + new) for n in lengths}
    variants |= {f"{n} prefill": lambda n=n: write_after(n, 1) for n in lengths}
    steps = {str(n): lambda n=n: student(n) for n in lengths}
    written = in_turn(variants, args.rounds, args.device).rounds
    trained_on = in_turn(steps, args.rounds, args.device).rounds
    tokens = {n: [a - b for a, b in zip(written[str(n)], written[f"{n} prefill"])] for n in lengths}
    draw_growth(args, "decode-time", "decoding a token", tokens)
    draw_growth(args, "step-time", "student step", {n: trained_on[str(n)] for n in lengths})
    works = {"decode": "memory of prefill and one token", "step": "memory of a student step"}
    for kind, work in works.items():
        turns = [
            (n, alone(args, f"{kind}:{n}")[0] / 1e6) for _ in range(args.rounds) for n in lengths
        ]
        used = {n: [size for length, size in turns if length == n] for n in lengths}
        draw_growth(args, f"{kind}-memory", work, used, "MB")


def draw_growth(
    args: argparse.Namespace, file: str, work: str, rounds: dict[int, list[float]], unit: str = ""
) -> None:
    """Report the last doubling of length, and draw all of them."""
    before, last = [*rounds][-2:]
    first = middle(rounds[next(iter(rounds))])[0]
    scale, unit = (1.0, unit) if unit else (first, f"times that at {next(iter(rounds))}")
    points = [(n, middle(values)[0] / scale) for n, values in rounds.items()]
    figure = line_figure(work.capitalize(), "tokens", unit, {work: points})
    write_text(args.out / f"{file}.svg", figure.svg())
    print(f"{work}: " + ", ".join(f"{y:.4g} {unit} at {n}" for n, y in points))
    ratio = middle([b / a for a, b in zip(rounds[before], rounds[last])])
    report(args, f"{work}, {last} tokens", f"{before} tokens", *ratio, "times as much")


def growing(args: argparse.Namespace) -> tuple[Callable, Callable]:
    """-> write_after(n, new): write after n tokens of prefill; student(n): a step on a row of n."""
    model = load(args)
    half = model.full_depth // 2
    attach(model, [half], lora=LoRAConfig())
    row = torch.tensor(prompts(1, args.longest, model.shape.vocab), device=args.device)
    depths = torch.full_like(row, model.full_depth)
    depths[:, ::2] = half
    teacher = torch.randn(args.longest, model.shape.width, dtype=model.dtype, device=args.device)

    def student(n: int) -> None:
        hidden = score(model, row[:, :n], depths[:, :n], [1]).hidden[0]
        readout_kl(model, teacher[:n], hidden).mean().backward()

    return lambda n, new: write(model, row[:, :n].tolist(), "full", new), student


def growth_alone(args: argparse.Namespace) -> tuple[float, float]:
    """-> bytes and seconds of --way decode:N or step:N, after a short call of the same kind."""
    kind, n = args.way.split(":")
    write_after, student = growing(args)
    run = student if kind == "step" else lambda n: write_after(n, 2)
    run(8)
    return peak(lambda: run(int(n)), args.device)


ALONE = {"memory": memory_alone, "load": load_alone, "growth": growth_alone}
