"""The page: what is in the file and, in a headless Chromium, what a person can do with it."""

import base64
import copy
import functools
import json
import random
import re
import shutil
import subprocess
import urllib.request
import zlib
from hashlib import sha256
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from conftest import script

from nanoexit.config import UserError, write_json_lines
from nanoexit.report import Run, read_run, write_page

EVIL = '</script><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
STORY = re.split(" ", "Start at 9 . 9 + 5 = 14 so it is 2 . 2 + 11 = 13 so it is 1 . \n #### 1")
ASKED = "The clock shows 9. Add 5, then add 11. Which hour is it?"
EXITS = (5, 10, 15, 20, 25)
HOSTILE = [None, True, "x", EVIL, -1, 0, 10**400, 1e308, float("nan"), float("inf"), [], {}]
HOSTILE += [[[]], [1, "x"], [["x"]], {"x": 1}, {"1": {}}, [{}], [None]]


def response(prompt: str, variant: str, seed: int, text: list[str] = STORY) -> dict:
    """A line of samples.jsonl; its numbers come from `seed`."""
    draw, tokens = random.Random(seed), []
    for index, word in enumerate(text):
        depth = 28 if variant == "base" else draw.choice([*EXITS, 5, 10, 28])
        probs = [round(draw.random(), 4) if d <= depth else None for d in EXITS]
        piece = " " * (index > 0) + word
        likely = round(draw.random(), 4)
        top = [[piece, likely], [" the", 0.2], [" 7", 0.05], ["\n", 0.03], [" so", 0.0004]]
        tokens.append({"text": piece, "depth": depth, "exit_probs": probs, "top": top})
    found = {"id": prompt[:16], "prompt": prompt, "answer": "1", "variant": variant, "cap": None}
    found |= {"text": "".join(text), "finish": "stop", "full_depth": 28, "exit_layers": [*EXITS]}
    return found | {"correct": seed % 3 > 0, "tokens": tokens}


def row(variant: str, policy: str, accuracy: float, depth: float) -> dict:
    """A row of evaluation.json."""
    row = {"variant": variant, "policy": policy, "prompts": 100, "full_depth": 28, "cap": None}
    row |= {"accuracy": accuracy, "accuracy_interval": [accuracy, 1], "written": None}
    row |= {"mean_depth": depth, "max_depth": depth, "layers_run": depth / 28, "tokens": 61.5}
    row |= {"max_depth_by_group": {"2 steps": depth, "logic": 3}}
    row |= {"exit_histogram": {"5": 0.3, "28": 0.7}, "capped_accuracy": {"4": 0.2, "28": 0.9}}
    row |= {"same_answer": [[0, 0.3], [1, 1]], "changed_value": {"follow": 0.8, "stay": 0.2}}
    return row | {"monitor": {"score": 0.9, "chance": 0.1}, "kl": float("nan"), "perplexity": 1.5}


def example(name: str = "tiny") -> Run:
    """A run with everything; a prompt, a response, names and a metric try to break out."""
    prompts = [ASKED, f"The clock shows 8. {EVIL}", "The clock shows 7.", "The clock shows 6."]
    samples, metrics = [], []
    for i, prompt in enumerate(prompts):
        base, student, rollout = (response(prompt, v, i) for v in ("base", "student", "rollout"))
        samples += [base, student, rollout | {"step": 3, "rewards": {"depth": -0.4, EVIL: None}}]
    samples.append(response(prompts[1], EVIL, 5, ["Now", EVIL, "$js", "\x00\u2028\ud83d"]))
    for i in range(11):
        losses = {"loss": None if i == 3 else 10.0 - i, "student_exit": [0.2, 0.3], EVIL: i}
        metrics.append({"step": i, **losses})
    rows = [row("base", "full", 0.93, 28), row("student", "head", 0.91, 14)]
    rows.append(row(EVIL, EVIL, 0.8, 9))
    return Run(name, samples, metrics, rows, [*rows, row("student", "kl:2", 0.9, 18)])


