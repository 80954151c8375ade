"""Every loss against numbers of trusted implementations, naive loops, and what must leave it unchanged."""

import cmath
import copy
import functools
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl.byol import BYOL, cosine_distance, momentum_at
from medssl.dcl import DCL, decoupled_loss
from medssl.lejepa import LeJEPA, sigreg
from medssl.simclr import SimCLR, nt_xent
from medssl.simsiam import SimSiam, negative_cosine
from medssl.swav import SwAV, sinkhorn, swapped_loss
from medssl.vicreg import VICReg, vicreg_terms
from tests.common import Flip, batch, tiny_encoder

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}
both_types = pytest.mark.parametrize("dtype", TOLERANCE)


def golden(name, dtype, *inputs):
    """The file's arrays as tensors, its inputs as leaves of this type."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: torch.as_tensor(file[key]) for key in file}
    return arrays, [arrays[key].to(dtype).requires_grad_() for key in inputs]


def same(found, wanted, worst=1.0):
    """Equal to the tolerance of the type, relative to the largest value; `worst` loosens float32 only."""
    assert found.isfinite().all()
    tolerance = TOLERANCE[found.dtype] * (worst if found.dtype == torch.float32 else 1.0)
    assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_embeddings(method_class, dim, **words):
    """A method whose views are embeddings already."""
    encoder = nn.Identity()
    encoder.dim = dim
    method = method_class(encoder, None, dim=dim, **words)
    method.projector = nn.Identity()
    return method


# Golden numbers

def both(loss):
    return lambda p1, p2, z1, z2: loss(p1, z2.detach()) + loss(p2, z1.detach())


def dcl(z1, z2, temperature, sigma=None):
    return on_embeddings(DCL, 64, temperature=temperature, sigma=sigma)(z1, z2)["loss"]


def vicreg(name):
    return lambda z1, z2: on_embeddings(VICReg, 32)(z1, z2)[name]


GOLDEN_LOSSES = [                   # file, function, what it takes, its value and gradients, its options
    ("nt_xent", nt_xent, "z1 z2", "loss grad_z1 grad_z2", "temperatures"),
    ("dcl", decoupled_loss, "z1 z2", "dcl_12 dcl_12_grad_z1 dcl_12_grad_z2", "temperatures"),
    ("dcl", decoupled_loss, "z1 z2", "dclw_12 dclw_12_grad_z1 dclw_12_grad_z2", "temperatures sigma"),
    ("dcl", decoupled_loss, "z2 z1", "dcl_21", "temperatures"),
    ("dcl", decoupled_loss, "z2 z1", "dclw_21", "temperatures sigma"),
    ("dcl", dcl, "z1 z2", "dcl_symmetric", "temperatures"),
    ("dcl", dcl, "z1 z2", "dclw_symmetric", "temperatures sigma"),
    ("byol", cosine_distance, "p1 z2", "loss_12", ""),
    ("byol", both(cosine_distance), "p1 p2 z1 z2", "loss grad_p1 grad_p2", ""),
    ("simsiam", negative_cosine, "p1 z2", "negative_cosine_12", ""),
    ("simsiam", both(lambda p, z: negative_cosine(p, z) / 2), "p1 p2 z1 z2", "loss grad_p1 grad_p2", ""),
    *[("vicreg", vicreg(name), "z1 z2", f"{name} {name}_grad_z1 {name}_grad_z2", "")
      for name in ("invariance", "variance", "covariance", "loss")],
]


@both_types
@pytest.mark.parametrize("case", GOLDEN_LOSSES, ids=[f"{case[0]}-{case[3].split()[0]}" for case in GOLDEN_LOSSES])
def test_losses_golden(dtype, case):
    file, function, inputs, (value, *gradients), options = *case[:3], case[3].split(), case[4].split()
    g, x = golden(file, dtype, *inputs.split())
    for place in (0, 1) if "temperatures" in options else (...,):           # of each temperature
        loss = function(*x, *(g[key].view(-1)[place if g[key].ndim else 0].item() for key in options))
        same(loss, g[value][place])
        if gradients:
            for key, gradient in zip(gradients, torch.autograd.grad(loss, x[:2]), strict=True):
                same(gradient, g[key][place], worst=10)


@both_types
def test_lejepa_golden(dtype):
    g, (z,) = golden("lejepa", dtype, "z")
    directions, grid = g["directions"].to(dtype), (g["t_max"].item(), g["knots"].item())
    words = dict(sigreg_weight=g["lamb"].item(), t_max=grid[0], knots=grid[1])
    outs = on_embeddings(LeJEPA, 20, **words)(*z, directions)
    for name in ("loss", "sigreg", "invariance"):
        same(outs[name], g[name])
    same(torch.autograd.grad(outs["loss"], z)[0], g["grad"])
    each = [sigreg(z[v:v + 1], directions[:, k:k + 1], *grid) for v in range(3) for k in range(24)]
    same(torch.stack(each).view(3, 24), g["per_direction"])


@both_types
def test_swav_golden(dtype):
    g, (scores,) = golden("swav", dtype, "scores")
    codes = torch.stack([sinkhorn(view, g["epsilon"].item(), g["iterations"].item()) for view in scores])
    assert not codes.requires_grad
    same(codes, g["codes"], worst=2)                                        # scores are divided by 0.05
    loss = swapped_loss(scores, codes, g["temperature"].item())
    same(loss, g["loss"])
    same(torch.autograd.grad(loss, scores)[0], g["grad_scores"], worst=2)


def test_byol_momentum_golden():
    g, _ = golden("schedule", torch.float64)
    found = [momentum_at(g["base_momentum"].item(), step / 50) for step in range(51)]
    same(torch.tensor(found, dtype=torch.float64), g["byol_momentum"])
    assert found[0] == pytest.approx(0.99) and found[-1] == 1               # exactly: the target stands still
    assert momentum_at(0.9, 0.5, end=0.96) == pytest.approx(0.93) and momentum_at(0.9, 1, end=0.96) == 0.96


# Naive loops

def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_nt_xent_is_the_double_loop():
    z1, z2 = rows(5, 3), rows(5, 3, seed=1)
    z, total = [*z1.tolist(), *z2.tolist()], 0.0
    for i in range(10):
        others = [math.exp(cosine(z[i], z[j]) / 0.3) for j in range(10) if j != i]
        total -= math.log(math.exp(cosine(z[i], z[(i + 5) % 10]) / 0.3) / sum(others))
    assert nt_xent(z1, z2, 0.3).item() == pytest.approx(total / 10, abs=1e-10)


@pytest.mark.parametrize("sigma", (None, 0.4))
def test_decoupled_loss_is_the_double_loop(sigma):
    z1, z2 = rows(5, 3), rows(5, 3, seed=1)
    u, v, total = z1.tolist(), z2.tolist(), 0.0
    for i in range(5):
        negatives = sum(math.exp(cosine(u[i], other[j]) / 0.3) for other in (u, v) for j in range(5) if j != i)
        weight = 1.0
        if sigma is not None:
            shares = [math.exp(cosine(u[j], v[j]) / sigma) for j in range(5)]
            weight = 2 - shares[i] / (sum(shares) / 5)
        total += math.log(negatives) - weight * cosine(u[i], v[i]) / 0.3
    assert decoupled_loss(z1, z2, 0.3, sigma).item() == pytest.approx(total / 5, abs=1e-10)


def test_sigreg_is_the_loop_over_views_directions_and_knots():
    z, directions, t_max, knots, total = rows(2, 5, 3), rows(3, 4, seed=1), 2.5, 6, 0.0
    for view in z.tolist():
        for direction in directions.T.tolist():
            shadows = [sum(x * a for x, a in zip(row, direction, strict=True)) for row in view]
            heights = []
            for t in (t_max * i / (knots - 1) for i in range(knots)):
                found = sum(cmath.exp(1j * t * p) for p in shadows) / 5
                heights.append(abs(found - math.exp(-t * t / 2)) ** 2 * math.exp(-t * t / 2))
            steps = [(a + b) / 2 * t_max / (knots - 1) for a, b in itertools.pairwise(heights)]
            total += 5 * 2 * sum(steps)                                     # twice: t and -t
    assert sigreg(z, directions, t_max, knots).item() == pytest.approx(total / 8, abs=1e-10)


# What must not matter, and what must

PAIR_LOSSES = {
    "nt_xent": lambda a, b: nt_xent(a, b, 0.2),
    "dcl": lambda a, b: decoupled_loss(a, b, 0.2),
    "dclw": lambda a, b: decoupled_loss(a, b, 0.2, 0.5),
    "cosine_distance": cosine_distance,
    "negative_cosine": negative_cosine,
    "vicreg": lambda a, b: torch.stack(vicreg_terms(a, b)).sum(),
    "lejepa": lambda a, b: on_embeddings(LeJEPA, 4)(a, b, torch.eye(a.shape[1], dtype=a.dtype))["loss"],
    "swav": lambda a, b: swapped_loss(torch.stack([a, b]), torch.stack([sinkhorn(x, 0.5, 3) for x in (a, b)]), 0.2),
}
pair_losses = pytest.mark.parametrize("loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES)


@pair_losses
def test_the_order_of_images_does_not_matter_but_their_pairing_does(loss):
    a, b, order = rows(7, 4), rows(7, 4, seed=1), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert loss(a[order], b[order]).item() == pytest.approx(loss(a, b).item(), abs=1e-10)
    assert abs(loss(a[order], b) - loss(a, b)) > 1e-3


@pytest.mark.parametrize("name", ("nt_xent", "dcl", "dclw", "cosine_distance", "negative_cosine"))
def test_the_length_of_rows_does_not_matter(name):
    a, b, lengths = rows(7, 4), rows(7, 4, seed=1), torch.linspace(0.1, 9, 7, dtype=torch.float64).unsqueeze(1)
    loss = PAIR_LOSSES[name]
    assert loss(a * lengths, b / lengths).item() == pytest.approx(loss(a, b).item(), abs=1e-10)


@pair_losses
@pytest.mark.parametrize("half", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision_is_raised(loss, half):
    a, b = rows(8, 16).to(half), rows(8, 16, seed=1).to(half)
    with torch.autocast("cpu", dtype=half):
        found = loss(a, b)
    torch.testing.assert_close(found, loss(a.float(), b.float()), rtol=1e-5, atol=1e-6)         # of float32, as well
    assert loss(a.double(), b.double()).dtype == torch.float64


@pytest.mark.parametrize("method", (on_embeddings(SimCLR, 4), on_embeddings(DCL, 4), on_embeddings(DCL, 4, sigma=0.5),
                                    on_embeddings(VICReg, 4)), ids=("simclr", "dcl", "dclw", "vicreg"))
def test_chance_is_the_loss_of_equal_embeddings(method):
    outs = method(torch.ones(6, 4), torch.ones(6, 4))
    assert outs["loss"].item() == pytest.approx(outs["chance"], rel=1e-5)
    if "covariance" in outs:
        assert abs(outs["covariance"]) < 1e-10


# LeJEPA

def directions_of(dim, count, seed=1):
    return F.normalize(rows(dim, count, seed=seed), dim=0)


def test_sigreg_knows_no_order_of_views_or_directions_and_no_axes():
    z, directions = rows(3, 9, 5), directions_of(5, 7)
    wanted, turn = sigreg(z, directions, 3.0, 17), torch.linalg.qr(rows(5, 5, seed=2))[0]
    torch.testing.assert_close(sigreg(z[[2, 0, 1]], directions[:, [6, 2, 0, 1, 5, 4, 3]], 3.0, 17), wanted)
    torch.testing.assert_close(sigreg(z @ turn, turn.T @ directions, 3.0, 17), wanted)
    assert abs(sigreg(z @ turn, directions, 3.0, 17) - wanted) > 1e-3       # the directions have to turn as well


def test_lejepa_chance_is_the_least_loss_of_one_embedding():
    directions, method = directions_of(8, 64), on_embeddings(LeJEPA, 8)
    outs = [method(*torch.full((2, 64, 8), at).double(), directions) for at in (0.0, 0.1, 0.5)]
    assert outs[0]["loss"].item() == pytest.approx(outs[0]["chance"], rel=1e-5)
    assert outs[0]["loss"] < outs[1]["loss"] < outs[2]["loss"]


def test_lejepa_draws_directions_in_views():
    torch.manual_seed(0)
    method = LeJEPA(tiny_encoder(width=4), Flip(), hidden=8, dim=4, directions=10)
    *crops, directions = method.views(batch(6))
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(10))
    assert (directions - method.views(batch(6))[-1]).abs().max() > 0.1      # anew at every step
    outs = method(*crops, directions)
    assert abs(outs["sigreg"] - method(*crops, directions.roll(1, 0))["sigreg"]) > 1e-4


@pytest.mark.parametrize("kind, words, more", ((LeJEPA, {"directions": 10}, 1), (SwAV, {"prototypes": 5}, 0)))
def test_as_many_small_crops_as_told(kind, words, more):
    """Beside two large ones, and LeJEPA's directions."""
    small = functools.partial(F.interpolate, size=32)
    method = kind(tiny_encoder(width=4), Flip(), small=small, crops=3, hidden=8, dim=4, **words)
    views = method.views(batch(6))
    assert [view.shape[2] for view in views[:5]] == [64, 64, 32, 32, 32] and len(views) == 5 + more
    assert method(*views)["embedding"].shape == (6, 4)
    assert len(kind(tiny_encoder(), Flip()).views(batch(2))) == 2 + more


