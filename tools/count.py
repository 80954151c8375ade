"""Lines of code by room, without blank lines, comments and docstrings: `python tools/count.py`.

Also what the house rules bound: functions over 50 lines, more than 6 parameters, files over 400 lines, and the arrows
between files: how many, the longest chain, and circles, of which there must be none.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = {"methods": "medssl/*.py", "common": "medssl/common/*.py", "data": "medssl/common/data/*.py",
         "evaluation": "medssl/common/evaluation/*.py",
         "scripts": "*.py", "tests": "tests/*.py", "beside": "tools/*.py"}


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


def too_large(path, tree):
    """Functions over 50 lines or 6 parameters; constructors may have as many as they need."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            words = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs if a.arg != "self"]
            if length > 50:
                yield f"{path}: {node.name} has {length} lines"
            if len(words) > 6 and node.name != "__init__":
                yield f"{path}: {node.name} has {len(words)} parameters"


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
    rooms, complaints = {}, []
    for room, pattern in ROOMS.items():
        files = sorted(ROOT.glob(pattern))
        rooms[room] = sum(code_lines(f.read_text()) for f in files)
        print(f"{room:12} {len(files):3} files {rooms[room]:6} lines of code")
        for f in files if room not in ("tests", "beside") else []:
            name, text = f.relative_to(ROOT), f.read_text()
            complaints += too_large(name, ast.parse(text))
            complaints += [f"{name}: {text.count(chr(10))} lines"] if text.count("\n") > 400 else []
    house = sum(rooms[room] for room in ("common", "data", "evaluation", "scripts"))
    print(f"common with its wings, and the scripts: {house}")
    graph = arrows()
    chain, circles = chains(graph)
    print(f"{len(graph)} files, {sum(map(len, graph.values()))} arrows, longest chain {len(chain)}: "
          + " > ".join(str(f.relative_to(ROOT)) for f in chain))
    print("\n".join(complaints))
    for circle in circles:
        print("circle: " + " > ".join(str(f.relative_to(ROOT)) for f in circle))
    return bool(circles)


if __name__ == "__main__":
    sys.exit(main())
