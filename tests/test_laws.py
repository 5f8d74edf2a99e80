"""The laws of the project. Each test says which breach it catches; every one was seen to fail with its law broken by hand."""

import ast
import itertools
import json
import shutil

import numpy as np
import pytest
import reference
import torch
from conftest import random_model, with_exits

from nanoexit.config import ROOT, TARGETS, LoRAConfig
from nanoexit.decode import DecodeBlock, DecodeStep
from nanoexit.errors import UserError
from nanoexit.exits import attach, detach, stick_breaking
from nanoexit.generate import generate, sample
from nanoexit.lora import adapters_off, linear_maps
from nanoexit.model import Transformer
from nanoexit.score import pad, score
from nanoexit.tokenizer import load_tokenizer
from nanoexit.weights import load_model

PROMPTS = [[3, 7, 11], [5, 1, 30, 22, 9, 4, 17], [8, 8], [2, 39, 14, 6, 25]]
PROMPT_EXITS = ["full", "limit:2", "limit:3", "head"]  # a head sits at 2, none at 3


def rescored(model: Transformer, prompts, gens, **kw):
    """What the alignment of DESIGN says: ids = prompt + tokens[:-1], depths = the prompt's, then depths[1:]."""
    ids = pad([p + g.tokens[:-1] for p, g in zip(prompts, gens)], model.device)
    depths = pad([g.prompt_depths + g.depths[1:] for g in gens], model.device)
    return ids, depths, score(model, ids, depths, [len(p) for p in prompts], **kw)


# --- law 1: exits off = base model --------------------------------------------------------------------------------------


def test_fresh_attachment_changes_no_bit(family):
    """Catches: an adapter that starts non-zero, or a path for 'exits off' that rounds otherwise."""
    model = random_model(family)
    ids = torch.tensor([PROMPTS[1], PROMPTS[1][::-1]])
    before = model(ids)
    attach(model, [1, 3], "mlp", LoRAConfig(r=3, targets=TARGETS))
    assert torch.equal(model(ids), before)
    everywhere = torch.full_like(ids, model.full_depth)
    assert torch.equal(score(model, ids, everywhere, [3, 3]).logits, before)


def test_attach_train_detach_leaves_every_base_bit(family):
    """Catches: training that touches a base tensor, adapters_off that leaves something on, detach that forgets something."""
    model = random_model(family)
    ids = torch.tensor([PROMPTS[1]])
    before, weights = model(ids), {n: p.clone() for n, p in model.named_parameters()}
    with_exits(model)
    trainable = [p for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.1)
    out = score(model, ids, torch.tensor([[5, 5, 1, 2, 4, 5, 1]]), [2])
    (out.logits.square().mean() - out.exit_logprobs.sum()).backward()
    optimizer.step()
    assert not torch.equal(model(ids), before)
    with adapters_off(model):
        assert torch.equal(model(ids), before)
    detach(model)
    assert torch.equal(model(ids), before)
    assert {n for n, _ in model.named_parameters()} == set(weights)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_policy_full_writes_what_the_plain_model_writes(family):
    """Catches: a policy `full` that asks a head and obeys it."""
    model = random_model(family)
    plain = generate(model, PROMPTS, "full", 8, seed=1)
    attach(model, [1, 3], "linear")
    model.exits.heads["1"].bias.data += 100  # these heads would let everything out
    again = generate(model, PROMPTS, "full", 8, seed=1)
    assert [g.tokens for g in again] == [g.tokens for g in plain]
    assert all(set(g.depths) == {5} for g in again)


