"""benchmarks/methods.json, from which the table of methods is made: every row names a command that its script accepts
and a test that exists. One object per line, so that rows from several hands merge."""
import ast
import json
import re
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
    module = script(name)
    args = module.parse_args(["--model", "a/model", *flags])  # a flag that does not exist leaves with code 2
    if hasattr(module, "check_flags"):
        module.check_flags(args)
    file, _, test = row["test"].partition("::")
    functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert test.partition("[")[0] in functions, row["test"]
