"""The laws of the project. Each test has been seen to fail with its law broken on purpose.
Law 6 (exact resume) is in test_training.py, law 9 (figures) in test_evaluate.py, what law 7 says
of templates in test_tokenizer.py, and of pickles in test_weights.py."""

import ast

import numpy as np
import pytest
import reference
import torch
from conftest import random_model, scramble, with_exits

from nanoexit.config import ROOT, TARGETS, LoRAConfig, UserError
from nanoexit.exits import as_base, attach, capped, detach, path_logprob
from nanoexit.generate import Sampling, generate, sample
from nanoexit.lora import adapters
from nanoexit.model import Transformer
from nanoexit.score import Aligned, Score, align, pad, score
from nanoexit.tasks import Response
from nanoexit.teacher import rescore
from nanoexit.weights import load_model

PROMPTS = [[3, 7, 11], [5, 1, 30, 22, 9, 4, 17], [8, 8], [2, 39, 14, 6, 25]]
POLICIES = ["full", "head", "head:0.4", "fixed:2", "fixed:3", "kl:1", "confidence:0.2"]
CAPS = [None, 1, 3, 4]  # with heads at 1, 2 and 4: no head below it, some, all but one
UNSAFE_IMPORTS = {"pickle", "dill", "joblib", "shelve", "marshal", "transformers", "peft"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "np.load"}
UNSAFE_CALLS |= {"yaml.unsafe_load", "yaml.full_load", "jinja2.Environment", "jinja2.Template"}


def aligned(model: Transformer, prompts, gens) -> tuple[Aligned, Score]:
    a = align(model, prompts, [g.tokens for g in gens], [g.depths for g in gens])
    return a, score(model, a.ids, a.depths, a.prompt_lens)


def written(gens) -> list[tuple[list[int], list[int]]]:
    return [(g.tokens, g.depths) for g in gens]


# --- law 1: exits off = base model ------------------------------------------------------------
def test_fresh_attachment_changes_no_bit(family):
    """Catches: an adapter that starts non-zero, or a path for 'exits off' with other rounding."""
    model, ids = random_model(family), torch.tensor([PROMPTS[1], PROMPTS[1][::-1]])
    before = model(ids)
    attach(model, [1, 3], "mlp", lora=LoRAConfig(r=3, targets=TARGETS))
    assert torch.equal(model(ids), before)
    assert torch.equal(score(model, ids, torch.full_like(ids, 5), [3, 3]).logits, before)
    for training in (True, False):  # what is attached has the mode of the model
        attach(model.train(training), [1], lora=LoRAConfig())
        assert {m.training for m in [*adapters(model).values(), model.exits]} == {training}


def test_attach_train_detach_leaves_every_base_bit(family):
    """Catches: training that touches a base tensor, as_base or detach that leaves something on."""
    model, ids = random_model(family), torch.tensor([PROMPTS[1]])
    before, weights = model(ids), {n: p.clone() for n, p in model.named_parameters()}
    with_exits(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.1)
    out = score(model, ids, torch.tensor([[5, 5, 1, 2, 4, 5, 1]]), [2])
    (out.logits.square().mean() - out.exit_logprobs.sum()).backward()
    optimizer.step()
    assert not torch.equal(model(ids), before)
    model.cap = 2
    with as_base(model):
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
    model.exits.heads["1"].bias.data += 100  # this head would exit every token
    again = generate(model, PROMPTS, "full", 8, seed=1)
    assert [g.tokens for g in again] == [g.tokens for g in plain]
    assert all(set(g.depths) == {5} for g in again)