# SimSiam and BYOL

def test_simsiam_stops_the_gradient_of_the_goal():
    x1, x2 = rows(6, 4).requires_grad_(), rows(6, 4, seed=1).requires_grad_()
    method = on_embeddings(SimSiam, 4, predictor=False)
    found = torch.autograd.grad(method(x1, x2)["loss"], (x1, x2))
    for x, goal, gradient in ((x1, x2, found[0]), (x2, x1, found[1])):
        wanted, = torch.autograd.grad(negative_cosine(x, goal.detach()) / 2, x)
        torch.testing.assert_close(gradient, wanted)                        # twice as much without the stop


def small_byol(**words):
    torch.manual_seed(0)
    method = BYOL(tiny_encoder(width=4), Flip(), hidden=8, predictor_hidden=8, dim=4, **words)
    for p in [*method.encoder.parameters(), *method.projector.parameters()]:
        p.data.add_(torch.randn_like(p))                                    # as if trained for a while
    return method


@pytest.mark.parametrize("end", (1.0, 0.92))
def test_byol_target_follows_by_eq_3(end):
    method = small_byol(momentum=0.9, momentum_end=end)
    pairs = [*zip([*method.target_encoder.parameters(), *method.target_projector.parameters()],
                  [*method.encoder.parameters(), *method.projector.parameters()])]
    for progress in (0.25, 1.0):
        m = end - (end - 0.9) * (1 + math.cos(math.pi * progress)) / 2
        before = [slow.clone() for slow, _ in pairs]
        method.after_step([], progress)
        for old, (slow, fast) in zip(before, pairs):
            torch.testing.assert_close(slow, m * old + (1 - m) * fast)
            assert ((slow - old).abs().max() > 1e-3) == (m < 1)             # at the end the target stands still


