"""ResNet-18/34/50 with torchvision's parameter names, and a small one for CPUs.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, in torchvision's form (stride on the 3x3
convolution). Three things are ours: any number of input channels, `features(x)` -> the four stage maps, and
standardisation inside: images enter in [0,1], the network subtracts `mean` and divides by `std` itself, so no other
place has to know them.

A file of weights tells less than one thinks: the stem "nopool" has the keys and shapes of "default", and what other
libraries save holds wrappers' prefixes, slow copies and heads. `save` writes the kind of network beside the weights,
`load` finds the network in what others saved and says what it took, `opened_by` says how to open ours elsewhere.
"""

import functools
import json
import re
from collections import Counter
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


@functools.cache
def blank(block, depths, width, stem):
    """A network without numbers: its keys and shapes."""
    with torch.device("meta"):
        return ResNet(block, depths, width, 1, stem)


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
    """What is written beside a file of weights, or in the config.json of an older run: name, stem, channels, size,
    mean, std, as far as they are known."""
    path, known = Path(path), {}
    of_a_run = re.fullmatch(r"(encoder(-\d+)?|checkpoint)\.pt", path.name)
    for file in [path.parent / "config.json"] * bool(of_a_run) + [path.with_suffix(".json")]:
        if file.is_file():
            try:
                content = json.loads(file.read_text())
                known |= content.get("encoder", {}) if file.name == "config.json" else content
            except (OSError, ValueError, TypeError, AttributeError):
                raise UserError(f"{file}: damaged; put it right or remove it") from None
    return known


def load(source, encoder, note=lambda line: None):
    """Load an encoder.pt, a run's folder or checkpoint.pt, or a state dict that another library saved; strict. Returns
    (matched, in the encoder). `note` is called with each line that the user should read: what was left out, a doubt
    about the stem."""
    known, stem = {}, getattr(encoder, "stem", None)
    if not isinstance(source, dict):
        source = weights_file(source)
        known = about(source)
        if stem and known.get("stem", stem) != stem:
            made = known["stem"]
            raise UserError(f"{source}: was made with stem {made}, this encoder has stem {stem}: choose --stem {made}")
    state, prefix, rest = choose(source, encoder, known)
    if not isinstance(source, dict) and "stem" not in known and stem in ("default", "nopool"):
        note(f"{source} does not say its stem, and default and nopool have the same keys: {stem} is assumed")
    if prefix or rest:
        besides = ", ".join(f"{name} ({count})" for name, count in rest.items()) or "nothing"
        note(f"taken: the tensors under {prefix or 'no prefix'}; left out: {besides}")
    own = encoder.state_dict()
    encoder.load_state_dict(state, strict=False)                            # all keys were compared
    return len(own.keys() & state.keys()), len(own)


def weights_file(path):
    path = Path(path)
    return path / "encoder.pt" if path.is_dir() else path


def left_out(source, encoder):
    """What `load` would leave out of it, {name: number of tensors}; or Unfit: why it cannot be loaded."""
    return choose(source, encoder, {})[2]


class Unfit(UserError):
    """Weights that an encoder does not take. matched: how many of its tensors they have, in key and shape."""

    def __init__(self, line, matched):
        super().__init__(line)
        self.matched = matched


# Where a file holds the network twice, the one that was trained by gradients is taken and not the copy that follows it;
# of student and teacher the teacher.
NOT_TAKEN = re.compile(r"(^|[._])(k|key|momentum|target|ema|student)[._]")


def choose(source, encoder, known):
    """(state dict, prefix of its keys in the source, {what the source has besides: number of tensors})"""
    name = "the state dict" if isinstance(source, dict) else str(source)
    flat = dict(flatten(source if isinstance(source, dict) else files.load_torch(weights_file(source))))
    found = prefixes(flat, encoder)
    most = max(map(len, found.values()), default=0)
    readings = {prefix: read(flat, prefix, keys, encoder, name) for prefix, keys in found.items() if len(keys) == most}
    whole = [prefix for prefix, (_, faults, _) in readings.items() if not faults]
    if not whole:
        own = encoder.state_dict()
        matched = [sum(own[key].shape == state[key].shape for key in state) for state, _, _ in readings.values()]
        raise Unfit(f"{name}: {refusal(flat, readings, encoder, known)}", max(matched, default=0))
    trained = sorted([prefix for prefix in whole if not NOT_TAKEN.search(prefix)] or whole, key=len)
    state, _, rest = readings[trained[0]]
    for prefix in trained[1:]:
        if not all(torch.equal(state[key], value) for key, value in readings[prefix][0].items()):
            raise Unfit(f"{name}: holds this encoder more than once, under {trained[0]} and {prefix}: save the one "
                        "that you mean alone", len(state))
    return state, trained[0], rest


