"""The obvious implementation: token by token, head by head, nothing batched, nothing cached.
It is slow, but a glance should show that it is right. Laws 2 and 3: the fast path must equal it."""

import math

import torch

from nanoexit.model import rope_frequencies


def norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def turn(x, position, frequencies):
    """RoPE of one head's vector x, as complex numbers: pair (i, i + half) turns by its angle."""
    half = len(x) // 2
    turned = torch.complex(x[:half], x[half:]) * torch.exp(1j * position * frequencies)
    return torch.cat([turned.real, turned.imag])


def linear(module, x):
    y = module.weight @ x
    if module.bias is not None:
        y = y + module.bias
    if module.adapter is not None and module.adapter.enabled:
        y = y + module.adapter.scale * (module.adapter.lora_B @ (module.adapter.lora_A @ x))
    return y


def unit(h):
    return h / torch.sqrt((h * h).mean() + torch.finfo(torch.float32).eps)


def affine(linear, x):
    return x + linear.weight @ x + linear.bias


def hidden_states(model, ids, depths, lenses=True):
    """ids, depths: one row, lists of T ints -> [T, D]: what each token is read out from at its own
    depth, or, without lenses, its residual there."""
    s, frequencies = model.shape, rope_frequencies(model.shape, torch.device("cpu"))
    keys = [[] for _ in range(s.blocks)]  # keys[l][t][k]: kv head k of token t in block l
    values, ends = [[] for _ in range(s.blocks)], []
    for t, (token, depth) in enumerate(zip(ids, depths)):
        h = model.model.embed_tokens.weight[token]
        layers = model.exits.layers if model.exits else []
        for l, block in enumerate(model.blocks):
            if l == depth:
                ends.append(h)
            if depth < l and l in layers[1:]:
                h = affine(model.exits.shortcuts[str(l)], unit(h))
            attention = block.self_attn
            x = norm(h, block.input_layernorm.weight, s.norm_eps)
            k = linear(attention.k_proj, x).view(s.kv_heads, s.head_dim)
            v = linear(attention.v_proj, x).view(s.kv_heads, s.head_dim)
            if s.qk_norm:
                k = torch.stack([norm(head, attention.k_norm.weight, s.norm_eps) for head in k])
            keys[l].append([turn(head, t, frequencies) for head in k])
            values[l].append(list(v))
            if l >= depth:
                continue  # frozen: it leaves keys and values, and runs nothing else
            q = linear(attention.q_proj, x).view(s.heads, s.head_dim)
            outputs = []
            for i, head in enumerate(q):
                group = i // (s.heads // s.kv_heads)
                head = norm(head, attention.q_norm.weight, s.norm_eps) if s.qk_norm else head
                head = turn(head, t, frequencies)
                scores = torch.stack([head @ past[group] for past in keys[l]])
                weights = torch.softmax(scores / math.sqrt(s.head_dim), 0)
                outputs.append(sum(w * past[group] for w, past in zip(weights, values[l])))
            h = h + linear(attention.o_proj, torch.cat(outputs))
            x = norm(h, block.post_attention_layernorm.weight, s.norm_eps)
            gate, up = linear(block.mlp.gate_proj, x), linear(block.mlp.up_proj, x)
            h = h + linear(block.mlp.down_proj, gate * torch.sigmoid(gate) * up)
        if depth == model.full_depth:
            ends.append(h)
        if lenses and depth in layers:
            ends[-1] = affine(model.exits.lenses[str(depth)], unit(ends[-1]))
    return torch.stack(ends)


def logits_of(model, h):
    """[..., D] -> [..., V]."""
    head = model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    last, eps = model.model.norm.weight, model.shape.norm_eps
    return torch.stack([head @ norm(row, last, eps) for row in h])


def exit_logprob(model, ids, depths, t):
    """log p(token t exits at depths[t]): its heads asked one after the other."""
    total = 0.0
    for d in model.exits.layers:
        if d > depths[t]:
            break
        x = unit(hidden_states(model, ids[: t + 1], depths[:t] + [d], lenses=False)[t])
        p = torch.sigmoid(model.exits.heads[str(d)](x).squeeze())
        total += torch.log(p if d == depths[t] else 1 - p)
    return float(total)


def generate(model, prompt, max_new_tokens, noise, stop_ids):
    """Greedy tokens, exits drawn with noise [max_new_tokens, 1 + E]; reruns all for each head."""
    tokens, depths = [], []
    before = [model.full_depth] * (len(prompt) - 1)
    while True:
        row, depth = [*prompt, *tokens], model.full_depth
        for e, d in enumerate(model.exits.layers):
            x = unit(hidden_states(model, row, [*before, *depths, d], lenses=False)[-1])
            if noise[len(tokens), 1 + e] < torch.sigmoid(model.exits.heads[str(d)](x).squeeze()):
                depth = d
                break
        depths.append(depth)
        token = int(logits_of(model, hidden_states(model, row, [*before, *depths])[-1:]).argmax())
        tokens.append(token)
        if token in stop_ids or len(tokens) == max_new_tokens:
            return tokens, depths
