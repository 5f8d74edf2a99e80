"""The bench: its ratios are the right way round, and its table can read its lines of JSON.
Speed itself is never tested. Benchmarks run in this process, on a model with few weights."""

import json
from pathlib import Path

import bench
import bench_alone
import bench_measure
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanoexit.config import ROOT, UserError
from nanoexit.exits import Asked
from nanoexit.generate import Sampling, generate
from nanoexit.weights import load_model


@pytest.fixture
def model(tmp_path) -> Path:
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "intermediate_size": 48}
    bench_measure.snapshot(tmp_path / "small", "tiny", torch.float32, **sizes)
    return tmp_path / "small"


def run(capsys, *arguments) -> str:
    """-> the last line of the output."""
    bench.main([*map(str, arguments), "--threads=1", "--device=cpu"])
    return capsys.readouterr().out.splitlines()[-1]


def test_a_ratio_says_how_many_times_faster():
    """Catches: slow and fast exchanged; rounds that are not paired; a mean instead of a median."""
    times = bench.Times({"slow": [2.0, 4.0, 60.0], "fast": [1.0, 1.0, 20.0]})
    assert times.ratio("slow", "fast") == (3.0, [2.5, 3.5])
    calls: list[str] = []
    bench_measure.in_turn({n: lambda n=n: calls.append(n) for n in "ab"}, 3, torch.device("cpu"))
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab", "once unmeasured, then in turn"


def test_mixed_depths_are_equally_likely():
    """Catches: a chance that forgets which tokens have exited before."""
    policy = bench.Mixed((2, 4, 6))
    u = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    left, counts = torch.ones(4000, dtype=torch.bool), []
    for column, depth in enumerate(policy.depths):
        gone = policy.exits(Asked(None, depth, None, None, None, u[:, column])) & left
        counts.append(int(gone.sum()))
        left &= ~gone
    assert all(abs(n - 1000) < 120 for n in [*counts, int(left.sum())])


@pytest.mark.parametrize("work", ["decode", "exits", "rollout", "train"])
def test_the_last_line_is_json_and_the_table_reads_it(model, tmp_path, capsys, work):
    """Catches: a benchmark that no longer runs; a line that lacks what the table needs."""
    sizes = ("--new=3", "--rounds=2", "--batch=2", "--length=8", f"--model={model}")
    last = run(capsys, work, *sizes, f"--save={tmp_path / 'cpu.jsonl'}")
    lines = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert json.loads(last) == lines[-1]
    needed = {"work", "shape", "dtype", "batch", "lengths", "ratio", "spread", "against"}
    assert all(needed | {"hardware"} <= set(line) for line in lines)
    run(capsys, "table", f"--out={tmp_path}")
    table = (tmp_path / "README.md").read_text()
    assert all(f"| {line['work']} | small, float32, 2 | " in table for line in lines)


def test_the_table_in_the_repository_is_that_of_its_lines(tmp_path):
    """Catches: a table that was not rewritten after new measurements."""
    for path in [*(ROOT / "data/bench").glob("*.jsonl"), *(ROOT / "data/bench").glob("*.svg")]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    written = bench_measure.write_table(tmp_path).read_text(encoding="utf-8")
    assert written == (ROOT / "data/bench/README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_memory_is_measured_at_its_peak(model, capsys):
    """Catches: memory freed before the end that is missed; memory held before that is counted."""
    held = torch.ones(2**22)  # 16 MiB
    size, seconds = bench_measure.peak(lambda: torch.ones(2**23).sum() + held[0], held.device)
    assert 0.9 < size / 2**25 < 1.1 and seconds > 0
    for work, way in (("load", "nanoexit"), ("growth", "decode:16"), ("growth", "step:16")):
        flags = (f"--model={model}", "--longest=16", f"--way={way}")
        size, seconds = json.loads(run(capsys, work, *flags))
        assert size > 0 and seconds > 0, way
    sizes = []
    for way in ("chunked", "whole"):  # the smaller one first: freed memory hides a peak
        args = bench.command_line(["memory", f"--way={way}", "--threads=1", "--chunk=16"])
        sizes.append(bench_alone.memory_alone(args, vocab=12000, tokens=512)[0])
    assert sizes[0] < sizes[1] / 3  # 16 rows of logits against 512


def test_growth_is_reported_for_its_last_doubling(tmp_path, capsys):
    """Catches: a ratio that is upside down; a drawing whose unit is not that of its axis."""
    args = bench.command_line(["growth", f"--out={tmp_path}"])
    args.name = "tiny"
    seconds = {8: [2, 2], 16: [4, 4], 32: [12, 12]}
    bench_alone.draw_growth(args, "step-time", "student step", seconds)
    out = capsys.readouterr().out
    assert "2 times that at 8 at 16, 6 times that at 8 at 32" in out
    assert json.loads(out.splitlines()[-1])["ratio"] == 3.0
    assert "times that at 8" in (tmp_path / "step-time.svg").read_text()


@pytest.mark.parametrize("arguments, says", [
    ("decode --rounds=1", "--rounds: expected at least 2, found 1"),
    ("table --out=/no/such", r"/no/such: no \*.jsonl"),
    ("rollout --batch=1", "--batch: rollout expects"),
    ("train --peer=llama.cpp", "--peer llama.cpp"),
])  # fmt: skip
def test_bad_input_is_refused(arguments, says):
    """Catches: a mistake reported after minutes of work, or as a traceback."""
    with pytest.raises(UserError, match=says):
        bench.main(arguments.split())


@pytest.mark.parametrize("kind, kv_heads", [("llama", 2), ("qwen2", 1)])
def test_llama_cpp_decodes_the_same_model(tmp_path, kind, kv_heads):
    """Catches: a peer with different weights: maps swapped, heads rotated the wrong way."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    import bench_llama

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    sizes |= {"model_type": kind, "num_attention_heads": 2, "num_key_value_heads": kv_heads}
    tied = kind == "llama"
    bench_measure.snapshot(tmp_path, "tiny", torch.float32, **sizes, tie_word_embeddings=tied)
    path = tmp_path / "model.safetensors"
    weights = {name: w * 8 if "proj" in name else w for name, w in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    model, ids = load_model(str(tmp_path), "cpu", "float32"), [[3, 7, 11, 2], [5, 1, 30, 22]]
    settings = Sampling(stop_ids=())
    ours = [g.tokens for g in generate(model, ids, "full", 12, 0, settings=settings)]
    assert len({token for row in ours for token in row}) > 3
    assert bench_llama.Llama(str(tmp_path), "float32", 2, 16, 1).decode(ids, 12) == ours
