"""The experiment: its arms, what is retrained and what is reused, its table and figures."""

import json
import math
from pathlib import Path

import experiment as script
import pytest
from experiment import DEFAULT, FULL, Arm
from test_evaluate import random_reasoner

from nanoexit.config import write_text

SMALL = ["sft.steps=2", "rl.steps=1", "rl.prompts=2", "rl.rollouts=2", "data.count=32", "lora.r=2"]
SMALL += ["sft.batch_size=4", "evaluate.count=8", "generation.max_new_tokens=4"]


def test_arms_are_what_they_say(tmp_path):
    """Catches: two arms in one folder; a cap or a charge in the SFT; an override that is undone."""
    folders = [arm.folder(tmp_path, 0) for arm in FULL]
    assert len({*folders}) == len(FULL) == len({arm.name for arm in FULL})
    assert all(arm.start is None or arm.start in FULL for arm in FULL) and {*DEFAULT} < {*FULL}
    configs = {arm: script.arm_config(arm, 1, tmp_path, ["rl.steps=7"]) for arm in FULL}
    plain = configs[Arm()]
    for arm, config in configs.items():
        assert config.rl.steps == 7 and config.run.seed == 1 and config.evaluate.caps[-1] == 8
        charge = (arm.weight or 0, arm.penalty, arm.cap, arm.targets)
        rl, exits = config.rl, config.exits
        assert charge == (rl.depth_weight, rl.depth_penalty, exits.cap, config.sft.targets)
        assert exits.layers == (plain.exits.layers if arm.exits else [])
        assert config.data.prompts == script.BASES[arm.base].task
        assert (config.model.name == "data/tiny") == (arm.base == "shipped")
        assert (config.run.init is None) == (arm.weight is None or not arm.exits)
    assert configs[Arm(3.0, "sum")].run.init == plain.run.dir
    assert Arm(0.0, base="permute", cap=4).name == "lambda 0, permute, cap 4"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, list[str]]:
    """A base of 8 blocks with random weights, and the overrides of a short experiment on it."""
    folder = tmp_path_factory.mktemp("experiment")
    return folder / "runs", [*SMALL, f"model.name={random_reasoner(folder / 'base', blocks=8)}"]


def test_the_experiment_runs_and_writes(runs, tmp_path, capsys):
    """Catches: another run's SFT; the student's adapters in the row of the base; a missing file."""
    folder, overrides = runs
    results = script.experiment(DEFAULT, [0], folder, 1, overrides)
    out = capsys.readouterr().out
    assert "pre-flight, base shipped" in out and "REINFORCE can only shift" in out
    assert [row["arm"] for row in results] == ["base", "SFT", "lambda 0", "lambda 3"]
    promised = "arm base lambda penalty cap seed accuracy written mean_depth max_depth tokens "
    promised += "max_depth_p95 capped_accuracy same_answer same_answer_cap follow stay monitor "
    promised += "steps_in_head greedy_accuracy unwritten_run max_depth_by_group operations made_by"
    assert all(set(promised.split()) <= set(row) for row in results)
    base, sft, _, charged = results
    assert (base["max_depth"], base["operations"], base["lambda"]) == (8, 98 * 8 + 23, None)
    assert abs(base["kl"]) < 1e-6 < charged["kl"] and charged["lambda"] == 3.0
    assert list(base["preflight"]) == [*"23456"] and "preflight" not in sft
    assert sft["made_by"]["model"]["content"].startswith("sha256:") and sft["made_by"]["commit"]
    script.write(results, tmp_path, "this test")
    files = {path.stem for path in tmp_path.iterdir()}
    assert {"results", "table", "index", "max_depth_by_group", "capped_accuracy"} <= files
    assert json.loads((tmp_path / "results.json").read_text()) == results
    text, found = (tmp_path / "table.md").read_text(), [f"{r['accuracy']:.3f}" for r in results]
    for title, cells in (("", [row["arm"] for row in results]), ("accuracy", found)):
        assert f"\n| {' | '.join([title, *cells])} |\n" in text, "a row for each figure"
    page = (tmp_path / "index.html").read_text()
    assert "lambda 3" in page and "{" not in page.split("</style>")[1].split("<svg")[0]


