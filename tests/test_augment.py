"""Views: geometry and intensities agree with hand-computed cases, every sample is drawn on its own."""

import colorsys
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medssl.common import augment
from tests.common import batch


def identity(count=1):
    return torch.eye(2, 3).repeat(count, 1, 1)


@pytest.mark.parametrize("name", augment.RECIPES)
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
        assert (many != many[:1]).flatten(1).any(1).any()                   # equal images come out different
    torch.manual_seed(5)
    again = recipe(picture)
    torch.manual_seed(5)
    assert torch.equal(again, recipe(picture, geometry=True)[0])


def test_theta_says_where_each_view_pixel_came_from():
    """An image whose two channels hold its own x and y: a view of it shows its own geometry."""
    size = 40
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    ramp = torch.stack([line.expand(size, size), line.view(-1, 1).expand(size, size)])                     # (2, S, S) in (-1, 1)
    images = (ramp / 4 + 0.5).expand(16, -1, -1, -1)
    recipe = augment.Augment(20, crop=(0.2, 0.5), rotation=60, flip=0.5, flip_vertical=0.5, quarter_turn=0.5, zoom=(0.8, 1.2))
    torch.manual_seed(0)
    views, theta = recipe(images, geometry=True)
    grid = F.affine_grid(theta, (16, 1, 20, 20), align_corners=False).permute(0, 3, 1, 2)                  # (16, 2, 20, 20)
    inside = (grid.abs() < 0.9).all(1, keepdim=True).expand_as(grid)
    assert inside.float().mean() > 0.5
    assert torch.allclose(((views - 0.5) * 4)[inside], grid[inside], atol=0.03)
    sides = theta[:, :, :2].norm(dim=1)                                     # (16, 2): share of the image's side
    area = sides.prod(1)
    assert area.min() > 0.2 / 1.2 ** 2 - 1e-4 and area.max() < 0.5 / 0.8 ** 2 + 1e-4


def test_crops_keep_the_area_and_ratio_that_were_asked_for():
    torch.manual_seed(0)
    recipe = augment.Augment(8, crop=(0.2, 0.6))
    _, theta = recipe(torch.zeros(4000, 1, 16, 16), geometry=True)
    width, height = theta[:, 0, 0], theta[:, 1, 1]
    area, ratio = width * height, width / height
    assert 0.2 - 1e-4 <= area.min() and area.max() <= 0.6 + 1e-4 and abs(area.mean() - 0.4) < 0.01        # uniform in the area
    assert 0.75 - 1e-4 <= ratio.min() and ratio.max() <= 4 / 3 + 1e-4 and abs(ratio.log().mean()) < 0.01
    assert (theta[:, 0, 2].abs() + width).max() <= 1 + 1e-4                 # never beyond the image


def test_a_flip_and_a_quarter_turn_are_exact():
    x = batch(3, 2, 32)
    assert torch.allclose(augment.Augment(32, flip=1.0)(x), x.flip(3), atol=1e-5)
    assert torch.allclose(augment.Augment(32, flip_vertical=1.0)(x), x.flip(2), atol=1e-5)
    turned = augment.Augment(32, quarter_turn=1.0)(x)
    for view, image in zip(turned, x):
        assert min((view - image.rot90(k, (1, 2))).abs().max() for k in (1, 2, 3)) < 1e-4


def test_a_turn_is_rigid_in_pixels_on_oblong_images():
    recipe = augment.Augment(32, rotation=90)
    torch.manual_seed(0)
    _, theta = recipe(torch.zeros(50, 1, 30, 60), geometry=True)
    to_pixels = torch.tensor([60.0, 30.0])
    linear = theta[:, :, :2] * to_pixels.view(1, 2, 1) / to_pixels          # both axes in pixels
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
    assert torch.allclose(augment.blend(x, torch.tensor(0.5), torch.tensor(1.5))[0, :, 0, 0], torch.tensor([0.05, 0.35, 1.0]))
    one = torch.rand(1, 1, 4, 4)
    values = augment.Augment(4, brightness=0.5)(one.expand(2000, -1, -1, -1))[:, 0, 0, 0] / one[0, 0, 0, 0]
    assert 0.5 <= values.min() and abs(values.min() - 0.5) < 0.01 and one[0, 0, 0, 0] * 1.5 >= values.max() * one[0, 0, 0, 0]
    torch.manual_seed(0)
    pixels = torch.rand(50, 3, 1, 1)
    pixels[0] = 0.5                                                         # gray has no hue
    for turn in (0.0, 0.1, -0.3, 0.5):
        ours = augment.turn_hue(pixels, torch.full((50,), turn))
        for before, after in zip(pixels.view(50, 3).tolist(), ours.view(50, 3).tolist()):
            hue, saturation, value = colorsys.rgb_to_hsv(*before)
            assert np.allclose(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), after, atol=1e-4)


def test_blur_is_a_gaussian():
    point = torch.zeros(2, 1, 41, 41)
    point[:, 0, 20, 20] = 1
    blurred = augment.gaussian_blur(point, torch.tensor([1.0, 3.0]))
    for picture, sigma in zip(blurred[:, 0], (1.0, 3.0)):
        distance = torch.arange(41) - 20.0
        assert math.isclose(picture.sum().item(), 1, abs_tol=1e-4)
        assert math.isclose((picture.sum(0) * distance ** 2).sum().sqrt().item(), sigma, rel_tol=0.01)
        assert torch.allclose(picture, picture.T, atol=1e-6)
    constant = torch.full((1, 1, 16, 16), 0.7)
    assert torch.allclose(augment.gaussian_blur(constant, torch.tensor([2.0])), constant, atol=1e-6)       # nothing fades at the border


