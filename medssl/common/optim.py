"""Optimisers, schedules and parameter groups.

LARS (You et al. 2017) and LAMB (You et al. 2020) scale each layer's step by |weights| / |step|, so that all layers move
by a similar share of their own size; that keeps large batches stable. SGD, Adam and AdamW are torch's.

LARS divides by |gradient| + decay * |weights|, as most code does; some divides by |gradient + decay * weights|, which
differs a little. With trust_clip=True it is LARC: no layer takes a larger step than SGD would with the same rate.

Biases, norms and tokens do not decay, and LARS and LAMB do not scale their steps. Some released code makes no such
difference (Wolf et al. 2023: SGD and LARS treat all parameters alike): with decay_all=True neither does this.
"""

import math

import torch
from torch import nn


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled per parameter by trust |w| / (|g| + decay |w|); by that over the rate, and
    by 1 at most, with trust_clip."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=0.001, nesterov=False, trust_clip=False,
                 eps=1e-8):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust,
                                      nesterov=nesterov, trust_clip=trust_clip, eps=eps, decays=True))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                g = w.grad
                if group["decays"]:
                    w_norm, g_norm = w.norm(), g.norm()
                    ratio = group["trust"] * w_norm / (g_norm + group["weight_decay"] * w_norm + group["eps"])
                    if group["trust_clip"]:
                        ratio = (ratio / group["lr"]).clamp(max=1)          # at rate 0, where warm-up starts, it is 1
                    ratio = torch.where((w_norm > 0) & (g_norm > 0), ratio, 1.0)
                    g = (g + group["weight_decay"] * w) * ratio
                state = self.state[w]
                velocity = state.setdefault("velocity", torch.zeros_like(w))
                velocity.mul_(group["momentum"]).add_(g)
                w.sub_(group["lr"] * (g + group["momentum"] * velocity if group["nesterov"] else velocity))


class LAMB(torch.optim.Optimizer):
    """Adam with decoupled decay whose update u is scaled per parameter by |w| / |u|."""

    def __init__(self, params, lr, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-6):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, decays=True))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            group["step"] = group.get("step", 0) + 1
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                m, v = (state.setdefault(name, torch.zeros_like(w)) for name in ("mean", "square"))
                m.lerp_(w.grad, 1 - beta1)
                v.lerp_(w.grad ** 2, 1 - beta2)
                m_hat, v_hat = m / (1 - beta1 ** group["step"]), v / (1 - beta2 ** group["step"])
                u = m_hat / (v_hat.sqrt() + group["eps"])
                if group["decays"]:
                    u = u + group["weight_decay"] * w
                    w_norm, u_norm = w.norm(), u.norm()
                    u = u * torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0)
                w.sub_(group["lr"] * u)


OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "lars": LARS, "lamb": LAMB}
SCALED = ("sgd", "lars", "lamb")                # their learning rate is given per 256 images; Adam's as it stands
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def build(name, groups, lr, options=None):
    """The optimiser of these groups. options: its own keywords, and decay_all=True: no parameter is excluded."""
    options = dict(options or {})
    if options.pop("decay_all", False):
        decay = max(group["weight_decay"] for group in groups)
        groups = [group | {"decays": True, "weight_decay": decay} for group in groups]
    if name == "sgd":
        options = {"momentum": 0.9, **options}
    return OPTIMIZERS[name](groups, lr=lr, **options)


def parameter_groups(module, weight_decay, scales=None):
    """Trainable parameters in groups with a rate factor and a decay of their own; see `decays` for what has none.
    scales {name prefix: rate factor} gives parts of the module another rate."""
    scales = scales or {}
    groups = {}
    for name, p in module.named_parameters():
        if p.requires_grad:
            rate = next((factor for prefix, factor in scales.items() if name.startswith(prefix)), 1.0)
            groups.setdefault((rate, decays(module, name, p)), []).append(p)
    return [{"params": params, "lr_scale": rate, "decays": decay, "weight_decay": weight_decay if decay else 0.0}
            for (rate, decay), params in groups.items()]


def decays(module, name, p):
    """Whether this parameter of the module is a weight: no norm's, no bias, no token. One that is not called "weight"
    (a token, a layer's scale) is told by its shape: one dimension longer than 1 at most. A layer's weight is not: with
    one channel that of a 1x1 convolution is (1, W, 1, 1)."""
    *path, last = name.split(".")
    token = any(part.endswith(("token", "tokens")) for part in (*path, last))
    if token or last.endswith("bias") or isinstance(module.get_submodule(".".join(path)), NORMS):
        return False
    return (p if last == "weight" else p.squeeze()).ndim > 1


def lr_at(step, steps, warmup, lr):
    """Linear from 0, reaching lr at step `warmup`; from there a cosine to 0 at step `steps`."""
    if step < warmup:
        return lr * step / warmup
    return cosine((step - warmup) / max(1, steps - warmup), lr, 0.0)


def cosine(progress, start, end):
    """start at progress 0, end at progress 1, along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
