"""benchmarks/methods.json, from which the table of methods/README.md is made: every row names a command that its script
accepts and a test that exists. One object per line, so that rows from several hands merge.

    python tests/test_method_table.py     write the table
"""

import ast
import json
import re
import runpy
import shlex

import pytest
from conftest import ROOT, SCRIPTS, script

LINES = (ROOT / "benchmarks" / "methods.json").read_text().splitlines()
ROWS = json.loads("\n".join(LINES))


def test_one_row_a_line():
    assert LINES[0] == "[" and LINES[-1] == "]" and len(LINES) == len(ROWS) + 2
    numbers = [row["row"] for row in ROWS]
    assert len(set(numbers)) == len(numbers), "a row of the inventory stands twice"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['row']} {row['name']}")
def test_row(row):
    assert list(row) == ["row", "name", "paper", "command", "formula", "test", "trl"]
    assert isinstance(row["row"], int) and isinstance(row["trl"], bool) and row["name"] and row["formula"]
    assert row["paper"] == "" or re.fullmatch(r"\d{4}\.\d{5}", row["paper"])
    assert all(isinstance(text, str) and text.isascii() and "|" not in text for text in
               (row["name"], row["command"], row["formula"]))  # fmt: skip
    path, *flags = shlex.split(row["command"])
    name = path.removeprefix("methods/").removesuffix(".py")
    assert name in SCRIPTS, path
    script(name).parse_args(["--model", "a/model", *flags])  # a flag that does not exist leaves with code 2
    file, _, test = row["test"].partition("::")
    functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert test.partition("[")[0] in functions, row["test"]


def plots():
    return runpy.run_path(str(ROOT / "benchmarks" / "plots.py"))


def test_the_table_is_current():
    assert not plots()["stale_pages"](["methods"]), "the table of methods/README.md: python tests/test_method_table.py"


def test_every_row_is_in_a_family_and_counted():
    text = plots()["part_methods"]()
    assert len(re.findall(r"^\| (?!method \||---)", text, re.M)) == len(ROWS)
    assert sum(map(int, re.findall(r"<summary>[^<]*?: (\d+) method", text))) == len(ROWS)
    for row in ROWS:
        assert f"`{row['command']}`" in text and f"`{row['formula']}`" in text
    assert "</summary>\n\n|" in text and "|\n\n</details>\n" in text  # or GitHub shows no table


if __name__ == "__main__":
    for path, text in plots()["stale_pages"](["methods"]).items():
        path.write_text(text)
        print(f"{path.relative_to(ROOT)} written")
