"""scripts/finetune.py on the shipped model. Kills and resuming are in test_training.py."""

import json

import finetune
import pytest
import torch
from safetensors.torch import load_file

from nanoexit.config import ROOT, UserError, load_config
from nanoexit.tasks import TASKS, Prompt, is_held_out
from nanoexit.training import trained
from nanoexit.weights import load_model

YAML = """
model: {name: data/tiny}
data: {prompts: clock}
finetune: {steps: 4, batch_size: 6, capped_rows: 3, cap: 3, early: [2], early_weight: 0.5,
  scaffold: 1, scaffold_steps: 2, first_weight: 1, save_every: 2}
run: {threads: 1}
"""


def configured(tmp_path, *overrides: str):
    path, keys = tmp_path / "c.yaml", [f"run.dir={tmp_path}/run", *overrides]
    path.write_text(YAML)
    return load_config(path, keys, finetune.Recipe)


def prompt_of(tokenizer, row) -> Prompt:
    text = tokenizer.decode(row.prompt, skip_special=True)
    return Prompt("x", text.removesuffix(" ="), checker="clock")


def test_capped_rows_change_no_block_beyond_the_cap(tmp_path):
    """Catches: a loss under a cap that runs deeper; capped rows with steps left out."""
    config = configured(tmp_path, "finetune.weights=blocks", "finetune.early_weight=0")
    model, tokenizer = finetune.load(config)
    _, shallow = finetune.rows_of_step(config, tokenizer, [], 0)
    finetune.step_losses(model, [], shallow, config.finetune, 9)
    touched = {int(n.split(".")[2]) for n, p in trained(model).items() if p.grad is not None}
    assert touched == {0, 1, 2}
    config.finetune.capped_rows = 30
    for row in finetune.rows_of_step(config, tokenizer, [], 0)[1]:
        text = tokenizer.decode(row.response[:-1])
        assert TASKS["clock"].verify(prompt_of(tokenizer, row), text).written == 1


def test_made_rows_are_right_and_not_held_out(tmp_path):
    """Catches: held-out chains in training; running values at the wrong place of a prompt."""
    config, task = configured(tmp_path), TASKS["clock"]
    _, tokenizer = finetune.load(config)
    full, _ = finetune.rows_of_step(config, tokenizer, [], 5)
    for row in full:
        prompt = prompt_of(tokenizer, row)
        assert not is_held_out(prompt)
        assert task.verify(prompt, tokenizer.decode(row.response[:-1])).correct
        words = [tokenizer.decode([row.prompt[at]]) for at, _ in row.values]
        assert words == task.parse(prompt.prompt)[1:]
        assert [tokenizer.decode([v]) for _, v in row.values] == task.values(prompt.prompt)


def test_a_file_of_prompts_and_responses(tmp_path):
    """Catches: a file that is read as a task; a model folder that is not one."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} +1", "response": f"<think> </think> {n + 1}"} for n in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    keys = ("finetune.capped_rows=0", "finetune.early_weight=0", "finetune.weights=lora")
    config = configured(tmp_path, f"data.prompts={path}", *keys)
    finetune.finetune(config, resume=False)
    model = load_model(tmp_path / "run" / "model")
    base = load_file(ROOT / "data/tiny/model.safetensors")
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, base[n])]
    assert changed and all("_proj" in name for name in changed)
    path.write_text('{"prompt": "1 +1"}')
    with pytest.raises(UserError, match=r"rows.jsonl:1: expected a prompt and a response"):
        finetune.finetune(config, resume=False)
    assert (tmp_path / "run" / "model").is_dir()  # not moved


def test_depths_beyond_the_model_are_refused(tmp_path):
    """Catches: an early readout that is silently never trained."""
    with pytest.raises(UserError, match=r"finetune.cap, finetune.early: .* below 8, found 9"):
        finetune.load(configured(tmp_path, "finetune.early=[9]"))
