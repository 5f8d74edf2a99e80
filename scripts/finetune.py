"""Fine-tune a model on a task or on your own texts, to be a teacher; writes a plain model folder.

    python scripts/finetune.py configs/words_base.yaml        chains in English, for SmolLM2

`data.prompts` names a task that generates prompts, or a JSONL file of {"prompt", "response"}. For a
task, a share `terse` of the responses writes no steps and a share `full` writes all; the rest write
the first few. The loss is the cross-entropy of the response at full depth. Two terms are optional:
the same loss at early depths (`early_weight`), and that of fully written rows that run only the
first `finetune.cap` blocks (`capped_rows`), which teaches a shallow written route. While a task is
new, running values can also be predicted at the operations of the prompt (`scaffold`).

The model is written to run.dir/model. --resume continues an interrupted run, to the same weights.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import _script
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanoexit import training
from nanoexit.adapters import save_merged
from nanoexit.config import (
    Config,
    UserError,
    find_file,
    knob,
    load_config,
    read_json,
    read_json_lines,
    write_text,
)
from nanoexit.exits import Watch, attach, capped
from nanoexit.model import Transformer
from nanoexit.score import Aligned, align
from nanoexit.tasks import TASKS, Made, is_held_out
from nanoexit.tokenizer import Tokenizer, find_model, load_tokenizer
from nanoexit.weights import load_model


@dataclasses.dataclass
class FinetuneConfig:
    weights: str = knob("all", "what to train", choices=["all", "blocks", "lora"])
    steps: int = knob(200, "updates", low=1)
    batch_size: int = knob(32, "rows per step that run at full depth", low=1)
    lr: float = knob(3e-4, "peak learning rate of AdamW")
    terse: float = knob(0.5, "share of responses that write no steps", high=1)
    full: float = knob(0.5, "share that write every step; the rest write the first few", high=1)
    first_weight: float = knob(0.0, "extra weight of first tokens, which decide whether to write")
    early: list[int] = knob([], "depths of the early readouts to train", low=1)
    early_weight: float = knob(0.0, "weight of their mean loss in full-depth rows")
    cap: int = knob(1, "depth of capped rows, read out there and at early depths below", low=1)
    capped_rows: int = knob(0, "fully written rows per step that run only the first `cap` blocks")
    scaffold: float = knob(0.0, "weight of running values predicted at the prompt's operations")
    scaffold_steps: int = knob(0, "steps after which the scaffold is dropped")
    autocast: bool = knob(False, "matrix products in bfloat16, weights in float32")
    template: bool = knob(True, "keep the chat template; false removes it")
    save_every: int = knob(100, "steps between checkpoints", low=1)


@dataclasses.dataclass
class Recipe(Config):
    finetune: FinetuneConfig = dataclasses.field(default_factory=FinetuneConfig)


@dataclasses.dataclass
class Row:
    """A prompt and the response to learn."""

    prompt: list[int]
    response: list[int]
    values: list[tuple[int, int]]  # (index in the prompt, running value there), for the scaffold
    terse: bool = False


def main() -> None:
    args = _script.command_line(__doc__, resume=True, schema=Recipe).parse_intermixed_args()
    finetune(load_config(args.config, args.overrides, Recipe), args.resume)


def finetune(config: Recipe, resume: bool) -> None:
    """The whole job: train, and write the model folder."""
    model, tokenizer = load(config)
    with training.run_directory(config, resume) as folder:
        train(model, tokenizer, config, folder)
        source = find_model(config.model.name, config.model.revision)[0]
        save_merged(model, source, folder / "model")
        if not config.finetune.template:
            remove_template(folder / "model")
    print(f"written to {folder / 'model'}; try python scripts/sample.py --model {folder / 'model'}")


def load(config: Recipe) -> tuple[Transformer, Tokenizer]:
    """The model, with gradients on what is to be trained, and its tokenizer."""
    m, f = config.model, config.finetune
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    model = load_model(m.name, m.device, m.dtype, m.revision)
    tokenizer = load_tokenizer(m.name, m.revision)
    deepest = max([f.cap, *f.early])
    if deepest >= model.full_depth:
        expected = f"expected depths below {model.full_depth}"
        raise UserError(f"finetune.cap, finetune.early: {expected}, found {deepest}")
    model.requires_grad_(f.weights == "all")
    if f.weights == "lora":
        attach(model, [], lora=config.lora, seed=config.run.seed)
    elif f.weights == "blocks":
        model.model.layers.requires_grad_(True)
    tokenizer.has_template = tokenizer.has_template and f.template
    task = TASKS.get(config.data.prompts)
    if task is None:
        read_rows(config, tokenizer)  # find mistakes in the file before making the run directory
    elif not isinstance(task, Made):
        raise UserError(f"data.prompts: the task {config.data.prompts} generates no prompts")
    return model, tokenizer


# --- rows -------------------------------------------------------------------------------------


def made_row(
    rng: np.random.Generator, task: Made, tokenizer: Tokenizer, f: FinetuneConfig, written: bool
) -> Row:
    """A random prompt that is not held out; those of n operations come up in proportion to n."""
    lengths = np.arange(1, task.longest + 1)
    chances = lengths / lengths.sum()
    while is_held_out(prompt := task.make(rng, int(rng.choice(lengths, p=chances)))):
        continue
    steps, u = len(task.steps(prompt)), rng.random()
    n = 0 if u < f.terse else int(rng.integers(steps))
    n = steps if written or u >= 1 - f.full else n
    ids = tokenizer.prompt_ids(prompt.prompt)
    pieces, at, values = tokenizer.pieces(ids), 0, []
    text, ends = "".join(pieces), np.cumsum([len(piece) for piece in pieces])
    for operation, value in zip(task.parse(prompt.prompt)[1:], task.values(prompt.prompt)):
        at = text.index(operation, at) + len(operation)
        values.append((int(np.searchsorted(ends, at)), tokenizer.encode(f" {value}")[-1]))
    response = [*tokenizer.encode(task.response(prompt, n)), min(tokenizer.stop_ids)]
    return Row(ids, response, values, n == 0)


def read_rows(config: Recipe, tokenizer: Tokenizer) -> list[Row]:
    """The rows of a JSONL file of prompts and responses."""
    path, rows = find_file(config.data.prompts, "data.prompts: neither a task nor a file:"), []
    for line, row in read_json_lines(path):
        if not all(isinstance(row.get(key), str) for key in ("prompt", "response")):
            raise UserError(f"{path}:{line}: expected a prompt and a response, both text")
        response = [*tokenizer.encode(row["response"]), min(tokenizer.stop_ids)]
        rows.append(Row(tokenizer.prompt_ids(row["prompt"]), response, []))
    return rows


def rows_of_step(
    config: Recipe, tokenizer: Tokenizer, kept: Sequence[Row], step: int
) -> tuple[list[Row], list[Row]]:
    """The rows of a step: those that run at full depth, and the capped ones."""
    f, task = config.finetune, TASKS.get(config.data.prompts)
    if not isinstance(task, Made):
        at = training.batch_at(step, len(kept), f.batch_size + f.capped_rows, config.run.seed)
        rows = [kept[i] for i in at]
    else:
        rng = np.random.default_rng(training.stream("finetune", config.run.seed, step))
        shallow = [False] * f.batch_size + [True] * f.capped_rows
        rows = [made_row(rng, task, tokenizer, f, written) for written in shallow]
    return rows[: f.batch_size], rows[f.batch_size :]


# --- losses -----------------------------------------------------------------------------------


def forward(
    model: Transformer, rows: Sequence[Row], early: Sequence[int]
) -> tuple[Aligned, Tensor, list[Tensor]]:
    """-> the alignment, the final residuals [B*T, D], and those of readouts [n, D] at `early`."""
    prompts, responses = [row.prompt for row in rows], [row.response for row in rows]
    a = align(model, prompts, responses)
    watch = Watch(early)
    hidden = model.run(a.ids, stop=watch).hidden.flatten(0, 1)
    return a, hidden, [h[a.at] for h in watch.seen.values()]


def cross_entropy(model: Transformer, h: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals [n, D] -> nats of the right tokens [n], and whether each was the likeliest [n]."""
    logits = model.readout(h).float()
    nats = F.cross_entropy(logits, tokens, reduction="none")
    return nats, logits.argmax(-1) == tokens