def test_what_is_reused_and_what_is_not(runs, capsys):
    """Catches: an arm trained again for nothing; a result reused for another config."""
    folder, overrides = runs
    arm = Arm(strength=4.0)
    again = [script.experiment([arm], [0], folder, 1, overrides) for _ in range(2)]
    assert again[0] == again[1] and capsys.readouterr().out.count("reused") == 1
    look = folder / "bases" / "shipped.json"  # the base is not measured again either
    marked = {"2": {"1": [0, 0]}}
    look.write_text(json.dumps(json.loads(look.read_text()) | {"preflight": marked}))
    assert script.experiment([arm], [0], folder, 1, overrides)[0]["preflight"] == marked
    look.unlink()
    capsys.readouterr()
    (arm.folder(folder, 0) / "result.json").unlink()
    assert script.experiment([arm], [0], folder, 1, overrides) == again[0]
    assert not list(folder.glob("*.before-*")) and "reused" not in capsys.readouterr().out
    changed = script.experiment([arm], [0], folder, 1, [*overrides, "sft.lr=1e-4"])[-1]
    assert changed["made_by"]["config"]["sft"]["lr"] == 1e-4
    assert len(list(folder.glob("*.before-1"))) == 1


def test_bases_are_made_after_what_they_start_from(tmp_path, monkeypatch):
    """Catches: a stage of fine-tuning that starts before the model of the stage before is there."""
    made = []
    monkeypatch.setattr(script, "check", lambda *_, **__: None)
    monkeypatch.setattr(script, "run_all", lambda _, __, calls, *___: made.append(calls))
    with pytest.raises(TypeError, match="iterable"):  # nothing has been measured
        script.experiment(script.WORDS, [0], tmp_path, 1, [])
    stages = [[name for name, *_ in calls] for calls in made]
    assert stages == [["words-head"], ["words-base"], *[["words", "words-head"]] * 2]


def test_side_by_side(tmp_path):
    """Catches: a run's error that is lost, or that leaves the others waiting forever."""
    with pytest.raises(ValueError, match="math"):
        script.run_all(2, math.sqrt, [(4.0,), (-1.0,)], "roots", tmp_path)


def test_what_is_shown_of_runs_in_progress(tmp_path):
    """Catches: a bar that stands still while arms and bases train."""
    for name, lines in (("SFT-seed0", 3), ("lambda-0-seed0", 2), ("SFT-seed1.before-1", 9)):
        write_text(tmp_path / name / "metrics.jsonl", "{}\n" * lines)
    write_text(tmp_path / "SFT-seed0" / "result.json", "{}")
    for name in ("values.log", "words.log", "words/model/tokenizer.json"):
        write_text(tmp_path / "bases" / name, "pretrain: 1\rpretrain: 20")
    assert script.status(tmp_path) == "lambda-0-seed0 step 2 | values pretrain: 20"


def test_lines_of_the_table_a_figure_and_the_preflight():
    """Catches: seeds mixed up; a gap counted as 0; another study's arm; a route where none is."""
    rows = [{"a": 0.5, "b": {"2 steps": 1, "1 step": 3}}, {"a": 0.7, "b": {"2 steps": 2}}]
    rows.append({"a": None})
    assert script.over_seeds(rows, "a", "{:.2f}") == "0.60 (0.50–0.70)"
    assert script.over_seeds(rows[:1], "b.2 steps", "{:.1f}") == "1.0"
    assert script.over_seeds(rows, "b.3 steps", "{:.1f}") == "–"
    pairs = [pair for row in rows for pair in script.entries(row, "b").items()]
    assert script.curve(pairs) == [(1.0, 3.0), (2.0, 1.5, 1, 2)]
    assert script.curve([("25% kept", 1.0), (0.0, 2.0)]) == [(0.0, 2.0), (25.0, 1.0)]
    assert script.main_arms([{"base": "words"}]) == ["base", "SFT", "lambda 0", "lambda 2"]
    good, poor = {"1": [1.0, 0.96, 0.2]}, {"1": [1.0, 0.5, 1.0]}
    text = script.preflight_text("shipped", {"2": poor, "3": good, "4": good})
    assert "there is a written route 3 blocks deep" in text and "0.98 (0.96)" in text
    assert "no shallow written route" in script.preflight_text("values", {"2": poor})
