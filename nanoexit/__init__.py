"""nanoexit: early exits for Llama- and Qwen-style transformers, so that models write their reasoning down.

The modules in order; each imports only from those before it (tests/test_house.py):

    config                              knobs, errors, files
    cache, model, lora, exits, score    tokens to residuals at any depth; adapters, heads, policies
    fast, generate                      decoding, plain and fused
    tokenizer, weights, adapters        text and files of public models
    tasks                               prompts, and what a right answer is
    training, teacher, sft, reinforce   the work
    judge, faithfulness, evaluate       what came of it
    figures, report                     the page
"""

from nanoexit.config import LoRAConfig
from nanoexit.exits import attach, detach
from nanoexit.generate import Generation, Sampling, generate
from nanoexit.model import Transformer
from nanoexit.score import Score, score

__all__ = ["Generation", "LoRAConfig", "Sampling", "Score", "Transformer", "attach", "detach", "generate", "score"]