def data_of(path: Path) -> dict:
    packed = path.read_text().split('id="data">')[1].split("<")[0]
    text = zlib.decompress(base64.b64decode(packed))
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"JavaScript has no {name}"))


def test_two_hundred_responses_under_three_megabytes(tmp_path):
    """Catches: a page too big for browsers; responses left out, rounded away, or out of order."""
    samples = [response(f"prompt {i}", "student", i, (STORY * 20)[:400]) for i in range(200)]
    samples[0]["step"] = 1
    write_page(tmp_path / "r.html", [Run("", samples)], "Big")
    assert (tmp_path / "r.html").stat().st_size < 3_000_000
    data = data_of(tmp_path / "r.html")
    assert data["samples"] == [*samples[1:], samples[0]], "results come before rollouts"


def test_no_text_of_a_model_is_markup(tmp_path):
    """Catches: an unescaped name, a filled placeholder, a stale hash, a figure that is missing."""
    write_page(tmp_path / "r.html", [example()], title=EVIL, note=EVIL)
    text = (tmp_path / "r.html").read_text()
    assert "<img" not in text and text.count("</script>") == 2
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in text and f"script-src 'sha256-{digest}'" in text
    for title in ("Accuracy under a cap", "Accuracy against depth", "Chance to exit at the heads"):
        assert f'aria-label="{title}"' in text


def test_a_base_of_three_runs_is_shown_once(tmp_path):
    """Catches: a base shown three times or left out; runs made one line; a run in two colours."""
    runs = [example(name) for name in ("first", "second", "third")]
    runs[2].rows[0]["perplexity"] = 2.5
    write_page(tmp_path / "r.html", runs)
    data, text = data_of(tmp_path / "r.html"), (tmp_path / "r.html").read_text()
    head = [name for name in data["table"][0][0] if "script" not in name]
    assert head[:4] == ["", "base (full)", "first · student (head)", "second · student (head)"]
    assert head[4:] == ["third · base (full)", "third · student (head)"]
    variants = [sample["variant"] for sample in data["samples"] if sample["prompt"] == ASKED]
    assert variants[:4] == ["base", *(f"{run} · student" for run in ("first", "second", "third"))]
    for name in ("first", "second", "first · student (head)", "second, exit head 2"):
        assert f'data-name="{name}"' in text
    lines = re.findall('<g style="color:([^";]+).*?data-name="(.*?)"', text)
    names = ("first", "first · student (head)", "second", "second · student (head)")
    first, same, second, too = ({color for color, n in lines if n == name} for name in names)
    assert first == same != second == too and len(first) == len(second) == 1
    assert "first · student (kl) (not drawn, beyond 8 lines)" in text


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of each value in nested dicts and lists; the first two items of lists."""
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value[:2]) if isinstance(value, list) else items
    return [path, *(found for key, item in items for found in places(item, (*path, key)))]


@pytest.mark.parametrize("part", ["samples", "metrics", "rows", "frontier"])
def test_hostile_files(part, tmp_path):
    """Catches: a traceback, or an error that names no file, for a wrong type anywhere."""
    run, draw = example(), random.Random(0)
    run.samples = [response("p", "student", 1, STORY[:2]) | {"rewards": {"depth": 1.0}}]
    run.metrics, run.rows, run.frontier = run.metrics[:2], run.rows[1:2], run.frontier[1:2]
    lines = part in ("samples", "metrics")  # that each is an object is checked where lines are read
    for *path, key in [found for found in places(getattr(run, part)) if len(found) > lines]:
        broken = copy.deepcopy(run)
        functools.reduce(getitem, path, getattr(broken, part))[key] = draw.choice(HOSTILE)
        try:
            write_page(tmp_path / "r.html", [broken])
            data_of(tmp_path / "r.html")
        except UserError as error:
            assert f"tiny/{part if lines else 'evaluation'}.json" in str(error), error


def test_the_script(tmp_path):
    """Catches: a traceback, or an error without file and key, for what people get wrong."""
    sample = response("p", "student", 0)
    bad = "samples.jsonl: malformed: ValueError('response 1 has depth 29 of 28')"
    for depth, code, wanted in ((28, 0, "1 responses, 0 steps"), (29, 2, bad)):
        sample["tokens"][2]["depth"] = depth
        write_json_lines(tmp_path / "samples.jsonl", [sample])
        done = script("report", tmp_path)
        assert done.returncode == code and wanted in done.stdout + done.stderr, done.stderr
        assert done.stderr.count("\n") == (code > 0)
    with pytest.raises(UserError, match="no run to report; expected a folder with samples"):
        read_run(tmp_path / "none")


# --- the page in a browser ----------------------------------------------------------------------
HELPERS = """
const find = (selector) => document.querySelector(selector);
const texts = (selector) =>
  [...document.querySelectorAll(selector)].filter(e => e.checkVisibility()).map(e => e.textContent);