# --- law 2: one meaning -----------------------------------------------------------------------
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("policy", POLICIES)
def test_forward_rescores_what_generate_sampled(family, policy, cap):
    """Catches: an off-by-one between generation and training; keys made from the wrong residual."""
    model = with_exits(random_model(family), cap=cap)
    gens = generate(model, PROMPTS, policy, 7, 1.0, 2, Sampling(stop_ids=[0], batch_size=3))
    _, out = aligned(model, PROMPTS, gens)
    logp = out.logits.log_softmax(-1)
    for row, (prompt, g) in enumerate(zip(PROMPTS, gens)):
        at = torch.arange(len(g.tokens)) + len(prompt) - 1
        ours = logp[row, at, torch.tensor(g.tokens)]
        assert torch.allclose(ours, torch.tensor(g.token_logprobs), atol=1e-4)
        assert torch.allclose(out.exit_logprobs[row, at], torch.tensor(g.exit_logprobs), atol=1e-4)
        assert (out.exit_logprobs[row, : at[0]] == 0).all()
        assert (out.exit_logprobs[row, at[-1] + 1 :] == 0).all()
        assert 0 < min(g.depths) <= max(g.depths) <= model.deepest


@pytest.mark.parametrize("policy", ["head", "fixed:2"])
def test_rescoring_cheaply_gives_the_same(family, policy):
    """Catches: in a shared row, a response that sees its neighbour or padding; wrong positions."""
    model = with_exits(random_model(family))
    prompts = [PROMPTS[1]] * 3 + [PROMPTS[0]] * 3 + [PROMPTS[2][:1]] * 3
    gens = generate(model, prompts, policy, 6, 1.0, 0)
    responses = [Response(None, prompt, g, "", None) for prompt, g in zip(prompts, gens)]
    found = [aligned(model, prompts, gens), rescore(model, responses), rescore(model, responses, 3)]
    results = []
    for a, out in found:
        logits = out.logits.flatten(0, 1)[a.at].log_softmax(-1)
        logp = logits.gather(1, a.tokens[:, None]).squeeze(1) + out.exit_logprobs.flatten()[a.at]
        weight = torch.linspace(-1, 1, len(logp))
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad((weight * logp).sum(), parameters, allow_unused=True)
        results.append((logp, [0.0 if g is None else g for g in gradients]))
        deepest = torch.tensor([max(g.depths) for g in gens]).view(len(a.ids), -1).amax(1)
        first = a.depths[:, 0].tolist()[: len(a.ids) * 2 // 3]  # the last prompt is one token
        assert a is found[0][0] or first == deepest.tolist()[: len(first)]
    assert found[2][0].ids.numel() < found[1][0].ids.numel() == found[0][0].ids.numel()
    for logp, gradients in results[1:]:
        assert torch.allclose(logp, results[0][0], atol=1e-4)
        for g, h in zip(gradients, results[0][1]):
            assert torch.allclose(torch.as_tensor(g), torch.as_tensor(h), atol=1e-3)


# --- law 3: skipping is exact -----------------------------------------------------------------
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_packed_forward_equals_the_slow_reference(family, head):
    """Catches: a mask, rotation or key wrong only beside exited tokens; padding that leaks."""
    model = with_exits(random_model(family), head=head)
    rng, lengths = np.random.default_rng(0), [9, 4, 7]
    ids = pad([rng.integers(40, size=n).tolist() for n in lengths], model.device)
    depths = pad([rng.choice([1, 2, 4, 5], size=n).tolist() for n in lengths], model.device)
    with torch.no_grad():
        out = score(model, ids, depths, [1, 1, 1])
        for row, n in enumerate(lengths):
            one, path = ids[row, :n].tolist(), depths[row, :n].tolist()
            hidden = reference.hidden_states(model, one, path)
            assert torch.allclose(out.hidden[row, :n], hidden, atol=1e-4)
            expected = [reference.exit_logprob(model, one, path, t) for t in range(n)]
            assert torch.allclose(out.exit_logprobs[row, :n], torch.tensor(expected), atol=1e-4)
            logits = reference.logits_of(model, out.hidden[row, :n])
            assert torch.allclose(out.logits[row, :n], logits, atol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_generation_equals_the_slow_reference(family, fast):
    """Catches: debts paid late, twice, or to the wrong block; a first token that never exits."""
    model = with_exits(random_model(family))
    gens = generate(model, PROMPTS, "head", 7, 0, 5, Sampling(stop_ids=[0], fast=fast))
    assert len({g.depths[0] for g in gens}) > 1 and max(g.exit_logprobs[0] for g in gens) < 0
    assert any(len(set(g.depths)) > 2 for g in gens), "exits at several depths, or it shows nothing"
    with torch.no_grad():
        for row, (prompt, g) in enumerate(zip(PROMPTS, gens)):
            noise = np.random.default_rng([5, row]).random((7, 4), dtype=np.float32)
            assert reference.generate(model, prompt, 7, noise, [0]) == (g.tokens, g.depths)


@pytest.mark.parametrize("fast", [True, False])
def test_the_oracle_draws_from_the_targets(family, fast):
    """Catches: chances from readouts without the lens; of another depth; of another row."""
    model, exits = with_exits(random_model(family)), [1, 2, 4, 5]
    gens = generate(model, PROMPTS * 5, "kl:2", 1, 0, 5, Sampling(fast=fast, batch_size=2))
    for row, (prompt, g) in enumerate(zip(PROMPTS * 5, gens)):
        paths = [[5] * (len(prompt) - 1) + [d] for d in exits]
        ends = [reference.hidden_states(model, prompt, path)[-1] for path in paths]
        *early, last = reference.logits_of(model, torch.stack(ends)).log_softmax(-1)
        noise = np.random.default_rng([5, row]).random((1, 4), dtype=np.float32)[0, 1:]
        chances = [2 * torch.sigmoid(-2 * (last.exp() * (last - q)).sum()) for q in early]
        assert g.depths[0] == next((d for d, u, p in zip(exits, noise, chances) if u < p), 5)
    assert len({g.depths[0] for g in gens}) > 2


def test_a_token_that_exits_runs_no_later_block():
    """Catches: 'skipping' that computes and masks. Counts rows through the MLP of each block."""
    model, rows = with_exits(random_model("qwen2")), []
    plain = Sampling(stop_ids=[], fast=False)
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _m, x, _y: rows.append(x[0].shape[:-1].numel()))
    score(model, torch.tensor([PROMPTS[1]]), torch.tensor([[5, 1, 2, 4, 1, 5, 2]]), [1])
    assert rows == [7, 5, 3, 3, 2]
    rows.clear()
    generate(model, [PROMPTS[0]], "fixed:2", 4, settings=plain)
    assert rows == [2] * 5 + [1, 1] * 4
    rows.clear()
    gens = generate(model, PROMPTS, "head", 4, seed=5, settings=plain)
    steps = [[g.depths[i] for g in gens] for i in range(4)]
    assert min(map(min, steps)) < 5, "a token must exit, or this shows nothing"
    running = [sum(x > d for x in depths) for depths in steps for d in range(5)]
    assert rows[5:] == [n for n in running if n]


# --- law 4: a row does not feel its neighbours ------------------------------------------------
@pytest.mark.parametrize("policy", ["full", "head", "kl:1"])
@pytest.mark.parametrize("fast", [True, False])
def test_the_same_row_writes_the_same_text_in_any_batch(family, policy, fast):
    """Catches: shared noise, padding that is attended to, rows mixed up when others come and go."""
    model = with_exits(random_model(family))
    prompts = PROMPTS * 2  # equal prompts are prefilled once, and their rows differ
    stops = [0, 1, 2, 3, 4]
    together = generate(model, prompts, policy, 9, 1.0, 3, Sampling(stop_ids=stops, fast=fast))
    assert len({len(g.tokens) for g in together}) > 1, "rows must finish at different times"
    for size in (1, 3):
        settings = Sampling(stop_ids=stops, batch_size=size, fast=fast)
        assert written(generate(model, prompts, policy, 9, 1.0, 3, settings)) == written(together)
    alone = Sampling(stop_ids=stops, streams=[6], fast=fast)
    one = generate(model, prompts[6:7], policy, 9, 1.0, 3, alone)
    assert written(one) == written(together)[6:7]


@pytest.mark.parametrize("cap", [None, 3])
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "kl:1"])  # see _Decoder.run
def test_forced_tokens_are_read_as_if_they_had_been_drawn(family, policy, cap):
    """Catches: another depth, noise or place for tokens read together; text after the end token."""
    model, stops = with_exits(random_model(family), cap=cap), [0, 1, 2, 3]
    free = generate(model, PROMPTS * 2, policy, 9, 1.0, 3, Sampling(stop_ids=stops))
    given = [[*g.tokens, *[7] * 9][:n] for g, n in zip(free, [0, 2, 9, 1, 9, 3, 8, 4])]
    settings = Sampling(stop_ids=stops, forced=given, batch_size=3)
    again = generate(model, PROMPTS * 2, policy, 9, 1.0, 3, settings)
    assert written(again) == written(free)
    for a, b, n in zip(again, free, map(len, given)):
        assert a.finish == b.finish and not any(a.token_logprobs[:n])
        assert np.allclose(a.exit_logprobs, b.exit_logprobs, atol=1e-4)
        assert np.allclose(a.token_logprobs[n:], b.token_logprobs[n:], atol=1e-4)


