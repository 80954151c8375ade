"""THE loop: it trains every method, pretraining and read-outs alike, and never learns a method's name.

One step: draw the batch, make the views, forward and backward (`accum` times), optimiser step, then the method's own
after_step. The order of images and the views depend on (seed, step, part) alone, so that any step can be computed again
and a resumed run is the uninterrupted one. `fit` is a generator: it yields one dict per step, so callers score, plot or
stop without callbacks. The device is waited for on logging steps and before saving, nowhere else.
"""

import os
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from . import encoders, files, optim
from .cli import StopSignal
from .errors import UserError
from .feed import batch_order, batches, make_views, mix

LARGEST = 2 ** 16                                   # images in a batch
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Config:
    """How to train. `lr` is the rate that is applied; `warmup` and the three `_every` are counted in steps."""
    steps: int
    batch: int
    lr: float
    optimizer: str = "sgd"
    options: dict = field(default_factory=dict)     # further keywords of the optimiser
    weight_decay: float = 0.0
    weight_decay_end: float | None = None           # cosine from weight_decay to this
    warmup: int = 0
    accum: int = 1                                  # micro-batches per step and process
    clip: float | None = None                       # largest global gradient norm
    amp: str = "off"                                # off, bf16, fp16
    compile: bool = False
    sync_bn: bool = False
    seed: int = 0
    device: str = "auto"
    out: str | None = None                          # folder for log and checkpoints; None writes nothing
    resume: bool = False
    save_every: int = 500
    keep_every: int | None = None                   # also keep encoder-STEP.pt
    log_every: int = 10


