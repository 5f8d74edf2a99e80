"""The experiment: the same tiny reasoner trained under different charges for depth, and what each of them then rests on.

An *arm* is one way of training: a base, a depth of the prompt, a charge. Every (arm, seed) is a run directory of its own and ends
as one JSON file under results/, so that the experiment goes on where it was stopped, and arms can run side by side.

Arms of `FULL` beyond the default three: 1. the externalization curve over lambda; 2. mean, max and sum of depth as the penalty;
3. prompts frozen at depth 1 throughout; 4. bases on which it fails (no deep supervision; chains without slots), and two attempts
on the slot-less one: prompt tokens that sample exits and pay for their depth, and a base pretrained with three quarters of its fully
written chains behind a prompt frozen at depth 1; 5. no exits, to see what the cost of length does alone.
"""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from html import escape
from pathlib import Path

import numpy as np

from nanoexit import reinforce, sft
from nanoexit.adapters import save_adapter
from nanoexit.config import ROOT, Config, load_config
from nanoexit.data import load_prompts, replace, rounded, write_text
from nanoexit.evaluate import measure
from nanoexit.faithfulness import accuracy, adding_mistakes, early_answering, forced_depth, monitor, preflight, probe, prompt_knockout
from nanoexit.figures import Line, bar_figure, line_figure, series_var, standalone
from nanoexit.lora import adapters_off
from nanoexit.model import Transformer
from nanoexit.responses import respond
from nanoexit.tokenizer import Tokenizer
from nanoexit.training import load_student, start_run

PROBED = 4096  # training chains that the probe is fitted on
RECIPES = {"shipped": None, "no-deep": ["pretrain.deep_weight=0"], "no-slots": ["pretrain.slots=0"],
           "shallow": ["pretrain.slots=0", "pretrain.shallow=0.75"]}


@dataclass(frozen=True)
class Arm:
    """depth_weight is lambda; None is SFT alone. prompt is exits.prompt, in SFT, RL and evaluation."""

    name: str
    depth_weight: float | None = None
    penalty: str = "mean"
    base: str = "shipped"
    prompt: str = "full"
    exits: bool = True

    @property
    def start(self) -> "Arm | None":
        """The SFT arm that this one goes on from; without exits there is none."""
        if self.depth_weight is None or not self.exits:
            return None
        return Arm(sft_name(self.base, self.prompt), base=self.base, prompt=self.prompt)


def sft_name(base: str, prompt: str) -> str:
    return "SFT" + ("" if base == "shipped" else f", base {base}") + ("" if prompt == "full" else f", prompt {prompt}")


DEFAULT = [Arm("SFT"), Arm("lambda 0", 0.0), Arm("lambda 1", 1.0)]
FULL = [
    *DEFAULT,
    Arm("lambda 0.1", 0.1), Arm("lambda 0.3", 0.3),
    *(Arm(f"lambda {w:g}, {penalty}", w, penalty) for penalty in ("max", "sum") for w in (0.1, 1.0)),
    Arm("SFT, prompt limit:1", prompt="limit:1"),
    Arm("lambda 0, prompt limit:1", 0.0, prompt="limit:1"), Arm("lambda 1, prompt limit:1", 1.0, prompt="limit:1"),
    Arm("SFT, base no-deep", base="no-deep"), Arm("lambda 1, base no-deep", 1.0, base="no-deep"),
    Arm("SFT, base no-slots", base="no-slots"), Arm("lambda 1, base no-slots", 1.0, base="no-slots"),
    Arm("SFT, base no-slots, prompt head", base="no-slots", prompt="head"),
    Arm("lambda 1, base no-slots, prompt head", 1.0, base="no-slots", prompt="head"),
    Arm("SFT, base shallow", base="shallow"),
    Arm("lambda 0, base shallow", 0.0, base="shallow"), Arm("lambda 1, base shallow", 1.0, base="shallow"),
    Arm("no exits", 0.0, exits=False),
]