# --- law 5: the sampled distribution is the trained one ---------------------------------------
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("cap", [None, 4])
def test_exit_frequencies_are_the_likelihoods(place, cap):
    """Catches: a floor in sampling; one noise for two heads; a cap that drops a share."""
    model = with_exits(random_model("qwen3"), cap=cap)
    for head, bias in zip(model.exits.heads.values(), (-3.0, -0.5, -1.0)):  # far below 0.1 too
        head.weight.data *= 0.05
        head.bias.data.fill_(bias)
    n, options, deepest = 4000, [1, 2, 4] if cap else [1, 2, 4, 5], model.deepest
    settings = Sampling(stop_ids=[], forced=[[7]] * n)  # the second is decoded
    gens = generate(model, [PROMPTS[0]] * n, "head", 2, 1.0, 0, settings)
    same = [g.depths[place] for g in gens if not place or g.depths[0] == deepest]
    ids = torch.tensor([PROMPTS[0] + [7] * place])
    z = score(model, ids, torch.full_like(ids, deepest), [3]).head_logits[0, -1]
    z = z.expand(len(options), -1)
    p = path_logprob(z, torch.tensor(options), options[:-1], deepest).exp().detach().numpy()
    assert abs(p.sum() - 1) < 1e-5 and 0.02 < p[0] < 0.08 and (p > 0.02).all()
    share = np.array([same.count(d) for d in options]) / len(same)
    assert (np.abs(share - p) < 4 * np.sqrt(p * (1 - p) / len(same))).all(), (share, p)


