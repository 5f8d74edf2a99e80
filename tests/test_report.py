"""The page: what is in the file and, in a headless Chromium, what a person can do with it."""

import base64
import copy
import json
import random
import re
import shutil
import subprocess
import sys
import urllib.request
import zlib
from hashlib import sha256
from pathlib import Path

import pytest

from nanoexit.config import UserError, write_json_lines
from nanoexit.report import Run, _fit, _responses, read_run, write_page

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "report.py"
EVIL = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
STORY = re.split(" ", "Start at 9 . 9 + 5 = 14 so it is 2 . 2 + 11 = 13 so it is 1 . \n #### 1")
ASKED = "The clock shows 9. Add 5, then add 11. Which hour is it?"
EXITS = (5, 10, 15, 20, 25)


def response(prompt: str, variant: str, seed: int, text: list[str] = STORY) -> dict:
    """A line of samples.jsonl; its numbers come from `seed`."""
    draw, tokens = random.Random(seed), []
    for index, word in enumerate(text):
        depth = 28 if variant == "base" else draw.choice([*EXITS, 5, 10, 28])
        probs = [round(draw.random(), 4) if d <= depth else None for d in EXITS]
        piece = " " * (index > 0) + word
        top = [[piece, draw.random()], [" the", 0.2], [" 7", 0.05], ["\n", 0.03], [" so", 0.0004]]
        token = {"text": piece, "depth": depth, "kind": "reasoning", "exit_probs": probs}
        tokens.append(token | {"top": top})
    known = {"id": prompt[:16], "prompt": prompt, "answer": "1", "variant": variant}
    rest = {"finish": "stop", "full_depth": 28, "exit_layers": [*EXITS], "cap": None}
    return known | rest | {"correct": seed % 3 > 0, "tokens": tokens}


def row(variant: str, policy: str, accuracy: float, depth: float) -> dict:
    """A row of evaluation.json."""
    row = {"variant": variant, "policy": policy, "prompts": 100, "full_depth": 28, "cap": None}
    row |= {"accuracy": accuracy, "accuracy_interval": [accuracy - 0.03, accuracy + 0.02]}
    row |= {"mean_depth": depth, "max_depth": depth, "layers_run": depth / 28, "tokens": 61.5}
    row |= {"accuracy_by_group": {"1 step": accuracy, "2 steps": accuracy - 0.1}, "written": None}
    row |= {"max_depth_by_group": {"clock": depth, "logic": 3}, "depth_by_position": [depth, 3, 4]}
    row |= {"exit_histogram": {"5": 0.3, "28": 0.7}, "depth_by_kind": {"answer": depth}}
    row |= {"same_answer": [[0, 0.3], [1, 1]], "same_answer_capped": [[0, 0.1], [1, 1]]}
    row |= {"changed_value": {"follow": 0.8, "stay": 0.2}, "capped_accuracy": {"4": 0.2, "28": 0.9}}
    return row | {"kl": float("nan"), "monitor": {"score": 0.9, "chance": 0.1}}


def example(name: str = "tiny") -> Run:
    """A run with everything; a prompt, a response, names and a metric try to break out."""
    prompts = [ASKED, f"The clock shows 8. {EVIL}", "The clock shows 7.", "The clock shows 6."]
    samples, metrics = [], []
    for i, prompt in enumerate(prompts):
        base, student, rollout = (response(prompt, v, i) for v in ("base", "student", "rollout"))
        samples += [base, student, rollout | {"step": 3, "rewards": {"depth": -0.4, EVIL: None}}]
    samples.append(response(prompts[1], EVIL, 5, ["Now", EVIL, "$js", "\x00\u2028\ud83d"]))
    for i in range(11):
        loss = None if i == 3 else 10.0 - i
        metrics.append({"step": i, "loss": loss, "student_exit": [0.2, 0.3], EVIL: i})
    rows = [
        row("base", "full", 0.93, 28),
        row("student", "head", 0.91, 14),
        row(EVIL, EVIL, 0.8, 9),
    ]
    evaluation = {"model": "m", "rows": rows, "frontier": [*rows, row("student", "kl:2", 0.9, 18)]}
    return Run(name, samples, metrics, {"evaluation_seconds": 94.2}, evaluation, f"{name}/")


def data_of(path: Path) -> dict:
    packed = path.read_text().split('id="data">')[1].split("<")[0]
    text = zlib.decompress(base64.b64decode(packed))
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"JavaScript has no {name}"))


# --- the file -----------------------------------------------------------------------------------


