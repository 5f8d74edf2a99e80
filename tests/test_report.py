"""The report page: what is in the file, and, in headless Chromium where there is one, what a person can do with it."""

import json
import random
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from nanoexit.figures import Line, line_figure, thin, ticks, training_figures
from nanoexit.report import pack, read_run, write_page, write_runs

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "report.py"
EVIL = "</script><img src=x onerror=\"window.hacked=1\"><script>window.hacked=1</script>"
STORY = "Start at 9 . 9 + 5 = 14 so it is 2 . 2 + 11 = 13 so it is 1 . \n #### 1".split(" ")


# ---- data as the other scripts write it -------------------------------------------------------------------------------


def response(prompt: str, variant: str, seed: int, repeat: int = 1, text: list[str] = STORY) -> dict:
    """A response as samples.jsonl has it, its numbers drawn from `seed`: depths at the exits, heads asked only up to there."""
    exits, full = (5, 10, 15, 20, 25), 28
    draw, tokens = random.Random(seed), []
    for index, piece in enumerate([" " * (i > 0) + word for i, word in enumerate(text * repeat)]):
        depth = full if not index or variant == "base" else draw.choice([*exits, *exits[:2], full])
        probs = [round(draw.random(), 3) if d <= depth else None for d in exits]
        top = [[piece, 0.7], [" the", 0.2], [" 7", 0.05], ["\n", 0.03], [" so", 0.0004]]
        kind = "answer" if index > 0.85 * len(text) * repeat else "punctuation" if not piece.strip().isalnum() else "reasoning"
        tokens.append({"text": piece, "depth": depth, "kind": kind, "exit_probs": probs, "top": top})
    whole = "".join(token["text"] for token in tokens)
    return {"id": f"clock-{prompt[:12]}", "prompt": prompt, "answer": "1", "variant": variant, "text": whole, "finish": "stop",
            "correct": seed % 3 > 0, "full_depth": full, "exit_layers": list(exits), "tokens": tokens}  # fmt: skip


def run_folder(folder: Path, prompts: int = 4, repeat: int = 1) -> Path:
    """A run directory with all four files; the second prompt and the last response try to break out of the page."""
    asked = [f"The clock shows {9 - i}. Add 5, then add 11. Which hour is it?" for i in range(prompts)]
    asked[1] += EVIL
    samples = [response(p, v, 7 * i + j, repeat) for i, p in enumerate(asked) for j, v in enumerate(["base", "head", "after RL"])]
    samples.append(response(asked[1], "kl:2" + EVIL, 5, text=["Now", EVIL, "{{js}}", "\x00\u2028"]))
    metrics = [
        {"step": i, "loss": 2 / (i + 1) + 0.1, "kl": 1 / (i + 1), "exit_loss": 0.7 / (i + 1), "lr": 1e-3, "mean_depth": 28 - i / 20,
         "exit_kl": [0.5, 0.4, 0.3, 0.2, 0.1], "teacher_exit": [0.1, 0.3, 0.5, 0.7, 0.9],
         "student_exit": [0.2 + i / 1000, 0.3, 0.4, 0.6, 0.8], "reward": i / 300, "reward_depth": -0.4, "flat_groups": 0.1,
         "odd": float("nan"), "name" + EVIL: i}
        for i in range(300)
    ]  # fmt: skip
    teacher = {"accuracy": 0.93, "mean_depth": 28, "full_depth": 28, "layers_run": 1, "tokens": 60100}
    summary = {"accuracy": 0.91, "mean_depth": 14.2, "full_depth": 28, "layers_run": 0.507, "kl": 0.031, "tokens": 61200,
               "seconds": 94.2, "teacher": teacher}  # fmt: skip
    policies = [("base", "full", 0.93, 28), ("trained", "head", 0.91, 14), ("trained", "kl:2", 0.92, 18), ("b" + EVIL, "kl:1", 0.8, 11)]
    rows = [evaluation_row(*policy) for policy in policies]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "evaluation.json").write_text(json.dumps({"rows": rows}))
    return folder


