"""docs/papers.md keeps pace with the code: commands can be given, defaults are the code's, links lead somewhere."""

import ast
import inspect
import re
import shlex
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import evaluate
import train
from medssl import METHODS
from medssl.common import augment, cli, encoders, presets, settings, unet
from medssl.common.data import prepare
from tests import test_contract

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/papers.md").read_text()
SECTIONS = dict(re.findall(r"^##+ (.*)\n((?:(?!##).*\n)*)", PAGE, re.M))
COMMAND = re.compile(r"python (train\.py|evaluate\.py|-m medssl\.common\.data)(?: (.*))?$", re.M)
BY_HAND = {"candidates", "brain", "organsmnist.npz"}                        # sets that no command of the page prepares
WORKS = ("Zhang", "Chattopadhyay", "Kalapos", "Wolf", "the same")           # in the settings tables of headers


def commands(program, text=PAGE):
    """The words of each command of a program; a line that ends in a backslash goes on in the next."""
    lines = re.sub(r" *\\\n *", " ", text)
    return [shlex.split(words) for name, words in COMMAND.findall(lines) if name == program]


def tables(text):
    """The rows of all tables, each a dict from the head of a column to its cell."""
    rows = []
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        head, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        rows += [dict(zip(head, cells, strict=True)) for cells in body]
    return rows


def value(cell):
    """A cell as the Python value that it spells; "low to high" is a pair."""
    low, to, high = cell.partition(" to ")
    try:
        return (ast.literal_eval(low), ast.literal_eval(high)) if to else ast.literal_eval(cell)
    except (ValueError, SyntaxError):
        return cell


def defaults(cls):
    """All that a table has to state: RECIPE, the constructor's words but for what train.py fills in, the decoder's."""
    recipe = dict(getattr(sys.modules[cls.__module__], "RECIPE", {}))
    found = {f"options.{key}": default for key, default in recipe.pop("options", {}).items()} | recipe
    words = inspect.signature(cls).parameters
    filled = {"small", "channels", "size", "mean"}
    found |= {name: word.default for name, word in words.items()
              if word.default is not word.empty and name not in filled}
    if "decoder" in words:
        found["decoder.skips"] = inspect.signature(unet.Decoder).parameters["skips"].default
    return found


# ---- commands

def case(words):
    """A training command as a case of a test, named after its run."""
    return pytest.param(words, id=words[-1])


@pytest.mark.parametrize("words", list(map(case, commands("train.py"))))
def test_training_commands_can_be_given(words):
    args = train.parse(words)
    names = args.method.split("+")
    assert args.preset == "paper" and args.out and set(names) <= set(METHODS)
    settings.parts_of(METHODS, names, args.set, args.views)                 # refuses what no constructor takes
    optimizer = args.optimizer or presets.recipe_of(METHODS[names[0]])["optimizer"]
    settings.check_optimizer(optimizer, cli.read_settings(args.options, "--options"))


def test_evaluation_commands_can_be_given():
    trained = [train.parse(words).out for words in commands("train.py")]
    assert len(trained) > 40 and len(commands("evaluate.py")) > 20
    for words in commands("evaluate.py"):
        for run in evaluate.parse(words).runs:
            folder = run.partition("/encoder-")[0]
            assert run.endswith("-imagenet.pth") or any(fnmatch(out, folder) for out in trained), f"who trains {run}?"


def test_data_commands_can_be_given(monkeypatch):
    made = set()
    monkeypatch.setattr(prepare, "prepare", lambda words: made.add(words.to))
    for words in commands("-m medssl.common.data"):
        prepare.main(words)
    used = [args.data for args in map(evaluate.parse, commands("evaluate.py")) if args.data]
    used += [words[words.index("--data") + 1] for words in commands("train.py")]
    assert made <= set(used) and set(used) - made == BY_HAND


@pytest.mark.parametrize("name", [name for name in METHODS if name != "together"])
def test_what_headers_tabulate_of_the_works_is_a_command(name):
    given = [train.parse(words) for words in commands("train.py") if words[words.index("--method") + 1] == name]
    for work, flags in test_contract.settings(name):
        if work.startswith(WORKS):
            row = train.parse([word for flag, words in flags.items() for word in (flag, *words)])
            assert any(holds(args, row, flags) for args in given), f"no command is {name}'s of {work}"


