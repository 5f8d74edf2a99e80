"""The judge: asks a language model behind any OpenAI-compatible chat endpoint to score what another wrote (see rubric.py).

1. Nothing is asked twice. Verdicts are appended to a JSONL cache as they come, under a hash of all that was asked (rubric
   text, model, prompt, response, order): a killed run goes on. Equal questions of one run are asked once.
2. Nothing is made up. A reply that cannot be read is asked for again, then recorded as `failed` with the reply. What was not
   reached, refused, or past a limit is `not_judged`: it is not cached, so the next run asks it. Neither enters a mean.
3. The key comes from the environment, and is cut out of every text that is kept or raised.

The client is huggingface_hub's InferenceClient; retries, waiting and limits are ours.
"""

import dataclasses
import email.utils
import hashlib
import itertools
import json
import os
import random
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import InferenceClient
from tqdm import tqdm

from nanoexit import rubric
from nanoexit.config import JudgeConfig
from nanoexit.errors import UserError
from nanoexit.rubric import Item, Judgement, Pair, Unreadable

MAX_BACKOFF, MAX_WAIT = 30.0, 300.0  # seconds: our own longest wait; the longest Retry-After that we sit out
FATAL, TRANSIENT = {401, 403, 404}, {408, 409, 425, 429}  # HTTP statuses: the user's mistake; worth another try, as 5xx are
SECRET = 8  # characters from which a key is a secret; shorter ones are placeholders such as EMPTY


class Fault(Exception):
    """A request without a reply. `status`: of HTTP, 0 where there was none; `wait`: seconds that the endpoint asked for."""

    def __init__(self, name: str, message: str, status: int = 0, wait: float | None = None):
        super().__init__(f"{name}: {message}" if message else name)
        self.name, self.status, self.wait = name, status, wait
        self.retry = status in TRANSIENT or status >= 500 or not status


@dataclass(frozen=True)
class Question:
    """`messages(marker, problem)` makes the chat, `parse(reply)` gives (scores, why) or Unreadable, `digest` names it all."""

    id: str
    kind: str
    digest: str
    messages: Callable[[str, str], list[dict]]
    parse: Callable[[str], tuple[dict[str, float], str]]


def item_question(item: Item, model: str) -> Question:
    """The question for the four scores of one response."""
    digest = _digest(rubric.RUBRIC, model, item.prompt, item.response, item.answer)
    return Question(item.id, "api", digest, lambda *with_: rubric.item_messages(item, *with_), rubric.parse_scores)


def pair_question(pair: Pair, model: str, seed: int) -> Question:
    """The question which of two responses is clearer; the order is a fair coin of `seed` and the texts."""
    texts = (pair.prompt, pair.base, pair.external)
    first = "external" if int(_digest("order", seed, *texts), 16) % 2 else "base"
    digest = _digest(rubric.PAIRWISE, model, *texts, first)

    def parse(reply: str) -> tuple[dict[str, float], str]:
        winner, why = rubric.parse_winner(reply)
        return rubric.pair_scores(winner, first), why

    return Question(pair.id, "api-pair", digest, lambda *with_: rubric.pair_messages(pair, first, *with_), parse)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def backoff(attempt: int, base: float, chance: float) -> float:
    """Seconds before the next attempt: base x 2^attempt, at most MAX_BACKOFF; `chance` (0..1) varies the upper half of it."""
    return min(MAX_BACKOFF, base * 2 ** min(attempt, 30)) * (0.5 + 0.5 * chance)


def retry_after(header: str | None, now: float) -> float | None:
    """A Retry-After header (seconds or an HTTP date) as seconds from `now` (Unix time); None where absent or unreadable."""
    if header is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d*)?\s*", header):
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - now)
    except ValueError:
        return None


def fault_of(error: Exception) -> Fault:
    """The client's exception as a Fault. An odd body can break the client's own wording: the status is then up the chain."""
    link: BaseException | None = error
    while link is not None and getattr(link, "response", None) is None:
        link = link.__context__
    message = " ".join(str(error).split())[:300]
    if link is None:
        return Fault(type(error).__name__, message)
    status, wait = link.response.status_code, link.response.headers.get("retry-after")
    return Fault(f"HTTP {status}", message, status, retry_after(wait, time.time()))


def adapt(options: dict, message: str) -> dict:
    """Request options without those that an endpoint's message refuses by name (OpenAI's newer models refuse both)."""
    options = dict(options)
    if "max_completion_tokens" in message and "max_tokens" in options:
        options["extra_body"] = {"max_completion_tokens": options.pop("max_tokens")}
    if "temperature" in message:
        options.pop("temperature", None)
    return options


