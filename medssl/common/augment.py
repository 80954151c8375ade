"""Views of images: random crops, turns, intensities; for a whole batch at once, on the device, drawn for every image.

An Augment is called with images (B, C, H, W) in [0, 1] and gives views (B, C, size, size) in [0, 1]. Any number of
channels; colour (saturation, hue, grayscale) acts on 3-channel images only. With geometry=True it also returns theta
(B, 2, 3): the affine map from view coordinates to image coordinates, both running from -1 to 1 over the picture
(torch's affine_grid with align_corners=False).

The definitions are torchvision's (RandomResizedCrop, ColorJitter, ...), with these differences: crops have fractional
borders; crop, flip and rotation are one resampling instead of three, bilinear; jitter runs in the fixed order
brightness, contrast, saturation, hue; a blur's width is given for a view of 224 pixels and shrinks with the view; the
blur's weights are renormalised at the border instead of reflecting the image.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Augment:
    size: int                                  # side of the view in pixels
    crop: tuple = None                         # share of the area kept (low, high), with crop_p
    crop_p: float = 1.0
    ratio: tuple = (3 / 4, 4 / 3)              # width : height of the crop
    zoom: tuple = None                         # magnification (low, high), with zoom_p
    zoom_p: float = 1.0
    shift: float = 0.0                         # largest translation, as a share of the side
    rotation: float = 0.0                      # largest angle in degrees, with rotation_p
    rotation_p: float = 1.0
    quarter_turn: float = 0.0                  # probability of a turn by 90, 180 or 270 degrees
    flip: float = 0.0                          # probability of a horizontal flip
    flip_vertical: float = 0.0
    brightness: float = 0.0                    # factor uniform in 1 +- this; the same for contrast and saturation
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0                           # shift uniform in +- this, in turns of the colour circle
    jitter: float = 1.0                        # probability of the four above
    gamma: tuple = None                        # exponent (low, high), log-uniform
    grayscale: float = 0.0                     # probability
    blur: tuple = None                         # Gaussian sigma (low, high) in pixels of a 224-pixel view, with blur_p
    blur_p: float = 0.5
    solarise: float = 0.0                      # probability of inverting what is brighter than a half
    noise: tuple = None                        # standard deviation (low, high), log-uniform, with noise_p
    noise_p: float = 0.5

    @torch.no_grad()
    def __call__(self, images, geometry=False):
        theta = self.draw_theta(images)                                                          # (B, 2, 3)
        moves = (self.crop, self.zoom, self.shift, self.rotation, self.quarter_turn, self.flip, self.flip_vertical)
        if any(moves) or images.shape[2:] != (self.size, self.size):
            images = resample(images, theta, self.size)                                          # (B, C, size, size)
        images = self.intensities(images)
        return (images, theta) if geometry else images

    def draw_theta(self, images):
        """view -> flip -> zoom and crop -> rotation about the image's centre -> image, as one affine map."""
        (count, _, height, width), device = images.shape, images.device
        box_w, box_h, x, y = self.draw_crop(count, height, width, device)                        # (B,) each, of [-1, 1]
        if self.zoom:
            factor = torch.where(chance(count, self.zoom_p, device), uniform(count, *self.zoom, device), 1.0)
            box_w, box_h = box_w / factor, box_h / factor
        if self.shift:
            x, y = (place + uniform(count, -2 * self.shift, 2 * self.shift, device) for place in (x, y))
        box_w = torch.where(chance(count, self.flip, device), -box_w, box_w)
        box_h = torch.where(chance(count, self.flip_vertical, device), -box_h, box_h)
        angle = torch.zeros(count, device=device)
        if self.rotation:
            turn = uniform(count, -self.rotation, self.rotation, device)
            angle = torch.where(chance(count, self.rotation_p, device), turn, 0.0)
        if self.quarter_turn:
            quarters = torch.randint(1, 4, (count,), device=device)
            angle = angle + 90 * torch.where(chance(count, self.quarter_turn, device), quarters, 0)
        cos, sin = torch.cos(angle * math.pi / 180), torch.sin(angle * math.pi / 180)
        aspect = height / width                            # a turn is rigid in pixels, not in units of width and height
        rows = [torch.stack([cos * box_w, -sin * box_h * aspect, cos * x - sin * y * aspect], 1),         # (B, 3)
                torch.stack([sin * box_w / aspect, cos * box_h, sin * x / aspect + cos * y], 1)]
        return torch.stack(rows, 1)                                                              # (B, 2, 3)

    def draw_crop(self, count, height, width, device):
        """Half-sides and centre of the crop: ten tries as in RandomResizedCrop, the first that fits; where none does,
        the largest central piece with an allowed ratio."""
        one, zero = torch.ones(count, device=device), torch.zeros(count, device=device)
        if not self.crop:
            return one, one, zero, zero
        low, high = self.ratio
        area = uniform((count, 10), *self.crop, device) * height * width                         # (B, 10)
        ratio = torch.exp(uniform((count, 10), math.log(low), math.log(high), device))
        box_w, box_h = (area * ratio).sqrt() / width, (area / ratio).sqrt() / height             # (B, 10)
        fits = (box_w <= 1) & (box_h <= 1)
        found, first = fits.any(1), fits.int().argmax(1, keepdim=True)                           # (B,), (B, 1)
        central = min(1, height * high / width), min(1, width / low / height)
        box_w, box_h = (torch.where(found, side.gather(1, first).squeeze(1), whole)              # (B,)
                        for side, whole in zip((box_w, box_h), central, strict=True))
        x, y = (uniform(count, -1, 1, device) * (1 - side) * found for side in (box_w, box_h))
        if self.crop_p < 1:
            cropped = chance(count, self.crop_p, device)
            box_w, box_h = torch.where(cropped, box_w, one), torch.where(cropped, box_h, one)
            x, y = x * cropped, y * cropped
        return box_w, box_h, x, y

    def intensities(self, x):
        count, channels, device = len(x), x.shape[1], x.device

        def factor(spread):
            return uniform(count, max(0, 1 - spread), 1 + spread, device).view(-1, 1, 1, 1)

        def sometimes(probability, changed, original):
            return torch.where(chance(count, probability, device).view(-1, 1, 1, 1), changed, original)

        jittered = x
        if self.brightness:
            jittered = (jittered * factor(self.brightness)).clamp(0, 1)
        if self.contrast:
            jittered = blend(jittered, luminance(jittered).mean((2, 3), keepdim=True), factor(self.contrast))
        if self.saturation and channels == 3:
            jittered = blend(jittered, luminance(jittered), factor(self.saturation))
        if self.hue and channels == 3:
            jittered = turn_hue(jittered, uniform(count, -self.hue, self.hue, device))
        if jittered is not x:
            x = sometimes(self.jitter, jittered, x)
        if self.gamma:
            exponent = torch.exp(uniform(count, math.log(self.gamma[0]), math.log(self.gamma[1]), device))
            x = x ** exponent.view(-1, 1, 1, 1)
        if self.grayscale and channels == 3:
            x = sometimes(self.grayscale, luminance(x).expand_as(x), x)
        if self.blur:
            x = sometimes(self.blur_p, gaussian_blur(x, uniform(count, *self.blur, device) * self.size / 224), x)
        if self.solarise:
            x = sometimes(self.solarise, torch.where(x >= 0.5, 1 - x, x), x)
        if self.noise:
            deviation = torch.exp(uniform(count, math.log(self.noise[0]), math.log(self.noise[1]), device))
            x = sometimes(self.noise_p, (x + deviation.view(-1, 1, 1, 1) * torch.randn_like(x)).clamp(0, 1), x)
        return x


