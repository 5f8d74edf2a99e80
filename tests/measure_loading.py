"""How much memory loading a model takes: not part of the test suite.

    python tests/measure_loading.py

Makes models of about half a gigabyte in bfloat16, in one file and in shards, loads each in a process of its own, in its own dtype on
the CPU, and prints the peak of resident memory beside the limit 1.2 N + 300 MB. Exits with 1 where one is above it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from rehearse_deepseek import SHAPE, make_snapshot
from safetensors.torch import load_file, save_file

LOAD = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import nanoexit
nanoexit.load_model(sys.argv[2], device="cpu", dtype="bfloat16")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main() -> None:
    over = False
    with tempfile.TemporaryDirectory() as scratch:
        whole, shards = Path(scratch) / "whole", Path(scratch) / "shards"
        size = make_snapshot(whole, SHAPE | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8})
        split(whole, shards, 4)
        for name, folder in (("one file", whole), ("four shards", shards)):
            peak = int(subprocess.run([sys.executable, "-c", LOAD, str(ROOT), str(folder)], check=True, capture_output=True, text=True).stdout)
            limit = 1.2 * size + 300e6
            over |= peak > limit
            print(f"{name}: {size / 1e6:.0f} MB of bfloat16, peak {peak / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB")
    sys.exit(int(over))


def split(source: Path, target: Path, count: int) -> None:
    """The same model in `count` shards with their index."""
    target.mkdir()
    for path in source.glob("*.json"):
        (target / path.name).write_bytes(path.read_bytes())
    tensors, where = load_file(source / "model.safetensors"), {}
    for i in range(count):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::count]}
        save_file(part, target / name, {"format": "pt"})
        where |= dict.fromkeys(part, name)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


if __name__ == "__main__":
    main()
