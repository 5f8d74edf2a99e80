"""How fast it is, always against something: variants take turns in one process, and what counts is the ratio of their medians.

    python scripts/bench.py decode --shape smollm2-135m --peer hf      full-depth decoding, beside transformers where installed
    python scripts/bench.py exits --shape smollm2-135m                 what exits at L/4 and L/2 save, against the ideal; mixed depths
    python scripts/bench.py rollout                                    sampled exits: 256 rows at once against one row
    python scripts/bench.py train --shape smollm2-135m --peer hf       a LoRA step; an SFT student step with exits
    python scripts/bench.py memory                                     KL over 152,000 tokens in chunks, against logits held whole
    python scripts/bench.py load --shape smollm2-135m --peer hf        time and peak memory of loading
    python scripts/bench.py growth --shape tiny                        cost against context and trace length, up to 4,096
    python scripts/bench.py table runs/bench.jsonl                     the saved lines as a Markdown table

Shapes have random weights; --model takes a folder instead. Every measurement ends in a line of JSON; --save FILE keeps it.
Times are of this machine at this moment: read the ratios. `spread` is the range of the middle half of the rounds' ratios.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from nanoexit.config import LoRAConfig
from nanoexit.data import replace
from nanoexit.decode import DecodeStep
from nanoexit.errors import UserError, run_script
from nanoexit.exits import Head, attach
from nanoexit.figures import Line, line_figure, series_var, standalone
from nanoexit.generate import generate
from nanoexit.lora import attach_lora
from nanoexit.model import Transformer
from nanoexit.score import divergence, readout_kl, readout_logprobs, score
from nanoexit.training import make_optimizer, trained
from nanoexit.weights import DTYPES, load_model, pick_device, read_shape

SHAPES = {  # config.json of the public checkpoints; tiny is a shape in which everything but the arithmetic shows
    "tiny": {"model_type": "llama", "vocab_size": 256, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 12,
             "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": True},
    "smollm2-135m": {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True},
    "qwen2.5-0.5b": {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                     "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True},
    "deepseek-1.5b": {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                      "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 131072, "tie_word_embeddings": False},
}
LENGTHS = {"decode": "{prompt} + {new}", "exits": "{prompt} + {new}", "rollout": "{prompt} + {new}", "train": "{length}",  # tokens a row
           "memory": "1600", "load": "1", "growth": "up to {longest}"}


# ---- measuring ---------------------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of each round by variant; round i of all variants was measured together."""

    rounds: dict[str, list[float]]

    def __getitem__(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratio(self, slow: str, fast: str) -> tuple[float, list[float]]:
        """How many times faster `fast` is -> median over the rounds, and the range of their middle half."""
        return middle([a / b for a, b in zip(self.rounds[slow], self.rounds[fast])])


def middle(values: Sequence[float]) -> tuple[float, list[float]]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, [low, high]


def in_turn(variants: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> Times:
    """Run every variant once unmeasured, then all of them in turn, `rounds` times, beginning with another one each time."""
    names, times = list(variants), {name: [] for name in variants}
    for run in variants.values():
        run()
    for i in tqdm(range(rounds), desc=" / ".join(names), unit="round", leave=False, dynamic_ncols=True):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            _wait(device)
            start = time.perf_counter()
            variants[name]()
            _wait(device)
            times[name].append(time.perf_counter() - start)
    return Times(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Report:
    """Prints what was measured; the last line is JSON."""

    def __init__(self, args: argparse.Namespace, name: str):
        self.args, self.name = args, name
        print(f"{name}, {args.dtype}, batch {args.batch}, {LENGTHS[args.work].format(**vars(args))} tokens a row; {hardware(args)}")

    def __call__(self, work: str, against: str, ratio: float, spread: Sequence[float], unit: str = "x faster", **more) -> None:
        """`ratio` of `work` to `against`, in `unit`; `more` are figures that belong to it."""
        a = self.args
        print(f"{work} against {against}: {ratio:.2f} {unit} ({spread[0]:.2f} to {spread[1]:.2f})"
              + "".join(f", {key.replace('_', ' ')} {value:.4g}" for key, value in more.items() if isinstance(value, float)))
        line = {"work": work, "shape": self.name, "dtype": a.dtype, "batch": a.batch, "tokens": LENGTHS[a.work].format(**vars(a)), "ratio": round(ratio, 3), "unit": unit,
                "spread": [round(s, 3) for s in spread], "against": against,
                **{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in more.items()},
                "rounds": a.rounds, "hardware": hardware(a), "torch": torch.__version__}
        print(json.dumps(line), flush=True)
        if a.save:
            Path(a.save).parent.mkdir(parents=True, exist_ok=True)
            with open(a.save, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def hardware(args: argparse.Namespace) -> str:
    if args.device.type == "cuda":
        return torch.cuda.get_device_name(args.device)
    cpu = next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    return f"{cpu or platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []


# ---- models ------------------------------------------------------------------------------------------------------------


def snapshot(folder: Path, config: dict, dtype: torch.dtype) -> None:
    """A checkpoint of random weights, in the layout of the hub's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6, "hidden_act": "silu"}))
    with torch.device("meta"):
        names = {name: tuple(p.shape) for name, p in Transformer(read_shape(folder)).named_parameters()}
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str, size: tuple[int, ...]) -> Tensor:
        return (torch.ones(size) if "norm" in name else torch.empty(size).normal_(0, 0.02, generator=generator)).to(dtype)

    save_file({name: tensor(name, size) for name, size in names.items()}, folder / "model.safetensors", {"format": "pt"})


def peer(name: str):
    """The peer's module (tests/peers.py, tests/llama_peer.py), or a line that says why there is none."""
    try:
        if name == "hf":
            import peers as module
        else:
            import llama_peer as module
    except ImportError:
        packages = {"hf": "transformers peft", "llama.cpp": "llama-cpp-python gguf"}[name]
        raise UserError(f"--peer {name}: not installed here: pip install {packages}") from None
    return module


def prompts(rows: int, length: int, vocab: int) -> list[list[int]]:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(1)).tolist()


# ---- what is measured --------------------------------------------------------------------------------------------------


def decode(args: argparse.Namespace, report: Report) -> None:
    """Greedy decoding at full depth; without a peer, against our own plain way. Prefill is part of all sides' time."""
    model = load_model(args.model, str(args.device), args.dtype)
    ids = prompts(args.batch, args.prompt, model.shape.vocab)
    variants = {"nanoexit": lambda: ours(args, model, ids, "full", args.new)}
    if args.peer == "hf":
        hf = peer("hf")
        theirs, given = hf.load(args.model, DTYPES[args.dtype], args.device), torch.tensor(ids, device=args.device)
        for cache in ("dynamic", "static"):
            variants[f"hf {cache} cache"] = lambda cache=cache: hf.decode(theirs, given, args.new, cache)
    elif args.peer == "llama.cpp":
        engine = peer("llama.cpp").Peer(args.model, args.dtype, args.batch, args.prompt + args.new, torch.get_num_threads())
        variants["llama.cpp"] = lambda: engine.decode(ids, args.new)
    else:
        plain = argparse.Namespace(**{**vars(args), "pack": "never", "no_graphs": True})
        variants["weights as stored"] = lambda: ours(plain, model, ids, "full", args.new)
    times = in_turn(variants, args.rounds, args.device)
    speed = {f"{name.replace(' ', '_')}_tokens_per_s": args.batch * args.new / times[name] for name in variants}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if args.batch == 1:
        speed["gigabytes_read_per_s"] = size * args.new / times["nanoexit"] / 1e9
    best = min((name for name in variants if name != "nanoexit"), key=times.__getitem__)
    report("decode, full depth", best, *times.ratio(best, "nanoexit"), **speed)


def ours(args: argparse.Namespace, model: Transformer, ids: list[list[int]], policy, new: int, temperature: float = 0.0) -> None:
    generate(model, ids, policy, new, temperature=temperature, stop_ids=(), pack=args.pack, cuda_graphs=not args.no_graphs)


def exits(args: argparse.Namespace, report: Report) -> None:
    """Every token exits at one depth, against the ideal: readout + its share of the blocks. And every row another depth."""
    model = load_model(args.model, str(args.device), args.dtype)
    ids, L = prompts(args.batch, args.prompt, model.shape.vocab), model.full_depth
    h = torch.randn(args.batch, model.shape.width, device=args.device, dtype=DTYPES[args.dtype])
    step = DecodeStep(model, args.batch, args.pack)

    @torch.inference_mode()
    def readout() -> None:
        for _ in range(args.new):
            step.readout(h).float().argmax(-1)

    depths = {f"exit at {d} of {L}": d for d in (L // 4, L // 2, 3 * L // 4)}
    mixed = Mixed((L // 4, L // 2, 3 * L // 4))
    variants = {"full": lambda: ours(args, model, ids, "full", args.new + 1), "prefill": lambda: ours(args, model, ids, "full", 1), "readout": readout,
                "mixed": lambda: ours(args, model, ids, mixed, args.new + 1)}
    variants |= {name: lambda d=d: ours(args, model, ids, f"fixed:{d}", args.new + 1) for name, d in depths.items()}
    times = in_turn(variants, args.rounds, args.device)
    rounds = {name: [a - b for a, b in zip(times.rounds[name], times.rounds["prefill"])] for name in variants if name not in ("prefill", "readout")}
    rounds["readout"] = times.rounds["readout"]
    for name, d in depths.items():
        shares = [(head + d / L * (full - head)) / took for head, full, took in zip(rounds["readout"], rounds["full"], rounds[name])]
        report(f"decode, {name}", "the ideal", *middle(shares), unit="of the ideal speed-up", times_faster_than_full_depth=Times(rounds).ratio("full", name)[0])
    report(f"decode, rows exit at mixed depths, mean {mixed.mean(L):.1f} of {L}", "full depth", *Times(rounds).ratio("full", "mixed"))


class Mixed(Head):
    """As many tokens exit at each of the depths as go on to the end, by the noise alone."""

    def exits(self, depth, h, z, u, chance):
        return u < 1 / (len(self.layers) + 1 - self.layers.index(depth))

    def mean(self, full_depth: int) -> float:
        return (sum(self.layers) + full_depth) / (len(self.layers) + 1)


def rollout(args: argparse.Namespace, report: Report) -> None:
    """What REINFORCE does most: many rows, heads sampled; tokens a second against one row alone."""
    model = load_model(args.model, str(args.device), args.dtype)
    L = model.full_depth
    attach(model, sorted({L // 4, L // 2, 3 * L // 4}))
    one, many = prompts(1, args.prompt, model.shape.vocab), prompts(args.batch, args.prompt, model.shape.vocab)
    times = in_turn({"batch 1": lambda: ours(args, model, one, "head", args.new, 1.0), f"batch {args.batch}": lambda: ours(args, model, many, "head", args.new, 1.0)},
                    args.rounds, args.device)
    ratio, spread = times.ratio("batch 1", f"batch {args.batch}")
    report(f"rollout of {args.batch} rows, exits sampled", "batch 1", args.batch * ratio, [args.batch * s for s in spread], unit="x the tokens/s",
           tokens_per_s=args.batch * args.new / times[f"batch {args.batch}"])


def train(args: argparse.Namespace, report: Report) -> None:
    """A LoRA step (r 8 on q, k, v, o; next-token loss; AdamW) against HF + PEFT; a student step with exits against one without."""
    model = load_model(args.model, str(args.device), args.dtype)
    attach_lora(model, LoRAConfig(dropout=0.0))
    ids = torch.randint(model.shape.vocab, (args.batch, args.length), device=args.device, generator=torch.Generator(args.device).manual_seed(1))
    full = torch.full_like(ids, model.full_depth)
    flat = ids[:, 1:].reshape(-1)
    teacher = torch.randn(args.batch * args.length, model.shape.width, device=args.device, dtype=DTYPES[args.dtype])

    def stepper(parameters, loss: Callable[[], Tensor]) -> Callable[[], None]:
        optimizer = make_optimizer([(list(parameters), 1e-4)], 0.0)

        def step() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def language_loss() -> Tensor:
        return -readout_logprobs(model, model.run(ids).hidden[:, :-1].flatten(0, 1), flat, args.chunk).mean()

    def student_loss(depths: Tensor) -> Tensor:
        hidden = score(model, ids, depths, [0] * args.batch).hidden.flatten(0, 1)
        return readout_kl(model, hidden, teacher, args.chunk).mean()

    if args.peer == "hf":
        hf = peer("hf")
        theirs = hf.with_lora(hf.load(args.model, DTYPES[args.dtype], args.device), list(LoRAConfig().targets))
        times = in_turn({"nanoexit": stepper(trained(model).values(), language_loss),
                         "hf + peft": stepper([p for p in theirs.parameters() if p.requires_grad], lambda: theirs(input_ids=ids, labels=ids).loss)},
                        args.rounds, args.device)
        report("LoRA step, full depth", "hf + peft", *times.ratio("hf + peft", "nanoexit"), tokens_per_s=ids.numel() / times["nanoexit"])

    L = model.full_depth
    attach(model, sorted({L // 4, L // 2, 3 * L // 4}), lora=LoRAConfig(dropout=0.0))
    step_of = {name: stepper(trained(model).values(), lambda depths=depths: student_loss(depths)) for name, depths in {
        "all at full depth": full, "with exits": torch.tensor([L // 4, L // 2, 3 * L // 4, L], device=args.device)[torch.randint(
            4, ids.shape, device=args.device, generator=torch.Generator(args.device).manual_seed(2))]}.items()}
    times = in_turn(step_of, args.rounds, args.device)
    ratio, spread = times.ratio("with exits", "all at full depth")
    report("SFT student step, mean depth 0.62 of all", "full depth", ratio, spread, unit="of the time", tokens_per_s=ids.numel() / times["with exits"])


def memory(args: argparse.Namespace, report: Report) -> None:
    """The KL's forward and backward, 1,600 tokens by 152,000: each way in a process of its own, peak above what it started with."""
    figures = {way: [_alone(args, "memory", way) for _ in range(3)] for way in ("whole", "chunked")}
    peak = {way: statistics.median(m for m, _ in runs) for way, runs in figures.items()}
    ratios = [c / w for (c, _), (w, _) in zip(figures["chunked"], figures["whole"])]
    times = [c / w for (_, c), (_, w) in zip(figures["chunked"], figures["whole"])]
    report("KL over 152k tokens, in chunks", "logits held whole", *middle(ratios), unit="of the extra memory",
           time_against_whole=statistics.median(times), gigabytes=peak["chunked"] / 1e9, gigabytes_whole=peak["whole"] / 1e9)


def _alone(args: argparse.Namespace, work: str, way: str) -> tuple[float, float]:
    """Bytes and seconds of `way`, measured in a fresh process: memory that was freed before would hide a peak."""
    flags = {"way": way, "chunk": args.chunk, "dtype": args.dtype, "threads": torch.get_num_threads(), "longest": args.longest,
             "device": args.device, "model": args.model or ""}
    command = [sys.executable, __file__, work, *(f"--{name}={value}" for name, value in flags.items())]
    return tuple(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def kl_once(way: str, chunk: int, dtype: torch.dtype) -> tuple[float, float]:
    """-> bytes of peak memory above the inputs, and seconds, of one forward and backward of KL(student || teacher)."""
    config = {"model_type": "llama", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    with tempfile.TemporaryDirectory() as folder:
        snapshot(Path(folder), config, dtype)
        model = load_model(folder, "cpu", str(dtype).removeprefix("torch."))
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1600, 896, generator=generator).to(dtype) for _ in range(2))
    readout_kl(model, student[:8].clone().requires_grad_(), teacher[:8], 4).sum().backward()  # what a first call sets up
    student.requires_grad_()

    def once() -> None:
        kl = readout_kl(model, student, teacher, chunk) if way == "chunked" else divergence(model.readout(student), model.readout(teacher))
        kl.mean().backward()

    start = time.perf_counter()
    return peak(once, torch.device("cpu")), time.perf_counter() - start


def peak(run: Callable[[], object], device: torch.device) -> float:
    """Bytes of memory of one call, at its peak, above what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    run()
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """VmRSS or VmHWM (the peak) of this process, in bytes. Linux only."""
    line = next((line for line in _lines("/proc/self/status") if line.startswith(key)), None)
    if line is None:
        raise UserError("memory is read from /proc, which this system does not have")
    return float(line.split()[1]) * 1024


def load(args: argparse.Namespace, report: Report) -> None:
    """Loading a folder and reading one token with it (weights may be mapped and not read before), each time in a fresh process:
    seconds, and peak memory above that of a process that loads nothing."""
    where, dtype = repr(str(args.device)), repr(args.dtype)
    calls = {"nothing": ("nanoexit.load_model", "lambda *_: torch.numel"), "nanoexit": ("nanoexit.load_model", f"lambda load: load({args.model!r}, {where}, {dtype})")}
    if args.peer == "hf":
        peer("hf")
        calls["hf"] = ("peers.load", f"lambda load: load({args.model!r}, torch.{args.dtype}, {where})")
    figures = {name: [] for name in calls}
    for _ in tqdm(range(args.rounds), desc=" / ".join(calls), unit="round", leave=False):
        for name, (loader, call) in calls.items():
            program = (f"import sys, time, resource\nsys.path[:0] = {sys.path[:2]!r}\nimport torch, {loader.partition('.')[0]}\nload = {loader}\n"
                       f"t = time.perf_counter()\nwith torch.no_grad():\n  str(({call})(load)(torch.tensor([[1]], device={where})))\n"
                       "print(time.perf_counter() - t, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)")
            out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
            figures[name].append([float(word) for word in out.split()[-2:]])
    size = sum(path.stat().st_size for path in Path(args.model).glob("*.safetensors"))
    base = statistics.median(peak for _, peak in figures["nothing"])
    peaks = {f"peak_over_size_{name}": (statistics.median(p for _, p in runs) - base) / size for name, runs in figures.items() if name != "nothing"}
    against = "hf" if args.peer == "hf" else "nanoexit"
    report("load and read a token", against, *middle([a / b for (a, _), (b, _) in zip(figures[against], figures["nanoexit"])]),
           seconds=statistics.median(s for s, _ in figures["nanoexit"]), megabytes=size / 1e6, **peaks)


def growth(args: argparse.Namespace, report: Report) -> None:
    """Decoding against context length, an SFT student step against trace length, and the memory of both; drawn into --out."""
    lengths, new = [args.longest // 2**i for i in (4, 3, 2, 1, 0)], 32
    decoding, student = _growing(args)
    variants = {f"{n}{kind}": lambda n=n, k=k: decoding(n, k) for n in lengths for kind, k in (("", 1 + new), (" prefill", 1))}
    times = in_turn(variants, args.rounds, args.device)
    steps = in_turn({str(n): lambda n=n: student(n) for n in lengths}, args.rounds, args.device)
    alone = lambda kind: {n: [_alone(args, "growth", f"{kind}:{n}")[0] / 1e6 for _ in range(min(args.rounds, 3) if n in lengths[-2:] else 1)]
                          for n in lengths}
    figures = {  # file: (work, unit, what each round gave at each length)
        "decode-time": ("decoding a token", "", {n: [a - b for a, b in zip(times.rounds[str(n)], times.rounds[f"{n} prefill"])] for n in lengths}),
        "step-time": ("SFT student step", "", {n: steps.rounds[str(n)] for n in lengths}),
        "decode-memory": ("memory of prefill and one token", "MB", alone("decode")),
        "step-memory": ("memory of a student step", "MB", alone("step")),
    }
    for file, (work, unit, rounds) in figures.items():
        values = {n: statistics.median(v) for n, v in rounds.items()}
        if not unit:
            values, unit = {n: value / values[lengths[0]] for n, value in values.items()}, f"times that at {lengths[0]}"
        drawing = line_figure(work[0].upper() + work[1:], "tokens", unit, [Line(work, list(values.items()), series_var(0))])
        replace(args.out / f"{file}.svg", lambda path, drawing=drawing: path.write_text(standalone(drawing), encoding="utf-8"))
        print(f"{work}: " + ", ".join(f"{v:.4g} {unit} at {n}" for n, v in values.items()))
        before, last = lengths[-2:]
        report(f"{work}, {last} tokens", f"{before} tokens", *middle([a / b for a, b in zip(rounds[last], rounds[before])]), unit="times as much",
               values={str(n): float(f"{v:.4g}") for n, v in values.items()})


def _growing(args: argparse.Namespace) -> tuple[Callable, Callable]:
    """-> decoding(n, new), which prefills n tokens first; student(n): forward and backward of one row of n tokens."""
    model = load_model(args.model, str(args.device), args.dtype)
    half = model.full_depth // 2
    attach(model, [half], lora=LoRAConfig(dropout=0.0))
    row = torch.randint(model.shape.vocab, (1, args.longest), generator=torch.Generator().manual_seed(1)).to(args.device)
    depths = torch.full_like(row, model.full_depth)
    depths[:, ::2] = half
    teacher = torch.randn(args.longest, model.shape.width, dtype=DTYPES[args.dtype], device=args.device)

    def student(n: int) -> None:
        readout_kl(model, score(model, row[:, :n], depths[:, :n], [0]).hidden[0], teacher[:n], args.chunk).mean().backward()

    return lambda n, new: ours(args, model, row[:, :n].tolist(), "full", new), student


def growth_once(args: argparse.Namespace) -> tuple[float, float]:
    """-> bytes of peak memory above the weights', and seconds, of --way decode:N or step:N, after a short call of the same kind."""
    kind, n = args.way.split(":")
    decoding, student = _growing(args)
    run = student if kind == "step" else lambda n: decoding(n, 2)
    run(8)
    start = time.perf_counter()
    return peak(lambda: run(int(n)), args.device), time.perf_counter() - start


def table(path: Path) -> str:
    """Lines that --save kept -> Markdown. Speeds are told of a GPU alone; a CPU's neighbours are too noisy."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    gpu = all("threads" not in r["hardware"] for r in rows)
    out = ["| work | shape, dtype, batch | tokens | against | | middle half of the rounds |" + " speed |" * gpu, "|" + "---|" * (6 + gpu)]
    # lines of data/bench/gpu.jsonl were kept before there was "tokens"
    units = {"nanoexit_tokens_per_s": "tokens/s", "tokens_per_s": "tokens/s", "gigabytes_read_per_s": "GB/s"}
    for r in rows:
        speed = ", ".join(f"{r[key]:,.0f} {unit}" for key, unit in units.items() if key in r)
        elsewhere = "".join(f", {here}" for here, first in zip(r["hardware"].split(", "), rows[0]["hardware"].split(", ")) if here != first)
        out.append(f"| {r['work']}{elsewhere} | {r['shape']}, {r['dtype']}, {r['batch']} | {r.get('tokens', '')} | {r['against']} | {r['ratio']:.2f} {r['unit']} "
                   f"| {r['spread'][0]:.2f} to {r['spread'][1]:.2f} |" + f" {speed} |" * gpu)
    first, *others = dict.fromkeys(f"{r['hardware']}, torch {r['torch']}" for r in rows)
    return "\n".join(out) + f"\n\nOn {first}" + (f"; where it is named, {'; '.join(others)}." if others else ".")


WORKS = {"decode": decode, "exits": exits, "rollout": rollout, "train": train, "memory": memory, "load": load, "growth": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=[*WORKS, "table"])
    parser.add_argument("file", nargs="?", type=Path, help="for table: the file that --save wrote")
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="random weights in this shape (default: tiny)")
    parser.add_argument("--model", help="a folder with a model instead")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 elsewhere")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, help="rows (default: 1; 4 for train, 256 for rollout)")
    parser.add_argument("--peer", choices=["hf", "llama.cpp"], help="measure this beside; llama.cpp in decode, on a CPU")
    parser.add_argument("--prompt", type=int, default=16, help="tokens before those that are decoded (default: 16)")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode (default: 64)")
    parser.add_argument("--length", type=int, default=256, help="tokens a row in training (default: 256)")
    parser.add_argument("--longest", type=int, default=4096, help="growth: the longest context; four halvings come before (default: 4096)")
    parser.add_argument("--chunk", type=int, default=128, help="sft.chunk: rows of logits at once (default: 128)")
    parser.add_argument("--pack", choices=["auto", "always", "never"], default="auto", help="generation.pack (default: auto)")
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--save", help="append the lines of JSON to this file")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="growth: where the figures go (default: runs/bench)")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work == "table":
        if args.file is None or not args.file.is_file():
            raise UserError(f"table: {args.file or 'no file given'}: expected a file that --save wrote")
        print(table(args.file))
        return
    for flag, low in (("batch", 1), ("prompt", 1), ("new", 1), ("length", 2), ("longest", 16), ("chunk", 1), ("rounds", 2), ("threads", 1)):
        if getattr(args, flag) is not None and getattr(args, flag) < low:
            raise UserError(f"--{flag}: expected at least {low}, found {getattr(args, flag)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = pick_device(args.device)
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    if args.peer == "llama.cpp" and (args.work != "decode" or args.device.type != "cpu"):
        raise UserError(f"--peer llama.cpp: measured in decode on a CPU, found {args.work} on {args.device}")
    args.batch = args.batch or {"train": 4, "rollout": 256}.get(args.work, 1)
    if args.work == "rollout" and args.batch < 2:
        raise UserError(f"--batch: a rollout is measured against one row; expected at least 2, found {args.batch}")
    if args.way:
        print(json.dumps(kl_once(args.way, args.chunk, DTYPES[args.dtype]) if args.work == "memory" else growth_once(args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        name = Path(args.model).name if args.model else args.shape
        if not args.model and args.work != "memory":
            snapshot(Path(folder), SHAPES[args.shape], DTYPES[args.dtype])
            args.model = folder
        WORKS[args.work](args, Report(args, "152k x 896" if args.work == "memory" else name))


if __name__ == "__main__":
    run_script(main)
