"""Write a few responses, each token coloured by the depth it used, with a summary line.

    python scripts/sample.py                                     the tiny reasoner of the repository, a few prompts of its own
    python scripts/sample.py "7 +3 *9" --adapter runs/tiny-sft   a student, on your prompt
    python scripts/sample.py "Why is the sky blue?" --model Qwen/Qwen3-0.6B --policy full
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanoexit.adapters import adapter_base, load_adapter
from nanoexit.colors import legend, paint
from nanoexit.config import Config
from nanoexit.data import load_prompts
from nanoexit.errors import UserError, run_script
from nanoexit.responses import Response, read_response, show_response
from nanoexit.exits import POLICIES
from nanoexit.generate import generate
from nanoexit.report import write_page
from nanoexit.tasks import Prompt, clock_values
from nanoexit.tokenizer import Tokenizer, load_tokenizer
from nanoexit.weights import load_model

TINY = "data/tiny"


def main() -> None:
    args = command_line()
    name = args.model or (adapter_base(args.adapter) if args.adapter else TINY)
    model = load_model(name, args.device, args.dtype)
    tokenizer = load_tokenizer(name)
    if args.adapter:
        load_adapter(model, args.adapter)
    policy = args.policy or ("head" if model.exits is not None else "full")
    prompts = own_prompts(args.prompt)
    ids = [tokenizer.prompt_ids(p.prompt) for p in prompts]
    room = model.shape.max_positions - max(map(len, ids))
    written = generate(model, ids, policy, max(1, min(args.max_new_tokens, room)), args.temperature, args.top_p, args.top_k, args.seed,
                       prompt_exits=args.prompt_exits)
    responses = [read_response(tokenizer, *row) for row in zip(prompts, ids, written)]
    shown = [show_response(model, tokenizer, r, policy) for r in responses] if args.json or args.html else []
    if args.html:
        write_page(Path(args.html), f"{Path(name).name}, policy {policy}", shown)
    if args.json:
        print("\n".join(json.dumps(row, ensure_ascii=False) for row in shown))
    else:
        show(responses, tokenizer, model, name, policy)
    if args.html:
        print(f"page written to {args.html}", file=sys.stderr)


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="default: a few prompts of the tiny reasoner's own task")
    parser.add_argument("--model", help=f"a folder or the id of a model on the hub (default: the adapter's base, else {TINY})")
    parser.add_argument("--adapter", metavar="RUN_DIR", help="a run whose adapters and exit heads to use")
    parser.add_argument("--policy", help=f"{' | '.join(POLICIES)} (default: head where there are heads, else full)")
    parser.add_argument("--prompt-exits", default="full", help="depth of prompt tokens: full | limit:D | head")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 takes the most likely token (default 0.6)")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--html", metavar="FILE", help="also write a page on which every token tells its depth and alternatives")
    parser.add_argument("--json", action="store_true", help="one JSON object a response instead of text")
    args = parser.parse_args()
    for flag, low, high in (("temperature", 0, 100), ("top_p", 0.01, 1), ("top_k", 0, 10**9), ("max_new_tokens", 1, 10**9), ("seed", 0, 2**63)):
        if not low <= getattr(args, flag) <= high:
            raise UserError(f"--{flag.replace('_', '-')}: {getattr(args, flag)} is out of range, expected {low} to {high}")
    return args


def own_prompts(text: str | None) -> list[Prompt]:
    """The user's prompt, with its answer where it is a clock chain; else a chain of each length."""
    if text is not None:
        try:
            return [Prompt("yours", text, str(clock_values(text)[-1]), checker="clock")]
        except UserError:
            return [Prompt("yours", text)]
    chains = load_prompts(Config().data, "held_out", 200)
    return [next(p for p in chains if len(clock_values(p.prompt)) == k) for k in (2, 4, 6)]


def show(responses: list[Response], tokenizer: Tokenizer, model, name: str, policy: str) -> None:
    if not tokenizer.has_template:
        print(f"{name} has no chat template: the plain prompt is continued", file=sys.stderr)
    for r in responses:
        g = r.generation
        pieces = tokenizer.pieces(r.prompt_ids[-1:] + g.tokens)[1:]  # with the prompt's end before it, a first space is kept
        shown = len(pieces) - (g.finish == "stop")
        print(tokenizer.decode(r.prompt_ids, skip_special=True) + paint(pieces[:shown], g.depths[:shown], model.full_depth, sys.stdout))
    layers = [] if model.exits is None else model.exits.layers
    if colours := legend(layers, model.full_depth, sys.stdout):
        print(colours)
    print(summary(responses, model.full_depth, policy))


def summary(responses: list[Response], full_depth: int, policy: str) -> str:
    """One line: tokens, mean depth, layers skipped, how many are right."""
    depths = [d for r in responses for d in r.depths]
    mean = sum(depths) / len(depths)
    checked = [r.verdict.correct for r in responses if r.prompt.checker != "none"]
    right = f" · {sum(checked)} of {len(checked)} correct" if checked else ""
    tokens = sum(len(r.generation.tokens) for r in responses)
    return f"policy {policy} · {tokens} tokens · mean depth {mean:.2f} of {full_depth} · {1 - mean / full_depth:.0%} of layers skipped{right}"


if __name__ == "__main__":
    run_script(main)
