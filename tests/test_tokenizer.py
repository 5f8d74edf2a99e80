"""Ids, special tokens, templates and text pieces, on tokenizers made on the spot."""

import json
import random

import make_golden
import pytest
from make_golden import BOS, CHAT, LAYOUTS, PLAIN, TEXTS, byte_fallback, byte_level

from nanoexit.config import UserError
from nanoexit.tokenizer import TemplateProcess, Tokenizer, find_model

GOLDEN = json.loads((make_golden.GOLDEN / "tokenizers.json").read_text())
MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
PANIC = json.dumps({"version": "1.0", "model": MODEL | {"continuing_subword_prefix": "####"}})
POINTER = "version https://git-lfs.github.com/spec/v1\noid 0"
BROKEN = {"tokenizer.json": ["{", PANIC, None, POINTER]}
BROKEN["tokenizer_config.json"] = [
    "[1]", '{"eos_token": {"lstrip": false}}', '{"eos_token": {"content": 5}}',
    '{"added_tokens_decoder": {"x": {"content": "a"}}}', '{"added_tokens_decoder": [1]}',
    '{"chat_template": [{"name": "other", "template": "x"}]}', '{"extra_special_tokens": 5}',
    '{"chat_template": 5}', '{"chat_template": [{"name": "default"}]}',
]  # fmt: skip
HOSTILE = [
    "{{ messages.__class__.__mro__ }}", "{{ raise_exception.__globals__['json'] }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}", "{{ (''|attr('__class__')).__mro__ }}",
    "{{ lipsum.__globals__['os'].system('true') }}", "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", r"{{ raise_exception('no\x1b[31m') }}",
    "{{ messages.append(1) }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
    "{{ messages[7]['role'] }}", "{{ range(10**9) | list }}", "{{ 'x'|center(10**10) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ [0] * 10**9 }}", "{{ 'x' * 2**25 }}",
    r"{{ '\ud800' }}", "{% for %}",
]  # fmt: skip


def made(folder, tokenizer=None, **files) -> Tokenizer:
    files = {"config": {}, "tokenizer_config": PLAIN} | files
    return Tokenizer(make_golden.write_tokenizer(folder, tokenizer or byte_level(), files))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_read_as_transformers_reads_them(tmp_path, name):
    """Catches: a place of special tokens, a stored truncation, a flag or a template ignored."""
    ours = Tokenizer(make_golden.write_tokenizer(tmp_path, *LAYOUTS[name]))
    theirs = GOLDEN["layouts"][name]
    rows = [ours.encode(text) for text in TEXTS]
    assert rows == theirs["ids"]
    assert [ours.decode(row) for row in rows] == theirs["texts"]
    assert [ours.decode(row, skip_special=True) for row in rows] == theirs["words"]
    assert ours.stop_ids == {theirs["eos"]} and ours.has_template == bool(theirs["chats"])
    for chat, options in zip(theirs["chats"], [{}, {"enable_thinking": False}]):
        assert ours.render(CHAT, **options) == chat
        ids = ours.prompt_ids(CHAT[1]["content"], CHAT[0]["content"], **options)
        assert ids == ours.encode(chat)  # no second BOS
    if not ours.has_template:
        assert [ours.prompt_ids(text) for text in TEXTS] == theirs["prompts"]


@pytest.mark.parametrize("case", range(18))
def test_bos_as_transformers_puts_it(tmp_path, case):
    """Catches: tokenizer_config.json overruling the post-processor of tokenizer.json."""
    ours = Tokenizer(make_golden.write_bos(tmp_path, *BOS[case]))
    assert (ours.prompt_ids("he")[0] == make_golden.BOS_ID) == GOLDEN["bos"][case]


def test_the_golden_file_is_up_to_date():
    """Catches: golden files of another transformers, or of layouts that have since changed."""
    pytest.importorskip("transformers", minversion="5")
    assert json.loads(json.dumps(make_golden.transformers_tokenizers())) == GOLDEN


def test_plain_prompts(tmp_path):
    """Catches: a system text lost without a template; variables that nothing reads."""
    ours = made(tmp_path, byte_level(bos=True))
    assert ours.prompt_ids("x", "Be brief.") == [make_golden.BOS_ID, *ours.encode("Be brief.\n\nx")]
    with pytest.raises(UserError, match="no chat template"):
        ours.prompt_ids("x", enable_thinking=False)


