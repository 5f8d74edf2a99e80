"""Where a model is, and its text: token ids, special tokens, chat templates, end tokens.

Contract. `find_model` gives the folder of a model, here or on the Hugging Face hub. `Tokenizer`
reads such a folder as transformers 5 does: tokenizer.json decides ids and BOS; special tokens may
also stand in `added_tokens_decoder` or, without it, in special_tokens_map.json. `prompt_ids` is how
every part of the project turns a prompt into ids. Chat templates are foreign programs: they run in
jinja2's immutable sandbox, in a process that is ended when it runs too long or grows too large.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2.ext
import jinja2.meta
import jinja2.sandbox
import tokenizers
from huggingface_hub import constants, snapshot_download
from huggingface_hub import errors as hub

from nanoexit.config import ROOT, UserError, nearest, printable, read_json, read_text, show

if TYPE_CHECKING:
    import resource  # of the worker; Windows has none

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
KINDS |= {dict: "an object", list: "a list", type(None): "null"}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
FAILURES = (  # of a download: the first kind that fits, and what to do
    (hub.GatedRepoError, "gated: accept its terms on its page there, then set HF_TOKEN"),
    (hub.RepositoryNotFoundError, "none of that name, or private: check the spelling or HF_TOKEN"),
    (hub.RevisionNotFoundError, "it has no such revision: check model.revision"),
    (getattr(hub, "IncompleteSnapshotError", ()), "an incomplete snapshot in the cache: go online"),
    (hub.LocalEntryNotFoundError, "cannot be reached, and not in the cache: check the connection"),
    (hub.EntryNotFoundError, "no such file there"),
    (hub.HfHubHTTPError, "refused by the server: try later, or set HF_TOKEN"),
    (Exception, "the download broke off: run the same command again to continue it"),
)


# --- where a model is -------------------------------------------------------------------------


def find_model(
    name: str, revision: str | None = None, files: Collection[str] = MODEL_FILES
) -> tuple[Path, str | None]:
    """A folder (from the working directory, else the repository), or a snapshot of OWNER/NAME and
    its commit. With a revision (branch, tag or commit), always the hub's. Raises UserError.
    """
    for path in (Path(name).expanduser(), ROOT / name):
        if revision is None and path.is_dir():
            return path, None
    if not HUB_ID.fullmatch(name):
        problem = "a folder has no revisions" if revision else "no such folder"
        raise UserError(f"{show(name)}: {problem}, and not an id on the hub (OWNER/NAME)")
    get = functools.partial(snapshot_download, allow_patterns=[*files], ignore_patterns=["*/*"])
    path = fetch(f"{name}: no such folder;", functools.partial(get, name, revision=revision))
    return path, path.name


def fetch(what: str, download: Callable[[], str]) -> Path:
    """Run a download; each way it can fail becomes one line that says what to do."""
    try:
        return Path(download())
    except Exception as error:  # the HTTP library's own too
        why = next(text for kind, text in FAILURES if isinstance(error, kind))
        status = getattr(getattr(error, "response", None), "status_code", type(error).__name__)
        offline = "; HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        raise UserError(f"{what} {constants.ENDPOINT}: {why} ({status}{offline})") from None


def check_file(path: Path) -> None:
    """Raise UserError for a file that is missing, or that is a git-lfs pointer."""
    if not path.is_file():
        snapshot = path.absolute().parent.parent.name == "snapshots"
        hint = ": an incomplete snapshot of the hub; run once with a connection" if snapshot else ""
        raise UserError(f"{path}: no such file{hint}")
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise UserError(f"{path}: a git-lfs pointer, not the file: run `git lfs pull` there")


def read_object(path: Path) -> dict:
    """The JSON object of a model's file, {} without one. Raises UserError for anything else."""
    if path.is_symlink() or path.exists():
        check_file(path)
    return read_json(path)


def check_values(given: dict[str, Any], rules: dict[str, tuple], where: str | Path) -> None:
    """The one rule for values of such files; rules: key -> (kinds, low, high of a number)."""
    for key in [key for key in given if key in rules]:
        value, (kinds, low, high) = given[key], rules[key]
        number = type(value) in (int, float)
        if type(value) not in kinds or (number and not low <= value <= high):  # so is NaN
            expected = " or ".join(KINDS[k] for k in kinds if k is not int or float not in kinds)
            limits = f" from {low} to {high}" if int in kinds else ""
            raise UserError(f"{where}: {key}: expected {expected}{limits}, found {show(value)}")


