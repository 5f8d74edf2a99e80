"""Makes tests/golden/*.json: results of transformers 5 and peft, for tests that run without them.

    python tests/make_golden.py        (needs both; kept for the record, not part of the suite)

Logits for each of CONFIGS; in tokenizers.json ids and texts for each of LAYOUTS and 18 ways to say
whether a text begins with BOS; in peft.json adapters of every form. Weights come from numpy's PCG64
by name and seed, and are the same on every machine, so only results are stored."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"vocab_size": 32, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SMALL |= {"rms_norm_eps": 1e-5, "hidden_act": "silu"}
ROWS = torch.from_numpy(np.random.default_rng(7).integers(0, SMALL["vocab_size"], (1, 64)))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 32
LLAMA = {"model_type": "llama", "rope_theta": 10000.0, "tie_word_embeddings": False}
QWEN2 = {"model_type": "qwen2", "rope_theta": 1000000.0, "use_sliding_window": False}
QWEN3 = {"model_type": "qwen3", "rope_theta": 1000000.0, "head_dim": 10}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
CONFIGS = {
    "llama": LLAMA,
    "llama3-rope": LLAMA | {"rope_theta": 500.0, "rope_scaling": LLAMA3} | TIED,
    "llama-biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "qwen2-tied": QWEN2 | TIED,
    "qwen2-untied": QWEN2 | {"rope_theta": 1e4, "sliding_window": 16} | UNTIED,
    "qwen3": QWEN3 | UNTIED,
}
Q, V = "model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.v_proj"
ONE, TWO = {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {  # options of peft.LoraConfig
    "plain": TWO, "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.(q|v)_proj"}, "full names": {"target_modules": [Q, V]},
    "endings": {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    "ranks": TWO | {"rank_pattern": {"v_proj": 2, Q: 3}},
    "alphas": ONE | {"alpha_pattern": {"^model.layers.1.*": 1, "q_proj": 3}},
    "dropout": ONE | {"lora_dropout": 0.3, "lora_alpha": 7.5},
    "rslora": ONE | {"use_rslora": True}, "orthogonal": ONE | {"init_lora_weights": "orthogonal"},
}  # fmt: skip


def weights(shapes: dict, seed: int) -> dict[str, np.ndarray]:
    """A random value for every tensor, by sorted name; norms around 1."""
    rng = np.random.default_rng(seed)
    values = {name: rng.standard_normal(shapes[name]) * 0.2 for name in sorted(shapes)}
    return {n: (v + ("norm" in n)).astype(np.float32) for n, v in values.items()}


def fill(parameters: dict, seed: int) -> dict[str, list[int]]:
    """Give parameters the weights above, by their names -> the shape of each."""
    values = weights({n: tuple(p.shape) for n, p in parameters.items()}, seed)
    for name, p in parameters.items():
        p.data = torch.from_numpy(values[name])
    return {name: list(value.shape) for name, value in values.items()}


def transformers_model(config: dict, seed: int):
    """AutoModelForCausalLM with the weights above."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SMALL, **config))
    fill(dict(model.named_parameters()), seed)
    return model.float().eval()


def logits_of(model) -> list[list[float]]:
    """To six digits."""
    return [[round(x, 6) for x in row] for row in model(ROWS).logits[0].tolist()]


SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "<pad>"]
CHATML = (
    "{%- if tools is not none %}TOOLS{% endif %}{%- for m in messages %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}<think>{% endif %}{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% set text = m['role'] + ':' + m['content'] | trim %}\n"
    "{{ text }}{{ eos_token }}{% generation %}{% set x = 1 %}y{% endgeneration %}{% endfor %}"
    "{% for m in messages %}\n  {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
    "  {{ m | tojson(indent=2) }}{{ x is defined }}\n{% break %}{% endfor %}\n"
    "{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ pad_token }}"
    "{{ strftime_now('%Y') | length }}{{ documents is none }}{{ dict(a=1).items() | list }}"
)
PLAIN = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS = PLAIN | {"eos_token": "<|im_end|>", "chat_template": CHATML}
BOS_ID = 260  # in `byte_level`
TEXTS = ["he said: hello  world", "<s>é日😀</s>", "<|im_start|> wow\n<think>x<|im_end|>", " a ", ""]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ' 2 < 3 & "é"? '}]


def byte_level(special=SPECIAL, bos=False) -> Tokenizer:
    """256 bytes, a few merges, special tokens; `bos`: with a post-processor that adds <s>."""
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("Ã", "©")]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(letters + [a + b for a, b in merges])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return finished(made, special, bos)


