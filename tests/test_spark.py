"""SparK against a naive reference (gather the visible sites, normalise, scatter back), and what its mask guarantees."""

import contextlib
import copy
import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl.spark import Mask, SparK, make_sparse, masked_patch_loss
from tests.common import batch, tiny_encoder


class Plain(nn.Module):
    """A foreign network: biased convolutions, some without BatchNorm, average pooling, no `mean`."""
    widths, strides = [6, 8], [2, 8]

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6, affine=False), nn.ReLU(inplace=True),
                                 nn.Conv2d(6, 6, 3, 1, 1))
        self.two = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 8, 5, 1, 2), nn.BatchNorm2d(8, momentum=None),
                                 nn.ReLU(), nn.AvgPool2d(2))

    def features(self, x):
        x = self.one(x)
        return x, self.two(x)


def some_encoder(kind, dtype=torch.float64):
    """A network whose BatchNorm layers have all different weights and buffers, so that none can be mistaken."""
    torch.manual_seed(0)
    encoder = Plain() if kind == "plain" else tiny_encoder(stem=kind)
    lows = {"weight": 0.5, "bias": -0.5, "running_mean": -0.5, "running_var": 0.5}
    norms = [layer for layer in encoder.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer, (name, low) in itertools.product(norms, lows.items()):
        if getattr(layer, name) is not None:
            nn.init.uniform_(getattr(layer, name), low, low + 1)
    return encoder.to(dtype)


def some_mask(encoder, count=3, size=64, ratio=0.6):
    """active (B, 1, h, w), not with the same number of visible cells in each image: no layer may count on that."""
    cells = size // encoder.strides[-1]
    active = torch.rand(count, 1, cells, cells, generator=torch.Generator().manual_seed(1)) >= ratio
    active[:, :, 0, 0], active[:, :, -1, -1] = True, ratio == 0
    return active


def pixels(active, x):
    return F.interpolate(active.double(), x.shape[2:]) > 0                                      # (B, 1, H, W)


def gather_and_scatter(encoder, active):
    """The reference: a dense layer followed by a product, and BatchNorm1d on the rows of the visible sites."""
    def batch_norm(rows_norm, x):
        keep = pixels(active, x).squeeze(1)
        out = torch.zeros_like(x).permute(0, 2, 3, 1).contiguous()                              # (B, H, W, C)
        out[keep] = rows_norm(x.permute(0, 2, 3, 1)[keep]).to(out.dtype)
        return out.permute(0, 3, 1, 2)

    def masked(dense, x):
        y = dense(x)
        return y * pixels(active, y)

    for layer in list(encoder.modules()):
        if isinstance(layer, nn.BatchNorm2d):
            rows_norm = nn.BatchNorm1d(layer.num_features, layer.eps, layer.momentum, layer.affine)
            rows_norm.weight, rows_norm.bias = layer.weight, layer.bias
            for name, buffer in layer.named_buffers():                      # shared, so that updates are seen in both
                setattr(rows_norm, name, buffer)
            rows_norm.train(layer.training)
            layer.forward = partial(batch_norm, rows_norm)
        elif isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            layer.forward = partial(masked, layer.forward)
    return encoder


def sparse(encoder, active):
    mask = Mask()
    make_sparse(encoder, mask)
    mask.active = active
    return encoder


def close(a, b, tolerance=1e-9):
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance * (1 + b.abs().max()), (a - b).abs().max()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["default", "nopool", "plain"])
def test_equals_gathering_normalising_and_scattering(kind, training):
    ours = some_encoder(kind).train(training)
    naive = copy.deepcopy(ours)
    active = some_mask(ours)
    sparse(ours, active), gather_and_scatter(naive, active)
    for seed in range(2):                                                   # twice: the second step meets moved buffers
        results = []
        for encoder in (ours, naive):
            x = batch(3, seed=seed).double()
            x = (x * pixels(active, x)).requires_grad_()
            maps = encoder.features(x)
            torch.manual_seed(seed)
            sum((m * torch.randn(m.shape, dtype=m.dtype)).sum() for m in maps).backward()
            results.append([*maps, x.grad, *(p.grad for p in encoder.parameters()), *encoder.buffers()])
        assert len(results[0]) == len(results[1])
        for a, b in zip(*results):
            close(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["default", "small", "plain"])
