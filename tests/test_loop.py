"""The loop: exact resume, nothing lost, the same weights however the batch is cut up, and clear words when something
is wrong."""

import copy
import math
import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import train
from medssl.common import augment, feed, files, loop, optim
from medssl.rotation import Rotation
from tests.common import batch
from tests.test_contract import NAMES, no_autocast  # noqa: F401
from tests.test_contract import make as make_whole
from tests.two_process import run_processes


def pictures(count=24, channels=1, size=64, dtype=np.uint8):
    images = (batch(count, channels, size).numpy() * np.iinfo(dtype).max).astype(dtype)
    return SimpleNamespace(name="pictures", images=images, labels=None, masks=None, groups=np.arange(count) // 2)


def make(name):
    """The loop does not care how deep a network is."""
    return make_whole(name, stages=2)


def config(out=None, **changes):
    return loop.Config(**{"steps": 3, "batch": 12, "lr": 0.05, "log_every": 1, "device": "cpu",
                          "out": out and str(out), **changes})


def run(method, settings, dataset=None, **words):
    return list(loop.fit(method, dataset or pictures(), settings, **words))


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_long_run_starts_at_once():
    """A list of its steps would take terabytes."""
    records = loop.fit(make("rotation"), pictures(), config(steps=10 ** 12))
    assert next(records)["step"] == 1
    records.close()


@pytest.mark.parametrize("name", NAMES)
def test_resume_is_exact_for_every_method(name, tmp_path):
    """Accumulation 2 and bf16; the last step is done twice, once going straight on and once from the checkpoint before
    it."""
    settings = dict(steps=2, batch=8, accum=2, amp="bf16", save_every=1, optimizer="lars", options={"trust": 0.02},
                    weight_decay=0.1)
    straight, resumed = make(name), make(name)
    for record in loop.fit(straight, pictures(), config(tmp_path / "a", **settings)):
        if record["step"] == 2:
            shutil.copytree(tmp_path / "a", tmp_path / "b")
    with torch.no_grad():
        for p in resumed.parameters():                                      # whatever it held before is overwritten
            p.add_(1)
    records = run(resumed, config(tmp_path / "b", resume=True, **settings))
    assert [r["step"] for r in records] == [2] and equal(straight, resumed)
    first, second = ([line["loss"] for line in files.read_log(tmp_path / x / "log.jsonl")] for x in "ab")
    assert first == second and len(first) == 2


KILLED = (("moco", 3), ("byol", -1))


def killed_run(folder):
    """In two child processes: each trains its own run and kills itself, as `kill -9` would, after step `at`; with -1
    in the middle of saving."""
    name, at = KILLED[dist.get_rank()]
    dist.barrier()                                                          # both are there before one of them dies
    dist.destroy_process_group()
    method, out = make(name), folder / name
    if at < 0:
        replace, count = os.replace, iter(range(100))
        os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL) if next(count) > 4 else replace(*paths)
    for record in loop.fit(method, pictures(), config(out, steps=6, save_every=2)):
        if record["step"] == at:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(RuntimeError, match=r"exit codes \[-9, -9\]"):
        run_processes(killed_run, 2, folder, folder)
    return folder


@pytest.mark.parametrize("name", [name for name, _ in KILLED])
def test_a_killed_run_is_resumed_exactly(name, killed):
    straight = make(name)
    run(straight, config(None, steps=6))
    assert torch.load(killed / name / "checkpoint.pt", weights_only=True)["step"] in (2, 4)
    resumed = make(name)
    run(resumed, config(killed / name, steps=6, resume=True))
    assert equal(straight, resumed)
    assert [line["step"] for line in files.read_log(killed / name / "log.jsonl")] == [1, 2, 3, 4, 5, 6]


class Plain(nn.Module):
    """An encoder without BatchNorm: its output for one image depends on that image alone."""
    dim = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 9, stride=8)

    def forward(self, x):
        return torch.tanh(self.conv(x)).mean((2, 3))


def without_norm():
    torch.manual_seed(0)
    return Rotation(Plain(), augment.build("contrastive", 64), hidden=8)


