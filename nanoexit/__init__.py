"""nanoexit: early exits for transformers, so that language models write their reasoning down.

The modules in order; each imports only from those before it:
    config                              knobs, errors, files
    cache, model, lora, exits, score    residuals at any depth; adapters, heads, policies, caps
    fast, generate                      decoding, plain and fused
    tokenizer, weights, adapters        text and files of public models
    tasks, judge                        prompts, and what a good answer is
    training, teacher, sft, reinforce   the training loops
    faithfulness, evaluate              the measurements
    figures, report                     the report page"""

from nanoexit.adapters import load_adapter, save_adapter
from nanoexit.config import LoRAConfig, UserError
from nanoexit.exits import attach, detach
from nanoexit.generate import Generation, Sampling, generate
from nanoexit.model import Transformer
from nanoexit.score import Score, score
from nanoexit.tokenizer import Tokenizer, load_tokenizer
from nanoexit.weights import load_model
