"""Train a tiny reasoner like data/tiny from scratch: a small transformer that answers chains.

It learns three styles of answering: terse (all in the head), full (every step written) and prefix
(the first few steps written). A curriculum makes chains learnable in the head: they grow by one
operation whenever the longest are answered in the head 3 times out of 4. While they grow, each
running value is also predicted at its operation in the prompt (`scaffold`). After that, only the
response is trained, read out at full depth.

The keys `task`, `slots` and `deep_weight` make the other bases of scripts/experiment.py.
"""

import dataclasses
import json
import subprocess
import time
from pathlib import Path

import _script
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from nanoexit.config import ROOT, UserError, knob, load_config, write_text
from nanoexit.exits import Watch
from nanoexit.generate import Sampling, generate
from nanoexit.model import Shape, Transformer
from nanoexit.tasks import TASKS, Chains, Prompt, is_held_out

SPECIAL = ["<bos>", "<eos>", "<think>", "</think>", "=", "."]
BOS, EOS, THINK, DONE, EQUALS, DOT = range(6)
TEMPLATE = (  # "5*9 +7" -> "<bos> 5 *9 +7 =", filled up to SLOTS words with dots
    "{% set words = messages[-1]['content']SPACED.split() %}"
    "{% for word in words %}{% if word not in KNOWN %}"
    "{{ raise_exception('this model reads chains such as EXAMPLE, not ' + word) }}"
    "{% endif %}{% endfor %}"
    "{{ bos_token }} {{ words | join(' ') }}{{ ' .' * (SLOTS - words | length) }}"
    "{% if add_generation_prompt %} ={% endif %}"
)


@dataclasses.dataclass
class PretrainConfig:
    out: str = knob("runs/tiny-pretrain", "where to write the model folder")
    seed: int = knob(0, "every random draw is a function of this", low=0)
    task: str = knob("clock", "kind of chains", choices=["clock", "clock-values", "permute"])
    width: int = knob(96, "D", low=8)
    blocks: int = knob(8, "L", low=2)
    ffn: int = knob(256, "F", low=8)
    heads: int = knob(4, "H", low=1)
    kv_heads: int = knob(2, "K", low=1)
    batch_size: int = knob(64, "chains per step", low=2)
    lr: float = knob(2e-3, "peak learning rate of AdamW", low=0)
    weight_decay: float = knob(0.05, "on matrices", low=0)
    warmup: int = knob(100, "steps of linear warm-up", low=1)
    threshold: float = knob(0.75, "accuracy in the head at which chains grow", low=0, high=1)
    steps_after: int = knob(800, "steps at full length; the rate falls in the second half", low=1)
    max_steps: int = knob(6000, "steps within which chains must reach full length", low=1)
    terse: float = knob(0.5, "share of chains answered in the head", low=0, high=1)
    full: float = knob(0.3, "share with every step written; the rest write a prefix", 0, 1)
    scaffold: float = knob(1.0, "while chains grow: weight of predicting running values", low=0)
    deep_weight: float = knob(0.0, "weight of the mean loss of the early readouts", low=0)
    slots: int = knob(0, "words to which dots pad a chain; 0: no dots", low=0)


@dataclasses.dataclass
class Recipe:
    pretrain: PretrainConfig = dataclasses.field(default_factory=PretrainConfig)


@dataclasses.dataclass
class Batch:
    """Rows of similar length, right-padded; -1 marks positions without a target."""

    ids: Tensor  # [B, T]
    targets: Tensor  # [B, T] the next token, in the response
    values: Tensor  # [B, T] the running value, at the operations of the prompt
    in_head: Tensor  # [B] position that answers a terse chain of the longest length, or -1


class Words:
    """The vocabulary of one task: one token per word."""

    def __init__(self, task: Chains, slots: int):
        self.task, self.slots = task, slots
        self.words = [*SPECIAL, *task.words]
        self.ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def prompt(self, chain: str) -> list[int]:
        """The ids of a chain, as the tokenizer's chat template renders it."""
        words = self.encode(chain)
        return [BOS, *words, *[DOT] * (self.slots - len(words)), EQUALS]

    def text(self, tokens: list[int]) -> str:
        return " ".join(self.words[t] for t in tokens if t != EOS)


def main() -> None:
    args = _script.command_line(__doc__, schema=Recipe).parse_intermixed_args()
    config = load_config(args.config, args.overrides, Recipe).pretrain
    torch.set_num_threads(1)
    started, commit = time.time(), git_commit()
    words = Words(TASKS[config.task], config.slots)  # type: ignore[arg-type]
    model, steps = train(config, words)
    figures = {
        **evaluate(model, config, words),
        "steps": steps,
        "seconds": round(time.time() - started),
    }
    print(json.dumps(figures, indent=2))
    save(model, Path(config.out), config, words, figures, commit)
    print(f"written to {config.out}; try python scripts/sample.py --model {config.out}")


