"""REINFORCE: the student writes, is rewarded for right answers and charged for depth.

The student writes K rollouts per prompt, with tokens and exits both sampled. With R the reward of a
rollout and b the mean reward of the *other* rollouts of its prompt (leave-one-out: Kool et al.
2019, Ahmadian et al. 2024), the update follows

    mean over rollouts of (R - b) * grad [ sum_t log p(token_t) + log p(exit_t) ],

an unbiased estimate of the gradient of the expected reward (with kl_weight, of all but the direct
gradient of the KL, since R counts as a number). R has four parts, each logged:

    1 if the answer is verified     - kl_weight * mean KL(teacher || student) per token
    - depth_weight * depth / L      - length_weight * tokens

where depth is the maximum (the opaque serial depth), mean or sum over the response's tokens. The
likelihood must be that of the samples, so any temperature but 1 and any truncation are refused.

Where depth is free, exits drift later and gain nothing. So the loss adds exit_kl_weight * KL(heads
|| heads before REINFORCE), summed over the heads reached that now exit less. Exiting more is free.

Simpler than GRPO and PPO: 1. one step per batch, so no ratio and no clipping; 2. advantages are not
divided by their standard deviation; 3. no value network; 4. the KL of tokens is in the reward."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanoexit import training
from nanoexit.adapters import save_adapter
from nanoexit.config import Config, RLConfig
from nanoexit.exits import delay_kl
from nanoexit.model import Transformer
from nanoexit.score import batches, readout_logprobs
from nanoexit.tasks import Prompt, Response, load_prompts
from nanoexit.teacher import against_base, rescore, respond, show_response
from nanoexit.tokenizer import Tokenizer

LONGEST_ROW = 1024  # the most tokens of a prompt's rollouts that share a row


@dataclass
class Rollout:
    """One response, its reward by parts, and its advantage over the prompt's other rollouts."""

    response: Response
    parts: dict[str, float]  # weighted: they add up to the reward
    advantage: float

    @property
    def reward(self) -> float:
        return sum(self.parts.values())


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards [groups, K] -> advantages: each reward minus the mean of the others in its group."""
    K = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (K / (K - 1))


def reward_parts(response: Response, kl: float, rl: RLConfig, full_depth: int) -> dict[str, float]:
    """What each part adds to the reward. kl: mean nats per token."""
    depths = response.generation.depths
    costs = {"max": max(depths), "mean": sum(depths) / len(depths), "sum": sum(depths)}
    return {
        "verify": float(response.verdict.correct),
        "kl": -rl.kl_weight * kl,
        "depth": -rl.depth_weight * costs[rl.depth_penalty] / full_depth,  # in units of L
        "length": -rl.length_weight * len(depths),
    }


def collect(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], config: Config, step: int
) -> list[Rollout]:
    """rl.rollouts responses to each of this process's prompts; a prompt's rollouts are adjacent."""
    rl, K = config.rl, config.rl.rollouts
    places = training.mine(range(len(prompts)))  # noise depends on a prompt's place in the step
    streams = [place * K + k for place in places for k in range(K)]
    asked = [prompts[stream // K] for stream in streams]
    policy = "full" if model.exits is None else "head"
    seed = training.stream("rollouts", config.run.seed, step)
    rows: Any = {"batch_size": len(asked), "streams": streams}
    responses = respond(model, tokenizer, asked, config, policy, seed, **rows)
    kls = [0.0] * len(responses)
    if rl.kl_weight:
        kls, _ = against_base(model, responses, rl.micro_batch)
    parts = [reward_parts(r, kl, rl, model.full_depth) for r, kl in zip(responses, kls)]
    rewards = torch.tensor([sum(p.values()) for p in parts], dtype=torch.float64).view(-1, K)
    advantages = leave_one_out(rewards).flatten().tolist()
    return [Rollout(*row) for row in zip(responses, parts, advantages)]


def copy_trained(model: Transformer) -> Transformer:
    """A copy with its own heads and adapters. Shares base weights, leaves out fast.py's layouts."""
    shared: Any = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared | {id(model.fast_products): {}})


