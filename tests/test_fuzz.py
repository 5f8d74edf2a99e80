"""Whatever a file or a text holds, it is accepted, or refused with one line.
100 examples per test, 3,000 with --hypothesis-profile=long."""

import copy
import json
import math
import re
from functools import reduce
from operator import getitem

import make_golden
import pytest
from conftest import random_model, with_exits
from test_judge import BARE, SCORES
from test_report import STORY, example, places, response
from test_weights import IDS, load, new_config, tensors_of, write

from nanoexit import adapters, config, exits, judge, report, tasks, teacher, training
from nanoexit.config import UserError
from nanoexit.tokenizer import TemplateProcess, Tokenizer
from nanoexit.weights import read_shape

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies
ODD = [None, True, -1, 0, 1, 2.5, 2**64, 10**400, 1e-320, 1e308, math.nan, math.inf, "", "x", "7"]
ODD += ["\0", "\ud83d", "\x1b[2J\u2028", "é" * 300, "~x/y", [], {}, [[]], {"x": 1}, {"x": [1]}]
SCALARS = st.sampled_from(ODD) | st.integers() | st.floats() | st.text()
VALUES = st.recursive(SCALARS, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=5)
JINJA = "{{ }} {% %} {# if for in endif endfor set x messages m [0] ['content'] range(9) ( ) | . ~"
JINJA += " join list + * == not none 'a' '\ud83d' 10**9 ** format() macro f() endmacro generation"
STARTED = [TemplateProcess("", "here", seconds=0.5)]
MODEL = with_exits(random_model("llama"))
NUMBERS = st.floats(0, 9) | st.integers(-1, 6) | st.sampled_from(["inf", "nan", "x"]) | st.floats()
TREE = config.asdict(config.Config())
RUN = example()
ROW = {"prompt": "5 +1 *3 =", "answer": "#### 8", "system": "s", "id": "a", "checker": "gsm8k"}
JSON = {"config/c.yaml": {name: TREE[name] for name in ("data", "exits")}, "prompts/a.jsonl": ROW}
JSON["run/t.jsonl"] = teacher.Trace("a", "5 +1", "6", [3, 4], [6, 1], "stop").__dict__
JSON["run/samples.jsonl"] = response("p", "student", 1, STORY[:2]) | {"step": 3}
JSON |= {"run/metrics.jsonl": RUN.metrics[0], "run/evaluation.json": {"rows": RUN.rows}}
OTHERS = ["model/config.json", "model/model.safetensors", "text/config.json", "text/tokenizer.json"]
OTHERS += ["text/tokenizer_config.json", "text/special_tokens_map.json"]
OTHERS += ["adapter/adapter_config.json", "adapter/nanoexit.json"]
SHAPE = new_config("llama") | {"layer_types": ["full_attention"] * 5}
WORDS = [f"\n{section}: {{{key}: " for section in TREE for key in TREE[section]]
WORDS += ["<<: *a", "&a ", "*a", "!!set ", '!!int ""', "!!bool x", "2020-01-01", "1e-3"]
WORDS += ["prompt,answer\n", '{"prompt": "a", ', '"answer": ', "#### "]
HAND = [a * n + "1" + b * n for a, b in ("[]", ('{"x": ', "}")) for n in (480, 1000, 10_000)]
HAND += [f'{{"x": {"7" * 5000}}}', "x" * 10**5, "[" + "1," * 10**4, "\0" * 99, "\ud83d", "{1: 2}"]
HAND += ['{"run": {"seed": 1, "seed": 2}}', f'{{"run": {{"seed": {2**64}}}}}', '["\\ud83d\\0"]']
HAND += ['{"run": {"dir": "\\u0000"}}', '{"data": {"template": {"x": [1]}}}', '{"step": "x"}']


@st.composite
def documents(draw, value):
    """JSON of `value` with values replaced or removed; sometimes with bytes inserted or cut out."""
    found = copy.deepcopy(value)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        *path, key = draw(st.sampled_from(places(found)[1:] or [("x",)]))
        reduce(getitem, path, found)[key] = copy.deepcopy(draw(VALUES))
        if isinstance(key, str) and draw(st.integers(0, 5)) == 0:
            del reduce(getitem, path, found)[key]
    data = json.dumps(found).encode()
    start, length = draw(st.integers(0, len(data))), draw(st.sampled_from([0, 1, 9, len(data)]))
    cut = data[:start] + draw(st.binary(max_size=4)) + data[start + length :]
    return draw(st.sampled_from([data, data, data, cut]))