def git_commit() -> str:
    """The commit before training starts, since the code on disk may change during it."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def new_model(config: PretrainConfig, vocab: int) -> Transformer:
    torch.manual_seed(config.seed)
    head_dim = config.width // config.heads
    sizes = (config.width, config.ffn, config.blocks, config.heads, config.kv_heads, head_dim)
    model = Transformer(Shape("qwen2", vocab, *sizes, qkv_bias=True, tied=True, max_positions=64))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.data /= (2 * config.blocks) ** 0.5
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    return model


# --- data -------------------------------------------------------------------------------------


def draw_rows(
    rng: np.random.Generator, config: PretrainConfig, words: Words, longest: int
) -> list[tuple[Prompt, list[int], list[int]]]:
    """(chain, prompt ids, response ids) of one step; held-out chains are never drawn."""
    task, rows = words.task, []
    for i in range(config.batch_size):
        growing = longest < task.longest and i < config.batch_size // 2
        prompt = None
        while prompt is None or is_held_out(prompt):
            weights = np.arange(1, longest + 1)
            k = longest if growing else rng.choice(weights, p=weights / weights.sum())
            prompt = task.make(rng, int(k))
        n, steps = 0, len(task.steps(prompt))
        if rng.random() >= config.terse:
            full = rng.random() < config.full / (1 - config.terse)
            n = steps if full else int(rng.integers(steps))
        response = [*words.encode(task.response(prompt, n)), EOS]
        rows.append((prompt, words.prompt(prompt.prompt), response))
    return rows


def make_batch(
    rows: list[tuple[Prompt, list[int], list[int]]], words: Words, longest: int
) -> Batch:
    width = max(len(prompt) + len(response) for _, prompt, response in rows)
    ids = torch.full((len(rows), width), EOS)
    targets, values = torch.full((2, len(rows), width), -1)
    in_head = torch.full((len(rows),), -1)
    for i, (chain, prompt, response) in enumerate(rows):
        start, row = len(prompt), prompt + response
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, start - 1 : len(row) - 1] = torch.tensor(response)
        running = words.encode(" ".join(words.task.values(chain.prompt)))
        values[i, 2 : 2 + len(running)] = torch.tensor(running)  # <bos> digit operation ...
        if response[1] == DONE and len(running) == longest:
            in_head[i] = start + 1
    return Batch(ids, targets, values, in_head)


# --- training ---------------------------------------------------------------------------------


def train(config: PretrainConfig, words: Words) -> tuple[Transformer, int]:
    model = new_model(config, len(words.words))
    rng = np.random.default_rng([config.seed, 1])
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
    longest, in_head, grown_at, step = 1, 0.0, None, 0
    with tqdm(desc="pretrain", unit="step", dynamic_ncols=True) as bar:
        while grown_at is None or step < grown_at + config.steps_after:
            left = 1.0 if grown_at is None else 1 - (step - grown_at) / config.steps_after
            for group in optimizer.param_groups:
                warm = min(1, (step + 1) / config.warmup)
                group["lr"] = config.lr * warm * max(0.02, min(1.0, 2 * left))
            rows = draw_rows(rng, config, words, longest)
            loss, hits = train_step(
                model, optimizer, rows, config, words, longest, grown_at is None
            )
            step += 1
            for hit in hits:
                in_head += (hit - in_head) * 0.05 / len(hits)
            if grown_at is None and in_head > config.threshold:
                if longest == words.task.longest:
                    grown_at = step
                else:
                    longest, in_head = longest + 1, 0.0
            if grown_at is None and step >= config.max_steps:
                raise UserError(
                    f"pretrain: chains have only grown to {longest} operations after {step} steps; "
                    "try another seed"
                )
            bar.total = None if grown_at is None else grown_at + config.steps_after
            bar.set_postfix(
                longest=longest, in_head=f"{in_head:.2f}", loss=f"{loss:.3f}", refresh=False
            )
            bar.update()
    return model, step


def train_step(
    model, optimizer, rows, config, words, longest, growing
) -> tuple[float, list[float]]:
    """One update -> the response's loss, and for each terse longest chain: was it answered?"""
    rows.sort(key=lambda row: len(row[1]) + len(row[2]))  # similar lengths need little padding
    half = len(rows) // 2
    tokens = sum(len(response) for *_, response in rows)
    loss, hits = 0.0, []
    for part in (rows[:half], rows[half:]):
        batch = make_batch(part, words, longest)
        share = sum(len(response) for *_, response in part) / tokens
        whole, final, hit = losses(model, batch, config, growing)
        (whole * share).backward()
        loss, hits = loss + final.item() * share, hits + hit.tolist()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, hits