def uniform(shape, low, high, device):
    return torch.rand(shape, device=device) * (high - low) + low


def chance(count, probability, device):
    return torch.rand(count, device=device) < probability                                        # (B,) bool


def resample(images, theta, size):
    """Bilinear; zero beyond the image, whose border pixels reach to its edge. Where the picture shrinks, k x k finer
    samples are averaged, so that nothing is aliased."""
    k = max(1, math.ceil(max(images.shape[2:]) / size - 1e-6))
    grid = F.affine_grid(theta, (len(images), 1, size * k, size * k), align_corners=False)       # (B, kS, kS, 2)
    views = F.grid_sample(images, grid, padding_mode="border", align_corners=False)              # (B, C, kS, kS)
    x, y = grid.abs().unbind(3)                                                                  # (B, kS, kS)
    views = views * ((x <= 1) & (y <= 1)).unsqueeze(1)
    return F.avg_pool2d(views, k) if k > 1 else views                                            # (B, C, size, size)


def warp(mask, theta):
    """The masks (B, H, W) that belong to views made with theta: nearest class, 0 (background) outside."""
    grid = F.affine_grid(theta, (len(mask), 1, *mask.shape[1:]), align_corners=False)
    picture = F.grid_sample(mask[:, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return picture[:, 0].to(mask.dtype)                                                          # (B, H, W)


def blend(x, other, factor):
    """other at factor 0, x at factor 1, beyond x above 1."""
    return (other + factor * (x - other)).clamp(0, 1)


def luminance(x):
    """(B, C, H, W) -> (B, 1, H, W)"""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def turn_hue(x, turn):
    """RGB -> hue, saturation, value; hue moved by `turn` (B,); and back."""
    value, low = x.amax(1), x.amin(1)                                                            # (B, H, W)
    spread = (value - low).clamp(min=1e-12)
    r, g, b = ((value - x[:, c]) / spread for c in range(3))
    hue = torch.where(x[:, 0] == value, b - g, torch.where(x[:, 1] == value, 2 + r - b, 4 + g - r)) / 6
    hue = hue + turn.view(-1, 1, 1)
    channels = []
    for n in (5, 3, 1):                                                                          # red, green, blue
        k = (n + 6 * hue) % 6
        channels.append(value - (value - low) * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)                                                              # (B, 3, H, W)


def gaussian_blur(x, sigma):
    """Row i of the matrix holds the weights with which pixels are averaged into pixel i: one product a side, no kernel
    size to choose."""
    def weights(length):
        place = torch.arange(length, device=x.device)
        distance = place.view(-1, 1) - place                                                     # (L, L)
        return torch.softmax(-distance ** 2 / (2 * sigma.clamp(min=1e-3) ** 2).view(-1, 1, 1, 1), -1)    # (B, 1, L, L)
    return weights(x.shape[2]) @ x @ weights(x.shape[3]).transpose(2, 3)


# What the works use, by the image they used it on. Where a work gives no value for a field, the field is left at rest.
#
# One for your own kind of image is one more entry here: a name, and the fields of Augment that are not at rest;
# `--views NAME` then takes it. Ask of each field whether a reader of such images would still give the same answer: no
# vertical flip where up matters, no zoom where size is a sign, no change of contrast where it tells the tissue. Then
# look at the run's views.png. What Augment cannot do, any callable can: see README.
VIEWS = {
    "plain": {},
    # autoencoder and Genesis, Zhang et al.; in their 2D code one flip, left-right or up-down, with probability 0.4
    "flips": {"flip": 0.2, "flip_vertical": 0.2},
    # SparK; bicubic there
    "mild": {"crop": (0.67, 1.0), "flip": 0.5},
    # MoCo v2
    "contrastive": {
        "crop": (0.2, 1.0), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "jitter": 0.8,
        "grayscale": 0.2, "blur": (0.1, 2.0), "flip": 0.5},
    # Chattopadhyay et al., with a crop of 0.2 to 1: their released 0.08 to 0.10 shows a tenth of the image
    "lowresource": {
        "crop": (0.2, 1.0), "flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1,
        "grayscale": 0.2, "blur": (0.1, 2.0), "solarise": 0.1},
    # ours, between the two: on four small sets never worse than MoCo v2's, which take a cue of some sets away (RESULTS)
    "soft": {
        "crop": (0.4, 1.0), "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05, "jitter": 0.5,
        "flip": 0.5},
    # contrastive tasks on CT, Zhang et al. There two crops of a pair must overlap by an IoU above 0.25; here the views
    # of an image know nothing of each other, and one pair in twenty overlaps by less.
    "ct": {
        "crop": (0.25, 1.0), "zoom": (0.8, 1.2), "rotation": 10, "flip": 0.5, "flip_vertical": 0.5, "blur": (0.1, 2.0)},
    # contrastive tasks on fundus photographs, the same; a crop that is larger than the image is drawn again
    "fundus": {
        "crop": (0.8, 1.2), "shift": 0.2, "rotation": 180, "flip": 0.5, "flip_vertical": 0.5,
        "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "grayscale": 0.2},
    # rotation task on fundus photographs, the same, as released. There the jitter stands twice, each with probability
    # 0.5, so that 0.75 of the images meet it; here they meet it once.
    "fundus_mild": {
        "crop": (0.85, 1.15), "crop_p": 0.5, "ratio": (0.8, 1.2),
        "brightness": 0.2, "contrast": 0.2, "jitter": 0.75},
    # BYOL on cardiac MRI, Kalapos and Gyires-Toth
    "mri": {
        "crop": (0.08, 1.0), "flip": 0.5, "brightness": 0.2, "contrast": 0.2, "jitter": 0.2},
    # MoCo and BYOL on CT slices, Wolf et al.
    "slices": {
        "rotation": 180, "rotation_p": 0.5, "crop": (0.2, 1.0), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4,
        "hue": 0.1, "blur": (0.1, 2.0), "flip": 0.5, "flip_vertical": 0.5, "noise": (0.0032, 0.01)},
    # SwAV on CT slices, Wolf et al.: the two large crops
    "multicrop": {
        "crop": (0.9, 1.0), "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.2, "jitter": 0.8,
        "grayscale": 0.2, "blur": (0.1, 2.0)},
    # and the six small ones
    "multicrop_small": {
        "crop": (0.1, 0.33), "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.2, "jitter": 0.8,
        "grayscale": 0.2, "blur": (0.1, 2.0)},
    # ours: upright, no vertical flip, exposure varies
    "xray": {
        "crop": (0.3, 1.0), "rotation": 10, "flip": 0.5, "brightness": 0.3, "contrast": 0.3, "gamma": (0.7, 1.4),
        "blur": (0.1, 1.5)},
    # ours: no orientation, stain varies, size is a cue
    "histology": {
        "crop": (0.5, 1.0), "ratio": (0.9, 1.1), "rotation": 180, "flip": 0.5, "brightness": 0.3, "contrast": 0.3,
        "saturation": 0.3, "hue": 0.08, "jitter": 0.8, "grayscale": 0.1, "blur": (0.1, 1.5)},
    # six strengths of augmentation under fine-tuning, Zhang et al.; S0 is none
    "S0": {},
    "S1": {"flip": 0.5},
    "S2": {"quarter_turn": 0.5},
    "S3": {"flip": 0.5, "rotation": 10, "rotation_p": 0.3},
    "S4": {"quarter_turn": 0.5, "rotation": 20, "rotation_p": 0.3},
    "S5": {"flip": 0.5, "quarter_turn": 0.5, "rotation": 30, "rotation_p": 0.6},
    "S6": {"flip": 0.5, "quarter_turn": 0.5, "rotation": 30, "rotation_p": 0.6, "zoom": (0.8, 1.2), "zoom_p": 0.4},
}


def build(name, size, **changes):
    """Views by name, of this size; single fields can be changed."""
    return replace(Augment(size, **VIEWS[name]), **changes)
