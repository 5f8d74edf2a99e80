"""REINFORCE: the student writes, is rewarded for right answers and charged for depth, and does more of what paid.

K rollouts a prompt, tokens and exits both sampled from the student itself. With R a rollout's reward and b the mean reward of
the *other* rollouts of its prompt (leave-one-out: Kool et al. 2019, Ahmadian et al. 2024), the update follows

    mean over rollouts of (R - b) * grad [ sum_t log p(token_t) + log p(exit_t) ],

an unbiased estimate of the gradient of the expected reward. R, each part logged:

    verify_weight * verified (+ lenient_weight where only the lenient reading is right)
    - kl_weight * mean KL(student || teacher) per token       - depth_weight * depth / L
    - length_weight * tokens                                    (depth: mean, max or sum over the positions that chose)

What is in the likelihood is what was sampled: temperature 1, nothing truncated, no floor; anything else is refused.

Simplified against GRPO and PPO: 1. no reference model in the loss, the KL is a part of the reward; 2. one step a batch, so no
ratio and no clipping unless asked for; 3. advantages are not divided by their spread unless asked for; 4. no value network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanoexit.config import Config, RLConfig
from nanoexit.data import load_prompts, read_jsonl, write_json_lines
from nanoexit.errors import UserError
from nanoexit.exits import Head, Policy
from nanoexit.model import Transformer
from nanoexit.responses import Response, against_teacher, readout_places, rescore, respond, show_response
from nanoexit.score import readout_logprobs
from nanoexit.tasks import Prompt
from nanoexit.tokenizer import Tokenizer
from nanoexit.training import Metrics, batch_at, is_main, load_checkpoint, make_optimizer, mine, rank, save_checkpoint, seed_of, totals, trained, update


@dataclass
class Rollout:
    """One response, what it earned, and how much better that was than its prompt's other rollouts did."""

    response: Response
    parts: dict[str, float]  # weighted: they add up to the reward
    advantage: float = 0.0

    @property
    def reward(self) -> float:
        return sum(self.parts.values())


# --- pure functions --------------------------------------------------------------------------------------------------


def leave_one_out(rewards: Tensor, normalize_std: bool = False) -> Tensor:
    """Rewards [groups, K] -> advantages: each less the mean of the others; optionally over the group's standard deviation."""
    K = rewards.shape[1]
    advantages = (rewards - rewards.mean(1, keepdim=True)) * (K / (K - 1))
    return advantages / (rewards.std(1, keepdim=True) + 1e-6) if normalize_std else advantages


def depth_cost(depths: Sequence[int], penalty: str, full_depth: int) -> float:
    """Depths of the positions that chose -> their mean, max or sum in units of L."""
    return {"mean": sum(depths) / len(depths), "max": max(depths), "sum": sum(depths)}[penalty] / full_depth


def reward_parts(response: Response, kl: float, rl: RLConfig, full_depth: int, prompt_chose: bool) -> dict[str, float]:
    """What each part adds to the reward. kl: mean nats a token. Where the prompt samples its exits, its depth is charged too."""
    v = response.verdict
    depths = response.depths + (response.generation.prompt_depths if prompt_chose else [])
    return {"verify": rl.verify_weight * v.correct + rl.lenient_weight * (v.lenient and not v.correct),
            "kl": -rl.kl_weight * kl,
            "depth": -rl.depth_weight * depth_cost(depths, rl.depth_penalty, full_depth),
            "length": -rl.length_weight * len(response.generation.tokens)}


def surrogate(logp: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """[n] each -> what is maximized, [n]. Without clipping its gradient is advantage * grad logp; with it, PPO's minimum."""
    if not clip:
        return advantage * logp
    ratio = (logp - old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def refuse_off_policy(config: Config, policy: Policy) -> None:
    """The gradient is only right for samples of the model's own distribution."""
    g = config.generation
    for key, value, wanted in (("temperature", g.temperature, 1.0), ("top_p", g.top_p, 1.0), ("top_k", g.top_k, 0)):
        if value != wanted:
            raise UserError(f"generation.{key} is {value}, but REINFORCE samples from the model's own distribution: expected {wanted}")
    if not isinstance(policy, Head) or policy.threshold is not None or policy.floor:
        raise UserError("REINFORCE samples the exit heads as they are: policy head, without threshold or floor")
    if config.rl.epochs > 1 and not config.rl.clip:
        raise UserError(f"rl.epochs is {config.rl.epochs}: more than one step on a batch needs rl.clip above 0")


# --- a step ----------------------------------------------------------------------------------------------------------


def collect(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt], config: Config, seed: Sequence[int]) -> list[Rollout]:
    """rl.rollouts responses a prompt, rewarded, with advantages; a prompt's rollouts stand side by side."""
    rl, K = config.rl, config.rl.rollouts
    responses = respond(model, tokenizer, [p for p in prompts for _ in range(K)], config, "full" if model.exits is None else "head", seed)
    kls = against_teacher(model, responses, rl.micro_batch, config.sft.chunk)[0] if rl.kl_weight else [0.0] * len(responses)
    prompt_chose = config.exits.prompt == "head"
    rollouts = [Rollout(r, reward_parts(r, kl, rl, model.full_depth, prompt_chose)) for r, kl in zip(responses, kls)]
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64).view(-1, K)
    for rollout, advantage in zip(rollouts, leave_one_out(rewards, rl.normalize_std).flatten().tolist()):
        rollout.advantage = advantage
    return rollouts