def losses(
    model: Transformer, batch: Batch, config: PretrainConfig, growing: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the whole loss, the response's loss, and which of batch.in_head are right."""
    at = (batch.targets >= 0).view(-1).nonzero().view(-1)
    goal = batch.targets.view(-1)[at]
    watch = Watch(range(1, model.full_depth) if config.deep_weight else ())
    hidden = model.run(batch.ids, stop=watch).hidden
    final = F.cross_entropy(model.readout(hidden.flatten(0, 1)[at]), goal)
    whole = final
    if config.deep_weight:
        early = [F.cross_entropy(model.readout(h[at]), goal) for h in watch.seen.values()]
        whole = whole + config.deep_weight * sum(early) / len(early)
    if growing:
        inside = batch.values >= 0
        values = F.cross_entropy(model.readout(hidden[inside]), batch.values[inside])
        whole = whole + config.scaffold * values
    rows = (batch.in_head >= 0).nonzero().view(-1)
    with torch.no_grad():
        guesses = model.readout(hidden[rows, batch.in_head[rows]]).argmax(-1)
    return whole, final, (guesses == batch.targets[rows, batch.in_head[rows]]).float()


# --- evaluation and saving --------------------------------------------------------------------


def evaluate(model: Transformer, config: PretrainConfig, words: Words, count: int = 2000) -> dict:
    """On held-out chains: accuracy, sampled and greedy in the head by length; shares of styles."""
    task, rng = words.task, np.random.default_rng([config.seed, 2])
    source = task.prompts(rng)
    prompts: list[Prompt] = []
    while len(prompts) < count:
        prompt = next(source)
        if is_held_out(prompt):
            prompts.append(prompt)
    ids = [words.prompt(p.prompt) for p in prompts]
    settings = Sampling(stop_ids=[EOS])
    sampled = generate(model, ids, "full", 24, 1.0, config.seed, settings)
    verdicts = [task.verify(p, words.text(g.tokens)) for p, g in zip(prompts, sampled)]
    terse = [[*row, THINK, DONE] for row in ids]
    answers = generate(model, terse, "full", 1, 0, settings=Sampling(stop_ids=[]))
    in_head: dict[int, list[bool]] = {}
    for p, g in zip(prompts, answers):
        right = words.words[g.tokens[0]] == p.answer
        in_head.setdefault(len(task.steps(p)), []).append(right)
    written = [v.claimed / len(v.steps) for v in verdicts]
    return {
        "accuracy": float(np.mean([v.correct for v in verdicts])),
        "in_head": {k: round(float(np.mean(v)), 4) for k, v in sorted(in_head.items())},
        "terse": float(np.mean([w == 0 for w in written])),
        "full": float(np.mean([w == 1 for w in written])),
    }


def save(
    model, out: Path, config: PretrainConfig, words: Words, figures: dict, commit: str
) -> None:
    """Write a folder like any public model's.

    It is declared as a Llama with attention biases, zero for o_proj: this computes the same, and
    AutoTokenizer leaves our tokenizer alone (it would give a Qwen2 model Qwen2's word splitting).
    """
    out.mkdir(parents=True, exist_ok=True)
    s = model.shape
    metadata = {"format": "pt", "made_by": "scripts/pretrain_tiny.py", "commit": commit}
    metadata |= {"recipe": json.dumps(dataclasses.asdict(config)), "figures": json.dumps(figures)}
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    for i in range(s.blocks):
        tensors[f"model.layers.{i}.self_attn.o_proj.bias"] = torch.zeros(s.width)
    save_file(tensors, out / "model.safetensors", metadata)
    files = {"config.json": model_config(s), "tokenizer_config.json": tokenizer_config(words)}
    files["generation_config.json"] = {"bos_token_id": BOS, "eos_token_id": EOS}
    for name, content in files.items():
        write_text(out / name, json.dumps(content, indent=2) + "\n")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words.ids, unk_token="."))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.save(str(out / "tokenizer.json"))


def model_config(s: Shape) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": False,
        "vocab_size": s.vocab,
        "hidden_size": s.width,
        "intermediate_size": s.ffn,
        "num_hidden_layers": s.blocks,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": s.max_positions,
        "rms_norm_eps": s.norm_eps,
        "rope_theta": s.rope_theta,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }


def tokenizer_config(words: Words) -> dict:
    first = sorted({operation[0] for operation in words.task.table})
    spaced = "".join(f".replace('{c}', ' {c}')" for c in first)
    example = " ".join(["7", *[*words.task.table][2::7]])
    template = TEMPLATE.replace("SPACED", spaced).replace("KNOWN", str(words.task.words))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<eos>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 64,
        "chat_template": template.replace("EXAMPLE", example).replace("SLOTS", str(words.slots)),
    }


if __name__ == "__main__":
    _script.run_main(main)
