"""The memory that SFT takes, by use.

    python scripts/plan.py configs/tiny.yaml                  one process
    python scripts/plan.py configs/tiny.yaml --processes 2    each of two

Checks the config as train_sft.py does, and writes nothing.
"""

import dataclasses
import math

import _script
import torch
from torch import Tensor

from nanoexit.config import Config, UserError, load_config
from nanoexit.exits import attach, check_cap
from nanoexit.model import Transformer
from nanoexit.tasks import load_prompts
from nanoexit.tokenizer import find_model, load_tokenizer
from nanoexit.training import check, prompt_ids, trained
from nanoexit.weights import DTYPES, pick_device, read_shape


def main() -> None:
    parser = _script.command_line(__doc__)
    parser.add_argument("--processes", type=int, default=1, help="of torchrun (default: 1)")
    args = parser.parse_intermixed_args()
    if args.processes < 1:
        raise UserError(f"--processes: expected at least 1, found {args.processes}")
    config = load_config(args.config, args.overrides)
    check(config)
    sizes = memory(config, args.processes)
    for name, size in [*sizes.items(), ("at most, in each process", sum(sizes.values()))]:
        print(f"{name:30} {size / 1e6:10.1f} MB")


def memory(config: Config, processes: int = 1) -> dict[str, int]:
    """The most bytes that SFT takes in each process, by use, if no token exits and all rows are as
    long as the longest prompt with the longest response. The libraries' own are not counted."""
    m, g, sft = config.model, config.generation, config.sft
    shape, device = read_shape(find_model(m.name, m.revision)[0]), pick_device(m.device)
    dtype = DTYPES.get(m.dtype, torch.bfloat16 if device.type == "cuda" else torch.float32)
    prompts = load_prompts(config, "train")
    tokenizer = load_tokenizer(m.name, m.revision)
    length = g.max_new_tokens + max(len(prompt_ids(tokenizer, p, config)) for p in prompts)
    rows = min(sft.micro_batch, math.ceil(sft.batch_size / processes))
    small = [dataclasses.replace(shape, blocks=blocks, vocab=1) for blocks in (2, 3)]
    two, three = (left_by_token(Transformer(s).to(device, dtype), config) for s in small)
    with torch.device("meta"):
        model = Transformer(shape).to(dtype)
    exits = config.exits
    attach(model, exits.layers, exits.head, exits.shortcuts, config.lora, exits.cap)
    for cap in config.evaluate.caps:
        check_cap(model, cap, "evaluate.caps")
    ours = sum(p.nbytes for p in trained(model).values())
    base = sum(p.nbytes for p in model.parameters()) - ours
    read = len(prompts) * config.teacher.traces * g.max_new_tokens * shape.width * dtype.itemsize
    cached = 2 * shape.blocks * shape.kv_heads * shape.head_dim * dtype.itemsize  # of a token
    return {
        "base": base,
        "base, laid out for decoding": base,
        "adapters and their gradients": 2 * ours,
        "moments": 2 * ours,
        "teacher's residuals": min(read, int(config.teacher.keep_mb * 1e6)),
        "activations": rows * length * (two + (shape.blocks - 2) * (three - two)),
        "logits chunk": 5 * 4 * shape.vocab * min(m.logits_chunk, rows * g.max_new_tokens),
        "cache": cached * length * max(g.batch_size, config.evaluate.batch_size),
    }


def left_by_token(model: Transformer, config: Config) -> int:
    """Bytes that each token keeps for the backward pass, measured."""
    left, tokens = {}, 64

    def keep(tensor: Tensor) -> Tensor:
        left[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    attach(model, [], lora=config.lora)
    model.model.embed_tokens.requires_grad_(config.exits.shortcuts)  # their gradient passes blocks
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.run(torch.zeros(1, tokens, dtype=torch.long, device=model.device))
    for p in model.parameters():
        left.pop(p.untyped_storage().data_ptr(), None)
    return sum(left.values()) // tokens


if __name__ == "__main__":
    _script.run_main(main)