def content_hash(paths: Iterable[Path]) -> str:
    """A hash of names, sizes and contents; of a file above 64 MiB, 16,384 samples of 4 KiB."""
    digest, sample = hashlib.sha256(), 4096
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for offset in range(0, size, max(sample, size // 16384)):
                file.seek(offset)
                digest.update(file.read(sample))
    return f"sha256:{digest.hexdigest()}"


# --- text and ids -----------------------------------------------------------------------------


class Tokenizer:
    """The tokenizer of a model's folder. Raises UserError where its files are missing or broken."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._tokenizer = _read_tokenizer(folder / "tokenizer.json")
        config = read_object(folder / "tokenizer_config.json")
        self.named = _add_tokens(self._tokenizer, config, folder)  # {"bos_token": "<s>", ...}
        self._tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
        rows = read_object(folder / "config.json").get("vocab_size")
        last = self._tokenizer.get_vocab_size(with_added_tokens=False) - 1
        for i in (last, *self._tokenizer.get_added_tokens_decoder()):
            if type(rows) is int and i >= rows:
                token = f"token {show(self._tokenizer.id_to_token(i))} has the id {i}"
                raise UserError(
                    f"{folder}: {token}, but the embedding has {rows} rows (vocab_size)"
                )
        template = _read_template(folder, config)
        self.has_template = template is not None
        self._template = TemplateProcess(template or "", str(folder))

    @property
    def content(self) -> str:
        """A hash of the files that decide ids and templates."""
        templates = self.folder.glob("chat_template.jinja")
        return content_hash([*self.folder.glob("*token*.json"), *templates])

    @property
    def bos_id(self) -> int | None:
        return self._tokenizer.token_to_id(self.named.get("bos_token", ""))

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
        """What each token adds to the text: len(ids) pieces that join to decode(ids), for any ids.

        A character made of several tokens comes with its last one.
        """
        text = self.decode(ids)
        start = clean = at = shown = 0  # ids[:clean] make text[:at]; ids[start:clean] is context
        pieces = []
        for end in range(1, len(ids) + 1):
            before, after = self.decode(ids[start:clean]), self.decode(ids[start:end])
            new = after[len(before) :]
            if after.startswith(before) and text.startswith(new, at):
                start, clean, at = clean, end, at + len(new)
            elif end - clean > 4:  # more tokens than a character has: decode from the beginning
                whole = self.decode(ids[:end])
                same = len(os.path.commonprefix([whole, text]))  # noqa: RUF071
                start, clean, at = clean, end, max(at, same)
            reached = at if end < len(ids) else len(text)
            pieces.append(text[shown:reached])
            shown = max(shown, reached)
        return pieces

    def render(self, messages: Sequence[dict[str, Any]], /, **variables: Any) -> str:
        """Messages [{"role", "content"}] -> the text that the chat template makes of them.

        variables: what else the template reads, such as enable_thinking. Raises UserError where
        the template fails, or does not read a variable.
        """
        if not self.has_template:
            raise UserError(f"{self.folder}: this model has no chat template")
        known = {**self.named, "add_generation_prompt": True, "tools": None, "documents": None}
        return self._template.render(list(messages), known, variables)

    def prompt_ids(self, prompt: str, system: str | None = None, /, **variables: Any) -> list[int]:
        """The ids that a response is written after."""
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


def model_stop_ids(folder: Path) -> frozenset[int]:
    """eos_token_id of generation_config.json, else of config.json."""
    rows = read_object(folder / "config.json").get("vocab_size")
    rule = ((int,), 0, rows - 1 if type(rows) is int else 2**31)
    for path in (folder / "generation_config.json", folder / "config.json"):
        found = read_object(path).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            for i in ids:
                check_values({"eos_token_id": i}, {"eos_token_id": rule}, path)
            return frozenset(ids)
    return frozenset()


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    check_file(path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise UserError(f"{path} is not a tokenizer: {printable(str(error))}") from None
    tokenizer.no_truncation()  # which it may store
    tokenizer.no_padding()
    return tokenizer


def _add_tokens(tokenizer: tokenizers.Tokenizer, config: dict, folder: Path) -> dict[str, str]:
    """Add the tokens that tokenizer.json lacks, in the order of transformers 5; -> named ones."""
    declared, added = config.get("added_tokens_decoder"), {}
    if declared is None:
        config |= read_object(folder / "special_tokens_map.json")
        added = read_object(folder / "added_tokens.json")
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = {
        k: v for k, v in config.items() if k.endswith("_token") and v not in (None, True, False)
    }
    try:
        named |= extra if isinstance(extra, dict) else {}
        special = [_added(value) for value in (*named.values(), *extra)]
        names = {token.content for token in special}
        declared = {i: text for text, i in added.items()} if declared is None else declared
        tokens = [_added(declared[i], names) for i in sorted(declared, key=int)]
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
        where = f"{folder}: a special token of tokenizer_config.json or special_tokens_map.json"
        raise UserError(f"{where} is malformed: {printable(str(error))}") from None
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known |= {token.content for token in tokens}
    tokenizer.add_tokens(tokens + [token for token in special if token.content not in known])
    return {key: token.content for key, token in zip(named, special)}


def _added(value: Any, special: Collection[str] | None = None) -> tokenizers.AddedToken:
    """A token written as text, or as an object with `content` and flags."""
    if isinstance(value, dict):
        flags = {k: v for k, v in value.items() if k not in ("__type", "content")}
        return tokenizers.AddedToken(value["content"], **flags)
    is_special = special is None or value in special
    return tokenizers.AddedToken(value, special=is_special, normalized=not is_special)


def _read_template(folder: Path, config: dict) -> str | None:
    """chat_template.jinja, else chat_template: text, or named texts with one `default`."""
    path = folder / "chat_template.jinja"
    if path.is_symlink() or path.exists():
        check_file(path)
        return read_text(path)
    found = config.get("chat_template")
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        named = {entry.get("name"): entry.get("template") for entry in found}
        found = named.get("default") or found
    if found is not None and not isinstance(found, str):
        where = f"{folder / 'tokenizer_config.json'}: chat_template"
        raise UserError(
            f"{where}: expected text, or named texts and a default, found {show(found)}"
        )
    return found


# --- chat templates ---------------------------------------------------------------------------


class TemplateProcess:
    """One chat template in a process of its own, ended when a text takes too long or too much.

    seconds: of computing. memory: bytes of the process (on macOS, time alone bounds them).
    """

    def __init__(self, template: str, where: str, seconds: float = 5, memory: int = 2**30):
        self.where = where
        self.setup = {"template": template, "seconds": seconds, "memory": memory}
        self._process: subprocess.Popen | None = None

    def render(self, messages: list, known: dict[str, Any], variables: dict[str, Any]) -> str:
        """known: what a template may read. variables: what this one has to read."""
        reply = self._ask(json.dumps({**known, **variables, "messages": messages}, default=str))
        if "error" in reply:
            problem = printable(" ".join(reply["error"].split()))
            raise UserError(f"{self.where}: the chat template failed: {problem}")
        readable = {*known, *reply["names"]} - {"messages"}
        for name in variables.keys() - readable:
            close = nearest(name, readable)
            raise UserError(f"{self.where}: the chat template does not read {name!r}{close}")
        return reply["text"]

    def _ask(self, line: str) -> dict:
        """One exchange with the process, which is started if need be and ended if it fails."""
        process = self._process
        if process is None:
            process = self._process = _start_worker()
            weakref.finalize(self, _end_worker, process)
            line = f"{json.dumps(self.setup)}\n{line}"
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        except BaseException as error:
            self._process = None
            _end_worker(process)
            if not isinstance(error, (OSError, ValueError)):
                raise
            limits = "stopped after {seconds} s of computing or {memory} bytes of memory"
            return {"error": limits.format(**self.setup)}


def _start_worker() -> subprocess.Popen:
    """A bare interpreter without the secrets of the environment, running `serve_templates`."""
    parts = map(inspect.getsource, (GenerationTag, serve_templates))  # type: ignore[arg-type]
    program = "\n".join([WORKER_IMPORTS, *parts, "serve_templates()"])
    keep = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
    options: dict[str, Any] = {"text": True, "start_new_session": True}  # Ctrl-C is for the parent
    options["env"] = {name: os.environ[name] for name in keep if name in os.environ}
    options |= dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    command = [sys.executable, "-I", "-c", program, json.dumps(sys.path)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)


def _end_worker(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()  # closes the pipes and waits


WORKER_IMPORTS = """
import contextlib, functools, json, resource, signal, sys
sys.path[:] = json.loads(sys.argv[1])
from datetime import datetime
import jinja2.ext, jinja2.meta, jinja2.sandbox
"""


class GenerationTag(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks text for training masks; it counts as text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def serve_templates() -> None:
    """Read a setup, then variables, a JSON line each; answer each with a JSON line of text."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    setup, template = json.loads(sys.stdin.readline()), None
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # not HTML's
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    with contextlib.suppress(ValueError, OSError):  # macOS
        resource.setrlimit(resource.RLIMIT_AS, (setup["memory"], setup["memory"]))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])  # its signal ends this process
        try:
            if template is None:
                names = jinja2.meta.find_undeclared_variables(environment.parse(setup["template"]))
                template = environment.from_string(setup["template"])
            text = template.render(json.loads(line))
            if len(text.encode()) > 2**24:  # encode fails on half a surrogate pair
                raise OverflowError("more than 16 MiB of text")
            reply = {"text": text, "names": sorted(names)}
        except BaseException as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), flush=True)