def test_token_frequencies_are_the_softmax():
    """Catches: an inverted distribution that is off by one token; top_p before top_k."""
    logits, n = torch.tensor([[2.0, 0.05, 0.7, 0.0, -30.0]]), 20000
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    cases = [(1.0, 1.0, 0, 5), (0.7, 1.0, 2, 2), (1.0, 0.7, 0, 2), (1.0, 0.85, 3, 2)]
    for temperature, top_p, top_k, keep in cases:  # of the last, top_k leaves .71, .19, .10
        tokens = sample(logits.softmax(-1).expand(n, -1), u, temperature, top_p, top_k)
        p = (logits[0] / temperature).softmax(-1)
        p = p.where(p >= p.sort(descending=True).values[keep - 1], 0.0)
        p = p / p.sum()
        share = torch.bincount(tokens, minlength=5) / n
        assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all(), (share, p)
    for temperature in (0, 1e-30):
        assert sample(logits.softmax(-1), torch.tensor([0.999]), temperature, 1.0, 0).item() == 0


@pytest.mark.parametrize("wrong", ["max_new_tokens", "top_k", "top_p", "batch_size", "temperature"])
def test_generate_refuses_values_out_of_range(wrong):
    """Catches: a value that generation would misread; an empty prompt, which has no readout."""
    for value in (-1, 2.5, float("nan")):
        named = {wrong: value} if wrong in ("max_new_tokens", "temperature") else {}
        settings = Sampling(**({} if named else {wrong: value}))
        if (wrong, value) != ("temperature", 2.5):
            with pytest.raises(UserError, match=wrong):
                generate(random_model("llama"), PROMPTS, settings=settings, **named)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(random_model("llama"), [[3], []])


