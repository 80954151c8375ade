"""Time per step and peak memory of the encoder, forward and backward, three times over:

  dense     the network without masks, on whole images
  ours      make_sparse: the same dense layers, a product after each, BatchNorm by arithmetic
  gather    the reference of test_spark.py: boolean indexing, BatchNorm1d on the rows, scatter

    python -m tools.benchmark_spark --encoders resnet18 resnet50 --sizes 128 224 --batch 32
    python -m tools.benchmark_spark --batch 8 --rounds 3 --cpu-time         a CPU that has other work, in some minutes
    python -m tools.benchmark_spark --compile         one more row, `compiled`: ours through torch.compile

Runs on the GPU if there is one (then also with bfloat16), else on the CPU. The variants take turns, so that whatever
else the machine does strikes all of them; the time is the median and the ratio is the median of the rounds' ratios.
Memory: on a GPU the most that tensors took, on a CPU what a fresh process grew by. The decoder is left out: it is the
same in all of them, and would only hide the difference.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import time

import torch

from medssl.common import encoders
from medssl.spark import Mask, make_sparse
from tests.test_spark import gather_and_scatter, pixels


def build(variant, name, size, batch, device):
    """A function that does one step of this variant. 40 % of the cells are visible, and hidden pixels are zero."""
    torch.manual_seed(0)
    encoder, cells = encoders.build(name).to(device), size // 32
    active = (torch.rand(batch, cells ** 2).argsort(1) < round(0.4 * cells ** 2)).view(-1, 1, cells, cells).to(device)
    x = torch.rand(batch, 1, size, size, device=device)
    features = encoder.features
    if variant == "gather":
        gather_and_scatter(encoder, active)
    elif variant != "dense":
        mask = Mask()
        make_sparse(encoder, mask)
        mask.active = active
    if variant != "dense":
        x = x * pixels(active, x)
    if variant == "compiled":
        features = torch.compile(features)

    def step(autocast):
        encoder.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = sum(m.float().square().mean() for m in features(x))
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
    return step


def cpu_memory(arguments, autocast, result):
    """Run in a process of its own: by how many MiB did two steps raise the most that it ever held?"""
    step = build(*arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(autocast), step(autocast)
    result.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def memory(arguments, autocast):
    if arguments[-1] == "cuda":
        step = build(*arguments)
        torch.cuda.reset_peak_memory_stats()
        step(autocast), step(autocast)
        return torch.cuda.max_memory_allocated() / 2 ** 20
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=cpu_memory, args=(arguments, autocast, result))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{arguments[0]} ended with status {process.exitcode}")
    return result.get()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", default=["resnet18", "resnet50"], choices=list(encoders.ENCODERS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 224])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, not the clock's: for a busy machine")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    variants = ["dense", "ours", "gather"] + ["compiled"] * args.compile
    rows = [(name, size, autocast) for name in args.encoders for size in args.sizes
            for autocast in ([False, True] if args.device == "cuda" else [False])]
    # memory first: a child process inherits the peak of its parent, which is still small now
    space = {(v, *row): memory((v, *row[:2], args.batch, args.device), row[2]) for row in rows for v in variants}
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    where = torch.cuda.get_device_name() if args.device == "cuda" else threads
    print(f"torch {torch.__version__}, {args.device} ({where}), batch {args.batch}, median of {args.rounds} rounds, "
          f"{'processor' if args.cpu_time else 'wall-clock'} time\n")
    print("| encoder | size | type | variant | ms per step | times dense | MiB | times dense |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        name, size, autocast = row
        steps = {v: build(v, name, size, args.batch, args.device) for v in variants}
        seconds = {v: [] for v in variants}
        for turn in range(args.rounds + 2):                                 # the first two warm up
            for v in variants:
                start = clock()
                steps[v](autocast)
                if turn > 1:
                    seconds[v].append(clock() - start)
        for v in variants:
            ratio = statistics.median(a / b for a, b in zip(seconds[v], seconds["dense"]))
            mib, dense = space[(v, *row)], space[("dense", *row)]
            print(f"| {name} | {size} | {'bf16' if autocast else 'fp32'} | {v} "
                  f"| {1e3 * statistics.median(seconds[v]):.0f} | {ratio:.2f} "
                  f"| {mib:.0f} | {mib / dense:.2f} |", flush=True)


if __name__ == "__main__":
    main()