def test_stop_ids(tmp_path):
    """Catches: generation_config.json or the tokenizer's end token ignored; an id out of range."""
    both = {"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": [5, 6]}}
    assert made(tmp_path / "a", **both).stop_ids == {5, 6, 261}  # six special tokens from 260 on
    assert made(tmp_path / "b", config={"eos_token_id": 3}).stop_ids == {3, 261}
    assert made(tmp_path / "c", tokenizer_config={}).stop_ids == frozenset()
    for eos in ("2", {"id": 2}, ["a"], 2.5, -1, 999, True, [None]):
        ours = made(tmp_path / "d", config={"eos_token_id": eos, "vocab_size": 266})
        with pytest.raises(UserError, match=r"config\.json: eos_token_id"):
            assert not ours.stop_ids
    more = {"config": {"vocab_size": 266}, "tokenizer_config": PLAIN | {"pad_token": "<more>"}}
    with pytest.raises(UserError, match=r"<more>.*266"):
        made(tmp_path / "e", **more)


@pytest.mark.parametrize("name, content", [(n, c) for n in BROKEN for c in BROKEN[n]])
def test_broken_files(tmp_path, name, content):
    """Catches: a traceback, even where the library panics; a default in place of a bad value."""
    folder = tmp_path / "snapshots" / "abc"
    made(folder)
    (folder / name).unlink(missing_ok=True)
    if content is None:
        (folder / name).symlink_to(tmp_path / "blobs" / "gone")
    else:
        (folder / name).write_text(content)
    words = {"{": "not a tokenizer", PANIC: "not a tokenizer", None: "incomplete snapshot"}
    with pytest.raises(UserError, match=words.get(content, "token|git-lfs pointer")):
        Tokenizer(folder)


@pytest.mark.parametrize("template", [*HOSTILE, "{{" + "[" * 20000])
def test_a_hostile_or_broken_template(tmp_path, template):
    """Catches: a foreign template that reaches Python, fills memory, or ends in a traceback."""
    with pytest.raises(UserError, match="the chat template failed") as caught:
        config = PLAIN | {"chat_template": template}
        assert "built-in" not in made(tmp_path, tokenizer_config=config).render(CHAT)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("work", ["", "{{ ('%' ~ messages[0] ~ '000000000d')|format(1) }}"])
def test_templates_are_stopped_and_started_again(work):
    """Catches: a template that never ends; a process that stays dead, or keeps what was set."""
    loop = "{% for a in range(99999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    template = f"{{% if messages %}}{work or loop}{{% endif %}}{{{{ x }}}}{{% set x = 1 %}}"
    process = TemplateProcess(template, "here", seconds=0.3)
    with pytest.raises(UserError, match=r"stopped after 0\.3 s"):
        process.render([1], {}, {})
    assert process.render([], {}, {}) == process.render([], {}, {}) == ""


def test_variables_of_templates():
    """Catches: a misspelled variable that silently changes nothing."""
    process = TemplateProcess("{{ enable_thinking }}{{ bos_token }}", "here")
    given = {"enable_thinking": [1], "bos_token": "B"}
    assert process.render(CHAT, {"bos_token": "A"}, given) == "[1]B"
    for wrong in ({"enable_thinkin": 1}, {"messages": []}):
        with pytest.raises(UserError, match=r"read '(enable_thinkin|messages)': expected"):
            process.render(CHAT, {}, wrong)


def test_the_environment_is_not_there(monkeypatch):
    """Catches: a secret of the environment within reach of a template's process."""
    monkeypatch.setenv("HF_TOKEN", "planted")
    process = TemplateProcess("x", "here")
    process.render([], {}, {})
    environment = make_golden.Path(f"/proc/{process.process.pid}/environ")
    assert not environment.exists() or b"planted" not in environment.read_bytes()


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()])
def test_pieces_join_to_the_text(tmp_path, tokenizer):
    """Catches: a character split over tokens that is shown broken, twice, late or not at all."""
    ours, draw = made(tmp_path, tokenizer), random.Random(0)
    texts = ["hello wow", "naïve — 你好 👩‍🚀🎉🎉!", "he\n\tll</s>", "", "\ufffd ok \ufffd"]
    rows = [ours.encode(text) for text in texts]
    assert [ours.decode(row) for row in rows] == texts
    assert all(len(piece) < 5 for row in rows for piece in ours.pieces(row))
    rows += [[draw.randrange(275) for _ in range(draw.randrange(1, 25))] for _ in range(300)]
    for row in rows:
        pieces = ours.pieces(row)
        assert len(pieces) == len(row) and "".join(pieces) == ours.decode(row)


def test_texts_and_names_that_cannot_be(tmp_path):
    """Catches: a traceback for bytes that are not text; a revision silently ignored."""
    with pytest.raises(UserError, match="surrogate"):
        made(tmp_path).encode("a\udcff")
    for name, revision in (("no/such/folder", None), ("/no", None), (str(tmp_path), "v1")):
        with pytest.raises(UserError, match="not an id on the hub"):
            find_model(name, revision)
