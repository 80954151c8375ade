"""Optimisers and schedules equal trusted ones step by step."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from medssl import spark
from medssl.common import optim, unet
from tests.common import Flip, golden, tiny_encoder

NAMES = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


class Net(nn.Module):
    def __init__(self, numbers):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10, dtype=torch.float64), nn.Linear(10, 3, dtype=torch.float64)
        self.load_state_dict({name: torch.from_numpy(numbers[f"start_{name}"]).double() for name in NAMES})

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


@pytest.mark.parametrize("name,optimizer,lr,options,clip", [
    ("lars", "lars", 0.2, {"momentum": 0.9, "trust": 0.02}, None),
    ("lars_nesterov", "lars", 0.2, {"momentum": 0.9, "trust": 0.02, "nesterov": True}, None),
    ("lamb", "lamb", 0.02, {}, 1.0),
    ("lamb_unclipped", "lamb", 0.02, {}, None)])
def test_lars_and_lamb_equal_trusted_ones(name, optimizer, lr, options, clip):
    numbers = golden("lars_lamb")
    net = Net(numbers)
    groups = optim.parameter_groups(net, 0.1)
    kinds = sorted((g["decays"], g["weight_decay"], len(g["params"])) for g in groups)
    assert kinds == [(False, 0.0, 2), (True, 0.1, 2)]
    opt = optim.build(optimizer, groups, lr, options)
    for step in (1, 2, 3):
        x, y = (torch.from_numpy(numbers[k][step - 1]).double() for k in "xy")
        loss = ((net(x) - y) ** 2).mean()
        opt.zero_grad()
        loss.backward()
        assert abs(loss.item() - numbers[f"{name}_loss"][step - 1]) < 1e-6
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        opt.step()
        for key in NAMES:
            wanted = numbers[f"{name}_step{step}_{key}"]
            found = dict(net.named_parameters())[key].detach().numpy()
            assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_schedules_equal_trusted_ones():
    numbers = golden("schedule")
    steps, warmup, base, low = (float(numbers[k]) for k in ("steps", "warmup", "base_lr", "min_lr"))
    ours = np.array([optim.lr_at(s, int(steps), int(warmup), base) for s in range(int(steps))])
    ours[int(warmup):] = low + ours[int(warmup):] * (base - low) / base     # theirs ends at `low`, ours at 0
    assert np.abs(ours - numbers["cosine_warmup"]).max() < 1e-12
    theirs = numbers["cosine_spark_weight_decay"]
    decay = [optim.cosine(s / (len(theirs) - 1), 0.04, 0.2) for s in range(len(theirs))]
    assert np.abs(np.array(decay) - theirs).max() < 5e-3                    # they end one step earlier or later
    assert optim.lr_at(0, 10, 0, 1.0) == 1.0 and optim.lr_at(0, 10, 5, 1.0) == 0.0


def test_groups_by_prefix():
    module = nn.ModuleDict({"encoder": nn.Conv2d(2, 3, 1), "head": nn.Linear(3, 4)})
    module.token = nn.Parameter(torch.zeros(1, 5, 1, 1))
    module.encoder.weight.requires_grad_(False)
    groups = optim.parameter_groups(module, 0.3, {"head.": 10.0})
    found = {(g["lr_scale"], g["decays"]): sum(p.numel() for p in g["params"]) for g in groups}
    assert found == {(10.0, True): 12, (10.0, False): 4, (1.0, False): 3 + 5}           # the frozen weight is not there


def excluded(module):
    """Names of the parameters that do not decay."""
    groups = optim.parameter_groups(module, 0.3)
    assert all(g["weight_decay"] == (0.3 if g["decays"] else 0) for g in groups)
    without = {id(p) for g in groups if not g["decays"] for p in g["params"]}
    return {name for name, p in module.named_parameters() if id(p) in without}


def test_only_biases_norms_and_tokens_are_excluded():
    module = nn.ModuleDict({"conv": nn.Conv2d(4, 1, 1), "deep": nn.Conv1d(1, 1, 1), "linear": nn.Linear(1, 1),
                            "batch": nn.BatchNorm2d(3), "group": nn.GroupNorm(1, 3), "layer": nn.LayerNorm((3, 4, 4)),
                            "tokens": nn.ParameterList([torch.zeros(1, 3, 1, 1), torch.zeros(1, 2, 3)])})
    module.prototypes, module.scale = nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.ones(1, 3, 1, 1))
    module.attention_bias = nn.Parameter(torch.zeros(4, 4))
    assert excluded(module) == {
        "conv.bias", "deep.bias", "linear.bias", "batch.weight", "batch.bias", "group.weight", "group.bias",
        "layer.weight", "layer.bias", "tokens.0", "tokens.1", "scale", "attention_bias"}


def test_last_layers_of_gray_networks_decay():
    """SparK's head and a decoder's last layer have weights (1, W, 1, 1) where images have one channel."""
    method, restoring = spark.SparK(tiny_encoder(), Flip(), channels=1, width=64), unet.Decoder([8, 16], [2, 4], 1)
    assert method.head.weight.squeeze().ndim == restoring.out.weight.squeeze().ndim == 1
    for module, inside in ((method, "head.weight"), (restoring, "out.weight")):
        without = excluded(module)
        assert inside not in without and inside.replace("weight", "bias") in without
        assert {name for name, p in module.named_parameters() if p.ndim == 1} == without
    assert {"tokens.0", "norms.0.weight", "encoder.bn1.weight"} <= excluded(method)


@pytest.mark.parametrize("lr", [0.0, 0.01, 0.2])
def test_larc_clips_the_ratio(lr):
    """Step by step: min(trust |w| / (|g| + decay |w|) / lr, 1) times the gradient, so never more than SGD's step."""
    torch.manual_seed(0)
    w, frozen = torch.randn(3, 4, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    p, still = nn.Parameter(w.clone()), nn.Parameter(frozen)
    opt = optim.build("lars", [{"params": [p, still], "weight_decay": 0.1}], lr,
                      {"momentum": 0.9, "trust": 0.05, "trust_clip": True})
    velocity = torch.zeros_like(w)
    for scale in (0.01, 1.0, 100.0):                                        # from clipped to far below
        g = scale * torch.randn(3, 4, dtype=torch.float64)
        p.grad, still.grad = g.clone(), torch.ones_like(still)
        ratio = 0.05 * w.norm() / (g.norm() + 0.1 * w.norm() + 1e-8)
        velocity = 0.9 * velocity + (g + 0.1 * w) * (min(ratio / lr, 1) if lr else 1)
        w = w - lr * velocity
        opt.step()
        torch.testing.assert_close(p.data, w, rtol=1e-12, atol=0)
    assert still.abs().max() <= lr * (1 + 1.9 + 2.71)                       # a layer of zeros is not scaled


def test_decay_all_excludes_nothing():
    """As plain SGD with one decay for all: a norm's gain shrinks too, and LARS scales its step."""
    def after(name, options):
        net = nn.BatchNorm1d(4, dtype=torch.float64)
        opt = optim.build(name, optim.parameter_groups(nn.ModuleList([net, nn.Linear(1, 1)]), 0.1), 0.5, options)
        net.weight.grad = torch.full_like(net.weight, 0.2)
        opt.step()
        assert "decay_all" not in opt.defaults and all(g["decays"] for g in opt.param_groups) == bool(options)
        return net.weight[0].item()

    assert after("sgd", {}) == pytest.approx(1 - 0.5 * 0.2)
    assert after("sgd", {"decay_all": True}) == pytest.approx(1 - 0.5 * (0.2 + 0.1))
    assert after("lars", {"decay_all": True}) == pytest.approx(1 - 0.5 * (0.2 + 0.1) * 0.001 * 2 / (0.4 + 0.1 * 2))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_state_survives_a_round_trip(name):
    def net_and_optimizer():
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        return net, optim.build(name, optim.parameter_groups(net, 0.1), 0.01)

    def step(net, opt):
        opt.zero_grad()
        net(torch.ones(2, 4)).square().sum().backward()
        opt.step()

    net, opt = net_and_optimizer()
    step(net, opt), step(net, opt)
    other, again = net_and_optimizer()
    other.load_state_dict(net.state_dict())
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    step(net, opt), step(other, again)
    assert torch.equal(net.weight, other.weight) and torch.equal(net.bias, other.bias)
