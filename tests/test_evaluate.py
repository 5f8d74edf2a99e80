"""Rows of figures, tables and files, from hand-made responses, scripted writers, a random model."""

import json
import math
import re

import evaluate as evaluate_script
import pretrain_tiny
import pytest
from conftest import TINY, random_model, scramble, with_exits
from judge_server import KEY, JudgeServer
from test_faithfulness import Scripted, Words, chain, free_in_head, in_head, said

from nanoexit.config import Config, JudgeConfig, UserError, load_config, write_text
from nanoexit.evaluate import cell, evaluate_run, measure, repetition, table
from nanoexit.faithfulness import Subject, examine
from nanoexit.judge import Item, Judge, judge_summary
from nanoexit.tasks import TASKS, Prompt
from nanoexit.training import load_student

SMALL = ["generation.max_new_tokens=6", "evaluate.policies=[head]", 'evaluate.frontier=["fixed:1"]']
SMALL += ["evaluate.count=16", "evaluate.samples=2", "evaluate.caps=[2, 4]", "exits.layers=[1, 2]"]


def random_reasoner(folder, blocks: int = 4) -> str:
    """A folder like that of data/tiny, with random weights."""
    config = pretrain_tiny.PretrainConfig(width=16, heads=2, kv_heads=1, ffn=16, blocks=blocks)
    words = pretrain_tiny.Words(TASKS["clock"], 0)
    model = pretrain_tiny.new_model(config, len(words.words))
    scramble(model.named_parameters(), 0)
    pretrain_tiny.save(model, folder, config, words, {}, "")
    return str(folder)


@pytest.fixture(scope="module")
def name(tmp_path_factory) -> str:
    return random_reasoner(tmp_path_factory.mktemp("reasoner"))


def evaluated(name: str, folder, *overrides: str, thorough: bool = True, **known) -> list[dict]:
    config = load_config(TINY, [*SMALL, f"model.name={name}", f"run.dir={folder}", *overrides])
    return evaluate_run(*load_student(config), config, folder, thorough, **known)


def reader(policy: str = "head", **knobs) -> Subject:
    return Subject(with_exits(random_model("qwen2"), (1, 2), **knobs), Words(), Config(), policy)


def written(subject: Subject, depths: list[int], text: str, prompt: Prompt | None = None):
    response = said(subject.tokenizer, prompt or chain(), text)
    response.generation.depths = depths
    return response


def test_depths_are_over_all_tokens():
    """Catches: the first readout left out; a maximum over the batch; a mean of means."""
    subject = reader()
    deep = written(subject, [5, 1, 1, 1], "<think> 5 </think> 2")
    flat = written(subject, [2, 2], "</think> 8", chain("5 *9 +7 +1"))
    row = measure(subject, "student", [deep, flat])
    assert row["mean_depth"] == 12 / 6 and row["layers_run"] == pytest.approx(2 / 5)
    assert row["max_depth"] == 3.5 and row["max_depth_p95"] == pytest.approx(4.85)
    assert row["max_depth_by_group"] == {"2 steps": 5.0, "3 steps": 2.0}
    assert row["exit_histogram"] == {"1": 0.5, "2": 1 / 3, "5": 1 / 6}
    assert (row["accuracy"], row["accuracy_by_group"]) == (0.5, {"2 steps": 1.0, "3 steps": 0.0})
    assert row["accuracy_interval"] == pytest.approx([0.095, 0.905], abs=1e-3)
    assert (row["tokens"], row["written"], row["unwritten_run"]) == (3.0, 0.0, 2.5)
    assert (row["cap"], row["full_depth"], row["prompts"]) == (None, 5, 2)


def test_divergence_is_a_mean_over_tokens_and_shows_its_nan():
    """Catches: a mean over responses; the adapters on in the teacher; NaN made 0 by max()."""
    subject = reader("full")
    short = written(subject, [5], "2")
    long = written(subject, [5, 5, 5], "<think> </think> 2")
    rows = [measure(subject, "student", some) for some in ([short], [long], [short, long])]
    one, three, both = (row["kl"] for row in rows)
    assert both == pytest.approx((one + 3 * three) / 4) and one > 0.01
    subject.model.blocks[0].mlp.down_proj.adapter.lora_B.data.fill_(math.nan)
    row = measure(subject, "student", [short])
    assert math.isnan(row["kl"])
    assert "KL to the teacher, nats               –" in table([row])
    assert "– KL to the teacher, nats: not a number" in table([row])


