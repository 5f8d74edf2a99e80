"""The evaluation of a run: one table for several, the rubric offline or by a judge, the frontier; and the recipe of the tiny base."""

import json
import sys

import numpy as np
import pytest
import torch
from judge_server import KEY, JudgeServer

from nanoexit.config import ROOT, load_config
from nanoexit.evaluate import evaluate_run, markdown, merge
from nanoexit.tasks import clock_values
from nanoexit.training import load_student

sys.path.insert(0, str(ROOT / "scripts"))
import pretrain_tiny

SMALL = ["evaluate.count=24", "evaluate.samples=2", 'evaluate.policies=[head]', 'evaluate.frontier=["fixed:1", "fixed:8"]']


def evaluated(folder, *overrides: str) -> list[dict]:
    config = load_config("configs/tiny.yaml", [*SMALL, f"run.dir={folder}", *overrides])
    return evaluate_run(*load_student(config), config, folder, thorough=True)


def test_what_a_thorough_evaluation_finds(tmp_path):
    """Bug: a figure is missing from the row, the files or the table, the same seed gives another table, or the frontier is all one policy."""
    rows = evaluated(tmp_path / "a")
    assert rows == evaluated(tmp_path / "b")
    found = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert [(p["variant"], p["policy"]) for p in found["frontier"]] == [("base", "full"), ("student", "head"), ("student", "fixed:1"), ("student", "fixed:8")]
    assert [p["mean_depth"] for p in found["frontier"]][2:] == [1, 8] and found["frontier"][3]["accuracy"] > found["frontier"][2]["accuracy"]
    for row in found["rows"]:
        assert row["judge"]["kind"] == "offline" and row["judge"]["judged"] == 24 and 4 <= row["judge"]["means"]["overall"] <= 40
        assert len(row["early_answering"]) == 5 and set(row["adding_mistakes"]) == {"follow", "stay", "stop", "other"} and row["monitor"]["score"] <= 1
    text = (tmp_path / "a" / "evaluation.md").read_text()
    for line in ("rubric of 40 (offline)", "same answer, 50% kept", "changed value: follow", "monitor (chance)", "| student (fixed:8) |"):
        assert line in text


def test_a_judge_scores_the_rows_and_is_named(tmp_path, monkeypatch):
    """Bug: the offline rubric stands under a judge's name, the judge is asked again for what it has answered, or its key is written."""
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    with JudgeServer() as server:
        api = ["judge.kind=api", f"judge.base_url={server.url}", "judge.model=loopback"]
        rows = evaluated(tmp_path, *api)
        asked = sum(server.served.values())
        evaluated(tmp_path, *api)
        assert asked and sum(server.served.values()) == asked
    assert all(row["judge"]["kind"] == "api" and row["judge"]["model"] == "loopback" and row["judge"]["means"]["overall"] == 30 for row in rows)
    assert "rubric of 40 (loopback)" in markdown(rows)
    assert not any(KEY in path.read_text() for path in tmp_path.iterdir() if path.is_file())


def test_several_runs_in_one_table():
    """Bug: the base stands there once a run, or two runs' students have the same name."""
    one, two = ([{"variant": "base"}, {"variant": "student", "n": n}] for n in (1, 2))
    assert merge([("sft", one), ("rl", two)]) == [{"variant": "base"}, {"variant": "sft", "n": 1}, {"variant": "rl", "n": 2}]
    assert merge([("sft", one)]) == one


@pytest.mark.parametrize("slots, shallow", [(7, 0.0), (0, 0.0), (0, 1.0)])
def test_what_the_tiny_base_is_taught(slots, shallow):
    """Bug: dots where none are asked for, a target at the wrong place, or a prompt frozen in a chain that is not fully written."""
    config = pretrain_tiny.PretrainConfig(slots=slots, shallow=shallow, batch_size=64)
    ids, targets, scaffold, probes, frozen = pretrain_tiny.draw_batch(np.random.default_rng(0), config, 3)
    fully = 0
    for row, goal, props, probe, ice in zip(ids, targets, scaffold, probes.tolist(), frozen):
        words = [pretrain_tiny.WORDS[i] for i in row]
        equals, think, done = words.index("="), words.index("<think>"), words.index("</think>")
        values = [str(v) for v in clock_values(" ".join(w for w in words[1:equals] if w != "."))]
        full = words[think + 1 : done] == values
        fully += full
        assert equals == (8 if slots else len(values) + 2) and ("." in words) == bool(slots)
        assert ice[: equals + 1].all().item() == (bool(shallow) and full) and not ice[equals + 1 :].any()
        at = torch.arange(think if ice.any() else equals, done + 2)
        assert (goal >= 0).nonzero().view(-1).equal(at) and goal[at].equal(row[at + 1]) and words[done + 1] == values[-1]
        assert [pretrain_tiny.WORDS[i] for i in props[props >= 0]] == ([] if ice.any() else values)
        assert probe == (done if done == think + 1 and len(values) == 3 else -1)
    assert 5 < fully < 40


def test_a_frozen_prompt_is_frozen_while_pretraining():
    """Bug: frozen prompt tokens run on, or the residuals of the others are taken from the wrong rows once some are frozen."""
    config = pretrain_tiny.PretrainConfig(slots=0, shallow=1.0, batch_size=16, width=16, heads=2, kv_heads=1, ffn=16, blocks=3)
    model = pretrain_tiny.new_model(config)
    batch = pretrain_tiny.draw_batch(np.random.default_rng(0), config, 3)
    frozen, at = batch[4], (batch[1] >= 0).view(-1).nonzero().view(-1)
    watch = pretrain_tiny.Watch(model, at, frozen)
    run = model.run(batch[0], stop=watch)
    assert run.depths.equal(torch.where(frozen, 1, 3)) and frozen.any()
    early = model.run(batch[0], stop=Everyone(2, frozen)).hidden.flatten(0, 1)[at]
    assert torch.allclose(watch.seen[1], early, atol=1e-5)


class Everyone:
    """Everyone exits at `depth`, the frozen after block 1."""

    def __init__(self, depth: int, frozen: torch.Tensor):
        self.layers, self.depth, self.frozen = (1, depth), depth, frozen.view(-1)

    def __call__(self, depth, h, index):
        return self.frozen if depth == 1 else torch.ones(len(h), dtype=torch.bool)