def words(*own):
    """Texts made of these words and of the punctuation of file formats."""
    signs = ["\0", "\ufeff", "é", *'{}[]:,"\\\n\r7; -|&*!']
    return st.lists(st.sampled_from([*own, *own, *signs])).map("".join)


def outcome(call, *arguments):
    """What a call returns; None where it refuses with one line."""
    try:
        return call(*arguments)
    except UserError as error:
        assert re.fullmatch(r"[^\0-\x1f\x7f-\x9f]{1,4999}", str(error)), error


@given(st.sampled_from([*exits.POLICIES, "x"]), st.sampled_from("::: "), NUMBERS)
def test_policies(name, colon, number):
    """Catches: a threshold that is not a number; a depth that the model does not have."""
    policy = outcome(exits.parse_policy, name.partition(":")[0] + colon + str(number), MODEL)
    if policy is not None:
        assert {*policy.layers(MODEL)} <= {*range(1, 5)} and math.isfinite(policy.value or 0)


@given(words("</think>", BARE, BARE, '"clarity"', "1e999", "NaN", "9" * 5000, "\ud83d"))
def test_replies_of_a_judge(text):
    """Catches: a traceback, or another verdict than the one that the reply holds."""
    assert (outcome(judge.parse_scores, text) or [SCORES])[0] == SCORES


@given(st.lists(st.sampled_from(JINJA.split()), max_size=12).map(" ".join), st.booleans())
def test_templates(text, expression):
    """Catches: an error of another kind; a process that never answers again."""
    template = TemplateProcess(f"{{{{ {text} }}}}" if expression else text, "here", seconds=0.5)
    template.process = STARTED.pop().process
    STARTED.append(template)
    assert isinstance(outcome(template.render, make_golden.CHAT, {}, {}), str | None)


def use(folder):
    """Read what is in a folder, as a script does, and use it."""
    if folder.name == "config":
        found = config.load_config(folder / "c.yaml")
        config.write_text(folder.parent / "again.yaml", config.to_yaml(found))
        assert config.load_config(folder.parent / "again.yaml") == found
        training.check(found)
    elif folder.name == "prompts":
        (folder.parent / "a.csv").write_bytes((folder / "a.jsonl").read_bytes())
        for path in (folder.parent / "a.csv", folder / "a.jsonl"):
            data = config.DataConfig(prompts=str(path))
            prompts = outcome(tasks.read_prompts, config.Config(data=data))
            assert all(prompt.prompt.strip() for prompt in prompts or [])
    elif folder.name == "adapter":
        model = random_model("llama")
        adapters.load_adapter(model, folder)
        assert model(IDS).isfinite().all()
    elif folder.name == "text":
        tokenizer = Tokenizer(folder)
        tokenizer.has_template = False
        ids = tokenizer.prompt_ids("he said </s> é")
        assert "".join(tokenizer.pieces(ids)) == tokenizer.decode(ids)
        assert min(tokenizer.stop_ids, default=0) >= 0
    elif folder.name == "run":
        traces = teacher.read_traces(folder / "t.jsonl", [tasks.Prompt("a", "5 +1")], vocab=40)
        assert all(i in range(40) for trace in traces for i in trace.prompt_ids + trace.tokens)
        training.lines_until(folder / "samples.jsonl", 3)
        report.write_page(folder.parent / "report.html", [report.read_run(folder)])
    else:
        shape = read_shape(folder)
        assert shape.heads % shape.kv_heads == 0 == shape.head_dim % 2 < shape.head_dim
        load(folder)


@pytest.mark.parametrize("name", [*JSON, *OTHERS])
def test_files(tmp_path, name):
    """Catches: a file that was edited, cut or made by another tool, misread or not refused."""
    for path, value in JSON.items():
        config.write_json_lines(tmp_path / path, [value])
    write(tmp_path / "model", SHAPE, tensors_of(random_model("llama")))
    adapters.save_adapter(MODEL, tmp_path / "adapter")
    files = {"tokenizer_config": make_golden.TURNS, "special_tokens_map": make_golden.PLAIN}
    make_golden.write_tokenizer(tmp_path / "text", make_golden.byte_level(), files)
    path, whole = tmp_path / name, (tmp_path / name).read_bytes()
    start = 8 if path.suffix == ".safetensors" else 0  # there, the length of its header
    end = start + int.from_bytes(whole[:start], "little") or len(whole)
    own = words(*WORDS) if name in ("config/c.yaml", "prompts/a.jsonl") else st.nothing()

    @given(documents(json.loads(whole[start:end])) | own.map(str.encode))
    def read(data):
        path.write_bytes(len(data).to_bytes(8, "little")[:start] + data + whole[end:])
        outcome(use, path.parent)

    read()
    for text in HAND:
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        outcome(use, path.parent)
