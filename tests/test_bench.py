"""The bench says which way round a ratio is, and ends in a line of JSON that its table reads. Speed itself is never tested."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoexit.config import ROOT
from nanoexit.generate import generate
from nanoexit.weights import load_model

sys.path.append(str(ROOT / "scripts"))

import bench


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "scripts" / "bench.py", *map(str, arguments)], check=False, capture_output=True, text=True)


def test_a_ratio_says_how_many_times_faster():
    """Catches: slow and fast exchanged; rounds that are not paired; a mean where a median is meant."""
    ratio, spread = bench.Times({"slow": [2.0, 4.0, 60.0], "fast": [1.0, 1.0, 20.0]}).ratio("slow", "fast")
    assert ratio == 3.0 and spread == [2.5, 3.5]


def test_mixed_depths_are_equally_likely():
    """Catches: a chance that forgets who has left before."""
    policy, u = bench.Mixed((2, 4, 6)), torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    left, counts = torch.ones(4000, dtype=torch.bool), []
    for column, depth in enumerate(policy.layers):
        gone = policy.exits(depth, None, None, u[:, column], None) & left
        counts.append(int(gone.sum()))
        left &= ~gone
    assert all(abs(n - 1000) < 120 for n in [*counts, int(left.sum())]) and policy.mean(8) == 5.0


@pytest.mark.parametrize("work, keys", [("decode", {"nanoexit_tokens_per_s"}), ("exits", {"times_faster_than_full_depth"}), ("train", {"tokens_per_s"}), ("growth", {"values"})])
def test_the_last_line_is_json_and_the_table_reads_it(tmp_path, work, keys):
    """Catches: a work that no longer runs, a line without what the table needs."""
    saved = tmp_path / "bench.jsonl"
    done = run(work, "--new", 2, "--rounds", 2, "--batch", 2, "--length", 8, "--longest", 64, "--threads", 1, "--save", saved, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in saved.read_text().splitlines()]
    assert json.loads(done.stdout.splitlines()[-1]) == lines[-1]
    assert {"work", "shape", "dtype", "batch", "ratio", "spread", "against", "hardware"} | keys <= set(lines[0])
    table = run("table", saved).stdout
    assert all(f"| {line['work']} | tiny, float32, 2 |" in table for line in lines)


@pytest.mark.parametrize("arguments, words", [(["decode", "--rounds", 1], "--rounds: expected at least 2, found 1"), (["table", "no.jsonl"], "no.jsonl: expected a file"),
                                              (["rollout", "--batch", 1], "--batch: a rollout"),
                                              (["decode", "--model", "/no/such"], "/no/such")])
def test_bad_input_is_one_line(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("kind, kv_heads", [("llama", 2), ("qwen2", 1)])
def test_llama_cpp_decodes_the_same_model(tmp_path, kind, kv_heads):
    """Catches: a peer that runs other weights than ours: maps exchanged, heads rotated the other way, biases lost."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    import llama_peer
    shape = {"model_type": kind, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
             "num_key_value_heads": kv_heads, "max_position_embeddings": 512, "tie_word_embeddings": kind == "llama"}
    bench.snapshot(tmp_path, shape, torch.float32)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: w * 8 if "proj" in name else w for name, w in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    model, prompts = load_model(str(tmp_path), "cpu", "float32"), [[3, 7, 11, 2], [5, 1, 30, 22], [9, 4, 17, 8]]
    ours = [g.tokens for g in generate(model, prompts, "full", 12, temperature=0, stop_ids=())]
    assert len({token for row in ours for token in row}) > 3
    assert llama_peer.Peer(str(tmp_path), "float32", 3, 16, 1).decode(prompts, 12) == ours