# --- running ---------------------------------------------------------------------------------------------------------


def make_base(name: str, folder: Path) -> None:
    """Pretrain one of RECIPES into folder/bases/NAME, where it is not there yet."""
    out = base_folder(name, folder)
    if RECIPES[name] is not None and not (out / "tokenizer.json").is_file():
        command = [sys.executable, str(ROOT / "scripts/pretrain_tiny.py"), str(ROOT / "configs/tiny_pretrain.yaml"), *RECIPES[name]]
        subprocess.run([*command, f"pretrain.out={out}"], check=True)


def base_folder(name: str, folder: Path) -> Path:
    return Path("data/tiny") if RECIPES[name] is None else folder / "bases" / name


def result_file(arm: Arm, seed: int, folder: Path) -> Path:
    return folder / "results" / f"{_slug(arm.name)}-seed{seed}.json"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c == "." else "-" for c in name).replace("--", "-")


def run_arm(arm: Arm, seed: int, folder: Path, overrides: Sequence[str] = ()) -> dict:
    """Train (or go on with) one arm and examine it -> its entry of results.json. Done before: read back."""
    done = result_file(arm, seed, folder)
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    config = arm_config(arm, seed, folder, overrides)
    resume = (Path(config.run.dir) / "checkpoint").is_dir()
    if arm.depth_weight is None:
        model, tokenizer, _ = sft.run(config, resume)
    else:
        model, tokenizer = load_student(config)
        out = start_run(config, resume)
        reinforce.train(model, tokenizer, config, out)
        save_adapter(model, out / "adapter")
    result = {"arm": arm.name, "base": arm.base, "lambda": arm.depth_weight, "penalty": arm.penalty, "prompt_exits": arm.prompt,
              "seed": seed, **examine(model, tokenizer, config)}
    write_text(done, json.dumps(rounded(result)))
    return rounded(result)


def arm_config(arm: Arm, seed: int, folder: Path, overrides: Sequence[str] = ()) -> Config:
    config = load_config("configs/tiny_rl.yaml", overrides)
    start = arm.start and str(folder / f"{_slug(arm.start.name)}-seed{seed}")
    return changed(
        config, model=changed(config.model, name=str(base_folder(arm.base, folder))),
        exits=changed(config.exits, prompt=arm.prompt, layers=config.exits.layers if arm.exits else []),
        rl=changed(config.rl, depth_weight=arm.depth_weight or 0.0, depth_penalty=arm.penalty),
        run=changed(config.run, dir=str(folder / f"{_slug(arm.name)}-seed{seed}"), init=start, seed=seed))


def examine(model: Transformer, tokenizer: Tokenizer, config: Config) -> dict:
    """Everything that is reported of one arm, on held-out prompts."""
    policy, seed = "head" if model.exits is not None else "full", [config.run.seed, 5]
    prompts = load_prompts(config.data, "held_out", config.evaluate.count, config.run.seed)
    responses = respond(model, tokenizer, prompts, config, policy, seed, show="examine")
    row = measure(model, tokenizer, responses, config, "student", policy)
    greedy = changed(config, generation=changed(config.generation, temperature=0.0))
    steps = [(len(r.verdict.steps), r.verdict.expected_steps) for r in responses]
    found = {key: row[key] for key in ("accuracy", "accuracy_interval", "accuracy_by_group", "written", "mean_depth", "full_depth", "tokens", "kl", "prompts")}
    with adapters_off(model):
        base_route = preflight(model, tokenizer, prompts)
        base_monitor = monitor(respond(model, tokenizer, prompts, config, "full", seed, "full"))
    return found | {
        "greedy_accuracy": accuracy(respond(model, tokenizer, prompts, greedy, "head:0.5" if policy == "head" else "full", seed)),
        "written_at_all": float(np.mean([min(1.0, n / expected) for n, expected in steps])),
        "answer_depth": row["depth_by_kind"].get("answer"),
        "forced_depth_accuracy": forced_depth(model, tokenizer, prompts, config, seed),
        "prompt_knockout_accuracy": prompt_knockout(model, tokenizer, prompts, config, policy, seed),
        "early_answering": early_answering(model, tokenizer, responses, config, policy, seed),
        "adding_mistakes": adding_mistakes(model, tokenizer, responses, config, policy, seed),
        "monitor": monitor(responses), "base_monitor": base_monitor,
        "probe": probe(model, tokenizer, load_prompts(config.data, "train", PROBED, config.run.seed), prompts),
        "preflight": preflight(model, tokenizer, prompts), "preflight_base": base_route,
    }


