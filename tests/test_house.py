"""House rules: the order of imports, the size of the package, its functions, its English."""

import ast
import io
import re
import tokenize

import pytest

from nanoexit.config import ROOT

ORDER = ["config", "cache", "model", "lora", "exits", "score", "fast", "generate"]
ORDER += ["tokenizer", "weights", "adapters", "tasks", "judge", "training", "teacher", "sft"]
ORDER += ["reinforce", "faithfulness", "evaluate", "figures", "report", "__init__"]
EVENING = ["cache", "model", "lora", "exits", "score", "generate", "teacher", "sft", "reinforce"]
LIMITS = {"lines": 5200, "tokens": 44000, "modules": 22, "evening": 1900, "function": 45}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
NO_CODE |= {tokenize.ENCODING, tokenize.ENDMARKER}
FILES = {path.stem: path for path in (ROOT / "nanoexit").glob("*.py")}
TRANSLATED = r"""who owes|nobody|somebody|everyone|forced out|let out|lets? everything out|rubbish|
how-manieth|lies? in\b|as free as ever|rests on|\btold\b|what is told"""


def source(name: str) -> str:
    return FILES[name].read_text(encoding="utf-8")


def test_a_module_imports_only_from_those_before_it():
    """Catches: a cycle, even one hidden in a function; a module that ORDER lacks."""
    assert sorted(ORDER) == sorted(FILES)
    for name in FILES:
        for node in ast.walk(ast.parse(source(name))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nanoexit"):
                asked = [node.module.partition(".")[2]] if "." in node.module else []
                asked += [alias.name for alias in node.names if not asked]
            elif isinstance(node, ast.Import):
                asked = [a.name.partition(".")[2] for a in node.names if a.name[:9] == "nanoexit."]
            else:
                continue
            late = [other for other in asked if ORDER.index(other) >= ORDER.index(name)]
            assert not late, f"{name} imports {late}"


def count_tokens(text: str) -> int:
    """Tokens but for comments and blank lines. An f-string is one, as it was before Python 3.12."""
    count = inside = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        inside += (kind == "FSTRING_START") - (kind == "FSTRING_END")
        count += token.type not in NO_CODE and not inside
    return count


def test_the_house_keeps_its_limits():
    """Catches: a package too large to read in an evening; a function that does too much."""
    text = {name: source(name) for name in FILES}
    lines = {name: t.count("\n") for name, t in text.items()}
    tokens = sum(map(count_tokens, text.values()))
    assert len(FILES) <= LIMITS["modules"]
    assert sum(lines.values()) <= LIMITS["lines"] and tokens <= LIMITS["tokens"]
    assert 60 + sum(lines[name] for name in EVENING) <= LIMITS["evening"]  # 60: of config.py
    assert all(len(line) <= 100 for t in text.values() for line in t.splitlines())
    for name, t in text.items():
        for node in ast.walk(ast.parse(t)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= LIMITS["function"], f"{name}.{node.name} has {length} lines"


def test_tests_use_no_more_lines_than_the_package():
    """Catches: tests that outgrow what they test."""
    tests = sum(p.read_text().count("\n") for p in (ROOT / "tests").glob("*.py"))
    assert tests <= sum(source(name).count("\n") for name in FILES)


@pytest.mark.parametrize("name", sorted(FILES))
def test_public_functions_have_types_and_docstrings(name):
    """Catches: a public function without types, or that does not say what it does."""
    tree = ast.parse(source(name))
    assert ast.get_docstring(tree), f"{name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [*node.args.args, *node.args.kwonlyargs]
            assert node.returns and all(a.annotation for a in arguments), f"{name}.{node.name}"
            short = (node.end_lineno or 0) - node.body[0].lineno < 4
            assert ast.get_docstring(node) or short, f"{name}.{node.name} has no docstring"


def test_the_prose_reads_as_written():
    """Catches: turns of phrase that read as if translated. make_prompts.py has users' phrases."""
    pattern = re.compile(TRANSLATED.replace("\n", ""), re.IGNORECASE)
    scripts = {*(ROOT / "scripts").glob("*.py")} - {ROOT / "scripts/make_prompts.py"}
    for path in [*(ROOT / "nanoexit").glob("*.*"), *scripts, ROOT / "README.md"]:
        found = pattern.findall(path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found}"
