"""Views: geometry and intensities agree with hand-computed cases, every sample is drawn on its own."""

import colorsys
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medssl.common import augment
from tests.common import batch


@pytest.mark.parametrize("name", augment.VIEWS)
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_every_recipe(name, channels):
    torch.manual_seed(0)
    picture = batch(1, channels, 48).expand(4, -1, -1, -1)
    recipe = augment.build(name, 32)
    views, theta = recipe(picture, geometry=True)
    assert views.shape == (4, channels, 32, 32) and theta.shape == (4, 2, 3)
    assert views.min() >= 0 and views.max() <= 1
    if name not in ("plain", "S0"):
        torch.manual_seed(1)
        many = recipe(picture[:1].expand(30, -1, -1, -1))
        assert (many - many[:1]).abs().max() > 1e-3                         # equal images come out different
    torch.manual_seed(5)
    again = recipe(picture)
    torch.manual_seed(5)
    assert torch.allclose(again, recipe(picture, geometry=True)[0], atol=1e-6)


def agreement(recipe, channels=1, size=64):
    """How well the geometry of any augmentation fits its views: the mean correlation between each view and what its
    theta cuts from the image. About 1 if the map is right, half of that or less if it is inverted or of another image.
    """
    torch.manual_seed(0)
    images = batch(32, channels, size)
    views, theta = recipe(images, geometry=True)
    grid = F.affine_grid(theta, (len(views), 1, *views.shape[2:]), align_corners=False)     # (B, S, S, 2)
    cut = F.grid_sample(images, grid, align_corners=False)                                  # (B, C, S, S)
    inside = (grid.abs() < 1).all(3)                                                        # (B, S, S)
    pairs = [torch.corrcoef(torch.stack([view.mean(0)[where], piece.mean(0)[where]]))[0, 1]
             for view, piece, where in zip(views, cut, inside, strict=True)]
    return torch.stack(pairs).abs().mean().item()


@pytest.mark.parametrize("name", augment.VIEWS)
def test_every_geometry_has_the_right_direction(name):
    assert agreement(augment.build(name, 48), channels=1) > 0.9


def test_theta_says_where_each_view_pixel_came_from():
    """An image whose two channels hold its own x and y: a view of it shows its own geometry."""
    size = 40
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    ramp = torch.stack([line.expand(size, size), line.view(-1, 1).expand(size, size)])      # (2, S, S) in (-1, 1)
    images = (ramp / 4 + 0.5).expand(16, -1, -1, -1)
    recipe = augment.Augment(20, crop=(0.2, 0.5), rotation=60, flip=0.5, flip_vertical=0.5, quarter_turn=0.5,
                             zoom=(0.8, 1.2))
    torch.manual_seed(0)
    views, theta = recipe(images, geometry=True)
    grid = F.affine_grid(theta, (16, 1, 20, 20), align_corners=False).permute(0, 3, 1, 2)   # (16, 2, 20, 20)
    inside = (grid.abs() < 0.9).all(1, keepdim=True).expand_as(grid)
    assert inside.float().mean() > 0.5
    assert torch.allclose(((views - 0.5) * 4)[inside], grid[inside], atol=0.03)
    sides = theta[:, :, :2].norm(dim=1)                                     # (16, 2): share of the image's side
    area = sides.prod(1)
    assert area.min() > 0.2 / 1.2 ** 2 - 1e-4 and area.max() < 0.5 / 0.8 ** 2 + 1e-4


