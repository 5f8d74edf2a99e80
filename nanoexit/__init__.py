"""nanoexit: early exits for Llama- and Qwen-style transformers, so that models write their reasoning down.

The house, floor by floor (a module imports only from floors before its own):

    errors, config                      what a user says, and how mistakes are told
    model, cache                        tokens to residuals, at any depth
    lora, exits, score, generate        adapters, exit heads and policies; one meaning for sampling and for scoring
    tasks, data, hub, tokenizer, weights, adapters    prompts and answers, traces, files
    training, teacher, sft, evaluate, reinforce    the work
    rubric, judge, colors, figures, report      what people look at
"""

from nanoexit.adapters import load_adapter, save_adapter
from nanoexit.config import LoRAConfig
from nanoexit.exits import attach, detach
from nanoexit.generate import Generation, generate
from nanoexit.model import Transformer
from nanoexit.score import Score, score
from nanoexit.tokenizer import Tokenizer, load_tokenizer
from nanoexit.weights import load_model

__all__ = ["Generation", "LoRAConfig", "Score", "Tokenizer", "Transformer", "attach", "detach", "generate", "load_adapter",
           "load_model", "load_tokenizer", "save_adapter", "score"]