def byte_fallback(special=SPECIAL[:2], bos=False) -> Tokenizer:
    """As in Llama 2: spaces become ▁, and text outside the vocabulary becomes bytes."""
    pieces = ["<unk>", *special, *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {p: i for i, p in enumerate([*pieces, *"▁adehlorswx:", "▁h", "ll"])}
    merges = [("▁", "h"), ("l", "l")]
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return finished(made, special, bos)


def unigram() -> Tokenizer:
    pieces = ["<unk>", *SPECIAL[:2], "▁", "▁he", "llo", *"adehlorswx:▁éw"]
    scores = [(piece, -float(i)) for i, piece in enumerate(dict.fromkeys(pieces))]
    made = Tokenizer(models.Unigram(scores, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return finished(made, SPECIAL[:2], False)


def finished(made: Tokenizer, special, bos: bool) -> Tokenizer:
    made.add_special_tokens(list(special))
    if bos:
        ids = [("<s>", made.token_to_id("<s>"))]
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    return made


def layout(made: Tokenizer, config: dict, **files) -> tuple[Tokenizer, dict]:
    return made, {"tokenizer_config": config, **files}


def token(content: str, **flags) -> dict:
    off = dict.fromkeys(["lstrip", "rstrip", "normalized", "single_word"], False)
    return off | {"content": content, "special": True} | flags


DECLARED = {str(260 + i): token(text, lstrip=i == 1) for i, text in enumerate(SPECIAL)}
OBJECTS = {"bos_token": token("<s>", __type="AddedToken"), "pad_token": "<pad>"}
OBJECTS["eos_token"] = token("<|im_end|>", __type="AddedToken")
NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": CHATML}]
EXTRA = PLAIN | {"extra_special_tokens": {"think_token": "<think>"}, "sep_token": "<sep>"}
EXTRA["chat_template"] = "{{ think_token }}{{ messages[-1].content | tojson }}{{ sep_token }}"
MAP = PLAIN | {"additional_special_tokens": SPECIAL[2:5]}
LESS = PLAIN | {"additional_special_tokens": ["<|im_end|>"]}
FEW, CUT = byte_level(SPECIAL[:2]), byte_level()
CUT.enable_truncation(max_length=4)
CUT.enable_padding(length=40, pad_id=0)
LAYOUTS = {  # name -> tokenizer.json, and the other files of the folder
    "all in tokenizer.json": layout(byte_level(bos=True), TURNS),
    "added_tokens_decoder alone": layout(FEW, TURNS | {"added_tokens_decoder": DECLARED}),
    "map alone": layout(byte_level([]), {"chat_template": LLAMA3_CHAT}, special_tokens_map=MAP),
    "objects and named templates": layout(byte_level(), OBJECTS | {"chat_template": NAMED}),
    "template in a file": layout(FEW, LESS, chat_template=CHATML),
    "truncation and padding": layout(CUT, TURNS),
    "byte fallback": layout(byte_fallback(bos=True), PLAIN | {"add_bos_token": False}),
    "unigram": layout(unigram(), PLAIN | {"unk_token": "<unk>"}),
    "extra tokens by name": layout(FEW, EXTRA),
    "special tokens as text": layout(byte_level(), TURNS | {"split_special_tokens": True}),
}
CLASSES = ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer"]
BOS = [(said, c, own) for said in (None, True, False) for c in CLASSES for own in (True, False)]


def write_tokenizer(folder: Path, made: Tokenizer, files: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    for name, value in {"config": {"model_type": "llama"}, **files}.items():
        kind, text = ("jinja", value) if isinstance(value, str) else ("json", json.dumps(value))
        (folder / f"{name}.{kind}").write_text(text, encoding="utf-8")
    return folder


def write_bos(folder: Path, said: bool | None, kind: str, own: bool) -> Path:
    config = PLAIN | {"tokenizer_class": kind} | ({} if said is None else {"add_bos_token": said})
    return write_tokenizer(folder, byte_level(bos=own), {"tokenizer_config": config})


def transformers_tokenizers() -> dict:
    from transformers import AutoTokenizer

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for i, (name, (made, files)) in enumerate(LAYOUTS.items()):
            t = AutoTokenizer.from_pretrained(write_tokenizer(Path(scratch) / str(i), made, files))
            ids = [t.encode(text, add_special_tokens=False) for text in TEXTS]
            row = {"ids": ids, "prompts": [*map(t.encode, TEXTS)], "texts": [*map(t.decode, ids)]}
            row |= {"words": [t.decode(some, skip_special_tokens=True) for some in ids]}
            ask = {"tokenize": False, "add_generation_prompt": True}
            asks = [ask] if t.chat_template else []
            asks += [ask | {"enable_thinking": False}] * ("enable_thinking" in str(t.chat_template))
            chats = [t.apply_chat_template(CHAT, **options) for options in asks]
            found[name] = row | {"eos": t.eos_token_id, "bos": t.bos_token_id, "chats": chats}
        folders = [write_bos(Path(scratch) / f"bos{i}", *case) for i, case in enumerate(BOS)]
        bos = [AutoTokenizer.from_pretrained(f).encode("he")[0] == BOS_ID for f in folders]
    return {"layouts": found, "bos": bos}


def peft_adapter(options: dict, folder: Path):
    """An adapter whose tensors have values by name, saved by peft; and the model with it."""
    import peft

    base = transformers_model(CONFIGS["qwen2-tied"], 3)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 16} | options))
    lora = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    shapes = fill(lora, 1)
    model.eval().save_pretrained(folder)
    return model, shapes


def write_adapter(folder: Path, golden: dict) -> Path:
    """The same without peft, from what is stored in peft.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(golden["config"]))
    save_file(weights(golden["shapes"], 1), folder / "adapter_model.safetensors")
    return folder


def peft_goldens() -> dict:
    found = {}
    for name, options in ADAPTERS.items():
        with tempfile.TemporaryDirectory() as folder:
            model, shapes = peft_adapter(options, Path(folder))
            config = json.loads((Path(folder) / "adapter_config.json").read_text())
        kept = {"peft_type", "r", "lora_alpha", "bias", "target_modules"} | {*options}
        config = {k: v for k, v in config.items() if k in kept}
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()  # peft writes a set
        found[name] = {"config": config, "shapes": shapes, "logits": logits_of(model)[-2:]}
    return found


def main() -> None:
    found = {"tokenizers": transformers_tokenizers(), "peft": peft_goldens()}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        logits = logits_of(transformers_model(config, seed))
        found[name] = {"config": {**SMALL, **config}, "seed": seed, "logits": logits}
    for name, content in found.items():
        (GOLDEN / f"{name}.json").write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
