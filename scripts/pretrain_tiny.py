"""Make the tiny reasoner of data/tiny from nothing: a small transformer that answers clock chains.

It learns three styles of answering: terse (all in the head), full (every value written) and prefix (the first few written).
Two things make it work. A curriculum: chains grow by one operation whenever the longest are answered in the head 3 times out
of 4; without it, in-head chains of three stay at chance. Deep supervision: the readout after every block is trained too
(weight `deep_weight`), which gives a tiny model the early-readable residuals that large ones have.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from nanoexit.config import ROOT, describe, knob, load_config
from nanoexit.data import is_held_out
from nanoexit.errors import UserError, run_script
from nanoexit.generate import generate
from nanoexit.model import Shape, Transformer
from nanoexit.tasks import LONGEST_CHAIN, OPERATIONS, check_clock, clock_chain, clock_prompts, clock_values, split_response

WORDS = ["<bos>", "<eos>", "<think>", "</think>", "=", ".", *map(str, range(10)), *OPERATIONS]
BOS, EOS, THINK, DONE, EQUALS, DOT = range(6)
ID = {word: i for i, word in enumerate(WORDS)}
CHAT_TEMPLATE = (  # pads a chain to its seven places, so that step i is always written at the same distance from operation i
    "{% set words = (messages[-1]['content'] | replace('+', ' +') | replace('*', ' *')).split() %}"
    "{% for word in words %}{% if word not in KNOWN %}"
    "{{ raise_exception('this model reads chains such as 7 +3 *9 (a digit, then +1..+9, *3, *7, *9), not ' + word) }}"
    "{% endif %}{% endfor %}"
    "{{ bos_token }} {{ words | join(' ') }}{{ ' .' * (SLOTS - words | length) }}"
    "{% if add_generation_prompt %} ={% endif %}"
).replace("KNOWN", str([*map(str, range(10)), *OPERATIONS]))


@dataclasses.dataclass
class PretrainConfig:
    out: str = knob("runs/tiny-pretrain", "where the model's folder is written")
    seed: int = knob(0, "every random draw is a function of this", low=0)
    width: int = knob(96, "D", low=8)
    blocks: int = knob(8, "L", low=2)
    ffn: int = knob(256, "F", low=8)
    heads: int = knob(4, "H", low=1)
    kv_heads: int = knob(2, "K", low=1)
    batch_size: int = knob(128, "chains a step", low=1)
    lr: float = knob(2e-3, "peak learning rate of AdamW", low=0)
    weight_decay: float = knob(0.05, "on matrices", low=0)
    warmup: int = knob(100, "steps of linear warm-up", low=1)
    deep_weight: float = knob(0.3, "weight of the mean loss of the early readouts", low=0)
    threshold: float = knob(0.75, "in-head accuracy at the longest length that lets chains grow", low=0, high=1)
    steps_after: int = knob(1200, "steps after chains have reached full length; over the last half the rate falls to 2 %", low=1)
    max_steps: int = knob(6000, "give up growing after so many steps", low=1)
    terse: float = knob(0.5, "share of chains answered in the head", low=0, high=1)
    full: float = knob(0.3, "share with every value written; the rest writes a prefix", low=0, high=1)
    slots: int = knob(LONGEST_CHAIN + 1, "places that a chain is filled up to with dots, so that step i is written at one distance from operation i; 0: no dots", low=0)
    shallow: float = knob(0.0, "share of the fully written chains whose prompt is frozen after block 1, which forces a written route", low=0, high=1)
    scaffold: float = knob(1.0, "while chains grow: weight of reading each running value out at its operation in the prompt", low=0)


@dataclasses.dataclass
class Recipe:
    pretrain: PretrainConfig = dataclasses.field(default_factory=PretrainConfig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="keys:\n" + describe(Recipe))
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides, Recipe).pretrain
    started, commit = time.time(), _commit()
    model, steps = train(config)
    figures = {**evaluate(model, config), "steps": steps, "seconds": round(time.time() - started)}
    print(json.dumps(figures, indent=2))
    save(model, Path(config.out), config, figures, commit)
    print(f"written to {config.out}; python scripts/sample.py --model {config.out} --policy full tries it")


def _commit() -> str:
    """What the code is before training starts; it may change on disk meanwhile."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def new_model(config: PretrainConfig) -> Transformer:
    torch.manual_seed(config.seed)
    torch.empty(len(WORDS), config.width).normal_()  # drawn and dropped, so that a seed gives the model that it always gave
    shape = Shape("qwen2", len(WORDS), config.width, config.ffn, config.blocks, config.heads, config.kv_heads,
                  config.width // config.heads, qkv_bias=True, tied=True, max_positions=64)
    model = Transformer(shape)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.data /= (2 * config.blocks) ** 0.5
        elif name.endswith("bias"):
            torch.nn.init.zeros_(p)
    return model


def draw_batch(rng: np.random.Generator, config: PretrainConfig, longest: int) -> tuple[torch.Tensor, ...]:
    """-> ids [B, T]; targets [B, T] of the response, and of the scaffold at the prompt's operations, -1 elsewhere; the position
    that answers a terse chain of the longest length, -1 in rows that are none; and prompt tokens to freeze [B, T] bool."""
    rows, probes, shallow = [], [], []
    for i in range(config.batch_size):
        chain = None
        while chain is None or is_held_out(chain):
            chain = clock_chain(rng, draw_length(rng, longest, i < config.batch_size // 2))
        values = [str(v) for v in clock_values(chain)]
        written = 0
        if rng.random() >= config.terse:
            full = rng.random() < config.full / (1 - config.terse)
            written = len(values) if full else int(rng.integers(0, len(values)))
        prompt = prompt_words(chain, config.slots)
        rows.append((len(prompt), values, [ID[w] for w in [*prompt, "<think>", *values[:written], "</think>", values[-1], "<eos>"]]))
        probes.append(len(prompt) + 1 if written == 0 and len(values) == longest else -1)
        shallow.append(config.shallow > 0 and written == len(values) and rng.random() < config.shallow)
    width = max(len(ids) for *_, ids in rows)
    ids = torch.full((len(rows), width), EOS)
    targets, scaffold = torch.full((2, len(rows), width), -1)
    frozen = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (start, values, row) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        targets[i, start - 1 : len(row) - 1] = torch.tensor(row[start:])
        scaffold[i, 2 : 2 + len(values)] = torch.tensor([ID[v] for v in values])  # <bos> start op op ...
        if shallow[i]:
            frozen[i, :start] = True
    return ids, targets.masked_fill(frozen, -1), scaffold.masked_fill(frozen, -1), torch.tensor(probes), frozen


def draw_length(rng: np.random.Generator, longest: int, at_longest: bool) -> int:
    """While chains grow, half of a batch is at the longest length; at full length, lengths in proportion to themselves."""
    if longest < LONGEST_CHAIN and at_longest:
        return longest
    weights = np.arange(1, longest + 1)
    return int(rng.choice(weights, p=weights / weights.sum()))


def prompt_words(chain: str, slots: int) -> list[str]:
    """What the chat template of the shipped tokenizer makes of a chain."""
    ops = chain.split()
    return ["<bos>", *ops, *["."] * (slots - len(ops)), "="]


def train(config: PretrainConfig) -> tuple[Transformer, int]:
    model = new_model(config)
    rng = np.random.default_rng([config.seed, 1])
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
                                  lr=config.lr, betas=(0.9, 0.98))
    longest, in_head, grown_at, step = 1, 0.0, None, 0
    with tqdm(desc="pretrain", unit="step", dynamic_ncols=True) as bar:
        while grown_at is None or step < grown_at + config.steps_after:
            left = 1.0 if grown_at is None else (grown_at + config.steps_after - step) / config.steps_after
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1, (step + 1) / config.warmup) * max(0.02, min(1.0, 2 * left))
            batch = draw_batch(rng, config, longest)
            loss, final, hits = losses(model, *batch, config.deep_weight, config.scaffold if grown_at is None else 0.0)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            if len(hits):
                in_head += 0.05 * (hits.float().mean().item() - in_head)
            if grown_at is None and in_head > config.threshold:
                longest, in_head = longest + 1, 0.0
                if longest > LONGEST_CHAIN:
                    longest, grown_at = LONGEST_CHAIN, step
            if grown_at is None and step >= config.max_steps:
                raise UserError(f"pretrain: chains stopped growing at {longest} operations after {step} steps; try another seed")
            bar.total = None if grown_at is None else grown_at + config.steps_after
            bar.set_postfix(longest=longest, in_head=f"{in_head:.2f}", loss=f"{final.item():.3f}", refresh=False)
            bar.update()
    return model, step


class Watch:
    """A `stop` that keeps the residuals at some places [n] of B*T after every block, and freezes others after the first."""

    def __init__(self, model: Transformer, at: torch.Tensor, frozen: torch.Tensor):
        self.layers, self.seen = range(1, model.full_depth), []
        self.at, self.frozen = at, frozen.view(-1)

    def __call__(self, depth: int, h: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor | None:
        self.seen.append(h[self.at if index is None else torch.searchsorted(index, self.at)])
        return self.frozen if depth == 1 and self.frozen.any() else None


def losses(model: Transformer, ids, targets, scaffold, probes, frozen, deep_weight: float, scaffold_weight: float):
    """-> (whole loss, loss of the last readout, for each probe: was the answer right at full depth)."""
    at = (targets >= 0).view(-1).nonzero().view(-1)
    goal = targets.view(-1)[at]
    watch = Watch(model, at, frozen)
    run = model.run(ids, stop=watch)
    final = F.cross_entropy(model.readout(run.hidden.flatten(0, 1)[at]), goal)
    early = [F.cross_entropy(model.readout(h), goal) for h in watch.seen]
    rows = (probes >= 0).nonzero().view(-1)
    with torch.no_grad():
        guesses = model.readout(run.hidden[rows, probes[rows]]).argmax(-1)
    props = F.cross_entropy(model.readout(run.hidden[scaffold >= 0]), scaffold[scaffold >= 0]) if scaffold_weight else 0.0
    return final + deep_weight * sum(early) / len(early) + scaffold_weight * props, final, guesses == targets[rows, probes[rows]]


def evaluate(model: Transformer, config: PretrainConfig, count: int = 2000) -> dict:
    """Held-out chains: sampled accuracy, and in the head (forced terse, greedy) by number of operations."""
    source = (p for p in clock_prompts([config.seed, 2]) if is_held_out(p.prompt))
    prompts = [next(source) for _ in range(count)]
    words = [[ID[w] for w in prompt_words(p.prompt, config.slots)] for p in prompts]
    sampled = generate(model, words, max_new_tokens=12, stop_ids=[EOS], seed=config.seed)
    right = [check_clock(p, text(g.tokens)).correct for p, g in zip(prompts, sampled)]
    terse = generate(model, [w + [THINK, DONE] for w in words], max_new_tokens=1, temperature=0, stop_ids=[])
    in_head: dict[int, list[bool]] = {}
    for p, g in zip(prompts, terse):
        in_head.setdefault(len(clock_values(p.prompt)), []).append(WORDS[g.tokens[0]] == p.answer)
    written = [len(split_response(text(g.tokens))[0].split()) / len(clock_values(p.prompt)) for p, g in zip(prompts, sampled)]
    return {"accuracy": float(np.mean(right)), "in_head": {k: round(float(np.mean(v)), 4) for k, v in sorted(in_head.items())},
            "terse": float(np.mean([w == 0 for w in written])), "full": float(np.mean([w == 1 for w in written]))}


def text(tokens: list[int]) -> str:
    return " ".join(WORDS[t] for t in tokens if t != EOS)


def save(model: Transformer, out: Path, config: PretrainConfig, figures: dict, commit: str) -> None:
    """A folder like any public model's. It is declared as a Llama with attention biases, that of o_proj being 0: the same function,
    and AutoTokenizer leaves our tokenizer alone (for a Qwen2 it puts Qwen2's own splitting into words in its place)."""
    out.mkdir(parents=True, exist_ok=True)
    s = model.shape
    metadata = {"format": "pt", "made_by": "python scripts/pretrain_tiny.py", "commit": commit, "seed": str(config.seed),
                "figures": json.dumps(figures), "torch": torch.__version__}
    tensors = {n: p.detach().contiguous() for n, p in model.named_parameters()}
    tensors |= {f"model.layers.{i}.self_attn.o_proj.bias": torch.zeros(s.width) for i in range(s.blocks)}
    save_file(tensors, out / "model.safetensors", metadata)
    files = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True, "mlp_bias": False, "vocab_size": s.vocab, "hidden_size": s.width,
            "intermediate_size": s.ffn, "num_hidden_layers": s.blocks, "num_attention_heads": s.heads,
            "num_key_value_heads": s.kv_heads, "hidden_act": "silu", "max_position_embeddings": s.max_positions,
            "rms_norm_eps": s.norm_eps, "rope_theta": s.rope_theta, "tie_word_embeddings": True,
            "attention_dropout": 0.0, "bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": "float32",
        },
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": True, "temperature": 1.0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>",
            "add_bos_token": False, "clean_up_tokenization_spaces": False, "model_max_length": s.max_positions,
            "chat_template": CHAT_TEMPLATE.replace("SLOTS", str(config.slots)),
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    make_tokenizer().save(str(out / "tokenizer.json"))


def make_tokenizer() -> tokenizers.Tokenizer:
    """One word, one token. '7+3*9' is read like '7 +3 *9'."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID, unk_token="."))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.WhitespaceSplit(),
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[+*]?\d|[.=]"), "isolated"),
    ])
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", normalized=False), tokenizers.AddedToken("</think>", normalized=False)])
    return tokenizer


if __name__ == "__main__":
    run_script(main)
