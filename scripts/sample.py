"""Generate text, and show the depth of every token.

python scripts/sample.py                                  the shipped tiny reasoner
python scripts/sample.py "7 +3 *9" --adapter runs/tiny-sft
python scripts/sample.py "Why is the sky blue?" --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import _script
import numpy as np

from nanoexit.adapters import adapter_base, load_adapter
from nanoexit.config import Config, UserError, parse_yaml, printable
from nanoexit.exits import POLICIES, check_cap, parse_policy
from nanoexit.generate import Sampling, generate
from nanoexit.model import Transformer
from nanoexit.report import Run, write_page
from nanoexit.tasks import TASKS, Prompt, Response, load_prompts
from nanoexit.teacher import read_response, show_response
from nanoexit.tokenizer import Tokenizer, load_tokenizer
from nanoexit.weights import load_model

TINY = "data/tiny"
# Of 256 colours, from depth 1 to full depth. A program cannot know a terminal's background, so each
# has a contrast of 3 to 1 on both white and black.
TERMINAL = (160, 166, 136, 100, 64, 29, 30, 31, 26)


def main() -> None:
    args = arguments()
    parse_policy(args.policy or "full")
    variables = template_variables(args.template)
    name, revision = args.model, None
    if name is None:
        name, revision = adapter_base(args.adapter) if args.adapter else (TINY, None)
    model = load_model(name, args.device, args.dtype, revision)
    tokenizer = load_tokenizer(name, revision)
    if args.adapter:
        load_adapter(model, args.adapter)
    check_cap(model, args.cap)
    model.cap = args.cap or model.cap
    policy = args.policy or ("head" if model.exits is not None else "full")
    prompts = own_prompts(args.prompt)
    ids = [tokenizer.prompt_ids(p.prompt, p.system, **variables) for p in prompts]
    room = max(1, model.shape.max_positions - max(map(len, ids)))
    settings = Sampling(args.top_p, args.top_k)
    most = min(args.max_new_tokens, room)
    written = generate(model, ids, policy, most, args.temperature, args.seed, settings)
    responses = [read_response(tokenizer, *row) for row in zip(prompts, ids, written)]
    if args.html or args.json:
        shown = [show_response(model, tokenizer, r, policy) for r in responses]
    if args.html:
        write_page(args.html, [Run("", shown)], f"{Path(name).name}, policy {policy}")
        print(f"page written to {args.html}", file=sys.stderr)
    if args.json:
        lines = [json.dumps(row).replace("\x7f", "\\u007f") for row in shown]
        print("\n".join(lines))  # JSON spells out every other control character itself
    else:
        show(responses, tokenizer, model, policy)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("prompt", nargs="?", help="default: three chains for the tiny reasoner")
    add("--model", help=f"a folder or hub id (default: the adapter's base, else {TINY})")
    add("--adapter", metavar="RUN_DIR", help="a run whose adapters and exit heads to use")
    add("--policy", help=f"{' | '.join(POLICIES)} (default: head, or full without heads)")
    add("--cap", type=int, metavar="D", help="largest depth of any token, the prompt's included")
    add("--temperature", type=float, default=0.6, help="0 takes the likeliest token (default 0.6)")
    add("--top-p", type=float, default=0.95)
    add("--top-k", type=int, default=0)
    add("--max-new-tokens", type=int, default=400)
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto | cpu | cuda | mps")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--template", metavar="NAME=VALUE", action="append", default=[], help="template variable")
    add("--html", metavar="FILE", help="also write a page with the depth of every token")
    add("--json", action="store_true", help="print one JSON object per response instead of text")
    args = parser.parse_args()
    ranges = {"temperature": (0, 1e6), "top_p": (1e-9, 1), "top_k": (0, math.inf)}
    ranges |= {"max_new_tokens": (1, math.inf), "seed": (0, 2**63 - 1)}
    for flag, (low, high) in ranges.items():
        value = getattr(args, flag)
        if not low <= value <= high:
            name = flag.replace("_", "-")
            raise UserError(f"--{name}: expected {low:g} to {high:g}, found {value}")
    return args


def template_variables(pairs: list[str]) -> dict:
    """["enable_thinking=false"] -> {"enable_thinking": False}."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--template {pair}: expected NAME=VALUE")
        found[name] = parse_yaml(value, f"--template {pair}")
    return found