# --- reading ---------------------------------------------------------------------------------------------------------


COLUMNS = {
    "accuracy": lambda r: r["accuracy"], "greedy": lambda r: r["greedy_accuracy"], "written": lambda r: r["written"],
    "depth": lambda r: r["mean_depth"], "answer depth": lambda r: r["answer_depth"], "tokens": lambda r: r["tokens"],
    "forced out at 2": lambda r: r["forced_depth_accuracy"][1], "prompt frozen at 1": lambda r: r["prompt_knockout_accuracy"][0],
    "follow": lambda r: r["adding_mistakes"].get("follow"), "stay": lambda r: r["adding_mistakes"].get("stay"),
    "stop": lambda r: r["adding_mistakes"].get("stop"), "monitor": lambda r: r["monitor"]["score"], "probe": lambda r: r["probe"][-1],
}


def table(results: Sequence[dict]) -> str:
    """Markdown: a row an arm, the mean over its seeds with the lowest and highest in brackets."""
    lines = [f"| arm | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, rows in by_arm(results).items():
        cells = [_cell([v for row in rows if (v := read(row)) is not None], 1 if title == "tokens" else 2 if "depth" in title else 3)
                 for title, read in COLUMNS.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    span = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{span}"


def by_arm(results: Sequence[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = defaultdict(list)
    for row in results:
        groups[row["arm"]].append(row)
    return groups


def preflight_lines(result: dict) -> str:
    """The check that is printed before REINFORCE starts: has this base a shallow written route?"""
    lines = [f"pre-flight check, base {result['base']}: accuracy of each written step, prompt frozen at depth 1, step forced out at depth 2"]
    for group, steps in result["preflight_base"].items():
        lines.append(f"  chains of {group:<8}" + " ".join(f"{s:.2f}" for s in steps))
    worst = min(min(steps) for steps in result["preflight_base"].values())
    return "\n".join([*lines, f"  worst step {worst:.2f}: " + ("there is a shallow written route" if worst > 0.9 else "no shallow written route: expect no externalization")])


def draw(results: Sequence[dict]) -> dict[str, str]:
    """File name -> a figure (as figures.py draws them), mean over seeds with the range as an interval."""
    groups = by_arm(results)
    curve = [rows for rows in groups.values() if rows[0]["lambda"] is not None and rows[0]["penalty"] == "mean"
             and rows[0]["base"] == "shipped" and rows[0]["prompt_exits"] == "full" and rows[0]["arm"] != "no exits"]
    curve.sort(key=lambda rows: rows[0]["lambda"])
    measures = {"values written": lambda r: r["written"], "accuracy": lambda r: r["accuracy"],
                "mean depth, share of all blocks": lambda r: r["mean_depth"] / r["full_depth"]}
    at_lambda = [_line(name, [rows[0]["lambda"] for rows in curve], [[read(r) for r in rows] for rows in curve], i)
                 for i, (name, read) in enumerate(measures.items())]
    main = [name for name in ("SFT", "lambda 0", "lambda 1") if name in groups]
    others = [name for name, rows in groups.items() if rows[0]["lambda"] == 1.0 and (rows[0]["base"] != "shipped" or name == "lambda 1")]

    def over_depth(title: str, x: str, key: str, names: Sequence[str]) -> str:
        lines = [_line(name, range(1, len(groups[name][0][key]) + 1), list(zip(*(r[key] for r in groups[name]))), i) for i, name in enumerate(names)]
        return line_figure(title, x, "accuracy", lines)

    figures = {
        "externalization": line_figure("Externalization", "lambda, the charge for depth", "share", at_lambda) if len(curve) > 1 else "",
        "forced-depth": over_depth("Forced out early", "depth at which every written token is forced out", "forced_depth_accuracy", main),
        "prompt-knockout": over_depth("Prompt knocked out", "depth at which prompt tokens are frozen", "prompt_knockout_accuracy", main),
        "probe": over_depth("Values that a probe finds in the prompt", "blocks", "probe", main),
        "early-answering": line_figure("Early answering", "share of the reasoning kept", "same answer", [
            _line(name, [x for x, _ in groups[name][0]["early_answering"]],
                  list(zip(*([y for _, y in r["early_answering"]] for r in groups[name]))), i) for i, name in enumerate(main)]),
        "changed-value": bar_figure("A written value is changed", "what the answer does", [("", [
            (name, [(share, series_var(i), f"{kind}: {share:.0%}", f"{kind} {share:.0%}") for i, kind in enumerate(("follow", "stay", "stop"))
                    if (share := float(np.mean([r["adding_mistakes"][kind] for r in groups[name]])))]) for name in main])],
            keys=[(kind, series_var(i), False) for i, kind in enumerate(("follow", "stay", "stop"))]),
    }
    if len(others) > 1:
        figures["bases"] = over_depth("Prompt knocked out, lambda 1 on other bases", "depth at which prompt tokens are frozen", "prompt_knockout_accuracy", others)
    return {name: figure for name, figure in figures.items() if figure}


def _line(name: str, xs: Sequence[float], values: Sequence[Sequence[float]], index: int) -> Line:
    points = [(x, float(np.mean(v))) for x, v in zip(xs, values)]
    spans = [(x, min(v), max(v)) for x, v in zip(xs, values) if len(v) > 1]
    tips = [f"{name}: {y:.3f} at {x:g}" for x, y in points]
    return Line(name, points, series_var(index), intervals=spans, tips=tips)


def write(results: Sequence[dict], folder: Path, command: str) -> None:
    """results.json, table.md, one SVG a figure, and index.html with all of them."""
    write_text(folder / "results.json", json.dumps(list(results), indent=None))
    write_text(folder / "table.md", f"`{command}`\n\n{table(results)}")
    figures = draw(results)
    for name, figure in figures.items():
        write_text(folder / f"{name}.svg", standalone(figure))
    replace(folder / "index.html", lambda path: path.write_text(_page(results, figures, command), encoding="utf-8"))


def _page(results: Sequence[dict], figures: dict[str, str], command: str) -> str:
    rows = [line.strip("| ").split(" | ") for line in table(results).splitlines()]
    head = "".join(f"<th scope=col>{escape(c)}</th>" for c in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows[2:])
    css = (Path(__file__).with_name("report.css")).read_text(encoding="utf-8")
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>nanoexit experiment</title><style>{css}</style></head><body><header class="top"><div>'
            f'<p class="mark">nanoexit</p><h1>Does a charge for depth make a model think out loud?</h1><p class="lead">{escape(command)}. Means over '
            f'seeds, lowest and highest in brackets. <b>Forced out at 2</b>: accuracy with every written token forced out at depth 2. '
            f'<b>Prompt frozen at 1</b>: accuracy with prompt tokens frozen after one block. <b>Follow, stay, stop</b>: what the answer does '
            f'when a written value is changed. <b>Monitor</b>: how often the written reasoning alone gives the answer away.</p></div></header>'
            f'<main><section><h2>Arms</h2><div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
            f'</div></section><section><h2>Figures</h2><div class="figures">{"".join(figures.values())}</div></section></main></body></html>\n')
