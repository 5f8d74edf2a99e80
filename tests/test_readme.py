"""The README: its figures are those of the committed results, and it stays short."""

import json
import re

import numpy as np

from nanoexit.config import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def row(folder: str, arm: str, cap: str) -> str:
    """A line of one of the README's tables: means over the seeds."""
    results = json.loads((ROOT / "data" / folder / "results.json").read_text())
    found = [r for r in results if r["arm"] == arm]
    kept = [dict(map(tuple, r["same_answer"])) for r in found]
    cells = [
        *(f"{np.mean([r[key] for r in found]):.3f}" for key in ("accuracy", "written")),
        *(f"{np.mean([r[key] for r in found]):.2f}" for key in ("mean_depth", "max_depth")),
        f"{np.mean([r['capped_accuracy'][cap] for r in found]):.3f}",
        *(f"{np.mean([k[share] for k in kept]):.2f}" for share in (0.25, 0.0)),
        *(f"{np.mean([r['changed_value'][key] for r in found]):.3f}" for key in ("follow", "stay")),
    ]
    return f"|{arm}|{'|'.join(cells)}|"


def test_the_tables_are_those_of_the_results():
    """Catches: a table of an older experiment, or a figure typed by hand."""
    tables = TEXT.split("\n|arm|accuracy|")[1:]
    for (folder, cap), table in zip((("experiment", "4"), ("real", "8")), tables, strict=True):
        lines = table.split("\n\n")[0].splitlines()[2:]
        assert len(lines) >= 4 and lines == [row(folder, x.split("|")[1], cap) for x in lines]


def test_the_tree_counts_lines():
    """Catches: outdated line counts."""
    for name, lines in re.findall(r"^  (\w+\.py) +(\d+)  ", TEXT, re.MULTILINE):
        found = (ROOT / "nanoexit" / name).read_text(encoding="utf-8").count("\n")
        assert found == int(lines), f"{name}: {found} lines, the README says {lines}"


def test_it_can_be_read_in_a_quarter_of_an_hour():
    """Catches: a README that grows with every feature."""
    assert len(TEXT.split()) <= 2500 and TEXT.count("\n") <= 250
    for path in re.findall(r"\]\(([\w/.]+)\)|src=\"([\w/.]+)\"", TEXT):
        assert (ROOT / (path[0] or path[1])).is_file(), path