def checked_key(config: JudgeConfig) -> str:
    """The key from the environment. Raises UserError, which never shows it, where base_url, model or key are not usable."""
    key = os.environ.get(config.api_key_env, "").strip()
    if not re.match(r"https?://[^/@\s]+(/|$)", config.base_url or ""):
        found = re.sub(r"//.*@", "//***@", config.base_url or "nothing")
        raise UserError(f"judge.base_url: expected a URL such as http://127.0.0.1:8000/v1 with no password in it, found {found}")
    if not config.model:
        raise UserError("judge.model: expected the judge's model name at the endpoint, found nothing")
    if not re.fullmatch(r"[!-~]+", key):  # other characters cannot go into a header, and the client's error would show them
        found = "one with characters that no header can carry" if key else "nothing"
        raise UserError(f"judge.api_key_env: expected the endpoint's key in the environment variable {config.api_key_env} "
                        f"(any word where it needs none), found {found}")
    return key


class Cache:
    """Verdicts by digest, in a JSONL file that only grows (or in memory, without a path). Unreadable lines are passed over."""

    def __init__(self, path: str | Path | None):
        self.path, self._lock = Path(path) if path else None, threading.Lock()
        self.known: dict[str, Judgement] = {}
        if self.path and self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    judgement = Judgement(**json.loads(line))
                except (ValueError, TypeError):  # torn by a kill: that one is asked again
                    continue
                self.known[judgement.digest] = judgement

    def add(self, judgement: Judgement) -> None:
        """Keep a verdict, on disk before anybody hears of it; after a torn line it starts a line of its own."""
        with self._lock:
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab+") as file:
                    if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                        file.write(b"\n")
                    file.write(json.dumps(dataclasses.asdict(judgement)).encode() + b"\n")
            self.known[judgement.digest] = judgement


