"""Models from the hub, through the real huggingface_hub and a server on the loopback address."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_model
from hub_server import COMMIT, Hub
from test_tokenizer import make
from test_weights import old_config, tensors_of, write

from nanoexit.config import ROOT


@pytest.fixture
def hub(tmp_path):
    """A hub with me/plain, me/sharded and me/gated, files beside them that nobody needs."""
    config = old_config("qwen2") | {"vocab_size": 40, "eos_token_id": 39}
    for name, shards in (("plain", 1), ("sharded", 3), ("gated", 1)):
        folder = write(tmp_path / "hub" / "me" / name, config, tensors_of(random_model("qwen2")), shards)
        make(folder)
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
        (folder / "original").mkdir()
        (folder / "original" / "consolidated.safetensors").write_bytes(b"another copy")
    with Hub(tmp_path / "hub") as server:
        server.gated = {"me/gated"}
        server.home = tmp_path / "home"
        yield server


def hub_environment(hub: Hub) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    return environment | {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}


def sample(hub: Hub, name: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "scripts" / "sample.py"), "!#$", "--model", name, "--max-new-tokens", "3", "--device", "cpu"],
                          env=hub_environment(hub) | env, capture_output=True, text=True, timeout=120)


def one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and an error of one line, with every one of these words in it, after whatever progress was shown."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr


def test_plain_then_offline(hub):
    """Bug: more comes down than is needed, or what is cached asks the network again."""
    done = sample(hub, "me/plain")
    assert done.returncode == 0, done.stderr
    assert "policy full" in done.stdout and "no chat template" in done.stderr
    snapshot = next(Path(hub.home).rglob(COMMIT))
    assert not any("pytorch_model.bin" in line or "original" in line for line in hub.asked)
    assert (snapshot / "model.safetensors").exists()
    hub.asked.clear()
    done = sample(hub, "me/plain", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and not hub.asked, done.stderr


def test_sharded(hub):
    """Bug: a shard or the index does not come down."""
    done = sample(hub, "me/sharded")
    assert done.returncode == 0, done.stderr


def test_gated(hub):
    """Bug: a gated model ends in a traceback, or the line does not say how to get in."""
    one_line(sample(hub, "me/gated"), "me/gated", "gated", "HF_TOKEN", hub.url)
    one_line(sample(hub, "me/gated", HF_TOKEN="hf_x"), "me/gated", "gated", "terms")


def test_missing(hub):
    """Bug: a misspelled name ends in a traceback."""
    one_line(sample(hub, "me/plane"), "me/plane", "spelling")


def test_offline_and_not_cached(hub):
    """Bug: HF_HUB_OFFLINE is not told apart from a broken connection."""
    one_line(sample(hub, "me/plain", HF_HUB_OFFLINE="1"), "not in the cache", "HF_HUB_OFFLINE")
    assert not hub.asked


def test_dropped_connection_then_again(hub):
    """Bug: half a file is taken for a whole one, or the same command does not do once the connection holds, or fetches all anew."""
    hub.dropped = {"model-00002-of-00003.safetensors"}
    one_line(sample(hub, "me/sharded", HF_HUB_DOWNLOAD_TIMEOUT="2"), "me/sharded", "broke off", "run the same command again")
    hub.dropped = set()
    hub.asked.clear()
    done = sample(hub, "me/sharded")
    assert done.returncode == 0, done.stderr
    fetched = [line for line in hub.asked if line.startswith("GET /me/")]
    assert any("00002-of" in line for line in fetched) and not any("00001-of" in line for line in fetched), fetched


def test_a_hiccup_of_the_connection_goes_unnoticed(hub):
    """Bug: one broken transfer ends the command, or leaves half a file behind."""
    hub.dropped_once = {"model.safetensors"}
    done = sample(hub, "me/plain")
    assert done.returncode == 0, done.stderr
    assert hub.asked.count(f"GET /me/plain/resolve/{COMMIT}/model.safetensors") == 2


def test_nobody_listens(hub):
    """Bug: an endpoint that cannot be reached ends in a traceback."""
    one_line(sample(hub, "me/plain", HF_ENDPOINT="http://127.0.0.1:9"), "cannot be reached", "connection")


PROMPTS = """
import sys
from nanoexit.config import DataConfig
from nanoexit.data import read_prompts
from nanoexit.errors import UserError
for name in sys.argv[1:]:
    try:
        print(name, *read_prompts(DataConfig(prompts=name)))
    except UserError as error:
        print(name, "->", error)
"""


def prompts(hub: Hub, *names: str, **env: str) -> list[str]:
    """What read_prompts makes of each name, a line each."""
    done = subprocess.run([sys.executable, "-c", PROMPTS, *names], env=hub_environment(hub) | {"PYTHONPATH": str(ROOT), **env},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_prompts_of_a_dataset(hub):
    """Bug: a dataset's file is looked for among the models, a folder in its path is lost, CSV is read as JSONL, the cache is not used;
    a name that is misspelled or gated ends in a traceback, or in a line that does not say what to do."""
    for file, text in {"sums/main/train.jsonl": '{"question": "1 + 1?", "answer": "so\\n#### 2"}', "sums/test.csv": "story,question,answer\nA box.,Where?,there",
                       "sums/broken.jsonl": "{", "shut/train.jsonl": "{}"}.items():
        path = hub.folder / "datasets" / "me" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    hub.gated = {"datasets/me/shut"}
    found = prompts(hub, "hub:me/sums/main/train.jsonl", "hub:me/sums/test.csv", "hub:me/sums/none.jsonl", "hub:me/summs/train.jsonl", "hub:me/sums",
                    "hub:me/shut/train.jsonl", "hub:me/sums/broken.jsonl")
    wanted = [("prompt='1 + 1?'", "checker='gsm8k'"), ("answer='there'", "checker='exact'"), ("hub:me/sums/none.jsonl", "no such file there"),
              ("hub:me/summs/train.jsonl", "spelling"), ("expected hub:OWNER/NAME/FILE",), ("hub:me/shut/train.jsonl", "gated", "HF_TOKEN"),
              ("broken.jsonl:1 is not JSON",)]
    assert len(found) == len(wanted) and all(word in line for line, words in zip(found, wanted) for word in words), found
    hub.asked.clear()
    cached, missing = prompts(hub, "hub:me/sums/test.csv", "hub:me/sums/none.jsonl", HF_HUB_OFFLINE="1")
    assert "answer='there'" in cached and "HF_HUB_OFFLINE" in missing and not hub.asked
