"""Models and adapters from a hub, through the real huggingface_hub and a local server."""

import os
import shutil
import subprocess
import sys

from conftest import random_model, with_exits
from hub_server import COMMIT, V1, Hub
from make_golden import PLAIN, byte_level, write_tokenizer
from test_weights import EMBEDDING, load, old_config, tensors_of, write

from nanoexit.adapters import save_adapter
from nanoexit.config import ROOT, write_text

DRIVER = """
import sys
from nanoexit.adapters import adapter_base, load_adapter
from nanoexit.config import UserError
from nanoexit.tokenizer import load_tokenizer
from nanoexit.weights import load_model
for asked in sys.argv[1:]:
    name, _, revision = asked.partition("@")
    try:
        if name.startswith("adapter:"):
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
REFUSED = {  # name -> what its line says
    "me/sharded": "run again to continue",
    "me/gated": "keeps it gated",
    "me/plane": "me/plane: no such folder; the hub (",
    "me/plain@v2": "me/plain, revision v2: the hub (",
    "adapter:me/adapter@main": "was trained on 'me/plain'",
}


def fill(root) -> None:
    """Repositories (me/plain has another at v1), and files that need no download."""
    config = old_config("qwen2") | {"vocab_size": 266, "eos_token_id": 39}
    shards = {"plain": 1, "plain@v1": 1, "sharded": 3, "gated": 1}
    for seed, name in enumerate(shards):
        tensors = tensors_of(random_model("qwen2", seed))
        tensors[EMBEDDING] = tensors[EMBEDDING].repeat(7, 1)[:266]
        folder = write(root / "me" / name, config, tensors, shards[name])
        write_tokenizer(folder, byte_level(), {"config": config, "tokenizer_config": PLAIN})
        write_text(folder / "pytorch_model.bin", "pickle")
        write_text(folder / "original" / "consolidated.safetensors", "another copy")
    model = with_exits(load(root / "me" / "plain@v1"))
    model.name, model.revision = "me/plain", V1
    save_adapter(model, root / "me" / "adapter")


def ask(hub: Hub, *names: str, **env: str) -> list[str]:
    """What the driver prints about each name, which may be `NAME@REVISION`."""
    kept = {k: v for k, v in os.environ.items() if k[:3] != "HF_" and "proxy" not in k.lower()}
    kept |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.home), "HF_HUB_DISABLE_XET": "1"}
    kept |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", DRIVER, *names]
    done = subprocess.run(command, env=kept | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    hub.asked, asked = [], hub.asked
    assert not any("pytorch_model" in line or "original" in line for line in asked)
    return [*done.stdout.splitlines(), *asked]


def test_models_and_adapters_then_offline(tmp_path):
    """Catches: extra files fetched; a revision or a base lost; half a file taken for all."""
    fill(tmp_path)
    with Hub(tmp_path) as hub:
        hub.gated, hub.home, hub.dropped = {"me/gated"}, tmp_path / "home", "model-00002"
        plain, adapter, *lines = ask(hub, "me/plain", "adapter:me/adapter", *REFUSED)
        assert plain == f"me/plain {COMMIT} 39 261"
        assert adapter == f"adapter of me/plain {V1} (1, 2, 4)"
        for line, word in zip(lines, REFUSED.values()):
            assert line.startswith("refused: ") and word in line
        hub.dropped = None
        line, *asked = ask(hub, "me/sharded")
        assert line == f"me/sharded {COMMIT} 39 261"
        assert not any(line.startswith("GET /me/") and "model-00001" in line for line in asked)
        (next(hub.home.glob(f"*/*plain/*/{COMMIT}")) / "model.safetensors").unlink()
        names = ["adapter:me/adapter", "me/gated", "me/plain"]
        cached, gated, plain = ask(hub, *names, HF_HUB_OFFLINE="1")
        assert cached == adapter
        assert "HF_HUB_OFFLINE" in gated and "ncomplete" in plain
    copy = shutil.copytree(tmp_path / "me" / "plain@v1", tmp_path / "copy")
    assert load(copy).content != load(tmp_path / "me" / "plain").content
    assert load(copy).content == load(next(hub.home.rglob(V1))).content
