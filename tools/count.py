"""Lines of code by room, without blank lines, comments and docstrings: `python tools/count.py`.

Also what the house rules bound: functions over 50 lines (but for the loop's `fit`), and the arrows between files: how
many, the longest chain, and circles, of which there must be none: with one the exit status is 1.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = {"methods": "medssl/*.py", "common": "medssl/common/*.py", "data": "medssl/common/data/*.py",
         "evaluation": "medssl/common/evaluation/*.py", "scripts": "*.py",
         "docs": "docs/**/*.py", "experiments": "experiments/**/*.py", "tools": "tools/*.py", "tests": "tests/*.py"}
HOUSE = "common", "data", "evaluation", "scripts"                           # what stands beside the methods


def code_lines(text):
    """Lines that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
                              tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def too_long(path, text):
    """Functions over 50 lines; the training loop is one piece on purpose."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (path.name, node.name) != ("loop.py", "fit"):
            length = node.end_lineno - node.lineno + 1
            if length > 50:
                yield f"{path}: {node.name} has {length} lines"


def imported(path, tree, modules):
    """The project's own files that a file takes something from."""
    inside = [*path.relative_to(ROOT).with_suffix("").parts]
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = inside[:len(inside) - node.level] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
            names = [name if name in modules else ".".join(base) for name in names]     # a file, or something in one
        for name in names:
            if name in modules and modules[name] != path:
                yield modules[name]


def arrows():
    """file: the files it imports, for the package and the scripts."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("medssl/**/*.py")]
    modules = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    found = {f: set(imported(f, ast.parse(f.read_text()), modules)) for f in files}
    return {f: {g for g in own if g.name != "__init__.py" or "data" in g.parts} for f, own in found.items()}


def chains(graph):
    """The longest chain of imports, and the circles."""
    longest, circles = {}, []

    def follow(file, above):
        if file in above:
            circles.append([*above[above.index(file):], file])
            return [file]
        if file not in longest:
            longest[file] = [file, *max((follow(g, [*above, file]) for g in sorted(graph[file])), key=len, default=[])]
        return longest[file]
    return max((follow(f, []) for f in graph), key=len), circles


def main():
    lines, complaints = {}, []
    for room, pattern in ROOMS.items():
        texts = {f.relative_to(ROOT): f.read_text() for f in sorted(ROOT.glob(pattern))}
        lines[room] = sum(map(code_lines, texts.values()))
        print(f"{room:12} {len(texts):3} files {lines[room]:6} lines of code")
        complaints += [each for name, text in texts.items() if room != "tests" for each in too_long(name, text)]
    print(f"methods {lines['methods']}, beside the methods ({', '.join(HOUSE)}) {sum(lines[room] for room in HOUSE)}, "
          f"tests {lines['tests']}")
    graph = arrows()
    chain, circles = chains(graph)
    print(f"{len(graph)} files, {sum(map(len, graph.values()))} arrows, longest chain {len(chain)}: "
          + " > ".join(str(f.relative_to(ROOT)) for f in chain))
    complaints += ["circle: " + " > ".join(str(f.relative_to(ROOT)) for f in circle) for circle in circles]
    print("\n".join(complaints))
    return bool(circles)


if __name__ == "__main__":
    sys.exit(main())