def crop_by_hand(random, height, width, crop, low=3 / 4, high=4 / 3):
    """RandomResizedCrop: ten tries, then the largest central piece with an allowed ratio. (x, y, w, h) in pixels."""
    for _ in range(10):
        area = random.uniform(*crop) * height * width
        ratio = math.exp(random.uniform(math.log(low), math.log(high)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            return random.uniform(0, width - w), random.uniform(0, height - h), w, h
    w, h = width, height
    if width / height < low:
        h = width / low
    if width / height > high:
        w = height * high
    return (width - w) / 2, (height - h) / 2, w, h


@pytest.mark.parametrize("crop,height,width,fallback", [
    ((0.9, 1.0), 64, 64, 0.13), ((0.9, 1.0), 224, 336, 1.0), ((0.9, 1.0), 336, 112, 1.0), ((0.8, 1.2), 64, 64, 0.13),
    ((0.3, 0.9), 60, 90, 0.0)])
def test_crops_that_do_not_fit(crop, height, width, fallback):
    """Against a naive loop: places and sides are distributed alike, and the share of crops of which no try fits."""
    count, random = 2500, np.random.default_rng(0)
    torch.manual_seed(0)
    half_w, half_h, x, y = augment.Augment(8, crop=crop).draw_crop(count, height, width, "cpu")
    scale = np.array([width, height])
    sides = torch.stack([half_w, half_h], 1).double().numpy() * scale       # (N, 2)
    ours = np.concatenate([(torch.stack([x, y], 1).double().numpy() + 1) * scale / 2 - sides / 2, sides], 1)
    naive = np.array([crop_by_hand(random, height, width, crop) for _ in range(count)])     # (N, 4): x, y, w, h
    left = np.array([min(width, height * 4 / 3), min(height, width / 0.75)])                # where no try fits
    fallen = [np.isclose(values[:, 2:], left, atol=1e-3).all(1) for values in (ours, naive)]
    assert np.mean(fallen, 1) == pytest.approx([fallback] * 2, abs=0.02)
    assert np.allclose(ours[fallen[0], :2], (scale - left) / 2, atol=1e-3)                  # the central piece
    share = ours[~fallen[0], 2:].prod(1) / scale.prod()
    assert ((crop[0] - 1e-5 <= share) & (share <= min(1, crop[1]) + 1e-5)).all() and ours[:, :2].min() > -1e-3
    steps = np.linspace(0.02, 0.98, 25)
    apart = np.abs(np.quantile(ours, steps, 0) - np.quantile(naive, steps, 0)) / np.tile(scale, 2)
    assert apart.max() < 0.03


def test_nothing_fades_at_the_border():
    """An enlarged white image is white to its last pixel; what lies beyond the image is black."""
    torch.manual_seed(0)
    white = torch.ones(2, 2, 64, 64)
    half = torch.tensor([[[1.0, 0, 1], [0, 1, 0]]]).expand(2, 2, 3)         # the right half lies outside
    for size in (32, 96):
        recipe = augment.Augment(size, crop=(0.3, 1.0), flip=0.5, quarter_turn=0.5)
        assert min(augment.Augment(size)(white).min(), recipe(white).min()) > 1 - 1e-6
        view = augment.resample(white, half, size)
        assert view[..., :size // 2].min() > 1 - 1e-6 and view[..., size // 2:].max() == 0
    far = torch.tensor([[[1.0, 0, 1 / 48], [0, 1, 0]]]).expand(2, 2, 3)     # one column of 96 outside; half one of 48
    for size, grey in ((96, 0.0), (48, 0.5)):
        assert torch.allclose(augment.resample(white, far, size)[..., -1], torch.full((2, 2, size), grey))


def test_a_flip_and_a_quarter_turn_are_exact():
    x = batch(1, 2, 32)
    assert torch.allclose(augment.Augment(32, flip=1.0)(x), x.flip(3), atol=1e-5)
    assert torch.allclose(augment.Augment(32, flip_vertical=1.0)(x), x.flip(2), atol=1e-5)
    turned = augment.Augment(32, quarter_turn=1.0)(x.expand(60, -1, -1, -1))
    turns = torch.cat([x.rot90(k, (2, 3)) for k in range(4)])               # (4, 2, 32, 32)
    apart = (turned[:, None] - turns).abs().amax((2, 3, 4))                 # (60, 4)
    assert apart.amin(1).max() < 1e-4 and set(apart.argmin(1).tolist()) == {1, 2, 3}


def test_a_turn_is_rigid_in_pixels_on_oblong_images():
    recipe = augment.Augment(32, rotation=90)
    torch.manual_seed(0)
    _, theta = recipe(torch.zeros(50, 1, 30, 60), geometry=True)
    to_pixels = torch.tensor([60.0, 30.0])
    linear = theta[:, :, :2] * to_pixels[:, None] / to_pixels               # both axes in pixels
    assert torch.allclose(linear @ linear.transpose(1, 2), torch.eye(2).expand(50, 2, 2), atol=1e-4)


def test_shrinking_averages_instead_of_skipping():
    stripes = (torch.arange(64) % 2).float().expand(1, 1, 64, 64)
    assert torch.allclose(augment.Augment(32)(stripes), torch.full((1, 1, 32, 32), 0.5), atol=1e-5)
    x = batch(2, 1, 64)
    assert torch.allclose(augment.Augment(32)(x), F.avg_pool2d(x, 2), atol=1e-5)


def test_masks_follow_their_views():
    torch.manual_seed(0)
    mask = torch.zeros(6, 48, 48, dtype=torch.uint8)
    mask[:, 8:30, 14:24] = 3
    images = mask[:, None].float() / 3
    views, theta = augment.Augment(48, crop=(0.3, 1), rotation=45, flip=0.5)(images, geometry=True)
    warped = augment.warp(mask, theta)
    assert warped.dtype == torch.uint8 and set(warped.unique().tolist()) <= {0, 3}
    assert ((warped == 3) == (views[:, 0] > 0.5)).float().mean() > 0.99
    outside = torch.tensor([[[1.0, 0, 5], [0, 1, 0]]])
    assert augment.warp(mask[:1] + 1, outside).max() == 0                   # beyond the image is background


def test_jitter_by_hand():
    x = torch.tensor([0.2, 0.4, 0.9]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    gray = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.9
    assert torch.allclose(augment.blend(x, augment.luminance(x), torch.tensor(0.0))[0, :, 0, 0], torch.full((3,), gray))
    beyond = augment.blend(x, torch.tensor(0.5), torch.tensor(1.5))[0, :, 0, 0]
    assert torch.allclose(beyond, torch.tensor([0.05, 0.35, 1.0]))
    torch.manual_seed(0)
    values = augment.Augment(4, brightness=0.5)(torch.full((2000, 1, 4, 4), 0.6))[:, 0, 0, 0] / 0.6
    assert 0.5 - 1e-5 <= values.min() < 0.51 and 1.49 < values.max() <= 1.5 + 1e-5
    assert augment.Augment(4, brightness=0.5)(torch.full((50, 1, 4, 4), 0.9)).max() == 1        # nothing beyond white
    pixels = torch.rand(50, 3, 1, 1)
    pixels[0] = 0.5                                                         # gray has no hue
    for turn in (0.0, 0.1, -0.3, 0.5):
        ours = augment.turn_hue(pixels, torch.full((50,), turn))
        for before, after in zip(pixels.view(50, 3).tolist(), ours.view(50, 3).tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*before)
            assert np.allclose(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), after, atol=1e-4)


def test_blur_is_a_gaussian():
    point = torch.zeros(2, 1, 41, 41)
    point[:, 0, 20, 20] = 1
    blurred = augment.gaussian_blur(point, torch.tensor([1.0, 3.0]))
    for picture, sigma in zip(blurred[:, 0], (1.0, 3.0), strict=True):
        heights = torch.exp(-(torch.arange(41) - 20.0) ** 2 / (2 * sigma ** 2))
        wanted = heights[:, None] * heights / heights.sum() ** 2
        assert torch.allclose(picture, wanted, atol=2e-3 * wanted.max().item())
    constant = torch.full((1, 1, 16, 16), 0.7)                              # nothing fades at the border
    assert torch.allclose(augment.gaussian_blur(constant, torch.tensor([2.0])), constant, atol=1e-6)


def test_solarise_and_gamma():
    x = torch.tensor([0.2, 0.5, 0.9]).view(1, 1, 1, 3).expand(1, 1, 3, 3)
    assert torch.allclose(augment.Augment(3, solarise=1.0)(x)[0, 0, 0], torch.tensor([0.2, 0.5, 0.1]), atol=1e-6)
    assert torch.allclose(augment.Augment(3, gamma=(2.0, 2.0))(x), x ** 2)


@pytest.mark.parametrize("name,least,jittered,strength", [("fundus", 0.8, 1.0, 0.4), ("fundus_mild", 0.85, 0.75, 0.2)])
def test_views_of_fundus_photographs(name, least, jittered, strength):
    """The area drawn is up to 1.2 of the image's; what does not fit is drawn again, so that nothing is zoomed out."""
    torch.manual_seed(0)
    recipe = augment.build(name, 8, shift=0.0, rotation=0.0)
    views, theta = recipe(torch.full((2000, 3, 8, 8), 0.5), geometry=True)
    area = torch.linalg.det(theta[:, :, :2]).abs()
    assert least - 1e-4 <= area.min() and area.max() <= 1 + 1e-4 and area.std() > 0.04
    factor = augment.luminance(views).amax((1, 2, 3)) / 0.5
    assert abs(((factor - 1).abs() > 1e-4).float().mean() - jittered) < 0.05
    assert abs(factor.min() - (1 - strength)) < 0.02 and abs(factor.max() - (1 + strength)) < 0.02


def test_zoom_shift_and_rotation_have_their_ranges():
    torch.manual_seed(0)
    nothing = torch.zeros(2000, 1, 8, 8)
    zoomed = augment.Augment(8, zoom=(2.0, 2.0))(nothing, geometry=True)[1]
    assert torch.allclose(zoomed, torch.tensor([[0.5, 0, 0], [0, 0.5, 0]]).expand(2000, 2, 3))      # half of the image
    moved = augment.Augment(8, shift=0.2)(nothing, geometry=True)[1][:, :, 2]                       # sides of length 2
    assert -0.4 <= moved.min() < -0.39 and 0.39 < moved.max() <= 0.4
    turned = augment.Augment(8, rotation=30)(nothing, geometry=True)[1]
    angle = torch.atan2(turned[:, 1, 0], turned[:, 0, 0]).rad2deg()
    assert -30.01 < angle.min() < -29 and 29 < angle.max() < 30.01


@pytest.mark.parametrize("height,width,ratio", [(16, 32, 1.0), (16, 16, 2.0), (30, 20, 0.5)])
def test_crops_of_oblong_images_keep_the_ratio_in_pixels(height, width, ratio):
    recipe = augment.Augment(8, crop=(0.1, 0.2), ratio=(ratio, ratio))
    _, theta = recipe(torch.zeros(50, 1, height, width), geometry=True)
    assert torch.allclose(theta[:, 0, 0] * width, ratio * theta[:, 1, 1] * height)                  # width : height


@pytest.mark.parametrize("words", [
    {"crop": (0.2, 0.6), "crop_p": 0.3}, {"zoom": (2.0, 2.0), "zoom_p": 0.3}, {"rotation": 30, "rotation_p": 0.3},
    {"flip": 0.3}, {"flip_vertical": 0.3}, {"brightness": 0.5, "jitter": 0.3}, {"grayscale": 0.3}, {"solarise": 0.3},
    {"blur": (9.0, 9.0), "blur_p": 0.3}, {"noise": (0.1, 0.1), "noise_p": 0.3}], ids=lambda words: [*words][0])
def test_probabilities_are_shares_of_the_images(words):
    torch.manual_seed(0)
    x = batch(1, 3, 16).expand(1000, -1, -1, -1)
    share = (augment.Augment(16, **words)(x) - x).abs().amax((1, 2, 3)).gt(1e-4).float().mean()
    assert abs(share - 0.3) < 0.06


def test_contrast_saturation_gray_and_blur_by_hand():
    x = 0.4 + 0.2 * batch(40, 3, 16)
    contrasted = augment.Augment(16, contrast=0.5)(x[:, :1])
    assert torch.allclose(contrasted.mean((2, 3)), x[:, :1].mean((2, 3)), atol=1e-5)       # around its own mean
    assert torch.allclose(augment.luminance(augment.Augment(16, saturation=0.5)(x)), augment.luminance(x), atol=1e-5)
    assert torch.allclose(augment.Augment(16, grayscale=1.0)(x), augment.luminance(x).expand_as(x))
    large = batch(2, 1, 112)
    blurred = augment.Augment(112, blur=(2.0, 2.0), blur_p=1.0)(large)
    assert torch.allclose(blurred, augment.gaussian_blur(large, torch.ones(2)))


def test_gamma_noise_and_hue_are_drawn_for_each_image_in_their_ranges():
    torch.manual_seed(0)
    bent = augment.Augment(8, gamma=(0.5, 2.0))(torch.full((1000, 1, 8, 8), 0.5))[:, 0, 0, 0].log2().neg()
    assert len(bent.unique()) > 900 and abs(bent.log().mean()) < 0.05
    assert 0.5 <= bent.min() + 1e-5 < 0.52 and 1.95 < bent.max() <= 2 + 1e-5
    noisy = augment.Augment(32, noise=(0.05, 0.05), noise_p=1.0)(torch.full((400, 1, 32, 32), 0.5))
    assert abs(noisy.std() - 0.05) < 1e-3 and (noisy[0] - noisy[1]).abs().max() > 0.01
    red = torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1).expand(1000, 3, 8, 8)
    turned = augment.Augment(8, hue=0.1)(red)[:, :, 0, 0].tolist()
    hues = [(colorsys.rgb_to_hsv(*pixel)[0] + 0.5) % 1 - 0.5 for pixel in turned]
    assert -0.101 < min(hues) < -0.095 and 0.095 < max(hues) < 0.101
