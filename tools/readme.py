"""Runs what the README shows, in an empty folder: the run command (shortened), and the examples.

    python tools/readme.py

The commands are taken from README.md itself, so that it cannot rot. Where torchvision is not installed, the example's
encoder is this project's ResNet-18 with the same parameter names.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def block(mark):
    """The code between the fences that follow <!-- mark -->."""
    found = re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    if not found:
        raise SystemExit(f"README.md: nothing is marked <!-- {mark} -->")
    return found[1]


def run(command, folder, **env):
    print("+", " ".join(command), flush=True)
    result = subprocess.run(command, cwd=folder, env=os.environ | env, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"failed with status {result.returncode}:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    return result.stdout


def run_command(folder):
    install, train = block("run").strip().split(" && ")
    assert install == "pip install -e ." and train == "python train.py", (install, train)
    said = run([sys.executable, str(ROOT / "train.py"), "--steps", "30"], folder, PYTHONPATH=str(ROOT))
    print(said)
    for word in ("kNN on validation images", "views.png", "curves.png", "spectrum.png"):
        assert word in said, f"the run does not speak of {word}"
    left = {path.name for path in Path(folder).iterdir()}
    assert left == {"runs"}, f"written outside the run's folder: {left}"


def copy_one_file(folder):
    shutil.copy(ROOT / "medssl" / "simclr.py", folder)
    code = block("copy").replace("range(100)", "range(5)").replace("/ 100)", "/ 5)")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        print("torchvision is not installed: the example runs with this project's ResNet-18")
        code = code.replace("import torch, torchvision",
                            f"import sys, torch\nsys.path.append({str(ROOT)!r})\nfrom medssl.common import encoders")
        code = code.replace("torchvision.models.resnet18()", "encoders.build('resnet18', 3)")
    code += "\nassert out['loss'].isfinite(); print('loss', float(out['loss']))\n"
    (Path(folder) / "example.py").write_text(code)
    print(run([sys.executable, "example.py"], folder))


def copy_with_maps(folder):
    shutil.copy(ROOT / "medssl" / "spark.py", folder)
    try:
        import torchvision  # noqa: F401
    except ImportError:
        print("torchvision is not installed: the example with maps was not run")
        return
    (Path(folder) / "example.py").write_text(block("maps")
                                             + "\nout['loss'].backward(); print('loss', float(out['loss']))\n")
    print(run([sys.executable, "example.py"], folder))


def python_way(folder):
    """The blocks that use the package from Python: the loop from a script, and an augmentation with its geometry."""
    code = block("python").replace("steps=200", "steps=20").replace('"phantoms", size=64', '"phantoms", size=32')
    code = code.replace('"contrastive", 64', '"contrastive", 32')
    (Path(folder) / "loop_example.py").write_text(code)
    said = run([sys.executable, "loop_example.py"], folder, PYTHONPATH=str(ROOT))
    assert "20 " in said and (Path(folder) / "encoder.pt").is_file(), said
    check = "\nfrom tests.test_augment import agreement\nassert agreement(nudged) > 0.9, agreement(nudged)\n"
    (Path(folder) / "geometry_example.py").write_text(block("geometry") + check)
    run([sys.executable, "geometry_example.py"], folder, PYTHONPATH=str(ROOT))


def other_formats(folder):
    if not all(importlib.util.find_spec(package) for package in ("safetensors", "onnx")):
        print("safetensors and onnx are not installed: the example of other formats was not run")
        return
    (Path(folder) / "example.py").write_text(block("formats"))
    run([sys.executable, "example.py"], folder, PYTHONPATH=str(ROOT))
    assert all((Path(folder) / f"encoder.{ending}").stat().st_size > 10 ** 6 for ending in ("safetensors", "onnx"))


def tour_block(folder):
    """The twenty lines that the tour begins with, in little."""
    page = (ROOT / "docs/tour.md").read_text()
    code = re.search(r"<!-- way-in -->\n```python\n(.*?)```", page, re.S)[1]
    (Path(folder) / "example.py").write_text(code.replace("steps=300", "steps=20").replace("size=64", "size=32"))
    assert "kNN, balanced accuracy" in run([sys.executable, "example.py"], folder, PYTHONPATH=str(ROOT))


for piece in (run_command, copy_one_file, copy_with_maps, python_way, tour_block, other_formats):
    with tempfile.TemporaryDirectory() as folder:
        piece(folder)
print("the README's commands work")