def trained_by_two(folder):
    plain, moco = without_norm(), make("moco")
    losses = [record["loss"] for record in run(plain, config(steps=4, accum=1))]
    run(moco, config(steps=2, accum=2))
    np.save(folder / f"{dist.get_rank()}.npy", pictures(32).images)
    train.main(["--method", "simclr", "--data", str(folder / f"{dist.get_rank()}.npy"), "--encoder", "tiny",
                "--out", str(folder / "run"), "--steps", "2", "--batch", "16", "--size", "32", "--stem", "small",
                "--device", "cpu", "--cache", str(folder / f"cache{dist.get_rank()}")])
    return {"losses": torch.tensor(losses), "plain": plain.state_dict(), "moco": moco.state_dict()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def by_two(folder):
    return run_processes(trained_by_two, 2, folder, folder)


def test_two_processes_equal_accumulation_of_two(by_two):
    one = without_norm()
    losses = torch.tensor([record["loss"] for record in run(one, config(steps=4, accum=2))])
    for result in by_two:
        assert torch.allclose(result["losses"], losses, atol=1e-6)
        for key, value in one.state_dict().items():
            assert torch.allclose(value, result["plain"][key], atol=1e-6), key


def test_queue_and_weights_stay_the_same_on_both_ranks(by_two):
    first, second = (result["moco"] for result in by_two)
    names = [name for name, _ in make("moco").named_parameters()] + ["queue", "pointer"]
    assert all(torch.equal(first[name], second[name]) for name in names)
    assert first["pointer"] == 24 % 20                                      # two steps of the whole batch of twelve


def test_a_run_of_two_processes_ends_with_its_pictures(by_two, folder):
    """Also with a loss that gathers from all processes, while the first one alone draws."""
    left = {path.name for path in (folder / "run").iterdir()}
    assert {"encoder.pt", "checkpoint.pt", "views.png", "curves.png", "spectrum.png"} <= left


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "lars", "lamb"])
def test_between_logging_steps_nothing_is_read_back(optimizer, no_autocast):                            # noqa: F811
    """On the "meta" device, which has no values, two steps with accumulation and clipping go by; the third one is
    logged and fails."""
    settings = config(steps=3, optimizer=optimizer, accum=2, clip=1.0, log_every=3, device="meta")
    running = loop.fit(without_norm(), pictures(), settings)
    assert [next(running)["step"] for _ in range(2)] == [1, 2]
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        next(running)


