"""The tour and the page of methods: what they point at is there, and the twenty lines run."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

from medssl import METHODS
from medssl.common import data
from medssl.common.data import phantoms

DOCS = Path(__file__).parents[1] / "docs"
TOUR, PAGE = (DOCS / "tour.md").read_text(), (DOCS / "methods.md").read_text()


def script(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tour():
    return script("tour")


def test_references_are_those_of_the_code(tour):
    assert tour.with_references(TOUR) == TOUR, "lines have moved: python docs/tour.py --references"
    found = re.findall(r"\[`([\w.]+)`, ([\w/.]+), lines (\d+) to (\d+)\]", TOUR)
    assert {name for name, *_ in found} == set(tour.CODE)
    for name, file, first, last in found:
        lines = (DOCS.parent / file).read_text().splitlines()[int(first) - 1:int(last)]
        own = name.rpartition(".")[2]
        assert any(re.match(rf"\s*(def|class) {own}\b", line) for line in lines[:3]), f"{name} is not in {file}:{first}"


def test_a_moved_line_is_found(tour):
    code = inspect.unwrap(tour.CODE["nt_xent"])
    first = inspect.getsourcelines(code)[1]
    moved = TOUR.replace(f"lines {first} to", f"lines {first + 1} to")
    assert moved != TOUR and tour.with_references(moved) == TOUR


def test_figures_are_filled_in(tour):
    text = tour.with_figures("a <!-- loss -->?<!-- / --> b <!-- images -->1<!-- / -->", {"loss": 1.234, "images": 2000})
    assert text == "a <!-- loss -->1.23<!-- / --> b <!-- images -->2,000<!-- / -->"
    assert "?<!-- / -->" not in TOUR and "?<!-- / -->" not in PAGE          # every figure was
    with pytest.raises(KeyError):
        tour.with_figures("<!-- nothing -->?<!-- / -->", {})


def test_pictures_are_there_and_small():
    for text in (TOUR, PAGE):
        for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text):
            assert (DOCS / picture).stat().st_size <= 80_000, picture
    shown = {path.relative_to(DOCS).as_posix() for folder in ("tour", "methods") for path in (DOCS / folder).iterdir()}
    assert shown == set(re.findall(r"\]\(([^)]+\.png)\)", TOUR + PAGE))


def test_lesions_are_outlined_where_there_are_some(tour):
    found, dataset = tour.lesions(40, 32), phantoms.make(40, 32)
    assert found.shape == (40, 32, 32) and (found.any((1, 2)) == (dataset.labels > 0)).all()


def test_every_method_has_its_section_and_its_training():
    methods = script("methods")
    sections = re.findall(r"^### (\w+)$", PAGE, re.M)
    assert sorted(sections) == sorted(METHODS), "docs/methods.md wants one section for each method"
    assert sorted(methods.STEPS) == sorted(METHODS), "docs/methods.py, STEPS: wants a line for each method"
    for name, steps in methods.STEPS.items():
        for wanted in (f"<!-- {name} -->{steps} steps of ", f"](methods/{name}.png)", f"[{name}.py](../medssl/{name}"):
            assert wanted in PAGE, f"docs/methods.md lacks {wanted}; `python docs/methods.py {name}` draws the picture"


def test_links_lead_somewhere():
    for text in (TOUR, PAGE):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert (DOCS / target).exists(), target


def test_the_twenty_lines_run(monkeypatch, tmp_path, capsys):
    code = re.search(r"<!-- way-in -->\n```python\n(.*?)```", TOUR, re.S)[1]
    assert len(code.strip().splitlines()) <= 22
    for whole, little in (("size=64", "size=32"), ('"contrastive", 64', '"contrastive", 32'), ("steps=300", "steps=10"),
                          ("batch=64", "batch=8"), ("warmup=30", "warmup=1")):
        assert whole in code
        code = code.replace(whole, little)
    monkeypatch.setattr(data, "load", lambda path, size: phantoms.make(80, size))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "tour.md", "exec"), {})
    said = capsys.readouterr().out
    assert re.search(r"^10 \d.*\nkNN, balanced accuracy: [01]\.\d", said) and (tmp_path / "encoder.pt").is_file()