# --- law 2: one meaning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_exits, freeze", list(itertools.product(PROMPT_EXITS, [True, False])))
@pytest.mark.parametrize("policy", ["full", "head", "head:0.4", "head-floor:0.3", "fixed:2", "fixed:3", "kl:1", "confidence:0.2"])
def test_forward_rescores_what_generate_sampled(family, policy, prompt_exits, freeze):
    """Catches: an off-by-one between generation and training, keys made from the wrong residual, a forgotten final norm."""
    model = with_exits(random_model(family))
    gens = generate(model, PROMPTS, policy, 7, seed=2, prompt_exits=prompt_exits, freeze=freeze, stop_ids=[0], batch_size=3)
    ids, depths, out = rescored(model, PROMPTS, gens, freeze=freeze, prompt_exits=prompt_exits == "head")
    logp = out.logits.log_softmax(-1)
    for row, (prompt, g) in enumerate(zip(PROMPTS, gens)):
        at = torch.arange(len(g.tokens)) + len(prompt) - 1
        assert torch.allclose(logp[row, at, torch.tensor(g.tokens)], torch.tensor(g.token_logprobs), atol=1e-4)
        assert torch.allclose(out.exit_logprobs[row, at[1:]], torch.tensor(g.exit_logprobs[1:]), atol=1e-4)
        assert torch.allclose(out.exit_logprobs[row, : len(prompt)], torch.tensor(g.prompt_exit_logprobs), atol=1e-4)
        assert (out.exit_logprobs[row, at[-1] + 1 :] == 0).all()
        assert g.depths[0] == g.prompt_depths[-1] and 0 not in g.depths


# --- law 3: skipping is exact -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_packed_forward_equals_the_slow_reference(family, head):
    """Catches: a mask, a rotation or a key that is wrong only for tokens whose neighbours exited; padding that leaks."""
    model = with_exits(random_model(family), head=head)
    rng = np.random.default_rng(0)
    lengths = [9, 4, 7]
    ids = pad([rng.integers(40, size=n).tolist() for n in lengths], model.device)
    depths = pad([rng.choice([1, 2, 4, 5], size=n).tolist() for n in lengths], model.device)
    with torch.no_grad():
        out = score(model, ids, depths, [1, 1, 1])
        for row, n in enumerate(lengths):
            one, path = ids[row, :n].tolist(), depths[row, :n].tolist()
            assert torch.allclose(out.hidden[row, :n], reference.hidden_states(model, one, path), atol=1e-4)
            expected = [reference.exit_logprob(model, one, path, t) for t in range(1, n)]
            assert torch.allclose(out.exit_logprobs[row, 1:n], torch.tensor(expected), atol=1e-4)
            assert torch.allclose(out.logits[row, :n], reference.logits_of(model, out.hidden[row, :n]), atol=1e-4)


def test_unfrozen_forward_equals_the_slow_reference(family):
    """Catches: an ablation that freezes after all, or reads out the wrong residual."""
    model = with_exits(random_model(family))
    ids, path = PROMPTS[1], [5, 1, 2, 4, 1, 5, 2]
    with torch.no_grad():
        out = score(model, torch.tensor([ids]), torch.tensor([path]), [1], freeze=False)
        assert torch.allclose(out.hidden[0], reference.hidden_states(model, ids, path, freeze=False), atol=1e-4)


def test_cached_generation_equals_the_slow_reference(family):
    """Catches: debts of the cache paid late, twice, or to the wrong block; noise that is not the row's own."""
    model = with_exits(random_model(family))
    gens = generate(model, PROMPTS, "head", 7, temperature=0, seed=5, stop_ids=[0])
    assert any(len(set(g.depths)) > 2 for g in gens), "exits at several depths, or this shows nothing"
    with torch.no_grad():
        for row, (prompt, g) in enumerate(zip(PROMPTS, gens)):
            noise = np.random.default_rng([5, row]).random((7, 4), dtype=np.float32)
            assert reference.generate(model, prompt, 7, noise, [0]) == (g.tokens, g.depths)


