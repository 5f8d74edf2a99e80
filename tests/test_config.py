"""Config: every mistake is one line that names file, key, what was found and what is allowed."""

import re
import signal
import subprocess
import sys
import time

import _script
import pytest
from conftest import TINY, script

from nanoexit import config as c
from nanoexit.config import ROOT, Config, UserError, load_config, to_yaml
from nanoexit.training import check, load_student

TINY_RL = TINY.with_name("tiny_rl.yaml")
FILE = "data.prompts=data/reasoning.jsonl"
BROKEN = ["sft.steps", "=3", "sft.steps=x", "sft.step=3", "sft.steps=["]
IMPORTS = "import _script, time; print('ready', flush=True); time.sleep(60)"
ENDLESS = """import _script, time
_script.run_main(lambda: (print('ready', flush=True), time.sleep(60)))"""


def written(tmp_path, text: str) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("text, says", [
    ("sft:\n  stepz: 3\n", ["c.yaml", "sft.stepz", "did you mean 'steps'"]),
    ("sfT:\n  steps: 3\n", ["c.yaml", "'sfT'", "did you mean 'sft'"]),
    ("sft:\n  steps: many\n", ["c.yaml", "sft.steps", "'many'", "a whole number"]),
    ("sft:\n  steps: 0\n", ["sft.steps", "0", "at least 1"]),
    ("sft:\n  steps: true\n", ["sft.steps", "True", "a whole number"]),
    ("sft:\n  steps: 3\n  steps: 4\n", ["c.yaml", "'steps' is given twice"]),
    ("data:\n  held_out: 1.5\n", ["data.held_out", "1.5", "from 0 to 0.9"]),
    ("exits:\n  layers: 5\n", ["exits.layers", "5", "a list"]),
    ("exits:\n  layers: [1, x]\n", ["exits.layers", "'x'"]),
    ("exits:\n  head: liner\n", ["exits.head", "linear, mlp", "did you mean 'linear'"]),
    ("data:\n  template: 3\n", ["data.template", "a mapping"]),
    ("run:\n  seed: 99999999999999999999\n", ["run.seed", "99999999999999999999", "from 0 to"]),
    ("sft: 3\n", ["sft", "a mapping", "3"]),
    ("sft:\n  lr: .inf\n", ["sft.lr", "inf"]),
    ("rl:\n  lr: 1.0e+30\n", ["rl.lr", "1e+30", "from 0 to"]),
    ("model: [\n", ["c.yaml", "line 2", "not YAML"]),
    ("model: !!python/object/apply:os.system ['true']\n", ["c.yaml", "not YAML"]),
    ("run:\n  seed: 1" + "0" * 5000 + "\n", ["c.yaml", "not YAML"]),
    ("[" * 10000, ["c.yaml", "not YAML"]),
    ("model:\n  name: \x1b[2J\n", ["c.yaml", "not YAML"]),
    ("run:\n  seed: !!int ''\n", ["c.yaml", "not YAML"]),
    ('run:\n  dir: "a\\0"\n', ["run.dir", "text without NUL or surrogate"]),
    ("data:\n  template: {x: [1]}\n", ["data.template.x", "[1]"]),
    ("data:\n  template: {1: 2}\n", ["data.template: a name", "1"]),
])  # fmt: skip
def test_a_mistake_is_named(tmp_path, text, says):
    """Catches: an error without file, key, value or remedy; a loader that executes (law 7)."""
    with pytest.raises(UserError) as error:
        load_config(written(tmp_path, text))
    assert all(part in str(error.value) for part in says), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_what_is_given_is_read_and_what_is_written_reads_back_the_same(tmp_path):
    """Catches: 1e-5 refused or kept as text; a shared default; a value that load_config refuses."""
    overrides = ["rl.lr=3e-7", "exits.layers=[2, 3]", "model.revision=abc", "exits.cap=null"]
    overrides.append("data.template={enable_thinking: false}")
    config = load_config(written(tmp_path, "sft:\n  lr: 1e-5\nlora:\n  alpha: 1\n"), overrides)
    assert (config.sft.lr, config.rl.lr, config.exits.layers) == (1e-5, 3e-7, [2, 3])
    assert isinstance(config.lora.alpha, float) and config.model.revision == "abc"
    assert load_config(written(tmp_path, to_yaml(config))) == config
    assert Config().exits.layers is not Config().exits.layers, "a default is not shared"


def test_every_shipped_config_loads_and_every_knob_is_documented():
    """Catches: a config that uses a renamed key; a knob that --help does not explain."""
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if not re.search("^(pretrain|finetune):", path.read_text(), re.MULTILINE):
            load_config(path)
    text = _script.command_line("").format_help()
    assert "exits.cap = null\n      largest depth of any token" in text