def test_simclr_projector_has_batch_norm_on_request():
    for norm in (False, True):
        layers = [type(layer) for layer in SimCLR(tiny_encoder(width=4), Flip(), norm=norm).projector]
        assert layers == [nn.Linear] + [nn.BatchNorm1d] * norm + [nn.ReLU, nn.Linear]


def test_byol_target_keeps_its_own_statistics_and_gets_no_gradient():
    method = small_byol()
    outs = method(*method.views(batch(6)))
    outs["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.target_encoder.parameters())
    before = method.target_encoder.bn1.running_mean.clone()
    assert (before - method.encoder.bn1.running_mean).abs().max() > 1e-3 < before.abs().max()
    method.after_step([outs], 0.5)
    assert torch.equal(before, method.target_encoder.bn1.running_mean)


def test_byol_compares_each_view_with_the_targets_view_of_the_other():
    method = small_byol()
    x1, x2 = method.views(batch(6))
    p1, p2 = (method.predictor(method.projector(method.encoder(x))) for x in (x1, x2))
    t1, t2 = (method.target_projector(method.target_encoder(x)) for x in (x1, x2))
    torch.testing.assert_close(method(x1, x2)["loss"], cosine_distance(p1, t2) + cosine_distance(p2, t1))


def test_byol_exports_the_encoder_that_was_asked_for():
    online, target = small_byol(), small_byol(export="target")
    assert online.exported is online.encoder and target.exported is target.target_encoder
    assert target.exported.dim == target.encoder.dim
    with pytest.raises(ValueError, match="online or target"):
        small_byol(export="both")


# SwAV

def test_sinkhorn_shares_out_the_batch_whatever_the_scale():
    scores = rows(12, 5)
    codes = sinkhorn(scores, 0.5, 200)
    torch.testing.assert_close(codes.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(0), torch.full((5,), 12 / 5, dtype=torch.float64))
    torch.testing.assert_close(sinkhorn(scores + 1000, 0.5, 3), sinkhorn(scores, 0.5, 3))
    assert sinkhorn(scores.float(), 1e-3, 3).isfinite().all()               # e^-1000 is no float


def test_swapped_loss_is_the_loop_over_codes_and_crops():
    scores, codes = rows(4, 6, 5), rows(2, 6, 5, seed=1).softmax(2)
    pairs = [F.cross_entropy(scores[v] / 0.1, codes[c]).item() for c in (0, 1) for v in range(4) if v != c]
    assert len(pairs) == 6
    assert swapped_loss(scores, codes, 0.1).item() == pytest.approx(sum(pairs) / 6, abs=1e-10)


def test_swav_crops_reach_the_loss_and_shape_no_code():
    torch.manual_seed(0)
    method = on_embeddings(SwAV, 4, prototypes=5)
    x1, x2, small = rows(6, 4).float(), rows(6, 4, seed=1).float(), rows(6, 4, seed=2).float().requires_grad_()
    loss = method(x1, x2, small)["loss"]
    assert torch.autograd.grad(loss, small)[0].abs().sum() > 0
    with torch.no_grad():
        scores = torch.stack([F.normalize(x, dim=1) for x in (x1, x2, small)]) @ method.prototypes.T
        codes = torch.stack([sinkhorn(view, 0.05, 3) for view in scores[:2]])
    torch.testing.assert_close(loss.detach(), swapped_loss(scores, codes, 0.1))


def test_swav_prototypes_are_frozen_as_told_and_stay_unit():
    torch.manual_seed(0)
    method = copy.deepcopy(on_embeddings(SwAV, 4, prototypes=5, freeze=2))  # copies freeze as well
    optimizer = torch.optim.Adam([method.prototypes], lr=0.05, weight_decay=0.1)        # its decay turns the rows
    start, moved, pulled = method.prototypes.detach().clone(), [], []
    for step in range(4):
        optimizer.zero_grad()
        outs = method(rows(6, 4, seed=step).float(), rows(6, 4, seed=9 + step).float())
        outs["loss"].backward()
        optimizer.step()
        method.after_step([outs], (step + 1) / 4)
        torch.testing.assert_close(method.prototypes.norm(dim=1), torch.ones(5))
        moved.append((method.prototypes - start).abs().max().item() > 1e-3)
        pulled.append(method.prototypes.grad.abs().max().item() > 1e-6)
    assert moved == pulled == [False, False, True, True]
    torch.testing.assert_close(on_embeddings(SwAV, 4).prototypes.norm(dim=1), torch.ones(500))


def test_swav_queue_wraps_and_joins_the_codes_once_it_is_full():
    torch.manual_seed(0)
    method, plain = on_embeddings(SwAV, 4, prototypes=5, queue_size=7), on_embeddings(SwAV, 4, prototypes=5)
    plain.prototypes.data.copy_(method.prototypes)
    seen = torch.zeros(2, 0, 4)
    for step, sizes in enumerate(((3,), (2, 1), (3,), (9,), (2,))):         # micro-batches; nine are more than fit
        outs, expected = [], []
        for size in sizes:
            x = rows(2, size, 4, seed=20 + 3 * step + size).float()
            outs.append(method(*x))
            expected.append(plain(*x)["loss"])
            seen = torch.cat([seen, F.normalize(x, dim=2)], 1)
        apart = max(abs(out["loss"] - loss) for out, loss in zip(outs, expected))
        assert apart < 1e-5 if step < 3 else apart > 1e-3                   # 3, 6, 9: full after the third step
        method.after_step(outs, 0.5)
    slots = torch.arange(seen.shape[1])[-7:]
    torch.testing.assert_close(method.queue[:, slots % 7], seen[:, -7:])
    assert method.queued == 20


@pytest.mark.parametrize("method, loss", (
    (SimCLR, lambda a, b: nt_xent(a, b, 0.3)),
    (DCL, lambda a, b: (decoupled_loss(a, b, 0.3) + decoupled_loss(b, a, 0.3)) / 2)))
def test_both_views_get_the_gradient_of_the_loss(method, loss):
    z = rows(5, 4).requires_grad_(), rows(5, 4, seed=1).requires_grad_()
    found, wanted = on_embeddings(method, 4, temperature=0.3)(*z)["loss"], loss(*z)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(wanted, z))


def test_swav_each_view_has_its_own_queue():
    method = on_embeddings(SwAV, 4, prototypes=5, queue_size=6)
    method.queue.copy_(F.normalize(rows(2, 6, 4), dim=2))
    method.queued.fill_(6)
    z = F.normalize(rows(2, 3, 4, seed=1).float(), dim=2)
    codes = [sinkhorn(torch.cat([z[v], method.queue[v]]) @ method.prototypes.T, 0.05, 3)[:3] for v in (0, 1)]
    torch.testing.assert_close(method(*z)["loss"], swapped_loss(z @ method.prototypes.T, torch.stack(codes), 0.1))
