"""The README tells the truth about what can be counted."""

import re
from pathlib import Path

import evaluate
import train
from medssl import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_method_has_its_row_and_its_lines():
    rows = dict(re.findall(r"^\| \[(\w+)\]\(medssl/\1\.py\) \|.*?\| (\d+) \|", README, re.M))
    assert set(rows) == set(METHODS)
    for name, lines in rows.items():
        true = len((ROOT / f"medssl/{name}.py").read_text().splitlines())
        assert abs(int(lines) - true) <= 5, f"{name}.py has {true} lines, the README says {lines}"


def test_links_lead_somewhere():
    for text in (README, (ROOT / "data/README.md").read_text()):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if not target.startswith("http"):
                assert (ROOT / target).exists() or (ROOT / "data" / target).exists(), target


def test_commands_have_flags_that_exist(capsys):
    flags = {}
    for name, module in (("train.py", train), ("evaluate.py", evaluate)):
        try:
            module.main(["--help"])
        except SystemExit:
            flags[name] = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for name, words in re.findall(r"python (train\.py|evaluate\.py)([^`\n]*)", README):
        assert set(re.findall(r"--[a-z][\w-]*", words)) <= flags[name] | {"--nproc_per_node"}, words