def test_hidden_pixels_are_without_influence(kind, training):
    encoder = some_encoder(kind, torch.float32)
    method = SparK(encoder, None, width=32).train(training)
    x, active = batch(3), some_mask(encoder)
    y = torch.where(pixels(active, x), x, torch.rand_like(x)).requires_grad_()
    seen = []
    features = encoder.features
    encoder.features = lambda inputs: seen.append(features(inputs)) or seen[-1]
    before = copy.deepcopy(method.state_dict())
    method(x, active)
    method.load_state_dict(before)                                          # the buffers have moved
    method(y, active)
    for a, b in zip(*seen):
        close(a, b, 1e-6)
        assert (a[(~pixels(active, a)).expand_as(a)] == 0).all()
    sum(m.sum() for m in seen[1]).backward()
    assert (y.grad[~pixels(active, x)] == 0).all() and y.grad[pixels(active, x)].abs().max() > 0


def test_hidden_sites_become_tokens_between_encoder_and_decoder():
    encoder = some_encoder("default")
    naive, method, seen = copy.deepcopy(encoder), SparK(encoder, None, width=32).double(), []
    active, x = some_mask(encoder), batch(3).double()
    for project in method.projections:
        project.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    method(x, active)
    maps = gather_and_scatter(naive, active).features(x * pixels(active, x))
    for f, d, token, norm in zip(reversed(maps), seen, method.tokens, method.norms):
        keep = pixels(active, f).squeeze(1)                                 # (B, H, W)
        f, d = f.permute(0, 2, 3, 1), d.permute(0, 2, 3, 1)                 # (B, H, W, C)
        close(d[keep], F.batch_norm(f[keep], None, None, training=True))
        close(norm.running_var, 0.9 + 0.1 * f[keep].var(0))
        assert torch.equal(d[~keep], token.expand_as(d[~keep])) and 0 < token.abs().max() <= 0.02


def test_half_precision_statistics_are_taken_in_float32():
    layer, active = nn.BatchNorm2d(1), torch.tensor([[[[True, False]]]])
    x = (130 + torch.arange(64.0).view(1, 1, 4, 16)).bfloat16()             # exact in bfloat16, but their mean is not
    y = sparse(layer, active)(x)
    rows = x[:, :, :, :8].float()
    assert y.dtype == torch.bfloat16
    close(layer.running_mean, 0.1 * rows.mean().view(1), 1e-6)
    close(y[:, :, :, :8].float(), (rows - rows.mean()) / rows.std(correction=0), 1e-2)


def test_outside_of_its_own_forward_the_encoder_is_what_it_was():
    encoder = some_encoder("default", torch.float32)
    plain = copy.deepcopy(encoder)
    method = SparK(encoder, None, width=32)
    assert list(encoder.state_dict()) == list(plain.state_dict()) and str(encoder) == str(plain)
    x, active = batch(3), some_mask(encoder)
    method(x, active)
    with pytest.raises(RuntimeError):
        method(x[:, :, :63], active)                                        # an error must not leave the mask on
    twin = copy.deepcopy(method)
    assert twin.mask is not method.mask and twin.encoder.bn1.forward.args[0] is twin.encoder.bn1
    plain.load_state_dict(encoder.state_dict())                             # a plain network takes the weights strictly
    for network in (encoder, twin.encoder):
        other = copy.deepcopy(plain)
        for training in (True, False):
            results = [[net.train(training)(x), *net.buffers()] for net in (network, other)]
            for a, b in zip(*results):
                close(a, b, 1e-6)
    twin.mask.active = active                                               # a copy has a mask of its own
    close(encoder(x), other(x), 1e-6)
    assert (twin.encoder(x) - encoder(x)).abs().max() > 0.01 * encoder(x).abs().max()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("normalise_prediction", [False, True])