class Reconstruct(nn.Module):
    """A method without randomness, whose outputs can be checked by hand."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.steps, self.seen = encoder, 0, []

    def views(self, images):
        self.seen.append(images.mean((1, 2, 3)))
        return (images,)

    def forward(self, x):
        loss = (self.encoder(x).mean(1) - x.mean((1, 2, 3))).square().mean()
        return {"loss": loss, "vector": x.mean((1, 2, 3)), "twice": 2 * loss}

    def after_step(self, outs, progress):
        self.steps, self.met = self.steps + 1, self.encoder.conv.weight.detach().clone()
        assert not any(v.requires_grad for out in outs for v in out.values()) and progress == self.steps / 3


def test_after_step_meets_the_new_weights_once_a_step_and_records():
    method = Reconstruct(Plain())
    records = run(method, config(accum=3, log_every=2))
    assert method.steps == 3 and len(method.seen) == 9 and torch.equal(method.met, method.encoder.conv.weight)
    assert isinstance(records[1]["loss"], float) and isinstance(records[0]["loss"], torch.Tensor)
    assert records[1]["twice"] == pytest.approx(2 * records[1]["loss"]) and "vector" not in records[1]
    assert records[1]["images_per_s"] > 0 and [r["step"] for r in records] == [1, 2, 3]


def test_every_image_is_seen_once_a_pass_and_order_depends_on_the_seed():
    assert all(len(feed.batch_order(20, 6, step, seed=3)) == 6 for step in range(9))
    order = np.concatenate([feed.batch_order(20, 6, step, seed=3) for step in range(3)])
    assert len(set(order.tolist())) == 18                                   # the tail of two is left out of this pass
    # the next pass differs
    assert not np.array_equal(feed.batch_order(20, 6, 0, 3), feed.batch_order(20, 6, 3, 3))
    assert not np.array_equal(feed.batch_order(20, 6, 0, 3), feed.batch_order(20, 6, 0, 4))
    assert np.array_equal(feed.batch_order(20, 6, 7, 3), feed.batch_order(20, 6, 7, 3))
    # 60 draws from 5 images
    wrapped = [feed.batch_order(5, 12, step, 0) for step in range(5)]
    assert all(len(b) == 12 for b in wrapped) and np.bincount(np.concatenate(wrapped)).tolist() == [12] * 5


def test_weights_shape_the_order():
    weights = np.r_[np.full(90, 1.0), np.full(10, 9.0)]                     # the rare tenth as often as the rest
    drawn = np.concatenate([feed.batch_order(100, 20, step, 0, weights) for step in range(200)])
    assert abs((drawn >= 90).mean() - 0.5) < 0.03
    never = feed.batch_order(100, 100, 0, 0, np.r_[np.ones(50), np.zeros(50)])
    assert never.max() < 50


def test_rows_limit_what_is_learnt_from():
    method, dataset, rows = Reconstruct(Plain()), pictures(), np.array([2, 3, 5, 7, 11, 13, 17, 19, 20, 21, 22, 23])
    run(method, config(), dataset, rows=rows)
    apart = np.abs(torch.cat(method.seen).numpy()[:, None] - dataset.images[rows].mean((1, 2, 3)) / 255)  # (36, 12)
    assert apart.min(1).max() < 1e-5 and len(set(apart.argmin(1))) == 12


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_images_become_floats_between_zero_and_one(dtype, tmp_path):
    images, asked = pictures(6, 2, dtype=dtype).images, [np.array([4, 1, 1]), np.array([0])]
    np.save(tmp_path / "x.npy", images)
    for source in (images, np.load(tmp_path / "x.npy", mmap_mode="r")):
        for rows, (index, taken) in zip(asked, feed.batches(source, asked, torch.device("cpu")), strict=True):
            assert taken.dtype == torch.float32 and index.tolist() == rows.tolist()
            assert np.allclose(taken.numpy(), images[rows] / np.iinfo(dtype).max)


def test_reading_ahead_ends_with_the_caller():
    """One part is read while the one before is worked with, never more; and no thread is left behind."""
    asked, threads = [], threading.active_count()

    def parts():
        for number in range(5):
            asked.append(number)
            yield np.array([number])
    reading = feed.batches(pictures().images, parts(), torch.device("cpu"))
    for number in (0, 1):
        assert next(reading)[0].tolist() == [number] and asked == [*range(number + 2)]
    reading.close()
    assert asked == [0, 1, 2] and threading.active_count() == threads


def test_targets_reach_the_views():
    class Labelled(Reconstruct):
        def views(self, images, labels, groups, masks):
            assert masks is None and torch.equal(groups, labels // 2)
            assert torch.allclose(images.mean((1, 2, 3)) * 255, 10.0 * labels)              # each image has its own
            return (images,)
    dataset = pictures()
    dataset.labels = np.arange(24)
    dataset.images[:] = 10 * dataset.labels.reshape(-1, 1, 1, 1)
    run(Labelled(Plain()), config(), dataset)


class Explodes(Reconstruct):
    def forward(self, x):
        return {"loss": super().forward(x)["loss"] * (math.inf if self.steps == 2 else 1.0)}


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"not finite since step 3.*last good checkpoint"):
        run(Explodes(Plain()), config(tmp_path, save_every=1, log_every=100))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_rates_of_groups_and_schedule():
    method = Reconstruct(Plain())
    conv, before = method.encoder.conv, copy.deepcopy(method.encoder.conv)
    records = run(method, config(warmup=1), groups=[
        {"params": [conv.weight], "lr_scale": 0.0, "decays": True, "weight_decay": 0.0},
        {"params": [conv.bias], "lr_scale": 1.0, "decays": False, "weight_decay": 0.0}])
    assert torch.equal(before.weight, conv.weight) and (before.bias - conv.bias).abs().max() > 1e-6
    assert [record["lr"] for record in records] == [0, pytest.approx(0.05), pytest.approx(0.025)]


def test_compile_changes_no_saved_key(tmp_path, monkeypatch):
    compiled = torch.compile
    # the tracing without the C++ compiler
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="eager"))
    plain, traced = make("rotation"), make("rotation")
    run(plain, config(tmp_path / "a", steps=1))
    run(traced, config(tmp_path / "b", steps=1, compile=True))
    a, b = (torch.load(tmp_path / x / "checkpoint.pt", weights_only=True)["method"] for x in "ab")
    assert a.keys() == b.keys() and all(torch.allclose(a[k].float(), b[k].float(), atol=1e-4) for k in a)
    assert torch.load(tmp_path / "b/encoder.pt", weights_only=True).keys() == plain.encoder.state_dict().keys()


def test_numbers_come_back_in_a_type_that_the_device_has(monkeypatch):
    """Apple's GPU has no float64."""
    asked = []
    monkeypatch.setattr(torch, "as_tensor", lambda value, dtype, device: asked.append(dtype) or torch.tensor(3.0))
    for device in ("mps", "cpu"):
        assert loop.to_floats({"step": 3}, 1, torch.device(device)) == {"step": 3}
    assert asked == [torch.float32, torch.float64]