const fire = (selector, event, properties = {}, value = find(selector).value) => {
  if (value !== undefined) find(selector).value = value;
  find(selector).dispatchEvent(Object.assign(new Event(event, {bubbles: true}), properties));
};
const press = (...keys) => keys.forEach(key => fire(':focus', 'keydown', {key}));
const wait = async (ready) => { while (!ready()) await new Promise(ok => setTimeout(ok, 20)); };
"""


@pytest.fixture(scope="module")
def webdriver(tmp_path_factory):
    """WebDriver commands to a headless Chromium that has the example's page."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver")
    folder = tmp_path_factory.mktemp("browser")
    command = [shutil.which("chromedriver"), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        started = (re.search(r"successfully on port (\d+)", line) for line in process.stdout)
        url = f"http://127.0.0.1:{next(match[1] for match in started if match)}/session"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def call(path: str, body: dict | None = None, method: str = "POST") -> Any:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(url + path, data, method=method)
            with opener.open(request, timeout=60) as reply:
                return json.load(reply)["value"]

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--no-first-run", "--window-size=1280,900", f"--user-data-dir={folder}/profile"]
        options = {"args": flags, "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        url += "/" + call("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        write_page(folder / "report.html", [example()])
        call.page = (folder / "report.html").as_uri()
        yield call
        call("", method="DELETE")
        process.terminate()


@pytest.fixture
def page(webdriver):
    """The value of JavaScript on the example's page, freshly opened."""

    def run(code: str) -> Any:
        return webdriver("/execute/sync", {"script": f"{HELPERS} return {code}", "args": []})

    webdriver("/url", {"url": webdriver.page})
    run("wait(() => document.documentElement.dataset.ready === '')")
    return run


def test_opens_clean_with_its_figures(page, webdriver):
    """Catches: an error in the console, a request, text that becomes code, a NaN as a number."""
    tiles = page("texts('.tiles div')")
    assert tiles[0] == "accuracy0.910base 0.930" and tiles[-1] == "steps written–base –"
    assert "KL to the teacher, nats–––" in page("texts('#table tbody tr')")
    assert "– steps written: the task lists no steps" in page("texts('#table li')")
    assert page("texts('h2')")[-2:] == ["Evaluation figures", "Training figures"]
    page("fire('#picker li:nth-child(2)', 'click')")
    for selector in ("#prompt", ".card:nth-child(3) .text"):
        assert page(f"find({selector!r}).textContent.includes({json.dumps(EVIL)})")
    assert page("[window.hacked ?? 0, document.images.length]") == [0, 0]
    assert page("performance.getEntriesByType('resource').length") == 0, "nothing is fetched"
    assert webdriver("/se/log", {"type": "browser"}) == []


def test_a_token_shows_its_own_numbers(page):
    """Catches: a panel one token off, wrong units, a head that was not asked shown as 0."""
    tokens = response(ASKED, "student", 0)["tokens"]
    place, token = next((i, t) for i, t in enumerate(tokens) if t["depth"] == 10)
    page(f"fire('.card:nth-child(2) .text span:nth-child({place + 1})', 'pointerover')")
    where = f"exited at depth 10 of 28 · token {place + 1} of {len(STORY)}"
    assert page("texts('#inspect p')") == [where]
    asked = [f"depth {d}{100 * round(p, 3):.1f}%" for d, p in zip(EXITS, token["exit_probs"][:2])]
    rows = page("texts('#inspect tr')")
    assert rows[:5] == [*asked, *(f"depth {d}not asked" for d in EXITS[2:])]
    assert rows[6:] == ["␣the20.0%", "␣75.0%", "↵3.0%", "␣so<0.1%"]
    page("fire('.card:nth-child(2) .text', 'pointerleave')")
    assert page("texts('#inspect p')") == []


def test_keyboard_reaches_every_token_and_prompt(page):
    """Catches: a page that needs a mouse, or one where 10,000 tokens are 10,000 tab stops."""
    assert len(page("""texts('.text span[tabindex="0"]')""")) == 3
    page("find('.card:nth-child(2) .text span').focus()")
    for keys, place in (("'ArrowRight', 'ArrowRight'", 3), ("'End'", len(STORY))):
        page(f"press({keys})")
        assert f"token {place} of" in page("texts('#inspect p')")[0]
    page("fire('#search', 'input', {}, 'SHOWS 6')")
    assert page("texts('#found')") == ["1 of 4 prompts"]
    page("fire('#picker li', 'click')")
    assert "The clock shows 6." in page("texts('#prompt')")[0]
    page("fire('#search', 'input', {}, '= 14 so')")
    assert len(page("texts('#picker li')")) == 4, "found in the responses"
    page("(find('#picker li').focus(), press('ArrowDown', 'ArrowDown'))")
    assert "shows 7." in page("texts('#prompt')")[0]


def test_replay(page):
    """Catches: a replay that starts complete, never ends, or gives every depth the same time."""
    later = "[...document.querySelectorAll('.card')].map(c => c.querySelectorAll('.later').length)"
    assert page(later) == [0, 0, 0]
    page("fire('#seek', 'input', {}, 100)")
    base, student, _ = page(later)
    depths = [token["depth"] for token in response(ASKED, "student", 0)["tokens"]]
    assert base == len(STORY) - 3, "100 blocks pay for 3 tokens of 28"
    assert student == sum(sum(depths[: i + 1]) > 100 for i in range(len(depths))) < base
    page("(fire('#speed', 'change', {}, 16), fire('#play', 'click'))")
    page("wait(() => find('#play').textContent === 'Play')")
    assert page(later) == [0, 0, 0]


def test_choosers_and_cross_hair(page):
    """Catches: a reversed scale, a control without effect, a cross-hair off its curve."""
    heat = [page(f"color({depth}, {{full_depth: 9}})") for depth in (1, 2, 9)]
    mixed = "color-mix(in srgb, var(--h{}) {}%, var(--h{}))"
    assert heat == [mixed.format(1, 0, 0), mixed.format(1, 50, 0), mixed.format(4, 100, 3)]
    page("fire('#variants button', 'click')")
    assert page("texts('.card h3')") == ["student", "rollout · step 3"]
    colors = "['.text span', 'body'].map(s => getComputedStyle(find(s)).backgroundColor)"
    before = page(colors)
    page("(fire('#scale', 'change', {}, 'safe'), fire('#theme', 'click'))")
    after = page(colors)
    assert before[0] != after[0] and before[1] != after[1]
    box = page("find('svg[aria-label=Loss]').getBoundingClientRect()")
    middle = {"clientX": box["x"] + box["width"] / 2, "clientY": box["y"]}
    page(f"fire('svg[aria-label=Loss]', 'pointermove', {middle})")
    step, loss = (float(text.split()[1]) for text in page("texts('.readout div')"))
    assert 0 < step < 10 and loss == pytest.approx(10 - step, abs=0.05)


def test_fits_a_phone(page, webdriver):
    """Catches: a page that scrolls sideways at 390 px, a panel outside the screen."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    webdriver("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})
    page("fire('.card:nth-child(2) .text span:nth-child(9)', 'pointerover')")
    assert page("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    box = page("find('#inspect').getBoundingClientRect()")
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["width"] > 200
