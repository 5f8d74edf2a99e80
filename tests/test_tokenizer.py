"""Chat templates, special tokens and text pieces, on tokenizers made on the spot."""

import datetime
import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from nanoexit.config import ROOT
from nanoexit.errors import UserError
from nanoexit.tokenizer import Tokenizer, stop_ids

HUB = ROOT.parent / "shared" / "hub"
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
LLAMA3 = ("{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + "
          "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
          "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 2 < 3 & \"é\"? "}]


def make(folder: Path, tokenizer_config: dict | None = None, adds_bos: bool = False, **files: dict) -> Tokenizer:
    """A byte-level tokenizer: 256 bytes, a few merges, special tokens. `files`: other JSON files of the folder, by stem."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("Ã", "©")]
    vocab = {c: i for i, c in enumerate(letters + [a + b for a, b in merges])}
    t = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens(SPECIAL)
    if adds_bos:
        t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", t.token_to_id("<s>"))])
    folder.mkdir(parents=True, exist_ok=True)
    t.save(str(folder / "tokenizer.json"))
    for name, content in {"tokenizer_config": tokenizer_config or {}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Tokenizer(folder)


def render(folder: Path, template: str, **more) -> str:
    return make(folder, {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}).render(CHAT, **more)


# --- templates -------------------------------------------------------------------------------------------------------

EXPECTED = {
    CHATML: '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n 2 < 3 & "é"? <|im_end|>\n<|im_start|>assistant\n',
    LLAMA3: '<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n'
            '2 < 3 & "é"?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
    "{%- for m in messages %}\n  {%- if m.role == 'system' %}{% continue %}{% endif %}\n  {{ m.content | tojson }}\n{% break %}{% endfor %}\n":
        '  " 2 < 3 & \\"é\\"? "\n',
    "{{ strftime_now('%Y') }}": str(datetime.date.today().year),
    "{% if tools %}tools{% endif %}{% if tools is defined and tools is not none %}more{% endif %}{{ bos_token }}{{ eos_token }}": "<s></s>",
    "{% generation %}x{% endgeneration %}": "x",
    "{{ {'a': [1]} | tojson(indent=2) }}": '{\n  "a": [\n    1\n  ]\n}',
}


@pytest.mark.parametrize("template", EXPECTED)
def test_templates_in_the_wild(tmp_path, template):
    """Bug: a helper, block trimming, or escaping differs from what template writers rely on."""
    assert render(tmp_path, template) == EXPECTED[template]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, *list(EXPECTED)[2:3]])
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_equal_transformers(tmp_path, template, prompt):
    """Bug: a rendering of ours that is not the one the model was trained on."""
    transformers = pytest.importorskip("transformers")
    ours = render(tmp_path, template, add_generation_prompt=prompt)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    assert ours == theirs.apply_chat_template(CHAT, chat_template=template, tokenize=False, add_generation_prompt=prompt)


@pytest.mark.skipif(not HUB.is_dir(), reason="the public tokenizer files are not here")
def test_deepseek_template(tmp_path):
    """Bug: the distill's template gets no BOS, two, or no <think>; its bos_token is an object."""
    config = json.loads((HUB / "deepseek-ai" / "DeepSeek-R1-Distill-Qwen-1.5B" / "tokenizer_config.json").read_text())
    want = "<｜begin▁of▁sentence｜>Be brief.<｜User｜> 2 < 3 & \"é\"? <｜Assistant｜><think>\n"
    assert make(tmp_path, config).render(CHAT) == want
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=config["bos_token"]["content"])
    assert theirs.apply_chat_template(CHAT, chat_template=config["chat_template"], tokenize=False, add_generation_prompt=True) == want


def test_where_a_template_stands(tmp_path):
    """Bug: one of the three places is not read, or the file does not win."""
    assert make(tmp_path / "a", {"chat_template": "string"}).render(CHAT) == "string"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert make(tmp_path / "b", {"chat_template": named}).render(CHAT) == "plain"
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "chat_template.jinja").write_text("file")
    assert make(tmp_path / "c", {"chat_template": "string"}).render(CHAT) == "file"
    with pytest.raises(UserError, match="tool_use"):
        make(tmp_path / "d", {"chat_template": named[:1]})


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__ }}", "{{ raise_exception.__globals__['json'] }}",
    "{{ strftime_now.__globals__ }}", "{{ cycler.__init__.__globals__.os.system('true') }}", "{{ self.__init__.__globals__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}", "{{ messages.append(1) }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
    "{{ '{0.__class__.__mro__[0].__subclasses__}'.format('').upper() }}", "{{ raise_exception('no') }}", "{{ messages[7]['role'] }}",
    "{{ 1 / 0 }}", "{{ range(10**9) | list }}", "{% for %}", "{{ 'x' + 1 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
])
def test_a_hostile_or_broken_template(tmp_path, template):
    """Bug: a template from a stranger reaches Python's insides, or fails in a traceback."""
    with pytest.raises(UserError, match="chat template") as caught:
        text = render(tmp_path, template)
        assert "__subclasses__" not in text and "built-in" not in text.lower(), text
        if text == "":  # rendered to nothing: what it reached for was not there
            raise UserError("chat template: nothing came of it")
    assert "\n" not in " ".join(str(caught.value).split())