def test_loss_equals_a_loop_and_ignores_visible_cells(channels, normalise_prediction):
    torch.manual_seed(0)
    image, prediction = torch.rand(3, channels, 16, 24).double(), torch.randn(3, channels, 16, 24).double()
    active, total, eps = torch.rand(3, 1, 2, 3) > 0.6, [], 1e-3
    for b, i, j in (~active).nonzero()[:, [0, 2, 3]].tolist():
        t, p = (x[b, :, 8 * i:8 * i + 8, 8 * j:8 * j + 8] for x in (image, prediction))
        t = (t - t.mean()) / (t.var() + eps).sqrt()
        p = (p - p.mean()) / (p.var() + eps).sqrt() if normalise_prediction else p
        total.append(((p - t) ** 2).mean())
    loss = partial(masked_patch_loss, image=image, active=active, cell=8, eps=eps,
                   normalise_prediction=normalise_prediction)
    assert len(total) > 3 and abs(loss(prediction) - sum(total) / len(total)) < 1e-12
    shown = pixels(active, image)
    close(loss(prediction + 7 * torch.rand_like(prediction) * shown), loss(prediction))
    assert loss(prediction) - loss(prediction * shown) > 0.3                # about 2, and 1 for zeros


def test_loss_of_flat_and_of_textured_cells():
    active = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    flat, textured, prediction = torch.full((2, 1, 16, 16), 0.3), torch.rand(2, 1, 16, 16), torch.zeros(2, 1, 16, 16)
    for normalise_prediction in (False, True):
        half = torch.full((2, 1, 16, 16), 0.5, requires_grad=True)
        loss = masked_patch_loss(half, flat, active, 8, 1e-6, normalise_prediction)
        assert torch.autograd.grad(loss, half)[0].isfinite().all()
        assert abs(loss - 0.25 * (not normalise_prediction)) < 1e-4         # the target of a flat cell is zero
    # unbiased variance: (n - 1) / n
    assert abs(masked_patch_loss(prediction, textured, active, 8, 1e-6) - 63 / 64) < 1e-4
    assert masked_patch_loss(prediction, textured, ~active, 8, 1e-6) == 0   # nothing is hidden


def test_terms_and_picture():
    torch.manual_seed(0)
    method = SparK(tiny_encoder(stem="small"), lambda x: x, width=16, eps=1e-3)
    x, active = method.views(batch(4, size=32))
    x[:, :, :16] = 0.4                                                      # the upper half is flat
    lower = active.clone()
    lower[:, :, :2] = True
    prediction, shown = torch.zeros_like(x), pixels(active, x)              # zero is the mean of the cell
    method.head.register_forward_hook(lambda *_: prediction)
    outs = method(x, active)
    close(outs["chance"], masked_patch_loss(prediction, x, active, 8, 1e-3))
    close(outs["loss"], outs["chance"], 1e-6)
    close(outs["textured"], masked_patch_loss(prediction, x, lower, 8, 1e-3))
    assert torch.equal(outs["restored"][shown], x[shown])
    close(outs["restored"], torch.where(shown, x, F.interpolate(F.avg_pool2d(x, 8), scale_factor=8)), 1e-6)
    cells = F.pixel_unshuffle(x, 8)
    prediction = F.pixel_shuffle((cells - cells.mean(1, True)) / (cells.var(1, keepdim=True) + 1e-3).sqrt(), 8)
    outs = method(x, active)                                                # the right answer gives the image back
    close(outs["restored"], x, 1e-6)
    assert outs["loss"] < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hidden_pixels_are_exactly_zero_after_standardisation(dtype):
    encoder = tiny_encoder()
    encoder.mean, encoder.std = (0.31,), (0.17,)
    encoder.shift.fill_(0.31), encoder.scale.fill_(0.17)
    method, seen = SparK(encoder, None, width=32).to(dtype), []
    encoder.conv1.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    x, active = batch(3).to(dtype), some_mask(encoder)
    method(x, active)
    shown = pixels(active, x)
    assert (seen[0][~shown] == 0).all()
    close(seen[0][shown], ((x - 0.31) / 0.17)[shown], 1e-6)


@pytest.mark.parametrize("size, cells, kept", [(64, 4, 2), (96, 9, 4), (128, 16, 6), (160, 25, 10), (224, 49, 20)])
def test_number_of_visible_cells(size, cells, kept):
    method = SparK(tiny_encoder(), lambda x: x, width=32)
    x, active = method.views(torch.zeros(40, 1, size, size))
    assert active.dtype == torch.bool and active[0].numel() == cells
    assert (active.sum((1, 2, 3)) == kept).all() and (active.float().mean(0) > 0.1).all()       # other cells each time


