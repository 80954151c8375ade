"""Two processes with half of the batch each must learn what one process learns from the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medssl import dcl, lejepa, moco, simclr, swav, vicreg
from tests.two_process import run_processes

IMAGES, DIM = 12, 6


class Rows(nn.Module):
    """A method on fixed embeddings, which are parameters so that their gradients are averaged like the network's."""

    def __init__(self, method, views=2, others=lambda rows: ()):
        super().__init__()
        self.method, self.others = method, others
        self.embeddings = nn.Parameter(torch.randn(views, IMAGES, DIM) + 0.5)
        for name in ("projector", "key_projector"):
            if hasattr(method, name):
                setattr(method, name, nn.Identity())

    def forward(self, rows):
        return self.method(*self.embeddings[:, rows], *self.others(rows))   # views x (B, D)


def identity():
    encoder = nn.Identity()
    encoder.dim = DIM
    return encoder


def swav_method(**words):
    method = swav.SwAV(identity(), None, prototypes=5, dim=DIM, freeze=0, **words)
    if method.queue_size:                                                   # full from the start, so that it is used
        method.queue.copy_(F.normalize(torch.randn_like(method.queue), dim=2))
        method.queued.fill_(method.queue_size + 3)
    return method


def lejepa_directions(rows):
    """Each process draws its own; those of the first, which holds row 0, are to serve all."""
    generator = torch.Generator().manual_seed(rows[0].item())
    return (F.normalize(torch.randn(DIM, 8, generator=generator, dtype=torch.float64), dim=0),)


CASES = {
    "simclr": lambda: Rows(simclr.SimCLR(identity(), None)),
    "dcl": lambda: Rows(dcl.DCL(identity(), None)),
    "dclw": lambda: Rows(dcl.DCL(identity(), None, sigma=0.5)),
    "vicreg": lambda: Rows(vicreg.VICReg(identity(), None)),
    "lejepa": lambda: Rows(lejepa.LeJEPA(identity(), None, dim=DIM), views=3, others=lejepa_directions),
    "swav": lambda: Rows(swav_method(), views=4),
    "swav with queue": lambda: Rows(swav_method(queue_size=16)),
    "moco": lambda: Rows(moco.MoCo(identity(), None, dim=DIM, queue_size=20),
                         others=lambda rows: (torch.arange(len(rows)),)),                   # the order of the keys
}


def losses_and_gradients():
    """{case: loss on this process's share, gradients, buffers after one step}; alone, the share is all rows."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = torch.arange(IMAGES).chunk(world)[rank]
    results = {}
    for name, build in CASES.items():
        torch.manual_seed(5)
        module = build().double()
        model = DistributedDataParallel(module) if world > 1 else module
        outs = model(rows)
        outs["loss"].backward()
        module.method.after_step([{key: torch.as_tensor(value).detach() for key, value in outs.items()}], 1.0)
        results[name] = {"loss": outs["loss"].detach(), "chance": torch.as_tensor(outs["chance"]),
                         "gradients": {key: p.grad for key, p in module.named_parameters()},
                         "state": dict(module.named_buffers())}
    return results


@pytest.fixture(scope="module")
def one():
    return losses_and_gradients()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_processes(losses_and_gradients, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name, one, two):
    whole, parts = one[name], [result[name] for result in two]
    same = dict(rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(sum(part["loss"] for part in parts) / 2, whole["loss"], **same)
    assert whole["gradients"]["embeddings"][0].abs().sum(1).min() > 1e-4                        # every row takes part
    for part in parts:
        assert part["gradients"].keys() == whole["gradients"].keys()
        torch.testing.assert_close(part["gradients"], whole["gradients"], **same)
        torch.testing.assert_close(part["state"], whole["state"], **same)
        torch.testing.assert_close(part["chance"], whole["chance"], **same)
        if name != "moco":                                                  # a loss of gathered rows is one number
            torch.testing.assert_close(part["loss"], whole["loss"], **same)


def fails_on_one_rank():
    if dist.get_rank() == 1:
        raise ValueError("rank one gives up")


def test_an_error_in_a_process_is_reported(tmp_path):
    with pytest.raises(RuntimeError, match="rank one gives up"):
        run_processes(fails_on_one_rank, 2, tmp_path)
