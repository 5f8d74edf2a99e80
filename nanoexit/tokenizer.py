"""Find a model, and turn text into token ids: special tokens, chat templates, end tokens.

Contract. `find_model` returns a model's folder, local or from the Hugging Face hub. `Tokenizer`
reads it as transformers 5 does: tokenizer.json decides ids and BOS; special tokens may also be in
`added_tokens_decoder` or, without it, in special_tokens_map.json. Every part of the project turns
prompts into ids with `prompt_ids`. Chat templates are untrusted programs: they run in jinja2's
immutable sandbox, in a process that is killed when it takes too much time or memory."""

import hashlib
import inspect
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import tokenizers
from huggingface_hub import constants, snapshot_download

from nanoexit.config import ROOT, Rule, UserError, check_value, read_json, read_text, show

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_PROBLEMS = {  # class of an error -> what the hub does; AWAY is why it cannot be asked
    "GatedRepoError": "keeps it gated: ask for access on its page, then log in",
    "RepositoryNotFoundError": "has no such repository, or a private one",
    "RevisionNotFoundError": "has no such revision",
    "LocalEntryNotFoundError": "AWAY",
    "IncompleteSnapshotError": "AWAY, and the copy on this machine is incomplete",
}


def find_model(
    name: str, revision: str | None = None, files: Collection[str] = MODEL_FILES
) -> tuple[Path, str | None]:
    """-> a local folder (in the working directory, else the repository) and None, or a hub snapshot
    of OWNER/NAME and its commit. A revision (branch, tag or commit) means the hub. UserError."""
    for path in (Path(os.path.expanduser(name)), ROOT / name):
        if revision is None and os.path.isdir(path):
            return path, None
    if not HUB_ID.fullmatch(name):
        problem = "a folder has no revisions" if revision else "no such folder"
        raise UserError(f"{show(name)}: {problem}, and not an id on the hub (OWNER/NAME)")
    options: Any = {"allow_patterns": [*files], "ignore_patterns": ["*/*"]}
    try:
        path = Path(snapshot_download(name, revision=revision, **options))
    except Exception as error:  # some are the HTTP library's
        what = f"{name}, revision {revision}:" if revision else f"{name}: no such folder;"
        kind, away = type(error).__name__, f"cannot be reached ({error.__cause__})"
        if constants.HF_HUB_OFFLINE:
            away = "is switched off (HF_HUB_OFFLINE)"
        other = f"stopped: {kind}: {error}; run again to continue the download"
        problem = HUB_PROBLEMS.get(kind, other).replace("AWAY", away)
        raise UserError(f"{what} the hub ({constants.ENDPOINT}) {problem}") from None
    return path, path.name