def test_an_encoder_that_is_kept_is_there_before_its_checkpoint(tmp_path, monkeypatch):
    """Killed between the two, the resumed run would not come by that step again."""
    written, whole = [], files.whole
    monkeypatch.setattr(files, "whole", lambda path: written.append(Path(path).name) or whole(path))
    run(Reconstruct(Plain()), config(tmp_path, save_every=1, keep_every=1))
    assert written.index("encoder-1.pt") < written.index("checkpoint.pt")


def test_of_a_damaged_log_the_whole_lines_are_read(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0{"step": 2}\n\xff}\n{"loss": 3}\n[]\n{"step": 4}\n{"step": 5, "lo')
    assert files.read_log(path) == [{"step": 1}, {"step": 4}]


def test_no_row_is_nothing_to_learn_from():
    with pytest.raises(ValueError, match="no image"):
        run(Reconstruct(Plain()), config(), rows=[])


class Still(Reconstruct):
    """No gradient: only the decay moves the weights."""

    def forward(self, x):
        return {"loss": 0 * super().forward(x)["loss"]}


def test_decay_runs_to_its_end_and_spares_biases():
    method = Still(Plain())
    conv, before = method.encoder.conv, copy.deepcopy(method.encoder.conv)
    records = run(method, config(lr=0.1, options={"momentum": 0.0}, weight_decay=0.1, weight_decay_end=0.5))
    factor = np.prod([1 - record["lr"] * optim.cosine(i / 3, 0.1, 0.5) for i, record in enumerate(records)])
    assert torch.equal(conv.bias, before.bias) and torch.allclose(conv.weight, factor * before.weight, atol=1e-6)


def test_clipping_under_half_precision_is_that_of_full_precision():
    for amp in ("off", "fp16"):
        torch.manual_seed(0)
        method = Reconstruct(Plain())
        before = copy.deepcopy(method.encoder.conv)
        run(method, config(clip=1e-4, amp=amp, options={"momentum": 0.0}, lr=1.0))
        moved = [(new - old).norm().item() for new, old in zip(method.encoder.parameters(), before.parameters())]
        assert math.hypot(*moved) == pytest.approx(1e-4 * (1 + 0.75 + 0.25), rel=0.05)      # of rates 1, 0.75, 0.25


def test_the_scaler_is_resumed(tmp_path):
    run(without_norm(), config(tmp_path, amp="fp16"))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["scaler"]["scale"] = 1024.0
    torch.save(state, tmp_path / "checkpoint.pt")
    run(without_norm(), config(tmp_path, amp="fp16", steps=4, resume=True))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["scaler"]["scale"] == 1024


def test_the_exported_encoder_is_saved(tmp_path):
    method = make("byol")
    method.export = "target"
    run(method, config(tmp_path, keep_every=3))
    for name in ("encoder.pt", "encoder-3.pt"):
        saved = torch.load(tmp_path / name, weights_only=True)["conv1.weight"]
        assert torch.equal(saved, method.target_encoder.conv1.weight)
        assert (saved - method.encoder.conv1.weight).abs().max() > 1e-4


@pytest.mark.parametrize("accum", [1, 3])
def test_each_step_takes_its_own_gradient_in_training_mode(accum):
    """Plain gradient descent by hand, with a method that is handed over in evaluation mode; parts of a batch are
    averaged."""
    class Notes(Reconstruct):
        def views(self, images):
            self.seen.append(images.clone())
            return (images,)

        def forward(self, x):
            assert self.training and self.encoder.training
            return super().forward(x)
    method = Notes(Plain()).eval()
    other = copy.deepcopy(method.encoder)
    records = run(method, config(options={"momentum": 0.0}, lr=1.0, accum=accum))
    for step, record in enumerate(records):
        x = torch.cat(method.seen[accum * step:accum * (step + 1)])         # (12, 1, 64, 64)
        loss = (other(x).mean(1) - x.mean((1, 2, 3))).square().mean()
        for p, gradient in zip(other.parameters(), torch.autograd.grad(loss, list(other.parameters()))):
            p.data -= record["lr"] * gradient
    torch.testing.assert_close(method.encoder.state_dict(), other.state_dict())


def test_views_are_drawn_from_the_seed_step_and_part():
    drawn = []

    class Draws(Reconstruct):
        def views(self, images):
            drawn.append(torch.rand(()).item())
            return (images,)
    for seed in (0, 1):
        run(Draws(Plain()), config(seed=seed, accum=2))
    assert len(drawn) == len(set(drawn)) == 12