def accumulate(
    model: Transformer, rollouts: Sequence[Rollout], rl: RLConfig, start: Transformer | None = None
) -> Tensor:
    """Backward through the mean over a step's rollouts, a micro-batch at a time. Short rollouts of
    a prompt share one row, which holds it once; attention makes long rows too expensive for that.
    start: the model before REINFORCE, for exit_kl_weight. -> the mean KL from its heads, or 0."""
    K, count, held = rl.rollouts, rl.prompts * rl.rollouts, torch.zeros((), device=model.device)
    active = [r for group in ([rollouts] if start else unequal(rollouts, K)) for r in group]
    longest = max((len(r.response.generation.tokens) for r in active), default=0)
    together = K if K * longest <= LONGEST_ROW else 1
    size = max(1, rl.micro_batch // together) * together
    for batch in batches(active, size):
        responses = [r.response for r in batch]
        a, scored = rescore(model, responses, together)
        weight = torch.tensor([r.advantage for r in batch], device=model.device)[a.rows]
        some = weight != 0  # a group of equal rewards needs no readout
        h = scored.hidden.flatten(0, 1)[a.at[some]]
        logp = scored.exit_logprobs.flatten()[a.at]  # [n]: of the exit, then of token and exit
        logp = logp.masked_scatter(some, logp[some] + readout_logprobs(model, h, a.tokens[some]))
        loss = -(weight * logp).sum() / count
        if start:
            with torch.no_grad():
                before = rescore(start, responses, together)[1].head_logits
            kl = delay_kl(scored.head_logits, before).flatten(0, 1)[a.at].sum() / count
            loss, held = loss + rl.exit_kl_weight * kl, held + kl.detach()
        loss.backward()
    return held


def unequal(rollouts: Sequence[Rollout], K: int) -> list[Sequence[Rollout]]:
    """The K adjacent rollouts of each prompt, without prompts whose rewards are all equal."""
    return [g for g in batches(rollouts, K) if max(abs(r.advantage) for r in g) >= 1e-12]


def step_figures(rollouts: Sequence[Rollout], config: Config) -> dict[str, float]:
    """Means over a step's rollouts in all processes: reward, its parts, accuracy, depth, text."""
    rows = []
    for r in rollouts:
        depths, verdict = r.response.generation.depths, r.response.verdict
        row = {"reward": r.reward, "accuracy": float(verdict.correct)}
        row |= {"mean_depth": sum(depths) / len(depths), "max_depth": max(depths)}
        row |= {"written": verdict.written or 0.0, "tokens": len(depths)}
        rows.append(row | {f"reward_{name}": part for name, part in r.parts.items()})
    K = config.rl.rollouts
    flat = len(rollouts) // K - len(unequal(rollouts, K))
    sums = torch.tensor([[*row.values(), 1.0] for row in rows]).sum(0)
    *means, count, flat = training.total(torch.cat((sums, torch.tensor([flat])))).tolist()
    return {name: value / count for name, value in zip(rows[0], means)} | {"flat_groups": flat}


def run_reinforce(model: Transformer, tokenizer: Tokenizer, config: Config, folder: Path) -> None:
    """The whole job, from folder/checkpoint on: pick prompts, roll out, update, log, save."""
    rl, seed = config.rl, config.run.seed
    prompts = load_prompts(config, "train")
    start = copy_trained(model) if rl.exit_kl_weight else None
    optimizer = training.make_optimizer(model, rl.lr)
    done = training.load_checkpoint(folder, model, optimizer)
    metrics = training.Metrics(folder / "metrics.jsonl", done)
    samples = training.StepLog(folder / "samples.jsonl", done)
    with training.progress(rl.steps, "REINFORCE", "step", done) as bar:
        for step in range(done, rl.steps):
            chosen = [prompts[i] for i in training.batch_at(step, len(prompts), rl.prompts, seed)]
            rollouts = collect(model, tokenizer, chosen, config, step)
            held = accumulate(model, rollouts, rl, start)
            row = step_figures(rollouts, config)
            if start:
                row["exit_kl"] = training.total(held).item()
            norm = training.clip_and_step(optimizer, rl.lr * training.cosine_share(step, rl.steps))
            metrics.write(step + 1, **row, grad_norm=norm)
            if training.is_main():
                r = rollouts[0]
                line = show_response(model, tokenizer, r.response, "rollout")
                samples.write(step + 1, **line, rewards=r.parts | {"total": r.reward})
            shown = {n: f"{row[n]:.2f}" for n in ("reward", "accuracy", "max_depth", "written")}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if training.is_main() and ((step + 1) % rl.save_every == 0 or step + 1 == rl.steps):
                training.save_checkpoint(folder, step + 1, model, optimizer)
    if training.is_main():
        save_adapter(model, folder / "adapter")
    training.barrier()
