"""Config: every mistake of a user's is one line that names file, key, what was given and what is allowed."""

import subprocess
import sys

import pytest

from nanoexit.config import ROOT, Config, describe, load_config, to_yaml
from nanoexit.errors import UserError


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
    ("lora:\n  dropout: 1.5\n", ["lora.dropout", "1.5", "from 0 to 0.99"]),
    ("exits:\n  layers: 5\n", ["exits.layers", "5", "a list"]),
    ("exits:\n  layers: [1, x]\n", ["exits.layers", "'x'"]),
    ("exits:\n  head: liner\n", ["exits.head", "'liner'", "linear, mlp", "did you mean 'linear'"]),
    ("sft: 3\n", ["sft", "a mapping", "3"]),
    ("sft:\n  lr: .inf\n", ["sft.lr", "inf"]),
    ("model: [\n", ["c.yaml", "line 2", "not YAML"]),
    ("model: !!python/object/apply:os.system ['true']\n", ["c.yaml", "not YAML"]),
])
def test_a_mistake_is_named(tmp_path, text, says):
    """Catches: an error that leaves out the file, the key, what was found or what is right; a loader that executes (law 7)."""
    with pytest.raises(UserError) as error:
        load_config(written(tmp_path, text))
    assert all(part in str(error.value) for part in says), error.value
    assert "\n" not in str(error.value)


def test_numbers_that_yaml_reads_as_text(tmp_path):
    """Catches: 1e-5, which YAML 1.1 reads as a string, refused or kept as text; and a whole number where a float is due."""
    config = load_config(written(tmp_path, "sft:\n  lr: 1e-5\n  grad_clip: 1\n"), ["rl.lr=3e-4", "exits.layers=[2, 3]", "model.revision=abc"])
    assert (config.sft.lr, config.sft.grad_clip, config.rl.lr, config.exits.layers) == (1e-5, 1.0, 3e-4, [2, 3])
    assert isinstance(config.sft.grad_clip, float) and config.model.revision == "abc"


@pytest.mark.parametrize("override", ["sft.steps", "=3", "sft.steps=x", "sft.step=3", "steps=3", "sft.steps=[", "sft=3"])
def test_a_broken_override_is_named(tmp_path, override):
    """Catches: an override that is silently ignored."""
    with pytest.raises(UserError, match="override"):
        load_config(written(tmp_path, "{}"), [override])


def test_what_is_written_reads_back_the_same(tmp_path):
    """Catches: a default list shared by two configs, or a value that to_yaml writes and load_config refuses."""
    config = load_config(written(tmp_path, ""), ["exits.layers=[3]", "sft.lr=1e-7"])
    assert load_config(written(tmp_path, to_yaml(config))) == config
    assert Config().exits.layers == [1]


def test_every_shipped_config_loads_and_every_knob_is_documented():
    """Catches: a config left behind by a renamed key; a knob without a meaning in --help."""
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        if "pretrain" not in path.name:
            load_config(path)
    assert "sft.kl_weight = 1.0\n      weight of the divergence" in describe()


@pytest.mark.parametrize("name, vocabulary", [("deepseek", 151_936), ("qwen3", 151_936), ("llama3", 128_256), ("smollm2", 49_152)])
def test_the_logits_of_a_chunk_stay_small(name, vocabulary):
    """Catches: a default meant for small vocabularies: of 1,024 x 151,936 float32 logits (0.6 GB) losses hold half a dozen at once."""
    assert load_config(ROOT / "configs" / f"{name}.yaml").sft.chunk * vocabulary * 4 < 100e6


def test_deepseek_is_the_setting_it_says():
    """Catches: the config that is rehearsed, and named in the README, drifting away from the published setting."""
    c = load_config(ROOT / "configs" / "deepseek.yaml")
    assert c.exits.layers == [5, 10, 15, 20, 25] and c.generation.max_new_tokens == 400 and c.sft.samples_per_trace > 1
    assert (c.lora.r, c.lora.alpha, c.lora.dropout, c.lora.targets) == (8, 16, 0.05, ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert (c.generation.temperature, c.generation.top_p, c.data.prompts, c.data.system) == (0.6, 0.95, "data/reasoning.jsonl", None)


@pytest.mark.parametrize("arguments, says", [
    (["configs/none.yaml"], "configs/none.yaml: no such file"),
    (["configs/tiny.yaml", "sft.stpes=3"], "unknown key 'sft.stpes'; did you mean 'steps'?"),
    (["configs/tiny.yaml", "exits.layers=[3, 9]"], "exits.layers: 9 is not an exit depth of this model: it has 8 blocks"),
    (["configs/tiny.yaml", "model.name=no/such/folder/at/all"], "no/such/folder/at/all"),
    (["configs/tiny.yaml", "data.prompts=nothing.jsonl"], "nothing.jsonl: no such file"),
    (["configs/tiny.yaml", "--resume"], "holds no run"),
])
def test_a_script_ends_in_one_line_and_code_2(tmp_path, arguments, says):
    """Catches: a traceback shown to a user, a wrong exit code, a run directory left behind by a run that never was."""
    done = subprocess.run([sys.executable, ROOT / "scripts" / "train_sft.py", *arguments, f"run.dir={tmp_path}/run"] if "--resume" not in arguments
                          else [sys.executable, ROOT / "scripts" / "train_sft.py", arguments[0], f"run.dir={tmp_path}/run", "--resume"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