def test_a_token_that_exits_runs_no_later_block(monkeypatch):
    """Catches: 'skipping' that computes and masks. Counts rows through each block's MLP."""
    model = with_exits(random_model("qwen2"))
    rows, run = [], DecodeBlock.__call__
    monkeypatch.setattr(DecodeBlock, "__call__", lambda block, h, on, *args: rows.append(len(on)) or run(block, h, on, *args))
    for block in model.model["layers"]:
        block.mlp.register_forward_hook(lambda _m, args, _out: rows.append(args[0].shape[:-1].numel()))
    score(model, torch.tensor([PROMPTS[1]]), torch.tensor([[5, 1, 2, 4, 1, 5, 2]]), [1])
    assert rows == [7, 5, 3, 3, 2]
    rows.clear()
    generate(model, [PROMPTS[0]], "fixed:2", 4, stop_ids=[])
    assert rows == [3] * 5 + [1, 1] * 3
    rows.clear()
    gens = generate(model, PROMPTS, "head", 4, seed=5, stop_ids=[])
    steps = [[g.depths[i] for g in gens] for i in range(1, 4)]
    assert min(map(min, steps)) < 5, "somebody must exit, or this shows nothing"
    assert rows[5:] == [running for depths in steps for d in range(5) if (running := sum(x > d for x in depths))]


@pytest.mark.parametrize("pack", ["always", "never"])
@pytest.mark.parametrize("without", [(), ("k_proj", "gate_proj"), TARGETS])
def test_a_decoding_step_equals_the_plain_forward(family, without, pack, monkeypatch):
    """Catches: maps joined in the wrong order, an adapter on a neighbour's rows, keys of frozen rows made from the wrong norm."""
    model = with_exits(random_model(family))
    for name, linear in linear_maps(model):
        if name.rsplit(".", 1)[-1] in without:
            linear.adapter = None
    given = [[17] * 6, [4] * 6, [30, 2] * 3]  # the same tokens on both ways
    kw = {"seed": 5, "stop_ids": [], "forced": given, "pack": pack}
    fast = generate(model, PROMPTS[:3], "head", 7, **kw)
    assert any(len(set(g.depths)) > 2 for g in fast), "exits at several depths, or this shows nothing"
    monkeypatch.setattr(DecodeStep, "__call__", lambda step, *args: model.run(*args))
    slow = generate(model, PROMPTS[:3], "head", 7, **kw)
    for a, b in zip(fast, slow):
        assert (a.tokens, a.depths) == (b.tokens, b.depths)
        assert torch.allclose(torch.tensor([a.token_logprobs, a.exit_logprobs]), torch.tensor([b.token_logprobs, b.exit_logprobs]), atol=1e-4)


# --- law 4: a row does not feel its neighbours --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["full", "head", "kl:1"])
@pytest.mark.parametrize("prompt_exits", PROMPT_EXITS)
def test_the_same_row_writes_the_same_text_in_any_company(family, policy, prompt_exits):
    """Catches: noise shared between rows, padding that is attended to, rows mixed up when others leave or join."""
    model = with_exits(random_model(family))
    prompts = PROMPTS * 2
    kw = {"seed": 3, "stop_ids": [0, 1, 2, 3, 4], "prompt_exits": prompt_exits}
    together = generate(model, prompts, policy, 9, **kw)
    assert len({len(g.tokens) for g in together}) > 1, "rows must end at different times, or this shows nothing"
    for size in (1, 3):
        again = generate(model, prompts, policy, 9, batch_size=size, **kw)
        assert [(g.tokens, g.depths) for g in again] == [(g.tokens, g.depths) for g in together]
    alone = generate(model, prompts[:1], policy, 9, **kw)
    assert (alone[0].tokens, alone[0].depths) == (together[0].tokens, together[0].depths)


# --- law 5: the sampled distribution is the trained one -----------------------------------------------------------------


def test_exit_frequencies_are_the_likelihoods():
    """Catches: a floor or threshold in sampling, or one noise used for two heads. 4 standard errors: one run in 3,000 fails by luck,
    and the seed is fixed."""
    model = with_exits(random_model("qwen3"))
    for head, bias in zip(model.exits.heads.values(), (-3.0, -0.5, -1.0)):  # a chance far below 0.1, and every depth taken
        head.weight.data *= 0.05
        head.bias.data.fill_(bias)
    n = 4000
    gens = generate(model, [PROMPTS[0]] * n, "head", 2, temperature=0, seed=0, stop_ids=[])
    counts = np.array([sum(g.depths[1] == d for g in gens) for d in (1, 2, 4, 5)])
    ids = torch.tensor([PROMPTS[0] + gens[0].tokens[:1]])
    z = score(model, ids, torch.full_like(ids, 5), [3]).head_logits[0, -1]
    p = stick_breaking(z).exp().detach().numpy()
    assert abs(p.sum() - 1) < 1e-5 and 0.02 < p[0] < 0.08 and (p > 0.02).all()
    assert (np.abs(counts / n - p) < 4 * np.sqrt(p * (1 - p) / n)).all(), (counts / n, p)