def evaluation_row(variant: str, policy: str, accuracy: float, depth: float) -> dict:
    histogram = {"5": 0.2, "10": 0.25, "15": 0.2, "20": 0.05, "25": 0.03, "28": 0.27} if depth < 28 else {"28": 1.0}
    return {
        "variant": variant, "policy": policy, "accuracy": accuracy, "accuracy_interval": [accuracy - 0.03, accuracy + 0.02],
        "mean_depth": depth, "full_depth": 28, "layers_run": depth / 28, "exit_rate": 1 - histogram["28"],
        "exit_histogram": histogram, "kl": 0.03, "perplexity": 3.1, "depth_by_position": [depth - i % 3 for i in range(20)],
        "depth_by_kind": {"reasoning": depth - 1, "answer": min(28, depth + 3)},
        "early_answering": [[0, 0.2], [0.5, 0.4 + depth / 100], [1, 1]], "adding_mistakes": {"follow": 0.6, "stay": 0.3, "stop": 0.1},
        "judge": {"kind": "offline", "means": {"overall": 31.2}, "failed": 2},
    }  # fmt: skip


def page_data(path: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)[1])


# ---- the file ---------------------------------------------------------------------------------------------------------


def test_two_hundred_responses_under_three_megabytes(tmp_path):
    """Catches a page that mails and browsers choke on: 200 responses of 500 tokens fit, and what was left out is said."""
    samples = [response(f"prompt {i}", "head", i, repeat=18) for i in range(200)]
    write_page(tmp_path / "r.html", "Big", samples)
    data = page_data(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 3_000_000
    assert len(data["prompts"]) == 200 and data["left_out"] and "responses" not in data["left_out"]
    assert data["prompts"][0]["samples"][0]["top"], "the first responses keep all details"


def test_packing_keeps_every_number():
    """Catches a column read one place off: unpacked by hand, depth, head and top-5 are those that went in."""
    sample = response("p", "head", 1) | {"label": "head", "rewards": {}}
    data = pack([sample])
    packed, width = data["prompts"][0]["samples"][0], data["width"]
    for index, token in enumerate(sample["tokens"]):
        assert data["words"][int(packed["tokens"][index * width : (index + 1) * width], 36)] == token["text"]
        assert int(packed["depths"][2 * index : 2 * index + 2], 36) == token["depth"]
        heads = [packed["heads"][10 * index + 2 * e :][:2] for e in range(5)]
        assert [None if h == "zz" else int(h, 36) / 1000 for h in heads] == token["exit_probs"]
        top = packed["top"][5 * (width + 2) * index :][: 5 * (width + 2)]
        pairs = [top[i * (width + 2) :][: width + 2] for i in range(5)]
        assert [data["words"][int(p[:width], 36)] for p in pairs] == [text for text, _ in token["top"]]
        assert [int(p[width:], 36) for p in pairs] == [700, 200, 50, 30, 0]


def test_a_tight_budget_drops_details_before_responses():
    """Catches a page that drops whole responses, or the first ones, while details of the last could still go."""
    samples = [response(f"p{i}", "head", i) | {"label": "head", "rewards": {}} for i in range(10)]
    whole = len(json.dumps(pack(samples)))
    first, *_, last = pack(samples, whole - 3000)["prompts"]
    assert first["samples"][0]["top"] and not last["samples"][0]["top"] and last["samples"][0]["heads"]
    tiny = pack(samples, 100)
    assert len(tiny["prompts"]) == 1 and tiny["left_out"]["responses"] == 9, "one response is always kept"


def test_no_text_of_a_model_is_markup(tmp_path):
    """Catches a text that ends the data's script element, a metric's or variant's name put unescaped into a figure, and a
    placeholder in a response filled by the template."""
    write_runs(tmp_path / "r.html", [read_run(run_folder(tmp_path / "run"))], title=EVIL)
    text = (tmp_path / "r.html").read_text()
    assert "<img" not in text and text.count("</script>") == 2
    assert "{{js}}" in text, "shown as the model wrote it"
    assert "31.2 <small>offline, 2 failed</small>" in text, "a rubric names who scored, and how often that failed"


def test_each_file_may_be_missing(tmp_path):
    """Catches a page that needs a file which a run of another kind does not write."""
    for name in ("samples.jsonl", "metrics.jsonl", "summary.json", "evaluation.json"):
        folder = run_folder(tmp_path / name)
        for other in folder.iterdir():
            if other.name != name:
                other.unlink()
        write_runs(tmp_path / "r.html", [read_run(folder)])
        text = (tmp_path / "r.html").read_text()
        assert ("<h2>Training</h2>" in text) == (name == "metrics.jsonl")
        assert ("<h2>Quality</h2>" in text) == (name == "evaluation.json")
        assert ("<h2>Depth</h2>" in text) == (name in ("samples.jsonl", "evaluation.json"))
        assert ('class="tiles"' in text) == (name == "summary.json")


def test_runs_side_by_side(tmp_path):
    """Catches two runs whose variants have one name and become one: one curve, one bar, one column of responses."""
    runs = []
    for name in ("first", "second"):
        folder = run_folder(tmp_path / name)
        (folder / "evaluation.json").unlink()
        runs.append(read_run(folder))
    write_runs(tmp_path / "r.html", runs)
    text = (tmp_path / "r.html").read_text()
    assert [s["label"] for s in page_data(tmp_path / "r.html")["prompts"][0]["samples"]] == [
        f"{run} · {variant}" for run in ("first", "second") for variant in ("base", "head", "after RL")
    ]
    for name in ("first · head", "second · head", "first loss", "second loss"):
        assert f'data-name="{name}"' in text
    write_runs(tmp_path / "r.html", [read_run(run_folder(tmp_path / name)) for name in ("first", "second")])
    text = (tmp_path / "r.html").read_text()
    for name in ("first · trained · kl", "second · trained · kl"):
        assert f'data-name="{name}"' in text, "a frontier of each run"


def test_evaluation_fields_may_be_missing(tmp_path):
    """Catches a KeyError on a row that has little: a policy without accuracy, depth without its whole, a judge that failed."""
    rows = [{}, {"variant": "a", "accuracy": 0.5}, {"policy": "head", "mean_depth": 3, "full_depth": 4, "accuracy": 1.0},
            {"judge": {"means": {}, "failed": 3}}, {"exit_histogram": {"1": 1.0}},
            {"accuracy": None, "early_answering": [], "adding_mistakes": {"follow": 1.0}}]  # fmt: skip
    write_page(tmp_path / "r.html", "Few", [], evaluation={"rows": rows})
    assert "Quality against depth" in (tmp_path / "r.html").read_text()


def test_mistakes_are_one_line(tmp_path):
    """Catches a traceback, and a line that names neither file nor what is right, for the mistakes that people make."""

    def fails(*arguments: str) -> str:
        done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "no such folder" in fails(str(tmp_path / "none"))
    assert "samples.jsonl, metrics.jsonl" in fails(str(tmp_path))
    lines = run_folder(tmp_path / "run").joinpath("samples.jsonl").read_text().splitlines()
    (tmp_path / "run/samples.jsonl").write_text("\n".join([lines[0], "{oops", lines[1]]))
    assert "samples.jsonl: line 2: not JSON" in fails(str(tmp_path / "run"))
    broken = json.loads(lines[0])
    broken["tokens"][2]["depth"] = 29
    (tmp_path / "run/samples.jsonl").write_text(json.dumps(broken) + "\n")
    assert "tokens[2].depth: expected 1 to 28, found 29" in fails(str(tmp_path / "run"))


def test_a_run_that_is_still_written(tmp_path):
    """Catches a report that fails beside a live run: half a last line is left out, the page is renamed into place."""
    folder = run_folder(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as out:
        out.write('{"step": 300, "lo')
    done = subprocess.run([sys.executable, SCRIPT, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 and "13 responses, 300 steps" in done.stdout, done.stderr
    written = sorted(p.name for p in folder.iterdir())
    assert written == ["evaluation.json", "metrics.jsonl", "report.html", "samples.jsonl", "summary.json"], "nothing half done"


def test_ticks_and_thinning():
    """Catches axes that cut off a value, repeat a number or divide by zero, and thinning that loses the end of a run."""
    assert ticks(0, 1) == pytest.approx([0, 0.5, 1]) and ticks(3, 3)[0] <= 3 <= ticks(3, 3)[-1]
    for low, high in [(0, 0), (-3.2, 9.1), (1e-9, 2e-9), (0, 12345), (0.93, 0.94)]:
        marks = ticks(low, high)
        assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 7 and marks == sorted(set(marks))
    assert thin([(0, 1), (1, 3), (2, 5), (3, 7), (4, 9)], 3) == [(0.5, 2), (2.5, 6), (4, 9)]
    assert thin([]) == []


def test_curves_stand_where_they_should():
    """Catches an upside-down axis, related metrics torn apart, and a NaN in a curve that blanks the whole figure."""
    svg = line_figure("t", "x", "y", [Line("a", [(0, 0.0), (10, 1.0)], "red")])
    (x0, y0), (x1, y1) = ((float(v) for v in p.split(",")) for p in re.search(r'points="(\S+ \S+)"', svg)[1].split())
    assert x0 < x1 and y0 > y1
    flat = line_figure("t", "x", "y", [Line("a", [(0, 8), (1, 8)], "red")])
    assert re.search(r'data-y="(\S+) (\S+)', flat).groups() == ("0", "8"), "a constant stands on zero"
    metrics = [{"step": 1, "loss": 2.0, "kl": float("nan"), "exit_loss": 1}, {"step": 2, "loss": 1.0, "kl": 0.5, "exit_kl": [1, 2]}]
    figures = training_figures([("r", metrics)], [5, 10], 12)
    assert figures.count("<figure") == 2 and "nan" not in figures and "depth 10" in figures and "var(--d10of12)" in figures


# ---- the page in a browser --------------------------------------------------------------------------------------------


class Browser:
    """As much of the WebDriver protocol as these tests need, spoken to chromedriver over loopback."""

    def __init__(self, profile: Path):
        self.process = subprocess.Popen([shutil.which("chromedriver"), "--port=0"], stdout=subprocess.PIPE, text=True)
        found = (re.search(r"started successfully on port (\d+)", line) for line in self.process.stdout)
        port = next(match[1] for match in found if match)
        self.url = f"http://127.0.0.1:{port}/session"
        flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
                 "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1280,900").split()  # fmt: skip
        flags.append(f"--user-data-dir={profile}")
        options = {"goog:chromeOptions": {"args": flags, "binary": shutil.which("chromium")}, "goog:loggingPrefs": {"browser": "ALL"}}
        self.url += "/" + self.call("", {"capabilities": {"alwaysMatch": options}})["sessionId"]

    def call(self, path: str, body: dict | None = None, method: str = "POST") -> object:
        request = urllib.request.Request(self.url + path, None if body is None else json.dumps(body).encode(), method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
            return json.load(reply)["value"]

    def open(self, path: Path) -> None:
        self.call("/url", {"url": path.as_uri()})

    def js(self, code: str) -> object:
        """The value of a JavaScript expression in the page."""
        return self.call("/execute/sync", {"script": f"return {code}", "args": []})

    def texts(self, selector: str) -> list[str]:
        found = f"[...document.querySelectorAll({json.dumps(selector)})]"
        return self.js(f"{found}.filter(e => e.checkVisibility()).map(e => e.textContent)")

    def element(self, selector: str) -> dict:
        return self.call("/element", {"using": "css selector", "value": selector})

    def click(self, selector: str) -> None:
        self.call(f"/element/{next(iter(self.element(selector).values()))}/click", {})

    def set(self, selector: str, value: object, event: str) -> None:
        found = f"document.querySelector({json.dumps(selector)})"
        self.js(f"({found}.value = {json.dumps(value)}, {found}.dispatchEvent(new Event('{event}')))")

    def hover(self, selector: str) -> None:
        self.js(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        move = {"type": "pointerMove", "duration": 0, "origin": self.element(selector), "x": 0, "y": 0}
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
        self.call("/actions", {"actions": [mouse]})

    def press(self, *keys: str) -> None:
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": steps}]})

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.call("/se/log", {"type": "browser"})]

    def cdp(self, command: str, **parameters: object) -> None:
        self.call("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def wait(self, expression: str, seconds: float = 10) -> None:
        later = f"Date.now() > {1000 * seconds} + begun ? done(false) : setTimeout(look, 20)"
        code = f"const [done] = arguments, begun = Date.now(); (function look() {{ {expression} ? done(true) : {later} }})()"
        assert self.call("/execute/async", {"script": code, "args": []}), f"never came true: {expression}"

    def close(self) -> None:
        try:
            self.call("", method="DELETE")
        finally:
            self.process.terminate()
            self.process.wait(10)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = run_folder(tmp_path_factory.mktemp("runs") / "tiny")
    write_runs(folder / "report.html", [read_run(folder)])
    return folder / "report.html"


ARROWS = {"right": "\ue014", "down": "\ue015", "end": "\ue010"}


def test_opens_clean_and_injected_script_does_not_run(browser, report):
    """Catches any console error, also a blocked style or script or request, and a response or prompt that runs as code."""
    browser.open(report)
    browser.click("#picker li:nth-child(2)")
    assert EVIL in browser.js("document.querySelector('#prompt').textContent")
    assert EVIL in "".join(browser.texts(".card:nth-child(4) .text span")), "a response shows as the text it is"
    assert browser.js("[window.hacked ?? null, document.images.length, document.scripts.length]") == [None, 0, 2]
    assert browser.errors() == []
    assert browser.js("performance.getEntriesByType('resource').length") == 0, "nothing is fetched"


def test_hover_shows_the_numbers_of_that_token(browser, report):
    """Catches a panel off by one token, wrong units, and 'not asked' shown as a chance of 0."""
    browser.open(report)
    tokens = response("The clock shows 9. Add 5, then add 11. Which hour is it?", "head", 1)["tokens"]
    place, token = next((i, t) for i, t in enumerate(tokens) if t["depth"] == 10 and t["kind"] == "reasoning")
    browser.hover(f".card:nth-child(2) .text span:nth-child({place + 1})")
    assert browser.texts("#inspect p") == [f"depth 10 of 28 · reasoning, token {place + 1} of {len(STORY)}"]
    rows = [re.sub(r"\s+", " ", text) for text in browser.texts("#inspect tr")]
    wanted = [None if p is None else 100 * p for p in token["exit_probs"]]
    for row, depth, value in zip(rows, (5, 10, 15, 20, 25), wanted):
        assert row.startswith(f"depth {depth}")
        shown = row.removeprefix(f"depth {depth}")
        assert shown == "not asked" if value is None else float(shown.removesuffix(" %")) == pytest.approx(value)
    assert wanted[2:] == [None, None, None], "heads beyond the exit were not asked"
    assert rows[5:] == [f"␣{token['text'].strip()}70.0 %", "␣the20.0 %", "␣75.0 %", "↵3.0 %", "␣so<0.1 %"]
    browser.hover("h1")
    assert browser.texts("#inspect p") == []


def test_keyboard_reaches_every_token(browser, report):
    """Catches a page for mice only, and one where 10,000 tokens are 10,000 tab stops."""
    browser.open(report)
    assert browser.js("document.querySelectorAll('.text span[tabindex=\"0\"]').length") == 3, "one stop a response"
    browser.js("document.querySelector('.card:nth-child(2) .text span').focus()")
    browser.press(ARROWS["right"], ARROWS["right"])
    assert "token 3 of" in browser.texts("#inspect p")[0]
    browser.press(ARROWS["end"])
    assert f"token {len(STORY)} of" in browser.texts("#inspect p")[0]
    browser.press("\ue00c")
    assert browser.texts("#inspect p") == []


def test_picker_and_search(browser, report):
    """Catches a search blind to responses, an index of the filtered list used on the whole one, and a picker without keys."""
    browser.open(report)
    assert len(browser.texts("#picker li")) == 4 and browser.texts(".card h3") == ["base", "head", "after RL"]
    browser.click("#search")
    browser.press(*"SHOWS 6")
    assert browser.texts("#found") == ["1 of 4 prompts"]
    browser.click("#picker li")
    assert "The clock shows 6." in browser.texts("#prompt")[0]
    browser.set("#search", "= 14 so", "input")
    assert len(browser.texts("#picker li")) == 4, "found in the responses"
    browser.click("#picker li:first-child")
    browser.press(ARROWS["down"], ARROWS["down"])
    assert "shows 7." in browser.texts("#prompt")[0]


def test_replay(browser, report):
    """Catches a replay that starts fully written, never ends, or gives early and late exits the same time."""
    browser.open(report)
    later = "[...document.querySelectorAll('.card')].map(c => c.querySelectorAll('.later').length)"
    assert browser.js(later) == [0, 0, 0]
    browser.set("#seek", 100, "input")
    base, head, _ = browser.js(later)
    assert base == len(STORY) - 3, "100 blocks pay for 3 tokens of 28"
    depths = [t["depth"] for t in response("The clock shows 9. Add 5, then add 11. Which hour is it?", "head", 1)["tokens"]]
    assert head == sum(sum(depths[: i + 1]) > 100 for i in range(len(depths))) < base
    browser.click("#play")
    assert browser.texts("#play") == ["Pause"]
    browser.set("#speed", 16, "change")
    browser.wait("document.querySelector('#play').textContent === 'Play'")
    assert browser.js(later) == [0, 0, 0]
    browser.set("#speed", 0.25, "change")
    browser.click("#play")
    assert browser.js(later)[0] >= len(STORY) - 2, "it starts again from nothing"
    browser.click("#picker li:nth-child(3)")
    assert browser.js(later) == [0, 0, 0], "another prompt is shown whole"


def test_variants_scale_and_theme(browser, report):
    """Catches choosers that change a label and nothing else, and a button for a response that this prompt has not."""
    browser.open(report)
    counts = []
    for prompt in (2, 1):
        browser.click(f"#picker li:nth-child({prompt})")
        counts.append((len(browser.texts("#variants button")), len(browser.texts(".card h3"))))
    assert counts == [(4, 4), (3, 3)]
    browser.click("#variants button:nth-child(1)")
    assert browser.texts(".card h3") == ["head", "after RL"]
    background = "getComputedStyle(document.querySelector('.card .text span')).backgroundColor"
    before = browser.js(background)
    browser.set("#scale", "safe", "change")
    assert browser.js(background) != before
    paper = browser.js("getComputedStyle(document.body).backgroundColor")
    browser.click("#theme")
    assert browser.js("getComputedStyle(document.body).backgroundColor") != paper
    browser.js("localStorage.clear()")


def test_one_response_and_a_figure(browser, tmp_path):
    """Catches a picker beside a single prompt (`sample.py --html`), a chip for a single variant, and a dead cross-hair."""
    metrics = [{"step": i, "loss": 10.0 - i} for i in range(11)]
    write_page(tmp_path / "one.html", "One", [response("p", "head", 1)], metrics)
    browser.open(tmp_path / "one.html")
    assert browser.texts("nav") == [] and browser.texts("#variants button") == [] and browser.texts(".card h3") == ["head"]
    browser.hover("svg[aria-label=Loss]")  # its middle is at 4.5: the axis takes room on the left
    assert browser.texts(".readout div") == ["at 4", "loss  6"]
    assert browser.errors() == []


def test_fits_a_phone(browser, report):
    """Catches anything wider than a phone's screen: at 390 px the page does not scroll sideways, and the panel is inside."""
    browser.cdp("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    try:
        browser.open(report)
        assert browser.js("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        browser.hover(".card:nth-child(2) .text span:nth-child(9)")
        box = browser.js("document.querySelector('#inspect').getBoundingClientRect().toJSON()")
        assert box["left"] >= 0 and box["right"] <= 390 and box["width"] > 200
    finally:
        browser.cdp("Emulation.clearDeviceMetricsOverride")