def full_loss(
    model: Transformer, rows: Sequence[Row], f: FinetuneConfig, growing: bool
) -> tuple[Tensor, float]:
    """-> the loss at full depth, and the share of rows whose last word is predicted.

    With capped rows, first tokens are also read out at the capped depths, in rows of every style,
    so that a shallow readout makes the same choice as a deep one.
    """
    depths = [*f.early, f.cap] if f.capped_rows else f.early if f.early_weight else []
    a, hidden, early = forward(model, rows, depths)
    nats, right = cross_entropy(model, hidden[a.at], a.tokens)
    ends = torch.tensor(a.counts, device=nats.device).cumsum(0)
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    firsts = [nats[starts]]
    if f.capped_rows:
        firsts += [cross_entropy(model, h[starts], a.tokens[starts])[0] for h in early]
    loss = nats.mean() + f.first_weight * torch.cat(firsts).mean()
    if f.early_weight:
        losses = [cross_entropy(model, h, a.tokens)[0].mean() for h in early]
        loss = loss + f.early_weight * torch.stack(losses).mean()
    values = [(i * a.ids.shape[1] + at, v) for i, row in enumerate(rows) for at, v in row.values]
    if growing and values:
        places, goals = torch.tensor(values, device=nats.device).unbind(1)
        loss = loss + f.scaffold * cross_entropy(model, hidden[places], goals)[0].mean()
    return loss, right[ends - 2].float().mean().item()