def test_two_hundred_responses_under_three_megabytes(tmp_path):
    """Catches: a page that mails and browsers choke on, and details dropped without need."""
    samples = [response(f"prompt {i}", "student", i, (STORY * 20)[:400]) for i in range(200)]
    write_page(tmp_path / "r.html", [Run("", samples)], "Big")
    assert (tmp_path / "r.html").stat().st_size < 3_000_000
    assert data_of(tmp_path / "r.html")["left_out"] == []


def test_the_data_keeps_every_number(tmp_path):
    """Catches: a column one token off, chances of the wrong head, responses apart from a prompt."""
    samples = [response("p", "a", 1), response("q", "a", 2), response("p", "b", 3)]
    write_page(tmp_path / "r.html", [Run("", samples)])
    data = data_of(tmp_path / "r.html")
    assert [r["label"] for r in data["responses"]] == ["a", "b", "a"], "responses to p, then to q"
    for at, sample in enumerate([samples[0], samples[2], samples[1]]):
        for i, token in enumerate(sample["tokens"]):
            assert data["words"][at][i] == token["text"]
            assert data["depths"][at][i] == token["depth"]
            assert data["heads"][at][i] == pytest.approx(token["exit_probs"], abs=6e-4)
            found = [*zip(data["top"][at][i], data["chances"][at][i])]
            assert found == [(text, pytest.approx(p, abs=6e-4)) for text, p in token["top"]]


def test_a_tight_budget_drops_details_of_the_last():
    """Catches: whole responses, or the first ones, dropped while details of the last could go."""
    samples = [response(f"p{i}", "student", i) for i in range(10)]
    kept, left_out = _fit(_responses([Run("", samples)]), 3_000)
    assert len(kept) == 10 and kept[0]["top"] and kept[-1]["top"] is None and kept[-1]["heads"]
    assert re.fullmatch(r"likeliest tokens of the last \d", left_out[0]) and len(left_out) == 1
    kept, left_out = _fit(_responses([Run("", samples)]), 10)
    assert len(kept) == 1 and left_out[0] == "text of the last 9", "one response is always kept"


def test_no_text_of_a_model_is_markup(tmp_path):
    """Catches: an unescaped name, a filled placeholder, a stale hash, a figure that is missing."""
    write_page(tmp_path / "r.html", [example()], title=EVIL, note=EVIL)
    text = (tmp_path / "r.html").read_text()
    assert "<img" not in text and text.count("</script>") == 2
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in text and f"script-src 'sha256-{digest}'" in text
    assert data_of(tmp_path / "r.html")["words"][6][2] == " $js"
    for title in ("Accuracy under a cap", "Accuracy by group", "Same answer, capped"):
        assert f'aria-label="{title}"' in text


def test_a_base_of_three_runs_is_shown_once(tmp_path):
    """Catches: the same base three times, another base left out, runs that become one line."""
    runs = [example(name) for name in ("first", "second", "third")]
    runs[2].evaluation["model"] = "another"
    write_page(tmp_path / "r.html", runs)
    data, text = data_of(tmp_path / "r.html"), (tmp_path / "r.html").read_text()
    head = [name for name in data["table"][0][0] if "script" not in name]
    assert head[:4] == ["", "base (full)", "first · student (head)", "second · student (head)"]
    assert head[4:] == ["third · base (full)", "third · student (head)"]
    labels = [r["label"] for r, asked in zip(data["responses"], data["prompt"]) if asked == ASKED]
    assert labels[:3] == ["base", "first · student", "first · rollout · step 3"]
    assert labels[3:5] == ["second · student", "second · rollout · step 3"]
    for name in ("first", "second", "first · student", "second · student (head)"):
        assert f'data-name="{name}"' in text


