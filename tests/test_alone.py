"""Copying one file is enough: each, alone in an empty folder, trains with an encoder from elsewhere, and only torch."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from medssl import METHODS

PACKAGE = Path(__file__).parents[1] / "medssl"

SCRIPT = '''
import importlib, importlib.abc, inspect, json, sys
import torch
from torch import nn

allowed = set(sys.stdlib_module_names) | {"torch"}
class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        caller = inspect.currentframe().f_back
        while caller and "importlib" in caller.f_code.co_filename:
            caller = caller.f_back
        if name.split(".")[0] not in allowed and caller and caller.f_globals.get("__name__") in methods:
            raise ImportError(f"{caller.f_globals['__name__']} imports {name}")
methods = json.loads(sys.argv[1])
sys.meta_path.insert(0, Guard())

class Net(nn.Module):
    """Somebody else's encoder."""
    def __init__(self):
        super().__init__()
        def stage(a, b):
            return nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        self.a, self.b, self.c, self.d = stage(1, 8), stage(8, 8), stage(8, 16), stage(16, 16)
        self.dim, self.widths, self.strides = 16, [8, 8, 16, 16], [2, 4, 8, 16]
    def features(self, x):
        maps = []
        for part in (self.a, self.b, self.c, self.d):
            x = part(x)
            maps.append(x)
        return maps
    def forward(self, x):
        return self.features(x)[-1].mean((2, 3))

class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 1, 1)
    def forward(self, maps):
        return nn.functional.interpolate(self.conv(maps[-1]), scale_factor=16)

def augment(images, geometry=False):
    views = images * torch.empty(len(images), 1, 1, 1).uniform_(0.8, 1)
    return (views, torch.eye(2, 3).repeat(len(images), 1, 1)) if geometry else views

def train(name, class_name):
    torch.manual_seed(0)
    cls = getattr(importlib.import_module(name), class_name)
    words, encoder = inspect.signature(cls).parameters, Net()
    values = {"decoder": Decoder(), "channels": 1, "mean": 0.4, "small": augment, "queue_size": 16, "hidden": 32,
              "dim": 16, "width": 32, "prototypes": 8}
    parts = {"rotation": importlib.import_module("rotation").Rotation(encoder, augment)} if name == "together" else None
    values["parts"] = parts
    method = cls(encoder, augment, **{k: v for k, v in values.items() if k in words})
    before = encoder.a[0].weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            views = method.views(torch.rand(8, 1, 48, 48))
        out = method(*views)
        method.zero_grad()
        out["loss"].backward()
        with torch.no_grad():
            for p in method.parameters():
                if p.requires_grad:
                    p -= 0.1 * p.grad
        kept = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in out.items()}
        method.after_step([kept], (step + 1) / 3)
    assert out["loss"].isfinite() and (encoder.a[0].weight - before).abs().max() > 1e-5, name
    return float(out["loss"])

print(json.dumps({name: train(name, class_name) for name, class_name in methods.items()}))
'''


def test_each_file_trains_alone():
    classes = {name: cls.__name__ for name, cls in METHODS.items()}
    with tempfile.TemporaryDirectory() as folder:
        for name in METHODS:
            shutil.copy(PACKAGE / f"{name}.py", folder)
        (Path(folder) / "script.py").write_text(SCRIPT)
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-s", "script.py", json.dumps(classes)]
        result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1]).keys() == METHODS.keys()