def own_prompts(text: str | None) -> list[Prompt]:
    """The user's prompt, with its answer if it is a chain; without one, chains of 2, 4 and 6."""
    if text is None:
        chains = load_prompts(Config(), "held_out", 200)
        return [next(p for p in chains if p.group.startswith(k)) for k in "246"]
    clock = Prompt("yours", text, checker="clock")
    answer = TASKS["clock"].target(clock)
    return [Prompt("yours", text) if answer is None else replace(clock, answer=answer)]


def show(responses: list[Response], tokenizer: Tokenizer, model: Transformer, policy: str) -> None:
    """Print every response, each token in the colour of its depth, and two lines of figures."""
    if not tokenizer.has_template:
        name = printable(model.name)
        print(f"{name} has no chat template; it continues the plain prompt", file=sys.stderr)
    for r in responses:
        g = r.generation
        # decoded after the prompt's last token, which keeps a leading space
        pieces = tokenizer.pieces(r.prompt_ids[-1:] + g.tokens)[1:]
        n = len(pieces) - (g.finish == "stop")
        prompt = printable(tokenizer.decode(r.prompt_ids, skip_special=True))
        print(prompt + paint(pieces[:n], g.depths[:n], model.full_depth, sys.stdout))
    layers = () if model.exits is None else model.exits.layers
    if colours := legend(layers, model.full_depth, sys.stdout):
        print(colours)
    print(summary(responses, model.full_depth, policy))


def summary(responses: list[Response], full_depth: int, policy: str) -> str:
    """Two lines: tokens and right answers; mean depth, and the mean of each response's deepest."""
    depths = [r.generation.depths for r in responses]
    mean = np.mean([d for row in depths for d in row])
    deepest = np.mean([max(row) for row in depths])
    counts = [f"policy {policy}", f"{sum(map(len, depths))} tokens"]
    checked = [r.verdict.correct for r in responses if r.prompt.checker != "none"]
    if checked:
        counts.append(f"{sum(checked)} of {len(checked)} correct")
    figures = f"mean depth {mean:.2f} of {full_depth} ({mean / full_depth:.0%} of blocks run)"
    figures += f" · deepest token {deepest:.1f}" + " on average" * (len(responses) > 1)
    return f"{' · '.join(counts)}\n{figures}"


def has_colors(stream: TextIO) -> bool:
    """Whether `stream` shows 256 colours and NO_COLOR (no-color.org) is not set."""
    term = os.environ.get("TERM", "dumb")
    able = term != "dumb" and ("256" in term or "COLORTERM" in os.environ)
    return able and stream.isatty() and not os.environ.get("NO_COLOR")


def paint(pieces: Sequence[str], depths: Sequence[int], full_depth: int, stream: TextIO) -> str:
    """The pieces of a response as one text, safe to print, each in the colour of its depth.

    Characters that `stream` cannot encode become question marks."""
    painted, colored, encoding = "", has_colors(stream), stream.encoding or "utf-8"
    for depth, run in itertools.groupby(zip(pieces, depths, strict=True), key=lambda pair: pair[1]):
        text = printable("".join(piece for piece, _ in run))
        text = text.encode(encoding, "replace").decode(encoding)
        share = (depth - 1) / (full_depth - 1) if full_depth > 1 else 1
        code = TERMINAL[round(share * (len(TERMINAL) - 1))]
        painted += f"\x1b[38;5;{code}m{text}\x1b[0m" if colored else text
    return painted


def legend(exit_layers: Sequence[int], full_depth: int, stream: TextIO) -> str:
    """One line that names the colour of each depth; "" for a stream without colours."""
    depths = sorted({*exit_layers, full_depth})
    names = [f"  ■ {depth}" for depth in depths]
    return "depth" + paint(names, depths, full_depth, stream) if has_colors(stream) else ""


if __name__ == "__main__":
    _script.run_main(main)
