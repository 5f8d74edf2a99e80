"""The memory that plan.py predicts, against a step's peak as the profiler counts allocations."""

import itertools

import pytest
from conftest import TINY, script
from plan import memory
from torch.profiler import ProfilerActivity, profile

from nanoexit import sft, training
from nanoexit.config import load_config
from nanoexit.teacher import Trace


def peak(work) -> int:
    """The most bytes that were allocated at once by work(), above those at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("chunk", [16, 512])
def test_a_plan_is_within_15_percent_of_the_peak(chunk):
    """Catches: a plan that omits a part that takes memory, or counts one twice."""
    overrides = [f"model.logits_chunk={chunk}", "data.count=8"]
    overrides += ["sft.micro_batch=64", "sft.batch_size=128", "teacher.keep_mb=0", "sft.broad=0"]
    config = load_config(TINY, overrides)
    plan = memory(config, processes=2)
    model, tokenizer = training.load_student(config)
    prompts = training.load_prompts(config, "train")
    longest = max((training.prompt_ids(tokenizer, p, config) for p in prompts), key=len)
    for head in model.exits.heads.values():
        head.bias.data.fill_(-30)  # no token exits
    written = [5] * config.generation.max_new_tokens
    traces = [Trace("", "", "", longest, written, "length")] * 64
    teacher = sft.Teacher(model, traces, config)
    optimizer = training.make_optimizer(model, 1e-3)

    def step() -> None:
        sft.step_losses(model, teacher, range(64), config, 0)
        training.clip_and_step(optimizer, 1e-3)

    step()
    expected = plan["activations"] + plan["logits chunk"] + plan["adapters and their gradients"] / 2
    assert peak(step) == pytest.approx(expected, rel=0.15)
    assert plan["base"] == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    moments = [v.nbytes for state in optimizer.state.values() for v in state.values() if v.dim()]
    assert plan["moments"] == sum(moments)
    bare = load_config(TINY, [*overrides, "lora.targets=[]", "exits.shortcuts=true"])
    assert memory(bare, processes=2)["activations"] > 0.4 * plan["activations"], "of shortcuts"


def test_a_plan_that_cannot_be_made():
    """Catches: a traceback for a config or model that is not there, or a plan of half a config."""
    missing = [TINY, "model.name=none/such/folder"], "'none/such/folder': no such folder"
    for arguments, says in ((["nope.yaml"], "config nope.yaml: no such file"), missing):
        done = script("plan", *arguments)
        assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ") and says in done.stderr
