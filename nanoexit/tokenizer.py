"""Text to token ids and back: tokenizer.json, the chat template in a sandbox, and the tokens that end a text.

Contract. `prompt_ids` is how every part of the project turns a prompt into ids: through the model's chat template where it has
one, else the plain prompt; never two BOS. Templates come from strangers: they run in jinja2's immutable sandbox, with the
helpers that templates in the wild use and nothing else.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from nanoexit.errors import UserError
from nanoexit.hub import find_model


class Tokenizer:
    """The tokenizer of one model folder. Raises UserError where its files are missing or broken."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{folder}: no tokenizer.json; a model in the older sentencepiece format has to be converted first")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise UserError(f"{path} is not a tokenizer: {error}") from None
        self._config = read_json(folder / "tokenizer_config.json")
        self._bos, self._eos = (_content(self._config.get(key)) for key in ("bos_token", "eos_token"))
        template = _template(folder, self._config)
        self.has_template = template is not None
        self._template = _compile(template, folder) if template is not None else None

    @property
    def bos_id(self) -> int | None:
        return None if self._bos is None else self._tokenizer.token_to_id(self._bos)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a text: of generation_config.json, config.json, and the tokenizer's own end token."""
        own = None if self._eos is None else self._tokenizer.token_to_id(self._eos)
        return stop_ids(self.folder) | ({own} if own is not None else set())

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Special tokens written in the text are recognized; none are added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text; joined they are decode(ids). A character split over tokens comes with its last one."""
        pieces = []
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[max(0, end - 8) : end])  # the last few tokens settle spacing and split characters
            before = self.decode(ids[max(0, end - 8) : end - 1])
            whole = not text.endswith("\ufffd")
            start = len(before.rstrip("\ufffd")) if whole else len(text)
            pieces.append(text[start:])
        return pieces if "".join(pieces) == self.decode(ids) else self._slow_pieces(ids)

    def _slow_pieces(self, ids: Sequence[int]) -> list[str]:
        """The same from the whole text before each token: quadratic, for decoders that look further back."""
        pieces, shown = [], ""
        for end in range(1, len(ids) + 1):
            text = self.decode(ids[:end])
            ready = text if end == len(ids) else text.rstrip("\ufffd")
            pieces.append(ready[len(shown) :])
            shown = ready
        return pieces

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """Messages [{"role", "content"}] -> the text that the chat template makes of them."""
        if self._template is None:
            raise UserError(f"{self.folder}: this model has no chat template")
        names = {"bos_token": self._bos or "", "eos_token": self._eos or "", "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(messages=list(messages), **names, **variables)
        except Exception as error:  # whatever a stranger's template does: divide by zero, recurse without end, ask for the sandbox's outside
            raise UserError(f"{self.folder}: the chat template failed: {type(error).__name__}: {error}") from None

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """The ids that a response is written after."""
        if self._template is None:
            text = prompt if system is None else f"{system}\n\n{prompt}"
            bos = [self.bos_id] if self._adds_bos() else []
            return bos + self.encode(text)
        messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": prompt}]
        return self.encode(self.render(messages))  # a template writes its own BOS: nothing is added

    def _adds_bos(self) -> bool:
        """Whether a plain text begins with BOS: as tokenizer_config.json says, else as tokenizer.json's own processor does."""
        if self.bos_id is None:
            return False
        said = self._config.get("add_bos_token")
        return said if said is not None else self._tokenizer.encode("").ids[:1] == [self.bos_id]


def load_tokenizer(name: str | Path, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a folder or of a model on the hub."""
    return Tokenizer(find_model(str(name), revision).path)


def stop_ids(folder: Path) -> frozenset[int]:
    """eos_token_id of generation_config.json, else of config.json: an int or a list."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if any(type(i) is not int for i in ids):
                raise UserError(f"{folder / name}: eos_token_id: expected a whole number or a list of them, found {found!r}")
            return frozenset(ids)
    return frozenset()


def read_json(path: Path) -> dict:
    """A JSON object, {} where there is no such file. Raises UserError where it is something else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _content(token: str | dict | None) -> str | None:
    """A special token, written as text or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _template(folder: Path, config: dict) -> str | None:
    """chat_template.jinja, else chat_template: a string, or a list of named ones of which `default` is meant."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    where = f"{folder / 'tokenizer_config.json'}: chat_template"
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        named = {entry.get("name"): entry.get("template") for entry in found}
        if "default" not in named:
            raise UserError(f"{where} has {', '.join(map(str, named))}, but no default")
        found = named["default"] or 0  # named but empty: not text either
    if found is not None and not isinstance(found, str):
        raise UserError(f"{where}: expected text or a list of named texts, found {type(found).__name__}")
    return found


class Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks what the assistant wrote, for training masks: here only its text counts."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str, folder: Path) -> jinja2.Template:
    extensions = [jinja2.ext.loopcontrols, Generation]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"{folder}: the chat template does not parse: {error}") from None


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys: bool = False) -> str:
    """Plain JSON: jinja2's own filter would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
