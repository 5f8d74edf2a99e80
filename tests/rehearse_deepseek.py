"""A dress rehearsal of configs/deepseek.yaml at full size, without the real weights: not part of the test suite.

    python tests/rehearse_deepseek.py            (about fifteen minutes, 8 GB of disk for a while, 9 GiB of memory at most)
    python tests/rehearse_deepseek.py --small    (the same with a tiny shape, to try the script itself)
    python tests/rehearse_deepseek.py --gpu      (on a GPU: traces of 400 tokens, batches of 8; speed and memory)

Makes a snapshot of random weights with the exact shape of DeepSeek-R1-Distill-Qwen-1.5B, serves it as that model from a hub on the
loopback address, and runs the unchanged config from there on the CPU: 2 traces of 32 tokens and 1 step, then a second step by
--resume. Prints what it took, and exits with 1 where memory went above 9 GiB.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tokenizers
import torch
from hub_server import Hub
from safetensors.torch import save_file

NAME = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
LIMIT = 9 * 2**30
SHAPE = {  # config.json of the real model
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
    "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}
SMALL = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}{% else %}"
            "{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}")
SMALLER = ["data.count=2", "generation.max_new_tokens=32", "evaluate.count=2", "evaluate.samples=2", "sft.batch_size=2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny shape of 28 blocks")
    parser.add_argument("--gpu", action="store_true", help="16 traces of 400 tokens and 4 steps of 8 traces on a GPU, without a hub")
    args = parser.parse_args()
    if args.gpu:
        with tempfile.TemporaryDirectory() as scratch:
            make_snapshot(Path(scratch) / "model", SHAPE | SMALL if args.small else SHAPE)
            on_gpu(Path(scratch))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        started = time.time()
        size = make_snapshot(folder / "hub" / NAME, SHAPE | SMALL if args.small else SHAPE)
        print(f"snapshot of {size / 1e9:.2f} GB made in {time.time() - started:.0f} s")
        with Hub(folder / "hub") as hub:
            outside = ("HF_", "HUGGINGFACE_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")  # a cache of the user's shall never hold these weights
            env = {k: v for k, v in os.environ.items() if not k.upper().startswith(outside)}
            env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1"}
            first = train(env, folder, "sft.steps=1", "sft.save_every=1")
            env["HF_HUB_OFFLINE"] = "1"  # the second time from the cache
            second = resume(env, folder)
            sampled = subprocess.run([sys.executable, str(ROOT / "scripts/sample.py"), "Hello", "--adapter", str(folder / "run"), "--max-new-tokens", "4",
                                      "--device", "cpu", "--json"], env=env, check=True, capture_output=True, text=True).stdout
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        print(f"2 traces of 32 tokens, 1 step and the evaluation: {first:.0f} s; killed after a step and resumed to step {steps[-1]}: {second:.0f} s")
        print(f"adapter saved, and opened by sample.py, which wrote tokens with it: {bool(sampled.strip())}")
        print(f"peak resident memory {peak / 2**30:.2f} GiB, limit {LIMIT / 2**30:.0f} GiB")
        if peak > LIMIT or steps[-1] != 2:
            sys.exit(1)


def on_gpu(folder: Path) -> None:
    """The same config for 16 traces of 400 tokens and 4 steps, batches of 8 (32 rows in memory): prints tokens/s and the peak of GPU memory."""
    from nanoexit import sft
    from nanoexit.config import load_config
    from nanoexit.data import load_prompts
    from nanoexit.responses import respond
    from nanoexit.teacher import make_traces
    from nanoexit.training import load_student

    def measured(what: str, run, tokens) -> object:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        n = tokens(result)
        print(f"{what}: {n} tokens in {seconds:.1f} s, {n / seconds:.0f} tokens/s, peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB", flush=True)
        return result

    config = load_config(ROOT / "configs/deepseek.yaml", [
        f"model.name={folder / 'model'}", f"run.dir={folder / 'run'}", "data.count=16", "generation.batch_size=8", "sft.batch_size=8", "sft.micro_batch=32",
        "model.device=cuda"])
    model, tokenizer = load_student(config)
    print(f"{torch.cuda.get_device_name()}, weights {torch.cuda.memory_allocated() / 2**30:.2f} GiB in {model.dtype}")
    traces = measured("teacher writes traces and their divergences", lambda: make_traces(model, tokenizer, config), lambda ts: sum(len(t.tokens) for t in ts))
    patterns = config.sft.samples_per_trace
    model.train()
    for step in range(4):
        measured(f"SFT step {step + 1}, {patterns} patterns a trace", lambda step=step: sft.step_losses(model, traces[8 * (step % 2) :][:8], config, step),
                 lambda _, step=step: patterns * sum(len(t.tokens) for t in traces[8 * (step % 2) :][:8]))
    model.eval()
    prompts = load_prompts(config.data, "train", 8, 0)
    for policy in ("full", "head"):
        measured(f"8 responses, policy {policy}", lambda policy=policy: respond(model, tokenizer, prompts, config, policy, [1]),
                 lambda rs: sum(len(r.generation.tokens) for r in rs))


def make_snapshot(folder: Path, config: dict) -> int:
    """-> bytes of weights. Random, bfloat16, in one file as the real one is."""
    folder.mkdir(parents=True)
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = D // config["num_attention_heads"] * config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(0)
    tensors = {}

    def add(name: str, *shape: int) -> None:
        tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    add("model.embed_tokens.weight", V, D)
    add("lm_head.weight", V, D)
    tensors["model.norm.weight"] = torch.ones(D, dtype=torch.bfloat16)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        for name, rows, columns in (("self_attn.q_proj", D, D), ("self_attn.k_proj", kv, D), ("self_attn.v_proj", kv, D), ("self_attn.o_proj", D, D),
                                    ("mlp.gate_proj", F, D), ("mlp.up_proj", F, D), ("mlp.down_proj", D, F)):
            add(f"{block}.{name}.weight", rows, columns)
            if name[-6] in "qkv" and name.startswith("self_attn"):
                add(f"{block}.{name}.bias", rows)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{name}.weight"] = torch.ones(D, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 151646, "eos_token_id": 151643, "temperature": 0.6, "top_p": 0.95}))
    specials = ["<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<think>", "</think>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"<unused{i}>" for i in range(151643 - len(alphabet))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(words)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)  # ids 151643 and on
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"},
        "eos_token": {"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>"}, "chat_template": TEMPLATE}))
    return (folder / "model.safetensors").stat().st_size


def command(folder: Path, *more: str) -> list[str]:
    script = [sys.executable, str(ROOT / "scripts/train_sft.py"), str(ROOT / "configs/deepseek.yaml")]
    return [*script, *SMALLER, f"run.dir={folder / 'run'}", "model.device=cpu", *more]


def train(env: dict, folder: Path, *more: str) -> float:
    started = time.time()
    subprocess.run(command(folder, *more), env=env, check=True)
    return time.time() - started


def resume(env: dict, folder: Path) -> float:
    """The run with two steps, killed once its first checkpoint is there, and resumed."""
    run = folder / "run"
    shutil.rmtree(run)
    more = "sft.steps=2", "sft.save_every=1"
    started = time.time()
    process = subprocess.Popen(command(folder, *more), env=env)
    while not (run / "checkpoint" / "state.safetensors").is_file() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    subprocess.run(command(folder, *more, "--resume"), env=env, check=True)
    return time.time() - started


if __name__ == "__main__":
    main()
