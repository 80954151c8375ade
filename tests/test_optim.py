"""Optimisers and schedules equal trusted ones step by step."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from medssl.common import optim
from tests.common import golden

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
    assert sorted((g["decays"], g["weight_decay"], len(g["params"])) for g in groups) == [(False, 0.0, 2), (True, 0.1, 2)]
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
            assert np.abs(dict(net.named_parameters())[key].detach().numpy() - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_schedules_equal_trusted_ones():
    numbers = golden("schedule")
    steps, warmup, base, low = (float(numbers[k]) for k in ("steps", "warmup", "base_lr", "min_lr"))
    ours = [optim.lr_at(s, int(steps), int(warmup), base, low) for s in range(int(steps))]
    assert np.abs(np.array(ours) - numbers["cosine_warmup"]).max() < 1e-12
    decay = [optim.cosine(s / (len(numbers["cosine_spark_weight_decay"]) - 1), 0.04, 0.2) for s in range(len(numbers["cosine_spark_weight_decay"]))]
    assert np.abs(np.array(decay) - numbers["cosine_spark_weight_decay"]).max() < 5e-3      # they end one step earlier or later
    assert optim.lr_at(0, 10, 0, 1.0) == 1.0 and optim.lr_at(0, 10, 5, 1.0) == 0.0


def test_groups_by_prefix_and_shape():
    module = nn.ModuleDict({"encoder": nn.Conv2d(2, 3, 1), "head": nn.Linear(3, 4)})
    module.token = nn.Parameter(torch.zeros(1, 5, 1, 1))
    module.encoder.weight.requires_grad_(False)
    groups = optim.parameter_groups(module, 0.3, {"head.": 10.0})
    found = {(g["lr_scale"], g["decays"]): sum(p.numel() for p in g["params"]) for g in groups}
    assert found == {(10.0, True): 12, (10.0, False): 4, (1.0, False): 3 + 5}               # the token is not decayed, the frozen weight is not there


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
