"""The scripts beside the package: intervals over seeds by hand, and one script in little from its first command on."""

import csv
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import train
from medssl import METHODS
from tests.common import batch

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import byol_segmentation  # noqa: E402
import collect  # noqa: E402
import commands  # noqa: E402
import does_it_help  # noqa: E402
import every_method  # noqa: E402
import medmoco  # noqa: E402
import over_seeds  # noqa: E402
import pretext  # noqa: E402
import small_sets  # noqa: E402
import spark_contrastive  # noqa: E402


def write(path, scores):
    """results.csv with two read-out seeds, 0.01 on either side of each score."""
    with open(path, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["model", *over_seeds.CELL, "seed", "train_images", "train_patients", "metric", "value"])
        for row, score in scores.items():
            for seed in (0, 1):
                for metric, value in (("balanced_accuracy", score + 0.02 * seed - 0.01), ("auc", 0.9)):
                    lines.writerow([row, "knn", "1.0", "", "", "", seed, 10, 5, metric, value])


def test_over_seeds_by_hand(tmp_path, capsys):
    """Three files: t with two degrees of freedom is 4.3027 (95 %) and 9.9248 (99 %)."""
    for freedom, level, t in ((1, 0.99, 63.657), (2, 0.95, 4.3027), (4, 0.99, 4.6041), (30, 0.95, 2.0423)):
        assert over_seeds.t_quantile(freedom, level) == pytest.approx(t, rel=1e-4)
    paths = [tmp_path / f"{i}.csv" for i in range(3)]
    for path, a, b in zip(paths, (0.5, 0.6, 0.4), (0.6, 0.72, 0.53)):       # gains .10 .12 .13
        write(path, {"random": a, "medmoco": b})
    over_seeds.main([*map(str, paths), "--chart", str(tmp_path / "chart.png")])
    table = [[word.strip() for word in line.split("|")[1:-1]] for line in capsys.readouterr().out.split("\n")
             if "knn" in line]
    half = 4.3027 * 0.1 / 3 ** 0.5
    assert table[0][:5] == ["knn balanced accuracy, labels 1.0", "random", "3", "0.500",
                            f"[{0.5 - half:.3f}, {0.5 + half:.3f}]"] and table[0][5:] == [""] * 3
    mean, error = 0.35 / 3, (((0.1 - 0.35 / 3) ** 2 + (0.12 - 0.35 / 3) ** 2 + (0.13 - 0.35 / 3) ** 2) / 2 / 3) ** 0.5
    assert table[1][5:] == [f"{mean:+.3f}"] + [f"[{mean - t * error:+.3f}, {mean + t * error:+.3f}]"
                                               for t in (4.3027, 9.9248)]
    assert (tmp_path / "chart.png").is_file()


def test_several_sets_in_one_table(tmp_path):
    for deal, (before, after) in enumerate([(0.5, 0.6), (0.4, 0.54)]):
        folder = tmp_path / f"x/seed{deal}/results/frozen"
        folder.mkdir(parents=True)
        write(folder / "results.csv", {"random": before, "medmoco": after})
    collect.main([f"cells={tmp_path / 'x'}", "--out", str(tmp_path / "out"), "--tasks", "knn"])
    lines = (tmp_path / "out/scores.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[-1] == "cells,1,knn,1.0,,,,balanced_accuracy,medmoco,0.5400"
    assert (tmp_path / "out/gains.png").is_file()


def test_a_work_in_little(tmp_path, monkeypatch, capsys):
    """One step of each command, here in this process; a second time, everything is there already."""
    for folder, pictures in (("images", batch(24, 1, 32)), ("masks", batch(24, 1, 32) > 0.5)):
        (tmp_path / "set" / folder).mkdir(parents=True)
        for i, picture in enumerate(pictures.numpy()[:, 0]):
            Image.fromarray((picture * (200 if folder == "images" else 1)).astype(np.uint8)).save(
                tmp_path / f"set/{folder}/{i}.png")
    monkeypatch.setenv("MEDSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(commands.subprocess, "run", lambda words, check: {
        "train.py": train.main, "evaluate.py": evaluate.main}[Path(words[1]).name](words[2:]))
    words = ["--data", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--seeds", "1", "--steps", "1",
             "--train=--size 32 --batch 4 --encoder tiny --device cpu",
             "--evaluate=--seeds 1 --batch 4 --device cpu --task collapse"]
    pretrain = {name: medmoco.PRETRAIN[name] for name in ("moco", "medmoco-generic", "no-regions")}
    rows = {"masks": (["{generic}", *pretrain, "{runs}/moco/encoder*.pt"], medmoco.EVALUATE["masks"][1])}
    said = []
    for more in (["--list"], [], []):
        commands.main(medmoco.__doc__, pretrain, rows, argv=words + more)
        said.append(capsys.readouterr().out)
    assert said[0].count("python train.py") == 2 and "{generic}" not in said[0]
    assert said[1].count("+ python train.py") == 2 and said[1].count("+ python evaluate.py") == 1
    assert said[2].count("done already") == 3 and (tmp_path / "out/seed0/results/masks/results.csv").is_file()


def test_every_work_lists_commands_that_parse(capsys):
    """Each script's flags are flags of train.py and evaluate.py, and methods that are there."""
    for work in (pretext, small_sets, byol_segmentation, spark_contrastive, medmoco, does_it_help, every_method):
        for each in (work.EVALUATE, getattr(work, "MASKS", {})):
            commands.main(work.__doc__, work.PRETRAIN, each, argv=["--data", "X", "--out", "O", "--list", "--generic",
                                                                    "G.pth", "--seeds", "1"])
        for line in capsys.readouterr().out.split("\n"):
            words = shlex.split(line)
            if words[:2] == ["python", "train.py"]:
                assert words[words.index("--method") + 1] in METHODS
            elif words[:2] == ["python", "evaluate.py"]:
                assert evaluate.parse(words[2:]).data == "X"
