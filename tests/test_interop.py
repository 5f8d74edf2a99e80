"""What nanoexit writes opens in transformers and peft, and what they write opens here."""

import subprocess
import sys

import pytest
import torch
from conftest import random_model, scramble
from test_weights import HUB, old_config, tensors_of, write

from nanoexit.adapters import load_adapter, save_adapter
from nanoexit.config import ROOT, LoRAConfig
from nanoexit.exits import attach
from nanoexit.generate import generate
from nanoexit.tokenizer import Tokenizer
from nanoexit.weights import load_model

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]])
MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def ours(folder):
    return load_model(str(folder), "cpu", "float32")


def close(a, b) -> None:
    a, b = (x.detach() for x in (a, b))
    assert a.shape == b.shape and (a - b).abs().max() < 1e-4


@pytest.fixture
def base(tmp_path, family):
    """A model folder of each family."""
    return write(tmp_path / "base", old_config(family), tensors_of(random_model(family)))


def student(base, targets):
    """The model with adapters that are not zero, and heads."""
    model = ours(base)
    attach(model, (1, 3), "linear", LoRAConfig(r=3, alpha=6, targets=targets))
    scramble(((n, p) for n, p in model.named_parameters() if "lora_B" in n), 1)
    return model


@pytest.mark.parametrize("targets", [MLP[:4], MLP])
def test_our_adapter_opens_in_peft(tmp_path, base, targets):
    """Bug: a name, the scale or the targets in adapter/ are not those of PEFT. Policy full is what the plain forward runs."""
    peft = pytest.importorskip("peft")
    model = student(base, targets)
    save_adapter(model, tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(theirs(base), str(tmp_path / "adapter")).eval()
    close(other(IDS).logits, model(IDS))
    assert (model(IDS) - ours(base)(IDS)).abs().max() > 1e-2


@pytest.mark.parametrize("targets", [MLP[:4], MLP])
def test_a_peft_adapter_opens_here(tmp_path, base, targets):
    """Bug: an adapter trained with peft (three steps here) is refused or computes something else."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(theirs(base), peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(str(tmp_path / "peft"))
    here = ours(base)
    load_adapter(here, tmp_path / "peft")
    close(here(IDS), model(IDS).logits)


def test_merged_export_opens_in_transformers(tmp_path):
    """Bug: export --merge leaves the adapter out, forgets a file, or ties what is not tied."""
    model = student(ROOT / "data" / "tiny", MLP)
    save_adapter(model, tmp_path / "run" / "adapter")
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "export.py"), str(tmp_path / "run"), str(tmp_path / "out"), "--merge"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    close(theirs(tmp_path / "out")(IDS).logits, model(IDS))
    assert transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out")).chat_template
    assert (tmp_path / "out" / "adapter" / "exit_heads.safetensors").is_file()


def test_tiny_opens_in_transformers(tiny):
    """Bug: the tiny model of the repository is a model for us alone."""
    close(theirs(tiny)(IDS).logits, ours(tiny)(IDS))
    text = transformers.AutoTokenizer.from_pretrained(str(tiny))
    chat = [{"role": "user", "content": "7 +3 *9"}]
    rendered = text.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == Tokenizer(tiny).render(chat)
    assert text(rendered, add_special_tokens=False)["input_ids"] == Tokenizer(tiny).prompt_ids("7 +3 *9")
    for written in ("<bos> 7 +3 *9 . . . . = <think> 0 0 </think> 0 <eos>", "7+3*9"):  # for a Qwen2 AutoTokenizer would split as Qwen2 does
        assert text.encode(written, add_special_tokens=False) == Tokenizer(tiny).encode(written)


@pytest.mark.skipif(not HUB.is_dir(), reason="the real checkpoint is not here")
def test_a_real_checkpoint_tells_the_same_story():
    """Bug: anything at all between the files and the text."""
    folder = HUB / "raincandy-u" / "TinyStories-656K"
    model, ids = ours(folder), Tokenizer(folder).prompt_ids("Once upon a time")
    other = theirs(folder)
    close(other(torch.tensor([ids])).logits, model(torch.tensor([ids])))
    story = generate(model, [ids], policy="full", max_new_tokens=60, temperature=0)[0].tokens
    want = other.generate(torch.tensor([ids]), max_new_tokens=60, do_sample=False)[0, len(ids):].tolist()
    assert story == want and len(story) == 60