def test_decoder_is_the_papers(monkeypatch):
    for name in ("trunc_normal_", "kaiming_normal_", "kaiming_uniform_"):   # 29 million numbers that nobody looks at
        monkeypatch.setattr(nn.init, name, lambda tensor, **words: tensor)
    encoder = nn.Identity()
    encoder.strides, encoder.widths, encoder.features = [4, 8, 16, 32], [256, 512, 1024, 2048], None
    method = SparK(encoder, None, channels=3)
    count = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (method.ups, method.head, method.projections)]
    assert round(count[0] + count[1], 1) == 23.2 and round(count[2], 1) == 6.2
    assert [len(up) for up in method.ups] == [1, 1, 1, 2]
    assert [len(up) for up in SparK(tiny_encoder(stem="small"), None, width=32).ups] == [1, 1, 1, 0]


def test_the_decoder_against_a_plain_reading():
    """From coarse to fine: the map's projection is added, then each block doubles the side and halves the width. All
    cells are visible and norms are in evaluation mode, so that there are no tokens."""
    torch.manual_seed(0)
    method = SparK(tiny_encoder(stem="nopool"), None, width=32).double().eval()
    for p in method.ups.parameters():
        p.data.mul_(1 + 7 * (p.ndim == 4))                                  # values reach beyond 6
    x, y, most = batch(2).double(), 0, 0
    maps = method.encoder.features(x)
    for f, norm, project, up in zip(maps[::-1], method.norms, method.projections, method.ups, strict=True):
        y = y + project(norm(f))
        for enlarge, conv, middle_norm, _, last_conv, last_norm in up:
            assert isinstance(middle_norm, nn.BatchNorm2d) and isinstance(last_norm, nn.BatchNorm2d)
            middle = middle_norm(conv(enlarge(y)))
            most, y = max(most, middle.max()), last_norm(last_conv(middle.clamp(0, 6)))
    seen = []
    method.head.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    method(x, torch.ones(2, 1, 4, 4, dtype=torch.bool))
    assert most > 7 and seen[0].shape == x.shape
    close(seen[0], F.conv2d(y, method.head.weight, method.head.bias))


def test_projections_start_as_published():
    """With torch's own start, and the coarsest is the identity where its widths match."""
    torch.manual_seed(0)
    wide, narrow = SparK(tiny_encoder(), None, width=64), SparK(tiny_encoder(), None, width=32)
    assert isinstance(wide.projections[0], nn.Identity) and isinstance(wide.projections[1], nn.Conv2d)
    for layer in narrow.projections:
        bound = (layer.in_channels * layer.kernel_size[0] ** 2) ** -0.5     # uniform up to it
        assert 0.9 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() > 0.1 * bound
    for conv in (narrow.ups[0][0][1], narrow.ups[0][0][4]):
        assert abs(conv.weight.std() - 0.02) < 0.002


def test_a_cell_may_be_a_multiple_of_the_stride():
    method = SparK(tiny_encoder(stem="small"), lambda x: x, width=16, cell=16)
    x, active = method.views(batch(4, size=64))
    assert active.shape == (4, 1, 4, 4) and method(x, active)["loss"].isfinite()


@pytest.mark.parametrize("words, size, fits", [
    ({}, 32, False), ({}, 64, True), ({}, 80, False), ({"mask_ratio": 0.9}, 96, False), ({"cell": 64}, 96, False),
    ({"cell": 64}, 192, True)])
def test_sizes_that_do_not_fit_are_refused(words, size, fits):
    """One cell, no whole number of them, or hardly any to see."""
    refused = pytest.raises(ValueError, match=f"size {size}: has to be a multiple of the cell, .*--stem nopool")
    with contextlib.nullcontext() if fits else refused:
        SparK(tiny_encoder(), None, size=size, width=32, **words)


def test_other_norms_are_refused():
    for norm in (nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.SyncBatchNorm(8)):
        with pytest.raises(ValueError, match=f"1 is a {type(norm).__name__}"):
            make_sparse(nn.Sequential(nn.Conv2d(1, 8, 3), norm), Mask())
    method = nn.SyncBatchNorm.convert_sync_batchnorm(SparK(tiny_encoder(), lambda x: x, width=32))
    with pytest.raises(ValueError, match="--sync-bn"):
        method.views(batch(2))