HOSTILE = [None, True, "x", EVIL, -1, 0, 10**400, 1e308, float("nan"), float("inf"), [], {}]
HOSTILE += [[[]], [1, "x"], [["x"]], {"x": 1}, {"1": {}}, [{}], [None]]


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of each value in nested dicts and lists; the first two items of lists."""
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value[:2]) if isinstance(value, list) else items
    return [path, *(found for key, item in items for found in places(item, (*path, key)))]


@pytest.mark.parametrize("part", ["samples", "metrics", "summary", "evaluation"])
def test_hostile_files(part, tmp_path):
    """Catches: a traceback, or an error that names no file, for a wrong type anywhere."""
    run, draw = example(), random.Random(0)
    run.samples = [response("p", "student", 1, STORY[:2]) | {"rewards": {"depth": 1.0}}]
    run.metrics, run.evaluation["rows"] = run.metrics[:2], run.evaluation["rows"][1:2]
    run.evaluation["frontier"] = run.evaluation["frontier"][1:2]
    lines = part in ("samples", "metrics")  # that each is an object is checked where lines are read
    for *path, key in [found for found in places(getattr(run, part)) if len(found) > lines]:
        broken = copy.deepcopy(run)
        target = getattr(broken, part)
        for step in path:
            target = target[step]
        target[key] = draw.choice(HOSTILE)
        try:
            write_page(tmp_path / "r.html", [broken])
            data_of(tmp_path / "r.html")
        except UserError as error:
            assert f"tiny/{part}.json" in str(error), error


def test_the_script(tmp_path):
    """Catches: a traceback, or an error without file and key, for what people get wrong."""
    sample = response("p", "student", 0)
    bad = "samples.jsonl: response 1.tokens[2].depth: expected a depth from 1 to 28, found 29\n"
    for depth, code, wanted in ((28, 0, "1 responses, 0 steps"), (29, 2, bad)):
        sample["tokens"][2]["depth"] = depth
        write_json_lines(tmp_path / "samples.jsonl", [sample])
        command = [sys.executable, SCRIPT, tmp_path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code and wanted in done.stdout + done.stderr, done.stderr
        assert done.stderr.count("\n") == (code > 0)
    with pytest.raises(UserError, match="no run to report; expected a folder with samples"):
        read_run(tmp_path / "none")


# --- the page in a browser ----------------------------------------------------------------------


class Browser:
    """As much of the WebDriver protocol as these tests need, spoken to chromedriver."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [shutil.which("chromedriver"), "--port=0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        found = (re.search(r"successfully on port (\d+)", line) for line in self.process.stdout)
        self.url = f"http://127.0.0.1:{next(match[1] for match in found if match)}/session"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--no-first-run", "--window-size=1280,900", f"--user-data-dir={folder}/profile"]
        options = {"args": flags, "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.url += "/" + self.call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def call(self, path: str, body: dict | None = None, method: str = "POST") -> object:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def js(self, code: str) -> object:
        return self.call("/execute/sync", {"script": f"return {code}", "args": []})

    def wait(self, code: str) -> None:
        look = f"const look = (done) => {code} ? done() : setTimeout(look, 20, done);"
        self.call("/execute/async", {"script": f"{look} look(arguments[0])", "args": []})

    def texts(self, selector: str) -> list[str]:
        found = f"[...document.querySelectorAll('{selector}')]"
        return self.js(f"{found}.filter(e => e.checkVisibility()).map(e => e.textContent)")

    def click(self, selector: str) -> None:
        self.js(f"document.querySelector('{selector}').click()")

    def set(self, selector: str, value: object, event: str) -> None:
        found = f"document.querySelector('{selector}')"
        event = f"{found}.dispatchEvent(new Event('{event}'))"
        self.js(f"({found}.value = {json.dumps(value)}, {event})")

    def hover(self, selector: str) -> None:
        self.js(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
        found = self.call("/element", {"using": "css selector", "value": selector})
        move = {"type": "pointerMove", "duration": 0, "origin": found, "x": 0, "y": 0}
        self.call("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def press(self, selector: str, *keys: str) -> None:
        self.js(f"document.querySelector('{selector}').focus()") if selector else None
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
    folder = tmp_path_factory.mktemp("browser")
    write_page(folder / "report.html", [example()])
    driver = Browser(folder)
    yield driver
    driver.call("", method="DELETE")
    driver.process.terminate()
    driver.process.wait(10)


@pytest.fixture
def browser(driver):
    """The example's page, freshly opened."""
    driver.call("/url", {"url": (driver.folder / "report.html").as_uri()})
    driver.js("localStorage.clear()")
    driver.wait("document.documentElement.dataset.ready === ''")
    return driver


RIGHT, DOWN, END, ESCAPE = "\ue014", "\ue015", "\ue010", "\ue00c"


def test_opens_clean_with_its_figures(browser):
    """Catches: an error in the console, a request, text that becomes code, a NaN as a number."""
    tiles = browser.texts(".tiles div")
    assert tiles[0] == "accuracy0.910base 0.930" and tiles[-1] == "evaluation, seconds94"
    assert "KL to the teacher, nats–––" in browser.texts("#table tbody tr")
    assert "– steps written: the task lists no steps" in browser.texts("#table li")
    browser.click("#picker li:nth-child(2)")
    assert EVIL in browser.texts("#prompt")[0]
    text = "document.querySelector('.card:nth-child(4) .text').textContent"
    assert browser.js(f"{text}.includes({json.dumps(EVIL)})")
    assert browser.js("[window.hacked ?? 0, document.images.length]") == [0, 0]
    assert browser.js("performance.getEntriesByType('resource').length") == 0, "nothing is fetched"
    assert browser.call("/se/log", {"type": "browser"}) == []


def test_hover_shows_the_numbers_of_that_token(browser):
    """Catches: a panel one token off, wrong units, a head that was not asked shown as 0."""
    tokens = response(ASKED, "student", 0)["tokens"]
    place, token = next((i, t) for i, t in enumerate(tokens) if t["depth"] == 10)
    browser.hover(f".card:nth-child(2) .text span:nth-child({place + 1})")
    where = f"exited at depth 10 of 28 · reasoning, token {place + 1} of {len(STORY)}"
    assert browser.texts("#inspect p") == [where]
    asked = [f"depth {d}{100 * round(p, 3):.1f}%" for d, p in zip(EXITS, token["exit_probs"][:2])]
    rows = browser.texts("#inspect tr")
    assert rows[:5] == [*asked, *(f"depth {d}not asked" for d in EXITS[2:])]
    assert rows[6:] == ["␣the20.0%", "␣75.0%", "↵3.0%", "␣so<0.1%"]
    browser.hover("h1")
    assert browser.texts("#inspect p") == []


def test_keyboard_reaches_every_token_and_prompt(browser):
    """Catches: a page for mice only, or one where 10,000 tokens are 10,000 tab stops."""
    assert len(browser.texts('.text span[tabindex="0"]')) == 3
    browser.press(".card:nth-child(2) .text span", RIGHT, RIGHT)
    assert "token 3 of" in browser.texts("#inspect p")[0]
    browser.press("", END)
    assert f"token {len(STORY)} of" in browser.texts("#inspect p")[0]
    browser.press("", ESCAPE)
    assert browser.texts("#inspect p") == []
    browser.press("#search", *"SHOWS 6")
    assert browser.texts("#found") == ["1 of 4 prompts"]
    browser.click("#picker li")
    assert "The clock shows 6." in browser.texts("#prompt")[0]
    browser.set("#search", "= 14 so", "input")
    assert len(browser.texts("#picker li")) == 4, "found in the responses"
    browser.press("#picker li", DOWN, DOWN)
    assert "shows 7." in browser.texts("#prompt")[0]


def test_replay(browser):
    """Catches: a replay that starts whole, never ends, or gives every depth the same time."""
    later = "[...document.querySelectorAll('.card')].map(c => c.querySelectorAll('.later').length)"
    assert browser.js(later) == [0, 0, 0]
    browser.set("#seek", 100, "input")
    base, student, _ = browser.js(later)
    depths = [token["depth"] for token in response(ASKED, "student", 0)["tokens"]]
    assert base == len(STORY) - 3, "100 layers pay for 3 tokens of 28"
    assert student == sum(sum(depths[: i + 1]) > 100 for i in range(len(depths))) < base
    browser.set("#speed", 16, "change")
    browser.click("#play")
    browser.wait("document.querySelector('#play').textContent === 'Play'")
    assert browser.js(later) == [0, 0, 0]


def test_choosers_and_cross_hair(browser):
    """Catches: a chooser that changes a label and nothing else, a cross-hair off its curve."""
    browser.click("#variants button")
    assert browser.texts(".card h3") == ["student", "rollout · step 3"]
    style = "['.text span', 'body'].map(s => getComputedStyle(document.querySelector(s)))"
    before = browser.js(f"{style}.map(s => s.backgroundColor)")
    browser.set("#scale", "safe", "change")
    browser.click("#theme")
    after = browser.js(f"{style}.map(s => s.backgroundColor)")
    assert before[0] != after[0] and before[1] != after[1]
    browser.hover("svg[aria-label=loss]")
    at, value = browser.texts(".readout div")
    assert float(value) == pytest.approx(10 - float(at.removeprefix("at ")), abs=0.05)


def test_fits_a_phone(browser):
    """Catches: a page that scrolls sideways at 390 px, a panel outside the screen."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": size}
    browser.call("/goog/cdp/execute", command)
    browser.hover(".card:nth-child(2) .text span:nth-child(9)")
    assert browser.js("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    box = browser.js("document.querySelector('#inspect').getBoundingClientRect().toJSON()")
    assert box["left"] >= 0 and box["right"] <= 390 and box["width"] > 200
