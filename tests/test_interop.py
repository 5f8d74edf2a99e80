"""Adapters and models: ours opened by transformers and peft, theirs opened here."""

import json

import make_golden
import pytest
import torch
from conftest import random_model, script, with_exits
from make_golden import ADAPTERS, ROWS
from safetensors.torch import load_file, save_file
from test_parity import built
from test_weights import IDS, load, old_config, tensors_of, write

from nanoexit.adapters import adapter_base, load_adapter, save_adapter
from nanoexit.config import UserError
from nanoexit.tokenizer import Tokenizer

GOLDEN = json.loads((make_golden.GOLDEN / "peft.json").read_text())
EDITS = {"exit_layers": [[], ["1"], 1, [0], [3], [2], [1.0]], "head": ["tree", 1]}
EDITS |= {"cap": [0, 9, "2"], "base_model": [5], "revision": [5], "content": ["sha256:0", 1]}
NAN, INF = float("nan"), float("inf")
TARGETS = [["lm_head", "q_proj"], ["embed_tokens"], ".*", ["x"], 5, None, "(", "(a+)+$"]
TARGETS += [".?" * 25, "(.|.)" * 25]
REFUSED = {"peft_type": ["IA3", None], "bias": ["all", "lora_only", 0, False]}
REFUSED |= {"use_dora": [True, 0, 1], "modules_to_save": [["lm_head"], 0, False]}
REFUSED |= {"target_modules": TARGETS, "r": [None, 0, -1, 2.5, NAN, 10**9, True, "4"]}
REFUSED |= {"lora_alpha": [None, -1, NAN, INF, 1e30, "16", True], "rank_pattern": [4, [1]]}
REFUSED |= {"lora_dropout": [None, -0.1, 1.0, NAN, "0"], "alpha_pattern": [{"(": 4}]}
REFUSED |= {"layers_to_transform": [-1, 0, "all", [1]], "exclude_modules": ["q", ["q"]]}
REFUSED |= {"layers_pattern": ["blocks"], "use_rslora": [1], "fan_in_fan_out": [True]}
REFUSED |= {"lora_bias": [True], "layer_replication": [[[0, 2]]], "init_lora_weights": ["pissa"]}
REFUSED |= {"trainable_token_indices": [[1], 0], "a_future_option": [0, 1.0, "default", True]}


@pytest.fixture
def small(tmp_path):
    """The base of the golden adapters."""
    return built(tmp_path, {**make_golden.SMALL, **make_golden.CONFIGS["qwen2-tied"]}, 3)


@pytest.fixture
def plain(tmp_path):
    """The folder of a golden adapter."""
    return make_golden.write_adapter(tmp_path / "peft", GOLDEN["plain"])


def edited(folder, name="adapter_config.json", **keys):
    """The same folder with keys of a JSON file changed; None stands for null."""
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | keys))
    return folder


def opened(folder):
    """The model and the tokenizer of a folder, by transformers."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def close(a, b) -> None:
    assert (a - torch.as_tensor(b)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_every_form_compute_what_peft_computes(tmp_path, small, name):
    """Catches: a form of target, rank or alpha that is misread, or lost when saved."""
    load_adapter(small, make_golden.write_adapter(tmp_path / "peft", GOLDEN[name]))
    close(small(ROWS)[0, -2:], GOLDEN[name]["logits"])
    save_adapter(small, tmp_path / "ours")
    load_adapter(small, tmp_path / "ours")
    close(small(ROWS)[0, -2:], GOLDEN[name]["logits"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_peft_as_it_is_installed(tmp_path, small, name):
    """Catches: golden files of another peft; files of ours that peft reads differently."""
    peft = pytest.importorskip("peft")
    model = make_golden.peft_adapter(ADAPTERS[name], tmp_path / "peft")[0]
    load_adapter(small, tmp_path / "peft")
    close(small(ROWS), model(ROWS).logits)
    save_adapter(small, tmp_path / "ours")
    base = make_golden.transformers_model(make_golden.CONFIGS["qwen2-tied"], 3)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    close(small(ROWS), again(ROWS).logits)


@pytest.mark.parametrize("key, value", [(k, v) for k in REFUSED for v in REFUSED[k]], ids=str)
def test_options_of_peft_that_are_refused(plain, small, key, value):
    """Catches: an ignored option that changes what an adapter computes, even at 0 or false."""
    with pytest.raises(UserError, match=key):
        load_adapter(small, edited(plain, **{key: value}))
    assert small.model.layers[0].self_attn.q_proj.adapter is None


def test_names_of_tensors(plain, small):
    """Catches: an adapter's name in tensors refused; an extra tensor accepted; a pickle read."""
    path = plain / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}, path)
    load_adapter(small, plain)
    close(small(ROWS)[0, -2:], GOLDEN["plain"]["logits"])
    name = sorted(tensors)[0]
    changes = {"expected": {name: tensors[name][:2]}, "not finite": {name: tensors[name] * INF}}
    changes["k_proj.* is unexpected"] = {name.replace("q_proj", "k_proj"): torch.ones(2)}
    for word, change in changes.items():
        save_file(tensors | change, path)
        with pytest.raises(UserError, match=word):
            load_adapter(small, plain)
    save_file({n: t for n, t in tensors.items() if n != name}, path)
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_adapter(small, plain)
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"adapter_model\.bin: pickles are not read"):
        load_adapter(small, plain)