def test_token_frequencies_are_the_softmax():
    """Catches: an inverted cumulative distribution that is off by one token, or renormalized where nothing was cut."""
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0, -30.0]])
    n = 20000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    for temperature, top_p, top_k, keep in [(1.0, 1.0, 0, 5), (0.7, 1.0, 2, 2), (1.0, 0.8, 0, 2)]:
        tokens = sample(logits.expand(n, -1), u, temperature, top_p, top_k)
        p = (logits[0] / temperature).softmax(-1)
        p = p.where(p >= p.sort(descending=True).values[keep - 1], 0.0)
        p = p / p.sum()
        share = torch.bincount(tokens, minlength=5) / n
        assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all(), (share, p)
    assert sample(logits, torch.tensor([0.999]), 0, 1.0, 0).item() == 0


# --- law 6 is in test_training.py. law 7: nothing is executed that was loaded --------------------------------------------


def test_no_code_that_could_execute_what_it_loads():
    """Catches: pickle in any dress, eval and exec, unsafe YAML, remote code, a template environment outside the sandbox."""
    for path in [*(ROOT / "nanoexit").glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", None) or "").split(".")[0]}
                assert not names & {"pickle", "dill", "joblib", "shelve", "marshal", "transformers", "peft", "importlib"}, (path, names)
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "np.load", "yaml.load", "yaml.unsafe_load",
                                    "yaml.full_load", "jinja2.Environment", "jinja2.Template"}, (path, call)
                assert "trust_remote_code" not in {k.arg for k in node.keywords}, path


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}",
                                      "{{ lipsum.__globals__['os'].system('true') }}", "{% include '/etc/passwd' %}"])
def test_a_hostile_chat_template_stays_in_its_sandbox(tiny, tmp_path, template):
    """Catches: a template that reaches Python's classes, changes what it was given, or reads a file."""
    shutil.copytree(tiny, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    with pytest.raises(UserError, match="chat template failed"):
        load_tokenizer(tmp_path / "model").prompt_ids("7 +3")


def test_a_pickle_beside_the_weights_is_not_opened(tiny, tmp_path):
    """Catches: a fallback to pytorch_model.bin."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(UserError, match="no model.safetensors"):
        load_model(str(tmp_path / "model"))


# --- the same on the model that ships -----------------------------------------------------------------------------------


def test_laws_hold_on_the_tiny_reasoner(tiny):
    """Catches: what random weights cannot show, such as a law that only holds where every row is as long as the others."""
    model = load_model(str(tiny))
    ids = torch.tensor([[0, 15, 18, 25, 5, 5, 5, 5, 4, 2]])
    before = model(ids)
    with_exits(model, layers=(1, 3, 6))
    prompts = [ids[0].tolist(), ids[0, :6].tolist()]
    gens = generate(model, prompts, "head", 8, seed=1)
    _, _, out = rescored(model, prompts, gens)
    for row, (prompt, g) in enumerate(zip(prompts, gens)):
        alone = generate(model, [prompt], "head", 8, seed=1)[0]
        assert row or (alone.tokens, alone.depths) == (g.tokens, g.depths)
        hidden = reference.hidden_states(model, prompt + g.tokens[:-1], g.prompt_depths + g.depths[1:])
        n = len(hidden)
        assert torch.allclose(out.hidden[row, :n], hidden, atol=2e-3, rtol=1e-4)
        logp = out.logits[row].log_softmax(-1)[torch.arange(len(g.tokens)) + len(prompt) - 1, torch.tensor(g.tokens)]
        assert torch.allclose(logp, torch.tensor(g.token_logprobs), atol=1e-4)
    detach(model)
    assert torch.equal(model(ids), before)
