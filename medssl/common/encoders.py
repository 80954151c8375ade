"""ResNet-18/34/50 with torchvision's parameter names, and a small one for CPUs.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, in torchvision's form (stride on the 3x3 convolution).
Three things are ours: any number of input channels, `features(x)` -> the four stage maps, and standardisation inside:
images enter in [0,1], the network subtracts `mean` and divides by `std` itself, so no other place has to know them.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

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


STEMS = {"default": (7, 2, 4), "nopool": (7, 2, 2), "small": (3, 1, 1)}    # kernel and stride of conv1, stride of the first map


class ResNet(nn.Module):
    """encoder(x) -> (B, dim). Stems: "default" 7x7 stride 2 and pool (total stride 32); "nopool" the same keys without
    the pool (16); "small" 3x3 stride 1 without pool (8), for images below 40 pixels."""

    def __init__(self, block, depths, width=64, channels=1, stem="default", mean=None, std=None):
        super().__init__()
        self.mean = tuple(mean or [0.0] * channels)
        self.std = tuple(std or [1.0] * channels)
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(f"mean and std need {channels} values each, one a channel")
        self.register_buffer("shift", torch.tensor(self.mean).view(1, -1, 1, 1), persistent=False)   # (1, C, 1, 1)
        self.register_buffer("scale", torch.tensor(self.std).view(1, -1, 1, 1), persistent=False)
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
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
}


def build(name, channels=1, stem="default", mean=None, std=None):
    block, depths, width = ENCODERS[name]
    return ResNet(block, depths, width, channels, stem, mean, std)


def save(encoder, path):
    """The bare network under its own key names, and beside it (.json) the mean and standard deviation that it expects."""
    path = Path(path)
    files.save_torch(path, {key: value.cpu().contiguous() for key, value in encoder.state_dict().items()})
    about = {"mean": list(getattr(encoder, "mean", [])), "std": list(getattr(encoder, "std", []))}
    files.write_json(path.with_suffix(".json"), about)


PREFIXES = ("module.", "_orig_mod.", "encoder.", "backbone.")               # left behind by wrappers


def plain_keys(state):
    """A state dict with wrappers' prefixes and the classifier taken off; torch.compile and DDP leave such prefixes."""
    plain = {}
    for key, value in state.items():
        while key.startswith(PREFIXES):
            key = key.split(".", 1)[1]
        if not key.startswith("fc."):
            plain[key] = value
    return plain


def load(source, encoder):
    """Load an encoder.pt, a run folder, or a torchvision or timm state dict; strict. Returns (matched, in the encoder)."""
    state, own = fitting(source, encoder), encoder.state_dict()
    encoder.load_state_dict(state, strict=False)                            # all keys were compared
    return len(own.keys() & state.keys()), len(own)


def fitting(source, encoder):
    """What `load` takes, as a state dict with this encoder's keys and shapes; or a ValueError that says what does not fit."""
    name = "the state dict" if isinstance(source, dict) else str(source)
    if not isinstance(source, dict):
        path = Path(source)
        source = files.load_torch(path / "encoder.pt" if path.is_dir() else path)
    for inner in ("encoder", "state_dict", "model"):
        if isinstance(source.get(inner), dict):
            source = source[inner]
    state, own = plain_keys(source), encoder.state_dict()
    if not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{name}: not a state dict of tensors")
    if "conv1.weight" in state and "conv1.weight" in own:
        state["conv1.weight"] = match_channels(state["conv1.weight"], own["conv1.weight"].shape[1], name)
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]        # absent in some older files
    wrong = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or extra or wrong:
        parts = [f"{len(keys)} {what} (first: {keys[0]})"
                 for keys, what in ((missing, "missing"), (extra, "unexpected"), (sorted(wrong), "of another shape")) if keys]
        raise UserError(f"{name}: does not fit this encoder: {', '.join(parts)}; choose the encoder and stem that it was made with")
    return state


def match_channels(weight, channels, name):
    """First-layer weights (O, C, k, k) for another number of channels: summed to one, or one spread over several."""
    if weight.shape[1] == channels:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)                                  # the answer to a gray image repeated C times
    if weight.shape[1] == 1:
        return weight.repeat(1, channels, 1, 1) / channels
    raise UserError(f"{name}: its first layer takes {weight.shape[1]} channels, this encoder takes {channels}")