def content_hash(paths: Iterable[Path]) -> str:
    """A hash of names, sizes and contents; a file above 64 MiB gives 16,384 samples of 4 KiB."""
    digest, sample = hashlib.sha256(), 4096
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for offset in range(0, size, max(sample, size // 16384)):
                file.seek(offset)
                digest.update(file.read(sample))
    return f"sha256:{digest.hexdigest()}"


class Tokenizer:
    """The tokenizer of a model's folder. Raises UserError if its files are missing or broken."""

    def __init__(self, folder: Path):
        self.folder, rows = folder, _embedding_rows(folder)
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        config = read_json(folder / "tokenizer_config.json")
        self.named = _add_tokens(self._tokenizer, config, folder)  # {"bos_token": "<s>", ...}
        self._tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
        for token, i in self._tokenizer.get_vocab().items():
            if i >= rows:
                raise UserError(f"{folder}: token {show(token)} is id {i}, expected below {rows}")
        template = _read_template(folder, config)
        self.has_template = template is not None
        self._template = TemplateProcess(template or "", str(folder))

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a text: the model's, and the tokenizer's own end token."""
        own = self._tokenizer.token_to_id(self.named.get("eos_token", ""))
        return model_stop_ids(self.folder) | (frozenset() if own is None else {own})

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Special tokens written in the text are recognized; none are added."""
        if re.search("[\ud800-\udfff]", text):
            raise UserError(f"half a surrogate pair cannot be encoded: {show(text)}")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token: len(ids) strings that join to decode(ids), for any ids. The last
        token of a character that takes several has all of it."""
        text, ends = self.decode(ids), [0]  # ends: where in the text each token ends
        start = clean = at = 0  # ids[:clean] make text[:at]; ids[start:clean] is context
        for end in range(1, len(ids) + 1):
            before, after = self.decode(ids[start:clean]), self.decode(ids[start:end])
            new = after[len(before) :]
            if after.startswith(before) and text.startswith(new, at):
                start, clean, at = clean, end, at + len(new)
            elif end - clean > 4:  # longer than any character: decode from the beginning
                same = os.path.commonprefix([self.decode(ids[:end]), text])  # noqa: RUF071
                start, clean, at = clean, end, max(at, len(same))
            ends.append(at)
        ends[-1] = len(text)
        return [text[a:b] for a, b in itertools.pairwise(ends)]

    def render(self, messages: Sequence[dict], /, **variables: Any) -> str:
        """Messages [{"role", "content"}] -> text. UserError for a variable it ignores."""
        if not self.has_template:
            raise UserError(f"{self.folder}: this model has no chat template")
        known = {**self.named, "add_generation_prompt": True, "tools": None, "documents": None}
        return self._template.render(list(messages), known, variables)

    def prompt_ids(self, prompt: str, system: str | None = None, /, **variables: Any) -> list[int]:
        """The ids of a prompt, which a response continues."""
        if self.has_template or variables:
            messages = [{"role": "system", "content": system}] if system else []
            messages.append({"role": "user", "content": prompt})
            return self.encode(self.render(messages, **variables))  # a template writes its own BOS
        text = self._tokenizer.encode("a")  # with what tokenizer.json's post-processor adds
        bos = text.ids[: [*text.special_tokens_mask, 0].index(0)]
        return bos + self.encode(prompt if system is None else f"{system}\n\n{prompt}")


def load_tokenizer(name: str | Path, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a folder, or of a model on the hub."""
    return Tokenizer(find_model(str(name), revision)[0])


def _embedding_rows(folder: Path) -> float:
    """vocab_size of config.json, or infinity if there is none."""
    rows = read_json(folder / "config.json").get("vocab_size")
    return rows if type(rows) is int else math.inf


def model_stop_ids(folder: Path) -> frozenset[int]:
    """eos_token_id of generation_config.json, else of config.json: an id or a list of ids."""
    rule = Rule(list[int], 0, _embedding_rows(folder) - 1)
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = read_json(path).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            check_value(ids, rule, f"{path}: eos_token_id")
            return frozenset(ids)
    return frozenset()


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    text = read_text(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception, or a panic, which is not an Exception
        raise UserError(f"{path} is not a tokenizer: {error}") from None
    tokenizer.no_truncation()  # the file may turn either on
    tokenizer.no_padding()
    return tokenizer


def _add_tokens(tokenizer: tokenizers.Tokenizer, config: dict, folder: Path) -> dict[str, str]:
    """Add the tokens that tokenizer.json lacks, in transformers 5's order -> the named ones."""
    declared = config.get("added_tokens_decoder")
    if declared is None:  # older folders
        declared, config = {}, config | read_json(folder / "special_tokens_map.json")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = {key: config[key] for key in config if key.endswith("_token")}
    try:
        if isinstance(extra, dict):
            named, extra = named | extra, []
        named = {key: _added(value) for key, value in named.items() if value and value is not True}
        added = [_added(declared[i]) for i in sorted(declared, key=int)]
        special = [*named.values(), *map(_added, extra)]
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
        where = f"{folder}: a special token in tokenizer_config.json or special_tokens_map.json"
        raise UserError(f"{where} is malformed: {error}") from None
    known = [t.content for t in [*added, *tokenizer.get_added_tokens_decoder().values()]]
    tokenizer.add_tokens(added + [token for token in special if token.content not in known])
    return {key: token.content for key, token in named.items()}


def _added(value: Any) -> tokenizers.AddedToken:
    """A token written as text, or as an object with `content` and flags."""
    if isinstance(value, dict):
        flags = {key: value[key] for key in value if key not in ("__type", "content")}
        return tokenizers.AddedToken(value["content"], **flags)
    return tokenizers.AddedToken(value, special=True, normalized=False)


def _read_template(folder: Path, config: dict) -> str | None:
    """chat_template.jinja, else chat_template: text, or the `default` of a list of templates."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        return read_text(path)
    found = config.get("chat_template")
    for entry in found if isinstance(found, list) else []:
        if isinstance(entry, dict) and entry.get("name") == "default":
            found = entry.get("template") or found
    check_value(found, Rule(str | None), f"{folder / 'tokenizer_config.json'}: chat_template")
    return found


class TemplateProcess:
    """One chat template in its own process, which is killed after `seconds` of computing."""

    def __init__(self, template: str, where: str, seconds: float = 5):
        # {% generation %} marks text for training masks; here it only opens a scope: {% with %}.
        self.template = re.sub(r"({%[-+]?\s*(end)?)generation(?=\s*[-+]?%})", r"\1with", template)
        self.where, self.seconds = where, seconds
        self.process: Any = None

    def render(self, messages: list, known: dict, variables: dict) -> str:
        """known: what a template may read. variables: what this one must read."""
        given = {**known, **variables, "messages": messages}
        process, self.process = self.process or self._start(), None
        try:
            process.stdin.write(json.dumps([self.template, given], default=str) + "\n")
            process.stdin.flush()
            reply = json.loads(process.stdout.readline())
            self.process = process  # a process is reused only if it has answered
        except (OSError, ValueError):
            process.kill()
            reply = {"error": f"stopped after {self.seconds} s of computing or 1 GiB of memory"}
        if "error" in reply:
            raise UserError(f"{self.where}: the chat template failed: {reply['error']}")
        for name in variables.keys() - ({*reply["names"]} - {"messages"}):
            expected = f"expected one of {', '.join(reply['names'])}"
            raise UserError(f"{self.where}: the chat template does not read {name!r}: {expected}")
        return reply["text"]

    def _start(self) -> Any:
        """A bare interpreter that runs `serve_templates`, without the environment's secrets."""
        command = [sys.executable, "-I", "-c", SERVE_TEMPLATES, str(self.seconds), *sys.path]
        kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
        env = {name: os.environ[name] for name in kept if name in os.environ}
        pipes: Any = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL}
        return Popen(command, env=env, text=True, start_new_session=True, **pipes)  # no Ctrl-C


def serve_templates() -> None:
    """The process: it answers each line [template, variables] with a line {text, names} or {error}.
    Its source runs as a separate program, so it imports everything that it needs."""
    import functools
    import json
    import resource
    import signal
    import sys
    import time

    seconds, sys.path[:] = float(sys.argv[1]), sys.argv[2:]
    from jinja2 import TemplateError, ext, meta, sandbox

    def raise_exception(message):
        raise TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": time.strftime}
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # not HTML's

    @functools.cache
    def compiled(source):
        names = meta.find_undeclared_variables(environment.parse(source))
        return environment.from_string(source), sorted(names)

    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends this process
        try:
            source, given = json.loads(line)
            template, names = compiled(source)
            text = template.render(given)
            if len(text.encode()) > 2**24:  # encode fails on half a surrogate pair
                raise OverflowError("more than 16 MiB of text")
            reply = {"text": text, "names": names}
        except Exception as error:
            kind = "" if type(error) is TemplateError else f"{type(error).__name__}: "
            reply = {"error": f"{kind}{error}"[:500]}
        print(json.dumps(reply), flush=True)


# Read at import, because the file may change during a long run.
SERVE_TEMPLATES = f"{inspect.getsource(serve_templates)}serve_templates()"