def accumulate(model: Transformer, rollouts: Sequence[Rollout], config: Config, count: int) -> None:
    """Backward through the mean over `count` rollouts, a micro-batch at a time. Rollouts without advantage teach nothing."""
    active = [r for r in rollouts if abs(r.advantage) > 1e-12]
    for start in range(0, len(active), config.rl.micro_batch):
        batch = active[start : start + config.rl.micro_batch]
        logp, old, rows = action_logprobs(model, [r.response for r in batch], config)
        advantage = torch.tensor([r.advantage for r in batch], dtype=torch.float32, device=logp.device)[rows]
        (-surrogate(logp, old, advantage, config.rl.clip).sum() / count).backward()


def action_logprobs(model: Transformer, responses: Sequence[Response], config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """-> log p of what was sampled at each position (its exit and the token read out there) [n], the same as it was when it was
    sampled [n], and the row of each [n]. Exits of the prompt, where it sampled them, count at their own positions."""
    prompt_chose = config.exits.prompt == "head"
    scored = rescore(model, responses, prompt_chose)
    width, device = scored.hidden.shape[1], model.device
    at = readout_places(responses, width, device)
    tokens = torch.tensor([t for r in responses for t in r.generation.tokens], device=device)
    logp = scored.exit_logprobs.flatten().index_add(0, at, readout_logprobs(model, scored.hidden.flatten(0, 1)[at], tokens, config.sft.chunk))
    old = [r.generation.prompt_exit_logprobs + r.generation.exit_logprobs[1:] for r in responses]
    old = torch.tensor([x + [0.0] * (width - len(x)) for x in old], device=device).flatten()
    old = old.index_add(0, at, torch.tensor([p for r in responses for p in r.generation.token_logprobs], device=device))
    acted = (torch.arange(width * len(responses), device=device) if prompt_chose else at)
    acted = acted[scored.depths.flatten()[acted] > 0]
    return logp[acted], old[acted], acted.div(width, rounding_mode="floor")


# --- the loop --------------------------------------------------------------------------------------------------------


def train(model: Transformer, tokenizer: Tokenizer, config: Config, folder: Path) -> None:
    """The loop: draw prompts, roll out, reward, update, log, save. Goes on from folder/checkpoint where there is one."""
    rl = config.rl
    refuse_off_policy(config, Head())
    prompts = load_prompts(config.data, "train", config.data.count, config.run.seed)
    optimizer = make_optimizer([(list(trained(model).values()), rl.lr)])
    done = load_checkpoint(folder, model, optimizer)
    metrics, samples = Metrics(folder, done, config), _kept_samples(folder, done)
    on_policy = changed(config, evaluate=changed(config.evaluate, batch_size=rl.prompts * rl.rollouts))
    with tqdm(total=rl.steps, initial=done, desc="REINFORCE", unit="step", disable=not is_main(), dynamic_ncols=True) as bar:
        for step in range(done, rl.steps):
            chosen = mine([prompts[i] for i in batch_at(step, len(prompts), rl.prompts, config.run.seed)])
            model.eval()
            rollouts = collect(model, tokenizer, chosen, on_policy, [config.run.seed, 6, step, rank()])
            torch.manual_seed(seed_of(config.run.seed, step))
            for _ in range(rl.epochs):
                accumulate(model, rollouts, config, rl.prompts * rl.rollouts)
                norm = update(optimizer, rl.grad_clip)
            row = figures(rollouts, config, model.full_depth)
            metrics.write(step + 1, **row, grad_norm=norm)
            samples += [{**show_response(model, tokenizer, r.response, "rollout"), "step": step + 1, "rewards": {**r.parts, "total": r.reward}}
                        for r in rollouts[: rl.keep_samples]] if is_main() else []
            bar.set_postfix_str(f"reward {row['reward']:.2f} right {row['accuracy']:.2f} depth {row['mean_depth']:.2f} "
                                f"written {row['written']:.2f} tokens {row['tokens']:.1f}", refresh=False)
            bar.update()
            if is_main() and ((step + 1) % rl.save_every == 0 or step + 1 == rl.steps):
                write_json_lines(folder / "samples.jsonl", samples)
                save_checkpoint(folder, step + 1, model, optimizer)


def figures(rollouts: Sequence[Rollout], config: Config, full_depth: int) -> dict[str, float]:
    """Means over a step's rollouts (over all processes): the reward and its parts, accuracy, depth, written share, tokens."""
    responses = [r.response for r in rollouts]
    expected = [r.verdict.expected_steps for r in responses]
    groups = torch.tensor([r.advantage for r in rollouts]).view(-1, config.rl.rollouts)
    columns = {"reward": [r.reward for r in rollouts], **{f"reward_{part}": [r.parts[part] for r in rollouts] for part in rollouts[0].parts},
               "accuracy": [r.verdict.correct for r in responses], "mean_depth": [sum(r.depths) / len(r.depths) for r in responses],
               "written": [sum(r.verdict.steps) / n if n else 0.0 for r, n in zip(responses, expected)],
               "tokens": [len(r.generation.tokens) for r in responses]}
    flat = float((groups.abs().amax(1) < 1e-12).sum())
    *sums, count, flat = totals([*map(sum, columns.values()), len(rollouts), flat], torch.device("cpu"))
    return {**{name: value / count for name, value in zip(columns, sums)}, "flat_groups": flat}


def _kept_samples(folder: Path, done: int) -> list[dict]:
    path = folder / "samples.jsonl"
    return [row for _, row in read_jsonl(path) if row.get("step", 0) <= done] if done and path.is_file() else []
