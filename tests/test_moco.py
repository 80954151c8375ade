"""MoCo: contrast, queue and slow network equal the official code's; split BatchNorm, rows to skip, wrap-around."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medssl import moco
from medssl.moco import MoCo, ema_update, info_nce
from tests.common import Flip, batch, tiny_encoder

GOLDEN = np.load(Path(__file__).parent / "golden" / "moco.npz")


def golden(name):
    value = torch.from_numpy(GOLDEN[name])
    return value.double() if value.is_floating_point() else value


def method(**words):
    torch.manual_seed(0)
    return MoCo(tiny_encoder(), Flip(), **{"dim": 32, "queue_size": 24, **words})


def test_info_nce_equals_golden():
    k, queue, temperature = golden("k")[0], golden("queue"), golden("temperature")
    q, raw = golden("q").requires_grad_(), golden("q_raw").requires_grad_()
    loss = info_nce(q, k, queue, temperature)
    torch.testing.assert_close(loss, golden("loss"), rtol=0, atol=1e-8)
    torch.testing.assert_close(torch.autograd.grad(loss, q)[0], golden("grad_q"), rtol=0, atol=1e-8)
    loss = info_nce(F.normalize(raw, dim=1), k, queue, temperature)
    torch.testing.assert_close(torch.autograd.grad(loss, raw)[0], golden("grad_q_raw"), rtol=0, atol=1e-8)
    torch.testing.assert_close(moco.similarities(q, k, queue) / temperature, golden("logits"), rtol=0, atol=1e-8)


def test_queue_equals_golden():
    model = method().double()
    model.queue.copy_(golden("queue"))
    for s in range(4):
        model.after_step([{"keys": golden("k")[s]}], 0.5)
        torch.testing.assert_close(model.queue, golden("queue_after")[s], rtol=0, atol=1e-12)
        assert model.pointer == golden("pointer_after")[s]


def test_ema_equals_golden():
    def network(tag):
        model = nn.ModuleDict({"fc1": nn.Linear(6, 10), "fc": nn.Linear(10, 4)}).double()
        model.load_state_dict({name: golden(f"ema_{tag}_{name}") for name in model.state_dict()})
        return model
    twin = network("start")
    for s in "123":
        ema_update(twin, network(f"online{s}"), GOLDEN["ema_momentum"].item())
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(value, golden(f"ema_twin{s}_{name}"), rtol=0, atol=1e-8)


@pytest.mark.parametrize("count", [5, 10, 23, 24, 61])
def test_queue_wraps_around(count):
    """Any batch with any queue: row by row in a ring, the micro-batches of a step one after the other."""
    model, ring, place = method(), method().queue.clone(), 0
    for _ in range(3):
        outs = [{"keys": torch.randn(n, 32)} for n in (count, 3)]
        model.after_step(outs, 0.5)
        for out in outs:
            for key in out["keys"]:
                ring[place] = key
                place = (place + 1) % 24
        assert torch.equal(model.queue.roll(-int(model.pointer), 0), ring.roll(-place, 0))      # the oldest row first


def test_key_network_follows_after_the_step():
    model = method(momentum=0.9)
    with torch.no_grad():
        for parameter in [*model.encoder.parameters(), *model.projector.parameters()]:
            parameter.add_(torch.randn_like(parameter))
    pairs = [(model.key_encoder, model.encoder), (model.key_projector, model.projector)]
    expected = [[0.9 * old + 0.1 * new for old, new in zip(s.parameters(), f.parameters())] for s, f in pairs]
    model.after_step([], 0.5)
    for (slow, _), values in zip(pairs, expected):
        for parameter, value in zip(slow.parameters(), values):
            torch.testing.assert_close(parameter.data, value.data)
            assert not parameter.requires_grad


def test_keys_keep_their_rows_and_chunks_their_statistics():
    """In evaluation mode the shuffle changes nothing; in training a key depends on the images of its chunk only."""
    model, x = method(bn_chunks=3).double(), batch(29).double()
    order = torch.randperm(29)
    chunks = order.tensor_split(3)
    expected = torch.empty(29, 32, dtype=torch.float64)
    with torch.no_grad():
        for rows in chunks:
            expected[rows] = F.normalize(model.key_projector(model.key_encoder(x[rows])), dim=1)
        torch.testing.assert_close(model.encode_keys(x, order), expected)
        disturbed = x.clone()
        disturbed[chunks[0]] += 0.3 * torch.rand_like(x[chunks[0]])
        changed = (model.encode_keys(disturbed, order) - expected).abs().amax(1) > 1e-9
        assert changed[chunks[0]].all() and not changed[chunks[1]].any() and not changed[chunks[2]].any()
        model.eval()
        expected = F.normalize(model.key_projector(model.key_encoder(x)), dim=1)
        torch.testing.assert_close(model.encode_keys(x, order), expected)
    assert [len(rows) for rows in moco.split_order(torch.arange(29), 8)] == [10, 10, 9]     # 29 // 8 chunks
    assert len(moco.split_order(torch.arange(3), 8)) == 1


def test_rows_to_skip_are_not_counted():
    torch.manual_seed(0)
    q, k, queue = (F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=1) for n in (4, 4, 6))
    skip = torch.rand(4, 6) < 0.4
    expected = 0
    for i in range(4):
        own = math.exp(q[i] @ k[i] / 0.2)
        others = sum(math.exp(q[i] @ queue[j] / 0.2) for j in range(6) if not skip[i, j])
        expected -= math.log(own / (own + others)) / 4
    assert info_nce(q, k, queue, 0.2, skip).item() == pytest.approx(expected, abs=1e-10)


def test_accuracy_counts_the_own_key_on_top_and_chance_all_rows():
    torch.manual_seed(0)
    encoder = nn.Identity()
    encoder.dim = 8
    model = MoCo(encoder, None, dim=8, queue_size=6)
    model.projector, model.key_projector = nn.Identity(), nn.Identity()
    q = F.normalize(torch.randn(4, 8), dim=1)
    k = q.clone()
    k[1] = F.normalize(q[1] + F.normalize(torch.randn(8), dim=0), dim=0)                    # similar,
    model.queue[2] = q[1]                                                                   # but another one is more so
    out = model(q, k, torch.randperm(4))
    assert 0.3 < q[1] @ k[1] < 0.95
    assert float(out["accuracy"]) == pytest.approx(0.75) and float(out["chance"]) == pytest.approx(math.log(7))
    torch.testing.assert_close(out["loss"], info_nce(q, k, model.queue, 0.07))
