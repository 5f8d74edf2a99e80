"""Models, adapters and datasets of a hub, through the real huggingface_hub and a local server."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_model, with_exits
from hub_server import COMMIT, V1, Hub
from make_golden import PLAIN, byte_level, write_tokenizer
from test_weights import load, old_config, tensors_of, write

from nanoexit.adapters import save_adapter
from nanoexit.config import ROOT

DRIVER = """
import sys
from nanoexit.adapters import adapter_base, load_adapter
from nanoexit.config import UserError
from nanoexit.tokenizer import load_tokenizer
from nanoexit.weights import find_dataset_file, load_model
for asked in sys.argv[1:]:
    name, _, revision = asked.partition("@")
    try:
        if name.startswith("hub:"):
            print(find_dataset_file(name).read_text())
        elif name.startswith("adapter:"):
            base, commit = adapter_base(name[8:])
            model = load_model(base, "cpu", "float32", revision or commit)
            load_adapter(model, name[8:])
            print("adapter of", model.name, model.revision, model.exits.layers)
        else:
            model = load_model(name, "cpu", "float32", revision or None)
            print(name, model.revision, *sorted(load_tokenizer(name, revision or None).stop_ids))
    except UserError as error:
        print("refused:", error)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Repositories me/plain (another at v1), me/sharded, me/gated, me/adapter, a dataset, and
    files beside them that need not come down.
    """
    root = tmp_path_factory.mktemp("hub")
    config = old_config("qwen2") | {"vocab_size": 266, "eos_token_id": 39}
    for i, (name, shards) in enumerate(
        {"plain": 1, "plain@v1": 1, "sharded": 3, "gated": 1}.items()
    ):
        tensors = tensors_of(random_model("qwen2", i))
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].repeat(7, 1)[
            :266
        ]
        folder = write(root / "me" / name, config, tensors, shards)
        write_tokenizer(folder, byte_level(), {"config": config, "tokenizer_config": PLAIN})
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
        (folder / "original").mkdir()
        (folder / "original" / "consolidated.safetensors").write_bytes(b"another copy")
    model = with_exits(load(root / "me" / "plain@v1"))
    model.name, model.revision = "me/plain", V1
    save_adapter(model, root / "me" / "adapter")
    data = root / "datasets" / "me" / "sums" / "main"
    data.mkdir(parents=True)
    (data / "train.jsonl").write_text("1 + 1")
    return root


@pytest.fixture
def hub(folders, tmp_path):
    with Hub(folders) as server:
        server.gated, server.home = {"me/gated"}, tmp_path / "home"
        yield server


def ask(hub: Hub, *names: str, **env: str) -> list[str]:
    """What the driver prints about each name; names[0] may be `NAME@REVISION`."""
    kept = {k: v for k, v in os.environ.items() if k[:3] != "HF_" and "proxy" not in k.lower()}
    kept |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.home), "HF_HUB_DISABLE_XET": "1"}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", DRIVER, *names]
    done = subprocess.run(command, env=kept | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_models_adapters_datasets_then_offline(hub):
    """Catches: more fetched than is needed; a revision or an adapter's base lost; what is cached
    asked for again; a line that does not say what to do; half a file taken for a whole one.
    """
    hub.dropped, hub.dropped_once = {"model-00002.safetensors"}, {"model.safetensors"}
    names = ["me/plain", "adapter:me/adapter", "hub:me/sums/main/train.jsonl"]
    names += [
        "me/sharded",
        "me/gated",
        "me/plane",
        "me/plain@v2",
        "hub:me/sums/none",
        "adapter:me/adapter@main",
    ]
    lines = ask(hub, *names)
    assert hub.asked.count(f"GET /me/plain/resolve/{COMMIT}/model.safetensors") == 2
    assert lines[:2] == [f"me/plain {COMMIT} 39 261", f"adapter of me/plain {V1} (1, 2, 4)"]
    assert lines[2] == "1 + 1"
    words = ["broke off: run the same command again"] + [
        "gated: accept its terms",
        "check the spelling",
        "no such revision",
        "no such file",
    ]
    for line, word in zip(lines[3:], [*words, "was trained on me/plain"], strict=True):
        assert line.startswith("refused: ") and word in line
    assert not any("pytorch_model" in line or "original" in line for line in hub.asked)
    hub.dropped = set()
    hub.asked.clear()
    assert ask(hub, "me/sharded") == [f"me/sharded {COMMIT} 39 261"]
    assert not any("model-00001" in line for line in hub.asked if line.startswith("GET /me/"))
    hub.asked.clear()
    snapshot = hub.home / "hub" / "models--me--plain" / "snapshots" / COMMIT
    (snapshot / "model.safetensors").unlink()
    offline = ask(hub, *names[1:4], "me/gated", "me/plain", HF_HUB_OFFLINE="1")
    assert offline[:2] == lines[1:3] and offline[2].startswith("me/sharded") and not hub.asked
    assert "not in the cache" in offline[3] and "HF_HUB_OFFLINE is set" in offline[3]
    assert "incomplete snapshot" in offline[4]
    copy = shutil.copytree(hub.folder / "me" / "plain@v1", hub.home / "copy")
    assert load(copy).content != load(hub.folder / "me" / "plain").content
    assert load(copy).content == load(next(hub.home.rglob(V1))).content