def fit(method, dataset, config, rows=None, weights=None, groups=None):
    """Train `method` on dataset.images[rows]. On one device, without what is said to the outside, it is this:

        for step in range(config.steps):
            set_rates(optimizer, config, step)
            index = rows[batch_order(len(rows), config.batch, step, config.seed)]
            torch.manual_seed(mix(config.seed, step, 0))
            out = method(*make_views(method, batch(dataset.images, index, device), dataset, index))
            out["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            method.after_step([out], (step + 1) / config.steps)

    weights: how often each row is drawn; groups: the optimiser's groups. Yields the step's record: "step", "lr" and the
    scalars of the method's outputs. They stay tensors on the device, except on logging steps, where they are floats,
    "images_per_s" is there, and what the caller adds to the record before it asks for the next one goes into log.jsonl
    as well. Checkpoints are written after the yield. It is one piece, so that a step can be read from top to bottom."""
    rank, world, device = processes(config.device)
    parts = count_parts(config.batch, config.accum, world)
    rows = np.arange(len(dataset.images)) if rows is None else np.asarray(rows)
    if not len(rows):
        raise UserError(f"{dataset.name}: no image to learn from")
    method.to(device, memory_format=torch.channels_last).train()            # CPU convolutions: 1.2 to 1.6 times faster
    groups = groups or optim.parameter_groups(method, config.weight_decay)
    optimizer = optim.build(config.optimizer, groups, config.lr, config.options)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    start = restore(config, method, optimizer, scaler, rank) if config.resume else 0
    log = files.Log(Path(config.out) / "log.jsonl" if config.out and rank == 0 else None, start)
    model, call = parallel(method, config, world)
    dtype = AMP[config.amp]
    first_bad = torch.full((), -1, device=device)                   # the first step with a loss that is not finite

    def shares():                                                   # of this rank, of each micro-batch to come
        for step in range(start, config.steps):
            order = batch_order(len(rows), config.batch, step, config.seed, weights)
            for micro in range(config.accum):
                yield rows[order[micro * world + rank::parts]]

    with closing(batches(dataset.images, shares(), device)) as feed, StopSignal() as stop:
        for step in range(start, config.steps):
            lr = set_rates(optimizer, config, step)
            outs = []
            for micro in range(config.accum):
                index, pictures = next(feed)
                torch.manual_seed(mix(config.seed, step, micro * world + rank))
                views = make_views(method, pictures, dataset, index)
                if world > 1:                                       # gradients travel once a step, with the last part
                    model.require_backward_grad_sync = micro + 1 == config.accum
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    out = call(*views)
                scaler.scale(out["loss"] / config.accum).backward()
                outs.append({k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in out.items()})
                first_bad = torch.where((first_bad < 0) & ~outs[-1]["loss"].isfinite(), step, first_bad)
            if config.clip:
                scaler.unscale_(optimizer)
                all_weights = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(all_weights, config.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            method.after_step(outs, (step + 1) / config.steps)      # slow copies average new weights, queues were read

            record = {"step": step + 1, "lr": lr, **mean_scalars(outs)}
            logging = (step + 1) % config.log_every == 0 or step + 1 == config.steps
            last = step + 1 == config.steps or stop.seen(world, device, logging)
            if logging:
                record = to_floats(record, world, device)
                stop_at(first_bad, config)
                record["images_per_s"] = log.rate(step + 1, config.batch)
            yield record
            if logging:
                log.write(record)
            if config.keep_every and (step + 1) % config.keep_every == 0 and config.out and rank == 0:
                encoders.save(encoders.exported(method), Path(config.out) / f"encoder-{step + 1}.pt")
            if last or (step + 1) % config.save_every == 0:
                stop_at(first_bad, config)
                save_run(config, step + 1, method, optimizer, scaler, rank)
            if last:
                return


def count_parts(batch, accum, world):
    """How many parts a batch is cut into: micro-batches times processes."""
    parts = accum * world
    if batch % parts:
        raise UserError(f"--batch {batch} must divide by --accum {accum} x {world} processes")
    if not 2 * parts <= batch <= LARGEST:
        raise UserError(f"--batch {batch}: from {2 * parts} (BatchNorm and contrasts take two images at least"
                        f"{f' in each of {parts} parts' if parts > 1 else ''}) to {LARGEST}")
    return parts


def parallel(method, config, world):
    """The method as several processes train it, and that as it is called."""
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(method) if config.sync_bn and world > 1 else method
    if world > 1:                                           # statistics stay each rank's own; rank 0's are saved
        model = DistributedDataParallel(model, broadcast_buffers=False)
    return model, torch.compile(model) if config.compile else model


def set_rates(optimizer, config, step):
    """Learning rate and weight decay of this step, by group. Returns the rate."""
    decay = config.weight_decay
    if config.weight_decay_end is not None:
        decay = optim.cosine(step / config.steps, config.weight_decay, config.weight_decay_end)
    lr = optim.lr_at(step, config.steps, config.warmup, config.lr)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = decay if group["decays"] else 0.0
    return lr


def processes(name):
    """Rank, number of processes and device; joins the group when torchrun started us."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return (dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else (0, 1, device)


def mean_scalars(outs):
    """Scalars of the step's parts, averaged; they stay on the device."""
    names = [k for k, v in outs[0].items() if not isinstance(v, torch.Tensor) or v.ndim == 0]
    return {k: sum(out[k] for out in outs) / len(outs) for k in names}


def to_floats(record, world, device):
    kind = torch.float32 if device.type == "mps" else torch.float64         # Apple's GPU has no float64
    values = torch.stack([torch.as_tensor(v, dtype=kind, device=device) for v in record.values()])
    if world > 1:
        dist.all_reduce(values)
    return dict(zip(record, (values / world).tolist(), strict=True)) | {"step": record["step"]}


def stop_at(first_bad, config):
    if (step := first_bad.item()) >= 0:
        kept = config.out and (Path(config.out) / "checkpoint.pt").exists()
        raise UserError(f"the loss is not finite since step {step + 1}: try a smaller --lr, --clip 1 or --amp bf16"
                        + (f"; the last good checkpoint is in {config.out}" if kept else ""))


def save_run(config, step, method, optimizer, scaler, rank):
    """checkpoint.pt holds everything a resumed run needs; encoder.pt what other programs want."""
    if not config.out or rank:
        return
    if not torch.stack([p.isfinite().all() for p in method.parameters()]).all():
        raise UserError(f"weights are not finite at step {step}: nothing was saved over the last good checkpoint")
    files.save_torch(Path(config.out) / "checkpoint.pt", {
        "step": step, "method": method.state_dict(), "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict()})
    encoders.save(encoders.exported(method), Path(config.out) / "encoder.pt")


def restore(config, method, optimizer, scaler, rank):
    """Everything as the checkpoint has it. Where a run was killed between its two files, encoder.pt is that of another
    step: it is written anew."""
    path = Path(config.out) / "checkpoint.pt"
    state = files.load_torch(path)
    try:
        method.load_state_dict(state["method"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    except (RuntimeError, ValueError, KeyError):
        raise UserError(f"{path}: belongs to another method, encoder or optimiser than this run's, or to an earlier "
                        "version of the program") from None
    if rank == 0:
        encoders.save(encoders.exported(method), path.with_name("encoder.pt"))
    return state["step"]
