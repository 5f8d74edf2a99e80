"""Export a run for use with other tools.

    python scripts/export.py runs/tiny-sft out            a PEFT adapter, with the exit heads
    python scripts/export.py runs/tiny-sft out --merge    a model folder, adapters merged

A merged model loads in AutoModelForCausalLM and runs at full depth. The exit heads are saved beside
it, for code that can use them.
"""

import argparse
from pathlib import Path

import _script

from nanoexit.adapters import adapter_base, load_adapter, save_adapter, save_merged
from nanoexit.config import UserError
from nanoexit.tokenizer import find_model
from nanoexit.weights import load_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("out", metavar="OUT_DIR")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="write the whole model with the adapters merged into its weights",
    )
    parser.add_argument("--model", help="the base model, if it has moved since the run")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"]
    )
    args = parser.parse_args()
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists; expected a new or empty folder")
    name, revision = (args.model, None) if args.model else adapter_base(args.run)
    model = load_model(name, "cpu", args.dtype, revision)
    load_adapter(model, args.run)
    if args.merge:
        save_merged(model, find_model(name, revision)[0], out)
        if model.exits is not None:
            save_adapter(model, out / "adapter")
    else:
        save_adapter(model, out)
    print(f"written to {out}")


if __name__ == "__main__":
    _script.run_main(main)