def refusal(flat, readings, encoder, known):
    """Why no prefix fits, in words."""
    if not flat:
        return "is not a state dict of tensors"
    if not readings:
        return f"has none of this encoder's keys, but {', '.join(list(flat)[:3])}: a network of another kind"
    prefix, (state, faults, _) = next(iter(readings.items()))
    made = " and ".join(f"{key} {known[key]}" for key in ("name", "stem") if key in known)
    hint = f"it was made with {made}" if made else "choose the encoder and stem that it was made with"
    parts, there = ({key.split(".")[0] for key in keys} for keys in (encoder.state_dict(), state))
    if 2 * len(there) < len(parts):                                         # conv1, bn1, layer1, ...
        hint = "a network of another kind"
    return f"does not fit this encoder{prefix and f', read under {prefix}'}: {', '.join(faults)}; {hint}"


def flatten(content, prefix="", depth=5):
    """(key, tensor) of nested dicts, the keys joined by dots; the rest says nothing about a network."""
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict) and depth:
            yield from flatten(value, f"{prefix}{key}.", depth - 1)


def prefixes(flat, encoder):
    """{prefix: {the encoder's key: the key in the file}} for every prefix under which some of its keys stand. Children
    may also be named by their number, as in Sequential(*network.children())."""
    number = {name: str(i) for i, (name, _) in enumerate(encoder.named_children())}
    names = {}
    for key in encoder.state_dict():
        top, dot, rest = key.partition(".")
        names[key] = names[f"{number.get(top, top)}{dot}{rest}"] = key
    found = {}
    for key in flat:
        parts = key.split(".")
        for i in range(len(parts)):
            if own := names.get(".".join(parts[i:])):
                found.setdefault("".join(f"{part}." for part in parts[:i]), {})[own] = key
    return found


def read(flat, prefix, keys, encoder, name):
    """(state dict, what is wrong with it in words, what the file holds besides)"""
    own, state = encoder.state_dict(), {key: flat[there] for key, there in keys.items()}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]  # not in old files
    if "conv1.weight" in own.keys() & state.keys():
        state["conv1.weight"] = match_channels(state["conv1.weight"], own["conv1.weight"], name)
    taken = set(keys.values())
    tops = {there.removeprefix(prefix).split(".")[0] for there in taken}
    rest = [key for key in flat if key not in taken]
    extra = [key for key in rest if key.startswith(prefix) and key.removeprefix(prefix).split(".")[0] in tops]
    wrong = [f"{key} {shape_of(state[key])}, here {shape_of(own[key])}" for key in own
             if key in state and own[key].shape != state[key].shape]
    faults = [f"{len(those)} {what} (first: {those[0]})" for those, what in
              ((missing, "missing"), (extra, "unexpected"), (wrong, "of another shape")) if those]
    return state, faults, Counter(branch(key, prefix) for key in rest)


def shape_of(tensor):
    return "x".join(map(str, tensor.shape)) or "one number"


def branch(key, prefix):
    """The first part of the key that is not the prefix's."""
    parts = key.split(".")
    return next((part for part, own in zip(parts, prefix.split("."), strict=False) if part != own), parts[-1])


def match_channels(weight, own, name):
    """First-layer weights (O, C, k, k) for as many channels as `own`: summed to one, or one spread over several."""
    channels = own.shape[1]
    if weight.ndim != 4 or weight[:, 0].shape != own[:, 0].shape or weight.shape[1] == channels:
        return weight                                                       # of another kernel, or nothing to do
    if channels == 1:
        return weight.sum(1, keepdim=True)                                  # what a gray image repeated C times gives
    if weight.shape[1] == 1:
        return weight.repeat(1, channels, 1, 1) / channels
    raise UserError(f"{name}: its first layer takes {weight.shape[1]} channels, this encoder takes {channels}")


def opened_by(encoder, file):
    """{library: Python code that opens the file of these weights there}, empty where none has such a network. Other
    libraries know nothing of mean and deviation: they want standardised images."""
    name = (encoder.name or "").removesuffix("-3stages")
    if name not in ("resnet18", "resnet34", "resnet50"):
        return {}
    channels, (kernel, stride, _) = encoder.conv1.weight.shape[1], STEMS[encoder.stem]
    pool, whole, opening = encoder.stem == "default", len(encoder.widths) == 4, f"torch.load({str(file)!r})"
    lines = [f"net = torchvision.models.{name}()", "net.fc = torch.nn.Identity()"]
    if (channels, kernel) != (3, 7):
        lines.append(f"net.conv1 = torch.nn.Conv2d({channels}, 64, {kernel}, {stride}, {kernel // 2}, bias=False)")
    lines += ["net.maxpool = torch.nn.Identity()"] * (not pool) + ["net.layer4 = torch.nn.Identity()"] * (not whole)
    code = {"torchvision": "; ".join([*lines, f"net.load_state_dict({opening})"])}
    if whole:
        code["monai"] = (f"net = monai.networks.nets.{name}(spatial_dims=2, n_input_channels={channels}, "
                         f"conv1_t_size={kernel}, conv1_t_stride={stride}, no_max_pool={not pool}, shortcut_type='B', "
                         f"bias_downsample=False, feed_forward=False); net.load_state_dict({opening})")
    if whole and kernel == 7:
        code["timm"] = (f"net = timm.create_model({name!r}, num_classes=0, in_chans={channels}, "
                        f"checkpoint_path={str(file)!r})" + "; net.maxpool = torch.nn.Identity()" * (not pool))
    return code