# --- law 7: nothing is executed that was loaded -----------------------------------------------
def test_no_code_that_could_execute_what_it_loads():
    """Catches: pickle in any form, eval and exec, unsafe YAML, remote code, an open template."""
    for path in [*(ROOT / "nanoexit").glob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name.split(".")[0] for alias in node.names}
                names.add((getattr(node, "module", None) or "").split(".")[0])
                peer = path.name == "bench_hf.py"  # the one place that runs them, to compare
                assert not names & UNSAFE_IMPORTS or peer, (path, names)
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in UNSAFE_CALLS, (path, call)
                assert call != "yaml.load" or "Loader" in ast.unparse(node.args[1]), path
                assert "trust_remote_code" not in {k.arg for k in node.keywords}, path


# --- law 8: a cap is a bound ------------------------------------------------------------------
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fast", [True, False])
def test_noise_in_the_blocks_beyond_a_cap_changes_no_bit(family, policy, fast):
    """Catches: a prompt that is prefilled deeper than the cap; a policy that ignores it."""
    model, cap = with_exits(random_model(family)), 3
    settings = Sampling(stop_ids=[], fast=fast)
    ids, everything = torch.tensor([PROMPTS[1]]), []
    for noisy in (False, True):
        for beyond in [*model.blocks[cap:], model.exits.heads["4"]] if noisy else ():
            scramble(beyond.named_parameters(), 9)
        with capped(model, cap):
            gens = generate(model, PROMPTS, policy, 6, 1.0, 4, settings)
            logits = aligned(model, PROMPTS, gens)[1].logits
            everything.append((logits.tolist(), model(ids).tolist(), gens))
    assert everything[0] == everything[1]


@pytest.mark.parametrize("fast", [True, False])
def test_a_capped_model_is_a_model_of_that_many_blocks(family, fast):
    """Catches: a cap that differs from cutting the model. Blocks beyond it never run."""
    model, ran = random_model(family), []
    for depth, block in enumerate(model.blocks, start=1):
        block.mlp.register_forward_hook(lambda _m, _x, _y, depth=depth: ran.append(depth))
    attach(model, [], cap=2)
    capped_ids = [g.tokens for g in generate(model, PROMPTS, "full", 6, 0)]
    assert max(ran) == 2
    detach(model)
    del model.model.layers[2:]
    object.__setattr__(model.shape, "blocks", 2)
    short = generate(model, PROMPTS, "full", 6, 0, settings=Sampling(fast=fast))
    object.__setattr__(model.shape, "blocks", 5)
    assert capped_ids == [g.tokens for g in short]


# --- the same on the shipped model ------------------------------------------------------------
def test_laws_hold_on_the_tiny_reasoner(tiny):
    """Catches: what random weights cannot show, such as a law that needs rows of one length."""
    model = load_model(str(tiny))
    ids = torch.tensor([[0, 10, 18, 19, 4, 2, 7, 9]])
    before = model(ids)
    with_exits(model, layers=(1, 3, 6))
    prompts = [ids[0].tolist(), ids[0, :6].tolist()]
    gens = generate(model, prompts, "head", 8, seed=1)
    _, out = aligned(model, prompts, gens)
    for row, (prompt, g) in enumerate(zip(prompts, gens)):
        alone = generate(model, [prompt], "head", 8, seed=1)[0]
        assert row or (alone.tokens, alone.depths) == (g.tokens, g.depths)
        path = [8] * (len(prompt) - 1) + g.depths
        hidden = reference.hidden_states(model, prompt + g.tokens[:-1], path)
        assert torch.allclose(out.hidden[row, : len(hidden)], hidden, atol=2e-3, rtol=1e-4)
        at = torch.arange(len(g.tokens)) + len(prompt) - 1
        logp = out.logits[row].log_softmax(-1)[at, torch.tensor(g.tokens)]
        assert torch.allclose(logp, torch.tensor(g.token_logprobs), atol=1e-4)
    detach(model)
    assert torch.equal(model(ids), before)
