"""Write one standalone file of a script: its own text, with the text of all that it uses of common/ in it.

    python -m common.tools.bundle methods/grpo.py > grpo_alone.py

The file is output, to send, search, hash or fork. It trains without common/; only the tiny lab's data stay in
common/tiny, which it looks for above itself and in CLEANPOST. An import of common/ gives way to the text of what it
names. That needs one form of import and no top-level name for two things: tests/test_copies.py holds both.
"""

import argparse
import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "common/runtime/flags.py"
FINDER = """# All of {script} and of the files of common/ that it uses. Only the tiny lab's data are not in here.
places = [*Path(__file__).resolve().parents, Path(os.environ.get("CLEANPOST", "/"))]
places = [place for place in places if (place / "common" / "tiny").is_dir()]
COMMON_FOLDER = (places or [Path(__file__).resolve().parent])[0] / "common"
"""


class BundleError(Exception):
    """What is wrong with a script, in one line."""


def shared_file(node):
    """Return the file that an import takes names from, such as common/batches.py, or None where that is not ours."""
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("common."):
        return node.module.replace(".", "/") + ".py"
    return None


def parse(path):
    try:
        return ast.parse(path.read_text(), str(path))
    except (OSError, ValueError, SyntaxError) as error:
        raise BundleError(f"{path}: {error}. Name a script of methods/.") from None


def files_in_order(tree):
    """Return the files of common/ that a script uses, directly or through others, every file after those that it needs
    as it is imported. An import inside a function only says that the file belongs to them."""
    needed = {}
    waiting = [shared_file(node) for node in ast.walk(tree) if shared_file(node)]
    while waiting:
        file = waiting.pop()
        if file not in needed:
            imported = parse(ROOT / file)
            needed[file] = [shared_file(node) for node in imported.body if shared_file(node)]
            waiting += [shared_file(node) for node in ast.walk(imported) if shared_file(node)]
    return list(TopologicalSorter(needed).static_order())  # files that import each other could not be imported, either


def replaced(text, changes):
    """Return a text with other text in the places of some syntax nodes; for "", a statement goes with its line."""
    lines = text.splitlines(keepends=True)
    changes = sorted(changes, key=lambda change: (change[0].lineno, change[0].col_offset))
    for node, new in reversed(changes):  # so that the numbers of the lines before stay right
        first, last = node.lineno - 1, node.end_lineno - 1
        before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        lines[first : last + 1] = [before + new + after] if new or before.strip() else []
    return "".join(lines)


def body_of(file):
    """Return the text of a shared file for the bundle: its docstring as a comment, without imports of common/, and with
    the place that it would have in common/ for __file__, by which it finds the tiny lab."""
    text = (ROOT / file).read_text()
    tree = parse(ROOT / file)
    changes = []
    if ast.get_docstring(tree):
        comment = "\n".join(f"# {line}".rstrip() for line in ast.get_docstring(tree).splitlines())
        changes.append((tree.body[0], comment))
    for node in ast.walk(tree):
        if shared_file(node):
            changes.append((node, "pass"))
        if isinstance(node, ast.Name) and node.id == "__file__":
            changes.append((node, f'COMMON_FOLDER / "{file.removeprefix("common/")}"'))
    title = f"# ==== {file} ".ljust(100, "=")
    return f"{title}\n{replaced(text, changes)}\n"


def version(tree):
    """Return the constant VERSION of a file, and the statement that sets it."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VERSION":
            return ast.literal_eval(node.value), node
    return None, None


def without_spare_imports(text):
    """Return the text with every top-level import once, in the first place that it has, and none that nobody uses."""
    tree = ast.parse(text)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    seen, changes = set(), []
    for node in tree.body:
        if isinstance(node, ast.Pass):
            changes.append((node, ""))
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        wanted = []
        for alias in node.names:
            name = alias.asname or alias.name.split(".")[0]
            key = (getattr(node, "module", None), alias.name, name)
            if name in used and key not in seen:
                wanted.append(alias)
            seen.add(key)
        if len(wanted) < len(node.names):
            node.names = wanted
            changes.append((node, ast.unparse(node) if wanted else ""))
    return re.sub(r"\n{4,}", "\n\n\n", replaced(text, changes))


def bundle(path):
    """Return the standalone text of a script."""
    tree = parse(path)
    written_for, first = version(tree)
    imports = [node for node in tree.body if shared_file(node)]
    if first is None or not imports or shared_file(imports[0]) != FLAGS:
        raise BundleError(f"{path} does not find common/ as the scripts of methods/ do.")
    found, _ = version(parse(ROOT / FLAGS))
    if written_for != found:
        raise BundleError(f"{path} was written for common/ {written_for}, and {ROOT / 'common'} is {found}.")
    finder = [node for node in tree.body if first.lineno <= node.lineno < imports[0].lineno]
    nested = [node for node in ast.walk(tree) if shared_file(node) and node not in imports]
    changes = [(node, "pass") for node in [*finder, *nested, *imports[2:]]]
    # Flags come first, above the slow imports: --help and a wrong flag answer at once.
    title = f"# ==== {path} ".ljust(100, "=")
    changes.append((imports[0], FINDER.format(script=path) + body_of(FLAGS) + title))
    texts = [body_of(file) for file in files_in_order(tree) if file != FLAGS]
    changes += [(node, "".join(texts) + title) for node in imports[1:2]]
    return without_spare_imports(replaced(path.read_text(), changes))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    try:
        print(bundle(parser.parse_args().script), end="")
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