@pytest.mark.parametrize("overrides, says", [
    *[(broken, "override") for broken in BROKEN],
    ("exits.layers=[3,9]", "exits.layers: expected different depths from 1 to 7"),
    ("exits.cap=9", "exits.cap: expected a depth from 1 to 8"),
    ("model.name=no/such/folder", "no/such/folder"),
    ("data.prompts=nothing.jsonl", "nothing.jsonl: no such file"),
    ("data.prompts=~nobody-here/x.jsonl", "~nobody-here/x.jsonl: no such file"),
    ("data.checker=exact", "data.checker: expected auto or clock, found 'exact'"),
    (f"{FILE} data.checker=clok", ":1: checker 'clok': expected one of"),
    ("data.held_out=0", "data.held_out = 0.0: no held_out prompts in clock"),
    (f"{FILE} data.held_out=0", "no held_out prompts"),
    ("evaluate.policies=[haed]", "evaluate.policies: policy"),
    ("judge.kind=api", "judge.base_url"),
    (f"data.traces={TINY}/traces", f"data.traces: {TINY}/traces cannot be written"),
    ("sft.early=1 sft.targets=base", "sft.early trains the student's readouts"),
    ("generation.top_p=0.9", "generation.top_p: REINFORCE expects 1.0, found 0.9"),
])  # fmt: skip
def test_a_mistake_on_the_command_line_is_named(tmp_path, overrides, says):
    """Catches: an override that is ignored; a mistake found after hours of work, or not at all."""
    with pytest.raises(UserError, match=re.escape(says)):
        config = load_config(TINY, [*overrides.split(), f"run.dir={tmp_path}/run"])
        check(config, reinforce=True)
        load_student(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, arguments, says", [
    ("train_sft", ["configs/none.yaml"], "configs/none.yaml: no such file"),
    ("train_sft", [TINY, "--resume"], "holds no run"),
    ("train_rl", [TINY_RL, "run.init=null"], "run.init: name the SFT run"),
    ("train_rl", [TINY_RL, "run.init=run"], "run.init: run is also run.dir"),
    ("evaluate", [TINY], "no such folder"),
])  # fmt: skip
def test_a_mistake_ends_in_one_line_and_code_2_before_any_work(tmp_path, name, arguments, says):
    """Catches: a traceback shown to a user, a wrong exit code, work before the check."""
    done = script(name, *arguments, f"run.dir={tmp_path}/run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], done.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_is_whole_or_not_there(tmp_path):
    """Catches: half a file after an error; a temporary file left; a symlink or device replaced."""
    path, link = tmp_path / "a.txt", tmp_path / "link"
    c.write_text(path, "old")
    link.symlink_to(path)
    with pytest.raises(ZeroDivisionError):
        c.replace(path, lambda beside: beside.write_text("half") and 1 / 0)
    c.write_text(link, "new")
    assert path.read_text() == "new" and link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "link"]
    for target in (tmp_path, "/dev/null", path / "below"):
        with pytest.raises(UserError, match="file"):
            c.write_text(tmp_path / target, "x")


def test_foreign_json_numbers_and_text_are_tame():
    """Catches: unbounded recursion; NaN written as a number (law 9); text that moves the cursor."""
    for text in ("[" * 100000, "1" * 5000, "{", "nul"):
        with pytest.raises(UserError, match="here"):
            c.parse_json(text, "here")
    assert c.rounded({"a": [float("nan"), 1 / 3, float("inf")]}) == {"a": [None, 0.333333, None]}
    assert c.printable("a\x1b[2J\tb\n\x9b\x7fé") == "a\\x1b[2J\tb\n\\x9b\\x7fé"


@pytest.mark.parametrize("code", [ENDLESS, IMPORTS])
@pytest.mark.parametrize("number, end", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_script_ends_in_one_line(number, end, code):
    """Catches: a traceback on one Ctrl-C, on two, or on a scheduler's SIGTERM; a wrong code."""
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT / "scripts")
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == end and len(errors.splitlines()) == 1, errors


@pytest.mark.parametrize("output, code", [(">&-", 0), ("> /dev/full", 2)])
def test_an_output_that_takes_nothing(output, code):
    """Catches: a traceback or exit code 120 when stdout is closed or its disk is full."""
    command = f"'{sys.executable}' -c 'import _script; _script.run_main(lambda: print(1))' {output}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT / "scripts")
    assert done.returncode == code and len(done.stderr.splitlines()) == code // 2, done.stderr