@pytest.mark.parametrize("head, asked", [("linear", "."), ("mlp", "adapter")])
def test_adapter_round_trip(tmp_path, family, head, asked):
    """Catches: an adapter, a scale, a head or the cap lost between save and load."""
    base = write(tmp_path / "base", old_config(family), tensors_of(random_model(family)))
    model, again = with_exits(load(base), head=head, cap=3), load(base)
    save_adapter(model, tmp_path / "run" / "adapter")
    load_adapter(again, tmp_path / "run" / asked)
    assert torch.equal(again(IDS), model(IDS))
    assert (again.cap, again.exits.layers, again.exits.kind) == (3, (1, 2, 4), head)
    for a, b in zip(model.exits.parameters(), again.exits.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not again.exits.training


def test_the_base_of_an_adapter(tmp_path, small):
    """Catches: an equal copy refused as a base, or other weights accepted; the revision lost."""
    with_exits(small, (1,))
    small.name, small.revision = "someone/tiny", "1" * 40
    save_adapter(small, tmp_path / "run" / "adapter")
    assert adapter_base(tmp_path / "run") == ("someone/tiny", "1" * 40)
    copy = load(tmp_path)  # where `small` was built
    load_adapter(copy, tmp_path / "run")
    copy.content = "sha256:other"
    with pytest.raises(UserError, match=r"was trained on 'someone/tiny' .*, this model is"):
        load_adapter(copy, tmp_path / "run")
    (tmp_path / "run" / "adapter" / "nanoexit.json").unlink()
    assert adapter_base(tmp_path / "run") == ("someone/tiny", "1" * 40)  # as peft keeps it
    with pytest.raises(UserError, match="no adapter found there"):
        adapter_base(tmp_path)


@pytest.mark.parametrize("key, value", [(k, v) for k in EDITS for v in EDITS[k]], ids=str)
def test_an_edited_nanoexit_json(tmp_path, small, key, value):
    """Catches: a traceback, or heads put where they were not trained."""
    save_adapter(with_exits(small, (1,)), tmp_path / "run")
    with pytest.raises(UserError):
        load_adapter(small, edited(tmp_path / "run", "nanoexit.json", **{key: value}))


def test_merged_export_opens_in_transformers(tmp_path, tiny):
    """Catches: export --merge that leaves the adapter out, forgets a file, ties untied weights."""
    pytest.importorskip("transformers")
    model = with_exits(load(tiny))
    save_adapter(model, tmp_path / "run" / "adapter")
    done = script("export", tmp_path / "run", tmp_path / "out", "--merge")
    assert done.returncode == 0, done.stderr
    theirs, text = opened(tmp_path / "out")
    close(theirs(IDS).logits, model(IDS))
    load_adapter(model, tmp_path / "out")
    assert text.chat_template and model.exits.layers == (1, 2, 4)


def test_tiny_opens_in_transformers(tiny):
    """Catches: a tiny model that only nanoexit can open."""
    (theirs, text), ours = opened(tiny), Tokenizer(tiny)
    close(theirs(IDS).logits, load(tiny)(IDS))
    chat = [{"role": "user", "content": "7 +3 *9"}]
    rendered = text.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == ours.render(chat)
    for written in (rendered, "<bos> 7 +3 *9 . . . . = <think> 0 0 </think> 0 <eos>", "7+3*9"):
        assert text.encode(written, add_special_tokens=False) == ours.encode(written)