def test_what_no_task_can_verify_has_no_accuracy():
    """Catches: prompts without answers counted as wrong; a dash without a reason."""
    subject = reader()
    open_end = written(subject, [1, 1], "</think> yes", Prompt("q", "q", group="x"))
    row = measure(subject, "student", [open_end])
    assert row["accuracy"] is row["accuracy_interval"] is row["written"] is None
    assert row["accuracy_by_group"] == {} and row["max_depth_by_group"] == {"x": 1.0}
    text = table([row])
    assert "– accuracy: no prompt has a reference answer" in text
    assert "– steps written: the task lists no steps" in text
    mixed = measure(subject, "student", [open_end, written(subject, [1, 1], "</think> 2")])
    assert mixed["accuracy"] == 1.0


def test_necessity_is_measured_free_and_capped():
    """Catches: capped figures at free depth; a cap that is not the smallest good one."""
    subject = Scripted(lambda p, t, cap: free_in_head(p, t, cap) + " ?" * (cap == 1), Config())
    subject.config.evaluate.caps = [3, 1, 2]
    responses = subject.respond([chain(), chain("5 *9 +7 +1")], "evaluate")
    found = examine(subject, responses)
    assert found["capped_accuracy"] == {"1": 0.0, "2": 1.0, "3": 1.0}
    assert found["same_answer_cap"] == 2 and found["greedy_accuracy"] == 1.0
    assert found["same_answer"] == [[x / 4, 1.0] for x in range(5)]
    assert found["same_answer_capped"][0] == [0.0, 0.0]
    assert found["same_answer_capped"][-1] == [1.0, 1.0]
    assert (found["same_answer_area"], found["changed_value"]["stay"]) == (0.0, 1.0)
    assert found["same_answer_area_capped"] > 0.8 and found["changed_value_capped"]["follow"] == 1
    assert ("greedy", ["", ""], "head:0.5", None) in subject.asked
    assert ("full depth", ["", ""], "full", None) in subject.asked
    assert found["monitor"]["score"] == 0.5 and subject.model.cap is None


def test_without_a_good_cap():
    """Catches: a comparison under a cap that loses the accuracy."""
    subject = Scripted(lambda p, given, cap: in_head(p, given, cap) + " ?" * (cap == 1), Config())
    subject.config.evaluate.caps = [1]
    responses = subject.respond([chain()], "evaluate")
    row = measure(subject, "student", responses) | examine(subject, responses)
    assert row["same_answer_cap"] is None and "same_answer_capped" not in row
    assert "rubric" not in table([row]) and "\nsame answer capped " in table([row])
    assert "– smallest good cap: no cap in evaluate.caps keeps 0.95 of the accuracy" in table([row])


def test_tables_of_one_kind_of_row():
    """Catches: NaN, infinity or None as a number; columns not in line; a group of one row lost."""
    values, subject = (None, math.nan, math.inf, -1e-9, -0.25, 0), reader(cap=4)
    assert [cell(v, "{:.2f}") for v in values] == ["–", "–", "–", "0.00", "-0.25", "0.00"]
    asked = {"base": chain(), "student": chain("5 *9 +7 +1")}
    given = {v: written(subject, [2] * 4, "<think> 5 </think> 2", p) for v, p in asked.items()}
    rows = [measure(subject, variant, [response]) for variant, response in given.items()]
    lines = table(rows).split("\n")
    assert lines[0].split() == ["base", "(head,", "cap", "4)", "student", "(head,", "cap", "4)"]
    assert {len(line) for line in lines if not line.startswith("–")} == {len(lines[0])}
    assert [line.split()[-2:] for line in lines[2:4]] == [["1.000", "–"], ["–", "0.000"]]
    assert "perplexity" not in table(rows)
    more = {"monitor": {"score": 0.5}, "capped_accuracy": {"3": 0.25}, "same_answer": [[0.5, 1]]}
    text = re.sub(" +", " ", table([rows[0] | more, rows[1]]))
    for line in ("perplexity under", "accuracy, cap 3 0.250 –", "same answer, 50% kept 100.0% –"):
        assert f"\n{line}" in text