class Judge:
    """Asks `config.model` at `config.base_url` (`/chat/completions` is added), `config.concurrency` questions at once.

    `cache`: a JSONL file, or None; `base_wait`: seconds of the first backoff. The limits hold over the life of the object:
    requests exactly, tokens with an overshoot of at most the replies under way. `requests`, `tokens`, `cached` and `faults`
    (by name) count what happened; `stopped` says why it asks no more. Raises UserError for a missing base_url, model or key.
    """

    def __init__(self, config: JudgeConfig, cache: str | Path | None = None, base_wait: float = 0.5):
        self.config, self.base_wait, self._key = config, base_wait, checked_key(config)
        self.cache = Cache(cache)
        self._client = InferenceClient(base_url=config.base_url, api_key=self._key, timeout=config.timeout)
        self._options = {"max_tokens": config.max_tokens, "temperature": 0.0}
        self._lock, self._halt = threading.Lock(), threading.Event()
        self._hold, self._lost, self._answered = 0.0, 0, False  # no request before (s); questions lost in a row; any reply?
        self.requests = self.tokens = self.cached = 0
        self.faults: Counter[str] = Counter()
        self.stopped = ""

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        """The four parts of each item, in order. Raises UserError where the endpoint refuses the key or never answers."""
        return self._ask([item_question(item, self.config.model) for item in items])

    def compare(self, pairs: Sequence[Pair], seed: int = 0) -> list[Judgement]:
        """Which of each pair is clearer to follow (see `rubric.pair_scores`), in order. Raises as `score` does."""
        return self._ask([pair_question(pair, self.config.model, seed) for pair in pairs])

    def _ask(self, questions: list[Question]) -> list[Judgement]:
        """A judgement for each question, in order; equal questions are asked once, known ones not at all."""
        fresh = {q.digest: q for q in questions if q.digest not in self.cache.known}
        done = {q.digest: self.cache.known[q.digest] for q in questions if q.digest not in fresh}
        self.cached += len(done)
        self._halt.clear()
        pool = ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="judge")
        try:
            futures = [pool.submit(self._answer, question) for question in fresh.values()]
            for judgement in self._watched(futures, list(done.values())):
                done[judgement.digest] = judgement
        finally:  # on an error too: nobody goes on asking
            self._halt.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if self._lost and not self._answered:
            raise UserError(f"judge.base_url {self.config.base_url}: {self.stopped or done[questions[0].digest].why}")
        return [dataclasses.replace(done[q.digest], id=q.id) for q in questions]

    def _watched(self, futures: list[Future], known: list[Judgement]) -> Iterator[Judgement]:
        """Each judgement as it comes, under a progress bar with the running mean."""
        total, count = 0.0, Counter()
        with tqdm(total=len(known) + len(futures), desc="judge", disable=None) as bar:
            for judgement in itertools.chain(known, (future.result() for future in as_completed(futures))):
                total += judgement.scores.get("overall", judgement.scores.get("win", 0.0))
                count[judgement.status] += 1
                without = f"failed {count['failed']}, not judged {count['not_judged']}"
                bar.set_postfix_str(f"mean {total / max(1, count['judged']):.2f}, {without}", refresh=False)
                bar.update()
                yield judgement

    def _answer(self, question: Question) -> Judgement:
        """Ask until there is a readable reply, the attempts are used up, or the asking stops."""
        status, why, reply, problem, dead = "not_judged", "", "", "", False
        for attempt in range(self.config.retries + 1):
            if attempt and status == "not_judged":
                self._halt.wait(backoff(attempt - 1, self.base_wait, random.random()))
            if stopped := self._admit():
                return self._judgement(question, "not_judged", {}, stopped, reply, attempt)
            try:
                reply, cut = self._send(question.messages(secrets.token_hex(8), problem))
                if cut:
                    raise Unreadable(f"cut off at judge.max_tokens {self.config.max_tokens}")
                scores, why = question.parse(reply)
                return self._judgement(question, "judged", scores, why, reply, attempt + 1)
            except Unreadable as error:
                status, why, problem = "failed", f"unreadable reply: {error}", str(error)
                self._count("unreadable reply")
            except Fault as fault:
                status, why, dead = "not_judged", str(fault), fault.retry
                self._count(fault.name)
                if not fault.retry:
                    break
        if status == "not_judged":
            self._lose(why, dead)
        return self._judgement(question, status, {}, why, reply, attempt + 1)

    def _admit(self) -> str:
        """Wait out a Retry-After, then count one request; or say why there are no more."""
        self._halt.wait(max(0.0, self._hold - time.monotonic()))
        config = self.config
        with self._lock:
            if not self.stopped and self.requests >= config.max_requests:
                self.stopped = f"limit of {config.max_requests} requests reached (judge.max_requests)"
            if not self.stopped and self.tokens >= config.token_budget:
                self.stopped = f"limit of {config.token_budget} tokens reached (judge.token_budget)"
            if self.stopped or self._halt.is_set():
                return self.stopped or "interrupted"
            self.requests += 1
            return ""

    def _send(self, messages: list[dict]) -> tuple[str, bool]:
        """One request: the reply's text, and whether it was cut off. Raises Fault, or UserError where no retry can help."""
        options = self._options
        try:
            out = self._client.chat_completion(messages, model=self.config.model, **options)
            text, cut = out.choices[0].message.content or "", out.choices[0].finish_reason == "length"
            used = getattr(out.usage, "total_tokens", None) or (len(str(messages)) + len(text)) // 4  # where it is not told
        except Exception as error:  # whatever the client makes of an odd body is a fault of the endpoint
            raise self._weigh(fault_of(error), options) from None
        with self._lock:
            self.tokens, self._lost, self._answered = self.tokens + used, 0, True
        return text, cut

    def _weigh(self, fault: Fault, options: dict) -> Fault:
        """What a fault means for the run: the user's mistake, a pause for everybody, options to leave out, or nothing."""
        if fault.status in FATAL:
            where = f"judge.base_url {self.config.base_url}, judge.model {self.config.model}"
            raise UserError(self._scrub(f"{where}: {fault}")) from None
        if fault.status == 400 and (adapted := adapt(options, str(fault))) != options:
            self._options, fault.retry = adapted, True
        with self._lock:
            if fault.wait and fault.wait > MAX_WAIT:
                self.stopped = self.stopped or f"the endpoint asks to wait {fault.wait:.0f} seconds"
            elif fault.wait:
                self._hold = max(self._hold, time.monotonic() + fault.wait)
        return fault

    def _lose(self, why: str, dead: bool) -> None:
        """A question was lost: stop where an endpoint never answered at all, or lost more in a row than chance would."""
        with self._lock:
            self._lost += 1
            if (dead and not self._answered) or self._lost > 2 * self.config.concurrency:
                self.stopped = self.stopped or self._scrub(f"the endpoint does not answer: {why}")

    def _count(self, name: str) -> None:
        with self._lock:
            self.faults[name] += 1

    def _scrub(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) >= SECRET else text

    def _judgement(self, question: Question, status: str, scores: dict, why: str, reply: str, attempts: int) -> Judgement:
        """The record of one question, without the key in it; a verdict goes into the cache at once."""
        why, reply = self._scrub(why), self._scrub(reply)
        model = self.config.model
        judgement = Judgement(question.id, question.kind, status, scores, why, model, reply, attempts, question.digest)
        if status != "not_judged":
            self.cache.add(judgement)
        return judgement