def holds(args, row, flags):
    """Whether a command has all that a header's row has."""
    for flag in flags:
        ours, theirs = (getattr(each, flag[2:].replace("-", "_")) for each in (args, row))
        if flag in ("--set", "--options"):
            ours, theirs = cli.read_settings(ours or []), cli.read_settings(theirs)
            ours = {key: default for key, default in ours.items() if key in theirs}
        if ours != theirs:
            return False
    return True


# ---- the tables of defaults

@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_those_of_the_code(name):
    assert name in SECTIONS, f"docs/papers.md wants a section {name} with its table of defaults"
    rows = tables(SECTIONS[name])
    stated = {row["word"]: value(row["here"]) for row in rows}
    assert len(stated) == len(rows), "a word stands twice"
    true = defaults(METHODS[name])
    assert stated.keys() == true.keys()
    for word, default in true.items():
        assert (stated[word], type(stated[word]) is bool) == (default, type(default) is bool), f"{name}: {word}"


def test_views_are_those_of_the_code():
    stated = {}
    for row in tables(SECTIONS["views"]):
        fields = [] if row["fields"] == "none" else row["fields"].split(", ")
        values = [value(cell) for cell in row["here"].split(", ")] if fields else []
        stated.setdefault(row["view"], {}).update(zip(fields, values, strict=True))
    recipes = [presets.recipe_of(cls) for name, cls in METHODS.items() if name != "together"]
    named = {recipe[key] for recipe in recipes for key in ("views", "views_small") if key in recipe}
    named |= {args.views for args in map(train.parse, commands("train.py")) if args.views}
    assert set(stated) >= named
    for view, fields in stated.items():
        assert fields == augment.VIEWS[view], view


def test_what_is_the_same_for_all_methods():
    rows = {row["what"]: row["here"] for row in tables(SECTIONS["The same for all methods"])}
    args, sgd = train.parse([]), settings.optim.build("sgd", [encoders.nn.Parameter(encoders.torch.zeros(1))], 1.0)
    assert rows["encoder"] == presets.paper(METHODS["simclr"])["encoder"]
    assert value(rows["SGD's momentum"]) == sgd.defaults["momentum"]
    assert (rows["half precision"], value(rows["seed"])) == (args.amp, args.seed)
    assert (args.init, rows["first weights"]) == (None, "random")


# ---- the page itself

def test_no_cell_is_empty():
    rows = tables(PAGE)
    assert len(rows) > 250
    for row in rows:
        assert all(cell or head == "" for head, cell in row.items()), row
        assert row.get("", "an experiment's number")


def test_every_experiment_has_its_commands():
    listed = re.findall(r"^\| \[([A-Z]\d+)\]\(#([a-z]\d+)\) \|", PAGE, re.M)
    assert [number for number, _ in listed] == re.findall(r"^### ([A-Z]\d+)$", PAGE, re.M)
    for number, link in listed:
        assert link == number.lower() and commands("evaluate.py", SECTIONS[number]), number


def test_links_lead_to_headings():
    for path, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", PAGE):
        target = ROOT / "docs" / path if path else ROOT / "docs/papers.md"
        assert target.is_file(), path
        heads = re.findall(r"^##+ (.*)", target.read_text(), re.M)
        slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
        assert not anchor or anchor in slugs, f"{path}#{anchor}"


def test_lines_are_short_outside_tables():
    for line in PAGE.splitlines():
        assert len(line) <= 140 or line.startswith("|"), line


def test_splits_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"luna16/subset{n}/{n}.mhd" for n in (0, 4, 5, 6, 7, 9)]
    names += [f"ACDC/training/patient00{n}/patient00{n}_frame01{end}.nii.gz" for n in (1, 2, 3) for end in ("", "_gt")]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(code, {})
    read = [line.split(",") for line in (tmp_path / "luna16/split.csv").read_text().split()]
    assert [split for _, split in read] == ["split", "train", "train", "val", "val", "test", "test"]
    read = [line.split(",") for line in (tmp_path / "ACDC/split.csv").read_text().split()]
    assert [row[2:] for row in read[1:]] == [["test", "patient001"], ["val", "patient002"], ["train", "patient003"]]
    assert all((tmp_path / "ACDC" / name).exists() for row in read[1:] for name in row[:2])