def test_the_files_of_an_evaluation(name, tmp_path):
    """Catches: another table for the same seed; rollouts lost; a base under the student's cap."""
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        write_text(folder / "samples.jsonl", '{"step": 3}\n{"variant": "base (full)"}\n')
    rows = evaluated(name, folders[0], "exits.cap=3")
    assert rows == evaluated(name, folders[1], "exits.cap=3")
    found = json.loads((folders[0] / "evaluation.json").read_text())
    assert found["model"]["name"] == name and found["model"]["content"].startswith("sha256:")
    assert found["config"]["evaluate"]["count"] == 16 and found["commit"] and found["seed"] == 0
    assert [(p["policy"], p["max_depth"]) for p in found["frontier"]] == [("fixed:1", 1.0)]
    assert abs(rows[0]["kl"]) < 1e-6
    assert [(r["cap"], r["mean_depth"] > 3) for r in rows] == [(None, True), (3, False)]
    assert set(rows[1]["capped_accuracy"]) == {"2", "4"} and rows[1]["kl"] > 1e-3
    lines = [json.loads(line) for line in (folders[0] / "samples.jsonl").open()]
    expected = [None, "base (full)", "base (full)", "student (head)", "student (head)"]
    assert [line.get("variant") for line in lines] == expected
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert summary["max_depth"] == pytest.approx(rows[1]["max_depth"], rel=1e-5)
    assert summary["teacher"]["max_depth"] == 4.0 and summary["evaluation_seconds"] > 0
    text = (folders[0] / "evaluation.md").read_text()
    assert "student (head, cap 3)" in text and "student (fixed:1, cap 3)" in text


def test_a_known_base_is_not_measured_again(name, tmp_path):
    """Catches: a base row that is lost, or measured twice."""
    base = {"variant": "base", "policy": "full", "cap": None, "full_depth": 4, "kl": 0.0}
    base |= {"accuracy": 0.125, "accuracy_by_group": {}, "tokens": 1.0}
    base |= {"mean_depth": 4.0, "max_depth": 4.0, "layers_run": 1.0}
    rows = evaluated(name, tmp_path, thorough=False, base=base)
    assert [row["variant"] for row in rows] == ["base", "student"]
    assert rows[0]["accuracy"] == 0.125 and "monitor" not in rows[1]


def test_a_cap_too_deep_and_a_model_without_heads(name, tmp_path):
    """Catches: a mistake or exits.layers=[] that ends in an error only after the work."""
    with pytest.raises(UserError, match=r"evaluate.caps: expected a depth from 1 to 4, found 9"):
        evaluated(name, tmp_path, "evaluate.caps=[2, 9]")
    assert not list(tmp_path.iterdir())
    rows = evaluated(name, tmp_path, "exits.layers=[]", "evaluate.frontier=[]", thorough=False)
    assert [row["policy"] for row in rows] == ["full", "full"]


def test_a_judge_scores_the_rows_and_is_named(tmp_path, monkeypatch):
    """Catches: a judge asked again about what it has already scored; its key in a file."""
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    config, cache = Config(), tmp_path / "judge.jsonl"
    subject = Scripted(in_head, config)
    responses = subject.respond([chain(), chain("5 *9 +7 +1")], "evaluate")
    with JudgeServer() as server:
        config.judge = JudgeConfig("api", server.url, "loopback")
        judge = Judge(subject.config.judge, cache)
        items = [Item(r.prompt.prompt, r.text) for r in responses]
        scores = judge_summary(judge.score(items), "loopback")
        asked = sum(server.served.values())
        assert judge_summary(judge.score(items), "loopback") == scores
        assert asked == 2 == sum(server.served.values())
    assert scores["means"]["overall"] == 30 and KEY not in cache.read_text()
    assert repetition([5, 2] * 4) == pytest.approx(0.6) and repetition([5, 5, 5]) == 0
    row = measure(subject, "student", responses) | {"judge": scores, "monitor": {}}
    assert re.search(r"\nrubric, out of 40 \(loopback\) +30.0\n", table([row]))


def test_several_runs_in_one_table():
    """Catches: the base repeated for each run; two runs' students under one name."""
    one, two = ([{"variant": "base"}, {"variant": "student", "n": n}] for n in (1, 2))
    expected = [{"variant": "base"}, {"variant": "sft", "n": 1}, {"variant": "rl", "n": 2}]
    assert evaluate_script.merge([("sft", one), ("rl", two)]) == expected
    assert evaluate_script.merge([("sft", one)]) == one
