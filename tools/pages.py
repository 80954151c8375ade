"""Runs what the pages show, in little and in an empty folder: commands, and blocks of code that are marked.

    python tools/pages.py

Blocks are taken from the pages themselves, so that they cannot rot. A block that needs a package which is not installed
(torchvision, timm, ...) is left out, and that is said.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = "--steps 2 --size 32 --stem default --batch 16 --encoder tiny --device cpu"
READ_OUT = "--seeds 1 --steps 2 --batch 16 --device cpu"
COMMANDS = [
    "python -m medssl", "python -m medssl simclr", "python -m medssl.common.data phantoms --size 32 --sheet look.png",
    "python train.py --steps 30 --out runs/a", "python train.py --resume --out runs/a",
    f"python train.py --method rotation+simclr --set simclr.temperature=0.2 rotation.weight=0.5 --out runs/b {SMALL}",
    f"python train.py --deal 1 --init runs/a --keep-every 1 --weight-decay-end 0.1 --out runs/c {SMALL}",
    f"python evaluate.py runs/a --task knn linear collapse {READ_OUT}",
    "python evaluate.py thumbnails statistics runs/a runs/a+statistics --task knn --seeds 1 --device cpu",
    f"python evaluate.py runs/a --task finetune grade segment unet --labels 7n --lr 3e-4 1e-3 {READ_OUT}",
    f"python evaluate.py runs/c --deal 1 --task linear --stage 1 4 {READ_OUT}",
    f"python evaluate.py runs/a --task finetune --imbalance 1 5 --augment S0 S3 --freeze 0 {READ_OUT}",
    "python evaluate.py runs/c/encoder-1.pt runs/c/encoder-2.pt --task knn --seeds 1 --all-columns --device cpu",
    "python evaluate.py runs/a --export encoder.pt --features mine.npz --device cpu",
    "python evaluate.py mine.npz --data phantoms --size 64 --task linear --seeds 1 --device cpu",
    "python experiments/medmoco.py --data phantoms --out works --seeds 1 --steps 1 "
    '--train="--size 32 --batch 16 --encoder tiny --device cpu" '
    '--evaluate="--seeds 1 --batch 16 --device cpu --task collapse"',
    "python tools/benchmark.py --encoder tiny --size 32 --batch 8 --steps 1 --rounds 1 --device cpu",
    "python tools/benchmark.py --memory --most 1 --size 32 --batch 8", "python tools/benchmark_data.py 200",
    "python -m tools.benchmark_spark --encoders tiny --sizes 64 --batch 2 --rounds 1",
]
SHORTER = {"range(100)": "range(3)", "/ 100)": "/ 3)", "steps=200": "steps=10", "steps=300": "steps=10",
           "size=64": "size=32", '"contrastive", 64': '"contrastive", 32'}
BLOCKS = [      # page, mark, method file beside it, packages, what is appended
    ("README.md", "copy", "simclr", ("torchvision",), "assert out['loss'].isfinite()"),
    ("README.md", "python", None, (), "import os; assert os.path.exists('encoder.pt')"),
    ("docs/copying.md", "maps", "spark", ("torchvision",), "out['loss'].backward()"),
    ("docs/copying.md", "timm", None, ("timm",), ""),
    ("docs/copying.md", "geometry", None, (),
     "from tests.test_augment import agreement\nassert agreement(nudged) > 0.9, agreement(nudged)"),
    ("docs/copying.md", "formats", None, ("safetensors", "onnx"), ""),
]


def run(command, folder):
    print("+", shlex.join(command)[:160], flush=True)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "MEDSSL_CACHE": f"{folder}/cache"})
    if done.returncode:
        raise SystemExit(f"failed with status {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def commands(folder):
    for line in COMMANDS:
        _, first, *words = shlex.split(line)
        script = [str(ROOT / first)] if first.endswith(".py") else [first]
        said = run([sys.executable, *script, *words], folder)
        if line.startswith("python train.py --steps 30"):
            print(said)
            assert "kNN on validation images" in said and "views.png" in said
    left = {path.name for path in Path(folder).iterdir()}
    wanted = {"runs", "results", "works", "look.png", "mine.npz",
              *(f"encoder{kind}.{ending}" for kind in ("", "-rgb") for ending in ("pt", "json"))}
    assert left == wanted, f"left beside what was named: {left ^ wanted}"


def block(page, mark):
    """The code between the fences that follow <!-- mark -->."""
    found = re.search(rf"<!-- {mark} -->\n```\w*\n(.*?)```", (ROOT / page).read_text(), re.S)
    if not found:
        raise SystemExit(f"{page}: nothing is marked <!-- {mark} -->")
    return found[1]


def blocks(folder):
    for page, mark, method, packages, after in BLOCKS:
        code, missing = block(page, mark), [name for name in packages if not importlib.util.find_spec(name)]
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        if missing == ["torchvision"] and mark == "copy":
            code = code.replace("import torch, torchvision", "import torch\nfrom medssl.common import encoders")
            code = code.replace("torchvision.models.resnet18()", "encoders.build('resnet18', 3)")
        elif missing:
            print(f"{page}, {mark}: not run without {', '.join(missing)}")
            continue
        if method:
            shutil.copy(ROOT / f"medssl/{method}.py", folder)
        (Path(folder) / "example.py").write_text(f"{code}\n{after}\n")
        run([sys.executable, "example.py"], folder)
        print(f"{page}, {mark}: ran")


if __name__ == "__main__":
    assert block("README.md", "run").strip() == "pip install -e . && python train.py"
    for piece in (blocks, commands):
        with tempfile.TemporaryDirectory() as scratch:
            piece(scratch)
    print("the commands and examples of the pages work")
