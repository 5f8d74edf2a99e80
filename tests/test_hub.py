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


def sample(hub: Hub, name: str, **env: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, str(ROOT / "scripts" / "sample.py"), "!#$", "--model", name, "--max-new-tokens", "3", "--device", "cpu"],
                          env=environment, capture_output=True, text=True, timeout=120)


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


def test_dropped_connection_goes_on(hub):
    """Bug: half a file is taken for a whole one, or the same command does not go on once the connection holds."""
    hub.dropped = {"model.safetensors"}
    one_line(sample(hub, "me/plain", HF_HUB_DOWNLOAD_TIMEOUT="2"), "me/plain")
    hub.dropped = set()
    assert sample(hub, "me/plain").returncode == 0


def test_a_file_of_a_dataset(hub):
    """Bug: hub:OWNER/NAME/FILE is looked for among models, its name is cut at the wrong slash, or a missing one ends in a traceback."""
    folder = hub.folder / "me" / "riddles" / "data"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"question": "6 * 7?", "answer": "six times seven\\n#### 42"}\n')
    code = ("import sys; from nanoexit.config import DataConfig; from nanoexit.data import read_prompts; from nanoexit.errors import run_script\n"
            "def main(): print(read_prompts(DataConfig(prompts=sys.argv[1])))\nrun_script(main)")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}

    def ask(name: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code, name], env=environment, capture_output=True, text=True, timeout=60)

    assert "6 * 7?" in ask("hub:me/riddles/data/train.jsonl").stdout and "'gsm8k'" in ask("hub:me/riddles/data/train.jsonl").stdout
    one_line(ask("hub:me/riddles/data/none.jsonl"), "none.jsonl", "no such file")
    one_line(ask("hub:me/riddles"), "expected hub:OWNER/NAME/FILE")


def test_nobody_listens(hub):
    """Bug: an endpoint that cannot be reached ends in a traceback."""
    one_line(sample(hub, "me/plain", HF_ENDPOINT="http://127.0.0.1:9"), "cannot be reached", "connection")