def test_solarise_noise_cutout_gamma():
    x = torch.tensor([0.2, 0.5, 0.9]).view(1, 1, 1, 3).expand(1, 1, 3, 3)
    assert torch.allclose(augment.Augment(3, solarise=1.0)(x)[0, 0, 0], torch.tensor([0.2, 0.5, 0.1]), atol=1e-6)
    half = torch.full((400, 1, 32, 32), 0.5)
    torch.manual_seed(0)
    noisy = augment.Augment(32, noise=(0.05, 0.05), noise_p=1.0)(half)
    assert abs(noisy.std() - 0.05) < 1e-3
    hidden = (augment.Augment(32, cutout=(0.1, 0.2), cutout_p=1.0)(half) == 0).float().mean((1, 2, 3))
    assert 0.06 < hidden.min() and hidden.max() < 0.25 and 0.13 < hidden.mean() < 0.17
    bent = augment.Augment(3, gamma=(2.0, 2.0))(x)
    assert torch.allclose(bent, x ** 2)


def test_probabilities():
    torch.manual_seed(0)
    x = batch(1, 1, 16).expand(3000, -1, -1, -1)
    share = (augment.Augment(16, flip=0.3)(x) - x).abs().amax((1, 2, 3)).gt(1e-3).float().mean()
    assert abs(share - 0.3) < 0.03


def test_zoom_shift_and_rotation_have_their_ranges():
    torch.manual_seed(0)
    nothing = torch.zeros(2000, 1, 8, 8)
    zoomed = augment.Augment(8, zoom=(2.0, 2.0))(nothing, geometry=True)[1]
    assert torch.allclose(zoomed, torch.tensor([[0.5, 0, 0], [0, 0.5, 0]]).expand(2000, 2, 3))              # twice as large is half of it
    zoomed = augment.Augment(8, zoom=(2.0, 2.0), zoom_p=0.4)(nothing, geometry=True)[1]
    assert abs((zoomed[:, 0, 0] == 0.5).float().mean() - 0.4) < 0.06
    moved = augment.Augment(8, shift=0.2)(nothing, geometry=True)[1][:, :, 2]                               # of a side of length 2
    assert -0.4 <= moved.min() < -0.39 and 0.39 < moved.max() <= 0.4
    turned = augment.Augment(8, rotation=30, rotation_p=0.4)(nothing, geometry=True)[1]
    angle = torch.atan2(turned[:, 1, 0], turned[:, 0, 0]).rad2deg()
    assert -30.01 < angle.min() < -29 and 29 < angle.max() < 30.01 and abs((angle != 0).float().mean() - 0.4) < 0.06


def test_crops_of_oblong_images_keep_the_ratio_in_pixels():
    _, theta = augment.Augment(8, crop=(0.2, 0.4), ratio=(1.0, 1.0))(torch.zeros(50, 1, 16, 32), geometry=True)
    assert torch.allclose(theta[:, 0, 0] * 32, theta[:, 1, 1] * 16)


@pytest.mark.parametrize("words", [{"brightness": 0.5, "jitter": 0.3}, {"grayscale": 0.3}, {"blur": (9.0, 9.0), "blur_p": 0.3}, {"solarise": 0.3},
                                   {"noise": (0.1, 0.1), "noise_p": 0.3}, {"cutout": (0.2, 0.3), "cutout_p": 0.3}], ids=lambda words: [*words][0])
def test_intensities_change_their_share_of_the_images(words):
    torch.manual_seed(0)
    x = batch(1, 3, 16).expand(1000, -1, -1, -1)
    share = (augment.Augment(16, **words)(x) - x).abs().amax((1, 2, 3)).gt(1e-4).float().mean()
    assert abs(share - 0.3) < 0.06


def test_contrast_saturation_gray_and_blur_by_hand():
    x = 0.4 + 0.2 * batch(40, 3, 16)
    assert torch.allclose(augment.Augment(16, contrast=0.5)(x[:, :1]).mean((2, 3)), x[:, :1].mean((2, 3)), atol=1e-5)     # around its own mean
    assert torch.allclose(augment.luminance(augment.Augment(16, saturation=0.5)(x)), augment.luminance(x), atol=1e-5)
    assert torch.allclose(augment.Augment(16, grayscale=1.0)(x), augment.luminance(x).expand_as(x))
    large = batch(2, 1, 112)
    assert torch.allclose(augment.Augment(112, blur=(2.0, 2.0), blur_p=1.0)(large), augment.gaussian_blur(large, torch.ones(2)))


def test_gamma_noise_and_hue_are_drawn_for_each_image_in_their_ranges():
    torch.manual_seed(0)
    bent = augment.Augment(8, gamma=(0.5, 2.0))(torch.full((1000, 1, 8, 8), 0.5))[:, 0, 0, 0].log2().neg()
    assert len(bent.unique()) > 900 and 0.5 <= bent.min() + 1e-5 < 0.52 and 1.95 < bent.max() <= 2 + 1e-5 and abs(bent.log().mean()) < 0.05
    noisy = augment.Augment(8, noise=(0.05, 0.05), noise_p=1.0)(torch.full((9, 1, 8, 8), 0.5))
    assert not torch.equal(noisy[0], noisy[1])
    red = torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1).expand(1000, 3, 8, 8)
    hues = [(colorsys.rgb_to_hsv(*pixel)[0] + 0.5) % 1 - 0.5 for pixel in augment.Augment(8, hue=0.1)(red)[:, :, 0, 0].tolist()]
    assert -0.101 < min(hues) < -0.095 and 0.095 < max(hues) < 0.101
