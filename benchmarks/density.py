"""How dense Python files are: how many tokens a statement has.

    python benchmarks/density.py [FILE or FOLDER ...]     default: methods and common

Comments, docstrings and blank lines do not count. A statement is a logical line: wrapping it changes nothing, splitting
the thought does. The table has a row for every file, for every folder, and for all files together.
"""

import argparse
import ast
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONG = 30  # a statement of more tokens is a long one
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


@dataclass
class Density:
    sizes: list[int]  # tokens of every statement
    lines: int  # all lines of the files, comments and blank ones included

    @property
    def tokens(self):
        return sum(self.sizes)

    @property
    def average(self):
        """Tokens a statement."""
        return self.tokens / max(1, len(self.sizes))

    @property
    def long_share(self):
        """The share of statements that are long."""
        long_ones = [size for size in self.sizes if size > LONG]
        return len(long_ones) / max(1, len(self.sizes))


def docstring_lines(text):
    """Return the numbers of the lines on which a docstring of a module, class or function stands."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node, clean=False) is None:
            continue
        docstring = node.body[0]
        found.update(range(docstring.lineno, docstring.end_lineno + 1))
    return found


def tokens_of(text):
    """Yield the tokens of a file. An f-string is one token, as in Python 3.11; later versions show what is inside."""
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_END":
            depth -= 1
        if depth == 0:
            yield token
        if name == "FSTRING_START":
            depth += 1


def statement_sizes(text):
    """Return the number of tokens of every statement."""
    skipped = docstring_lines(text)
    sizes = []
    size = 0
    for token in tokens_of(text):
        if token.type in LAYOUT or token.start[0] in skipped:
            continue
        if tokenize.tok_name[token.type] == "FSTRING_END":
            continue  # its start was counted
        if token.type == tokenize.NEWLINE:
            sizes.append(size)
            size = 0
        else:
            size += 1
    return sizes


def measure(*paths):
    """Return the Density of all these files together."""
    total = Density(sizes=[], lines=0)
    for path in paths:
        text = path.read_text()
        total.sizes += statement_sizes(text)
        total.lines += len(text.splitlines())
    return total


def python_files(place):
    """Return the files that a command line names: one file, or all below a folder."""
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


def row(name, density):
    average, share = f"{density.average:.1f}", f"{density.long_share:.1%}"
    return f"{density.tokens:8,}{average:>14}{share:>10}{density.lines:8,}  {name}"


def table(places):
    """Return the table as text. places: files and folders."""
    files = [path for place in places for path in python_files(place)]
    folders = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    rows = [f"{'tokens':>8}{'a statement':>14}{f'over {LONG}':>10}{'lines':>8}"]
    for folder, paths in folders.items():
        rows += [row(path, measure(path)) for path in paths]
        rows.append(row(f"{folder}/*.py together", measure(*paths)))
    rows.append(row("all together", measure(*files)))
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", type=Path, metavar="FILE or FOLDER")
    places = parser.parse_args().places
    print(table(places or [ROOT / "methods", ROOT / "common"]))


if __name__ == "__main__":
    main()
