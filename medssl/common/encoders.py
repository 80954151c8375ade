"""ResNet-18/34/50 with torchvision's parameter names, and a small one for CPUs.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, in torchvision's form (stride on the 3x3
convolution). Three things are ours: any number of input channels, `features(x)` -> the four stage maps, and
standardisation inside: images enter in [0,1], the network subtracts `mean` and divides by `std` itself, so no other
place has to know them.

A file of weights tells less than one thinks: the stem "nopool" has the keys and shapes of "default", and what other
libraries save holds wrappers' prefixes, slow copies and heads. `save` writes the kind of network beside the weights,
`load` finds the network in what others saved and says what it took. docs/copying.md says how others open ours.
"""

import itertools
import json
import re
from pathlib import Path

import torch
from torch import nn

from . import files
from .errors import UserError


def conv(fan_in, fan_out, kernel, stride=1):
    return nn.Conv2d(fan_in, fan_out, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""
    expansion = 1

    def __init__(self, fan_in, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(fan_in, width, 3, stride), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = shortcut(fan_in, width, stride)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to four times the width, beside a shortcut."""
    expansion = 4

    def __init__(self, fan_in, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(fan_in, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(fan_in, 4 * width, stride)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def shortcut(fan_in, fan_out, stride):
    """The identity needs no module; where shape changes, a strided 1x1 convolution."""
    if stride == 1 and fan_in == fan_out:
        return None
    return nn.Sequential(conv(fan_in, fan_out, 1, stride), nn.BatchNorm2d(fan_out))


STEMS = {"default": (7, 2, 4), "nopool": (7, 2, 2), "small": (3, 1, 1)}    # conv1: kernel, stride; first map: stride


class ResNet(nn.Module):
    """encoder(x) -> (B, dim). Stems: "default" 7x7 stride 2 and pool (total stride 32); "nopool" the same keys without
    the pool (16); "small" 3x3 stride 1 without pool (8), for images below 40 pixels."""

    def __init__(self, block, depths, width=64, channels=1, stem="default", mean=None, std=None):
        super().__init__()
        self.name, self.stem = None, stem                                   # `build` knows the name
        self.mean = tuple(mean or [0.0] * channels)
        self.std = tuple(std or [1.0] * channels)
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(f"mean and std need {channels} values each, one a channel")
        for name, values in (("shift", self.mean), ("scale", self.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)    # (1, C, 1, 1)
        kernel, stride, first = STEMS[stem]
        self.conv1, self.bn1 = conv(channels, width, kernel, stride), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "default" else nn.Identity()
        fan_in = width
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(block(fan_in, width << i, 2 if i > 0 and j == 0 else 1))
                fan_in = (width << i) * block.expansion
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.widths = [(width << i) * block.expansion for i in range(len(depths))]
        self.strides = [first << i for i in range(len(depths))]
        self.dim = self.widths[-1]
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x):
        """(B, C, H, W) -> stage maps, fine to coarse: (B, widths[i], H / strides[i], W / strides[i])."""
        x = (x - self.shift) / self.scale
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for i in range(len(self.widths)):
            x = getattr(self, f"layer{i + 1}")(x)
            maps.append(x)
        return maps

    def forward(self, x):
        return self.features(x)[-1].mean((2, 3))                            # (B, dim)


ENCODERS = {
    "tiny": (BasicBlock, (2, 2, 2, 2), 16),                                 # ResNet-18 at a quarter of the width
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet18-3stages": (BasicBlock, (2, 2, 2), 64),                        # without the last, widest stage
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
}


def build(name, channels=1, stem="default", mean=None, std=None):
    block, depths, width = ENCODERS[name]
    encoder = ResNet(block, depths, width, channels, stem, mean, std)
    encoder.name = name
    return encoder


def exported(method):
    """The encoder that is kept of a method: the one that it names, else the one that is trained."""
    return getattr(method, "exported", method.encoder)


# ---- files of weights

def save(encoder, path):
    """The bare network under its own key names, and beside it (.json) what `about` reads: which network it is, and the
    mean and deviation that it expects. A caller that knows the size of the images sets encoder.size."""
    path = Path(path)
    files.save_torch(path, {key: value.cpu().contiguous() for key, value in encoder.state_dict().items()})
    known = {key: getattr(encoder, key, None) for key in ("name", "stem", "size", "mean", "std")}
    known["channels"] = len(known["mean"]) if known["mean"] else None
    files.write_json(path.with_suffix(".json"), {key: value for key, value in known.items() if value is not None})


def about(path):
    """What stands beside a file of weights (.json): name, stem, channels, size, mean, std, as far as they are known."""
    path = Path(path)
    file = path.with_name("encoder.json") if path.name == "checkpoint.pt" else path.with_suffix(".json")
    try:
        return dict(json.loads(file.read_text())) if file.is_file() else {}
    except (OSError, ValueError, TypeError):
        raise UserError(f"{file}: damaged; put it right or remove it") from None


def load(source, encoder, note=lambda line: None):
    """Load an encoder.pt, a run's folder or checkpoint.pt, or a state dict that another library saved; strict. Returns
    (matched, in the encoder). `note` is called with each line that the user should read: what was left out, a doubt
    about the stem."""
    name, stem = "the state dict", getattr(encoder, "stem", None)
    if not isinstance(source, dict):
        name = Path(source) / "encoder.pt" if Path(source).is_dir() else Path(source)
        source, made = files.load_torch(name), about(name).get("stem")
        if made and stem and made != stem:
            raise UserError(f"{name}: was made with stem {made}, this encoder has stem {stem}: choose --stem {made}")
        if not made and stem in ("default", "nopool"):
            note(f"{name} does not say its stem, and default and nopool have the same keys: {stem} is assumed")
    flat = dict(flatten(source))
    faults, prefix, state = matched_to(flat, encoder)
    if faults:
        try:
            hint = "try --encoder {} --stem {} --channels {}".format(*kind_of(flat), state["conv1.weight"].shape[1])
        except UserError:
            hint = "it fits no other encoder here"
        raise UserError(f"{name}: does not fit this encoder: {faults[0]} ({len(faults)} faults); {hint}")
    if len(flat) > len(state):
        note(f"taken: {len(state)} tensors under {prefix or 'no prefix'}; left out: {len(flat) - len(state)} others")
    encoder.load_state_dict(state, strict=False)                            # all keys and shapes were compared
    return len(state), len(encoder.state_dict())


def kind_of(state):
    """(name, stem) of the encoder that these bare weights are of. The stem "nopool" has the keys of "default"."""
    flat, refused = dict(flatten(state)), []
    for name, stem in itertools.product(ENCODERS, ("default", "small")):
        with torch.device("meta"):                                          # keys and shapes, no numbers
            faults = matched_to(flat, build(name, stem=stem))[0]
        if not faults:
            return name, stem
        refused.append((len(faults), f"as {name} with stem {stem}: {faults[0]} ({len(faults)} faults)"))
    raise UserError(f"its keys and shapes are those of none of {', '.join(ENCODERS)}; {min(refused)[1]}")


def flatten(content, prefix="", depth=5):
    """(key, tensor) of nested dicts, the keys joined by dots; the rest says nothing about a network."""
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict) and depth:
            yield from flatten(value, f"{prefix}{key}.", depth - 1)


# Where a file holds the network twice, the one that was trained by gradients is taken and not the copy that follows it;
# of student and teacher the teacher.
NOT_TAKEN = re.compile(r"(^|[._])(k|key|momentum|target|ema|student)[._]")


def matched_to(flat, encoder):
    """(faults, prefix, state dict): the encoder's tensors, which stand in the file under one prefix. A prefix with all
    of them has no faults; where there is none, the best one tells what is wrong."""
    own, readings = encoder.state_dict(), []
    for prefix in [key.removesuffix("conv1.weight") for key in flat if f".{key}".endswith(".conv1.weight")]:
        state = {key: flat[prefix + key] for key in own if prefix + key in flat}
        state["conv1.weight"] = match_channels(state["conv1.weight"], own["conv1.weight"].shape[1])
        readings.append((find_faults(flat, prefix, state, own), prefix, state))
    if not readings:
        return [f"no conv1.weight, but {', '.join(list(flat)[:3]) or 'no tensor at all'}"], "", {}
    return min(readings, key=lambda each: (bool(each[0]), -len(each[2]), bool(NOT_TAKEN.search(each[1])), len(each[1])))


def find_faults(flat, prefix, state, own):
    """Missing, unexpected and misshapen tensors, each in words. A head or a stage that the encoder lacks is neither."""
    parts = {key.split(".")[0] for key in own}
    inside = [key.removeprefix(prefix) for key in flat if key.startswith(prefix)]
    return ([f"{prefix}{key} is missing" for key in own if key not in state and not key.endswith("num_batches_tracked")]
            + [f"{prefix}{key} is unexpected" for key in inside if key.split(".")[0] in parts and key not in own]
            + [f"{prefix}{key} is {list(value.shape)}, here {list(own[key].shape)}" for key, value in state.items()
               if value.shape != own[key].shape])


def match_channels(weight, channels):
    """First-layer weights (O, C, k, k) for so many channels. Summed to one: what a gray image repeated C times gives;
    or one spread over several."""
    if weight.ndim == 4 and 1 in (channels, weight.shape[1]):
        weight = weight.sum(1, keepdim=True).repeat(1, channels, 1, 1) / channels           # (O, channels, k, k)
    return weight