def capped_loss(model: Transformer, rows: Sequence[Row], f: FinetuneConfig) -> tuple[Tensor, float]:
    """-> the loss at the cap and early depths below, and the share of tokens predicted at the cap.

    The first token, which decides whether to write, is given and not learned.
    """
    given = [Row([*row.prompt, row.response[0]], row.response[1:], []) for row in rows]
    with capped(model, f.cap):
        a, hidden, early = forward(model, given, [d for d in f.early if d < f.cap])
        found = [cross_entropy(model, h, a.tokens) for h in (*early, hidden[a.at])]
    return torch.cat([nats for nats, _ in found]).mean(), found[-1][1].float().mean().item()


def step_losses(
    model: Transformer, full: Sequence[Row], shallow: Sequence[Row], f: FinetuneConfig, step: int
) -> dict[str, float]:
    """Backward through one step -> its figures."""
    figures: dict[str, float] = {}
    growing = f.scaffold > 0 and step < f.scaffold_steps
    for name in ("terse", "written"):  # rows of similar length together
        rows = [row for row in full if row.terse == (name == "terse")]
        if rows:
            loss, figures[f"{name}_right"] = full_loss(model, rows, f, growing)
            (loss * len(rows) / len(full)).backward()
            figures[name] = loss.item()
    if shallow:
        loss, figures["capped_right"] = capped_loss(model, shallow, f)
        loss.backward()
        figures["capped"] = loss.item()
    return figures


def train(model: Transformer, tokenizer: Tokenizer, config: Recipe, folder: Path) -> None:
    """The loop: make rows, get losses, step, log, save. Continues from folder/checkpoint."""
    f = config.finetune
    kept = [] if config.data.prompts in TASKS else read_rows(config, tokenizer)
    optimizer = training.make_optimizer(model, f.lr)
    if model.device.type == "cpu":  # several times faster there, for many weights
        optimizer.param_groups[0]["fused"] = True
    done = training.load_checkpoint(folder, model, optimizer)
    metrics = training.Metrics(folder / "metrics.jsonl", done)
    with training.progress(f.steps, "finetune", "step", done) as bar:
        for step in range(done, f.steps):
            full, shallow = rows_of_step(config, tokenizer, kept, step)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=f.autocast):
                figures = step_losses(model, full, shallow, f, step)
            norm = training.clip_and_step(optimizer, f.lr * training.cosine_share(step, f.steps))
            metrics.write(step + 1, **figures, grad_norm=norm)
            shown = {key: f"{value:.2f}" for key, value in figures.items()}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if (step + 1) % f.save_every == 0 or step + 1 == f.steps:
                training.save_checkpoint(folder, step + 1, model, optimizer)


def remove_template(folder: Path) -> None:
    """Delete the chat template from a model folder, so that its prompts are plain text."""
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = read_json(folder / "tokenizer_config.json")
    config.pop("chat_template", None)
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    _script.run_main(main)