@pytest.mark.parametrize("template", [5, {"default": "x"}, [1], [{"name": "default"}]])
def test_a_template_of_another_kind(tmp_path, template):
    """Bug: chat_template that is no text ends in a traceback."""
    with pytest.raises(UserError, match="chat_template"):
        make(tmp_path, {"chat_template": template})


# --- prompts and stops -----------------------------------------------------------------------------------------------


def test_one_bos(tmp_path):
    """Bug: the template's BOS and the tokenizer's own both stand before the prompt."""
    tok = make(tmp_path, {"chat_template": LLAMA3, "bos_token": "<s>", "add_bos_token": True}, adds_bos=True)
    assert tok.prompt_ids("hello").count(tok.bos_id) == 1
    assert tok.prompt_ids("hello")[0] == tok.bos_id


@pytest.mark.parametrize("said, own, begins", [(True, False, True), (False, True, False), (None, True, True), (None, False, False)])
def test_a_plain_prompt_begins_as_told(tmp_path, said, own, begins):
    """Bug: without a template, BOS is put or left out against the model's word."""
    config = {"bos_token": "<s>"} | ({} if said is None else {"add_bos_token": said})
    tok = make(tmp_path, config, adds_bos=own)
    assert not tok.has_template
    assert tok.prompt_ids("hello") == ([tok.bos_id] if begins else []) + tok.encode("hello")
    assert tok.decode(tok.prompt_ids("hello", "Be brief."), skip_special=True) == "Be brief.\n\nhello"


def test_stop_ids(tmp_path):
    """Bug: a list, generation_config.json, or an end token written as an object is passed over."""
    eos = {"__type": "AddedToken", "content": "</s>"}
    tok = make(tmp_path, {"eos_token": eos}, config={"eos_token_id": 3}, generation_config={"eos_token_id": [5, 6]})
    own = tok._tokenizer.token_to_id("</s>")
    assert stop_ids(tmp_path) == {5, 6} and tok.stop_ids == {5, 6, own}
    tok = make(tmp_path, {"eos_token": "</s>"}, config={"eos_token_id": 3}, generation_config={})
    assert stop_ids(tmp_path) == {3} and tok.stop_ids == {3, own}
    assert make(tmp_path / "none").stop_ids == frozenset()


@pytest.mark.parametrize("eos", ["2", {"id": 2}, ["a"], 2.5])
def test_stop_ids_of_another_kind(tmp_path, eos):
    """Bug: an end token id that is no number is taken, and no text ever ends."""
    make(tmp_path, config={"eos_token_id": eos})
    with pytest.raises(UserError, match="eos_token_id"):
        stop_ids(tmp_path)


@pytest.mark.parametrize("name, content", [("tokenizer.json", "{"), ("tokenizer.json", None), ("tokenizer_config.json", "[1]"), ("tokenizer_config.json", "{")])
def test_broken_files(tmp_path, name, content):
    """Bug: a missing or broken file ends in a traceback."""
    make(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name):
        Tokenizer(tmp_path)


# --- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hello wow", "é", "naïve café — 你好 👩‍🚀!", "<s>he\n\tll</s>", "", "🎉🎉", "\ufffd ok \ufffd"])
def test_pieces_join_to_the_text(tmp_path, text):
    """Bug: a character split over tokens is shown broken, twice or not at all."""
    tok = make(tmp_path)
    ids = tok.encode(text)
    pieces = tok.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tok.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_of_any_ids(tmp_path):
    """Bug: bytes that form no character, as a model may well sample them, lose or double text."""
    tok, draw = make(tmp_path), random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(260 + len(SPECIAL)) for _ in range(draw.randrange(1, 25))]
        pieces = tok.pieces(ids)
        assert len(pieces) == len(ids) and "".join(pieces) == tok.decode(ids)


@pytest.mark.skipif(not HUB.is_dir(), reason="the real tokenizer is not here")
def test_pieces_of_a_real_tokenizer():
    """Bug: the same for a tokenizer of the sentencepiece kind, whose decoder strips the first space."""
    tok = Tokenizer(HUB / "raincandy-u" / "TinyStories-656K")
    ids = tok.encode("Once upon a time, there was a café. She said: \"Hello!\"\n\nThe end.")
    assert "".join(tok.pieces(ids)) == tok.decode(ids)
