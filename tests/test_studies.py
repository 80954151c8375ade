"""The studies as a program: which commands they run, that nothing is done twice, that what was stopped goes on, and
what they conclude."""

import inspect
import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train
from medssl import METHODS
from medssl.common import cli, files, settings
from medssl.common.errors import UserError
from medssl.common.evaluation import commands, findings, plan, protocols, studies
from medssl.common.evaluation.claims import CLAIMS, Effect, Evaluation, Given, Protocol, Run
from medssl.common.evaluation.protocols import STUDIES
from medssl.common.evaluation.study import Settings
from tests.common import batch

SCORES = ["balanced_accuracy", "dice", "epochs_to_95", "epochs_to_95_of_random", "recall a", "recall b", "recall c"]
SPEEDS = {"medmoco": 100, "spark": 10}                                      # images/s of the made-up runs; others: 50


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A set of 24 gray pictures, three classes, a block as mask, 12 patients."""
    root = tmp_path_factory.mktemp("set")
    lines = ["file,label,mask,split,group"]
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for i, picture in enumerate(batch(24, 1, 32).numpy()[:, 0]):
        mask = np.zeros((32, 32), np.uint8)
        mask[8:20, 4:16] = 1
        Image.fromarray((picture * 60 + 40 * (i % 3) + 60 * mask).astype(np.uint8)).save(root / f"images/{i}.png")
        Image.fromarray(mask).save(root / f"masks/{i}.png")
        patient = i // 3
        split = {3: "val", 1: "test"}.get(patient % 4, "train")
        lines.append(f"images/{i}.png,{'abc'[i % 3]},masks/{i}.png,{split},p{patient}")
    (root / "split.csv").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSSL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield root


class Ended:
    """A process that has done its work before anybody looks."""

    def __init__(self, returncode=0):
        self.returncode = returncode

    def poll(self):
        return self.returncode

    def terminate(self):
        pass

    def wait(self):
        pass


class Stage:
    """Stands in for start(): notes each command, and leaves what train.py or evaluate.py would leave."""

    def __init__(self):
        self.started, self.stop_at, self.fail_at = [], None, ()

    def __call__(self, words, log, lock):
        name = words[words.index("--out") + 1].split("/")[-1]
        self.started.append(words)
        if name in self.fail_at:
            log.parent.mkdir(exist_ok=True)
            log.write_text("a bar 1/3\rtrain.py: out of luck\n")
            return Ended(2)
        if words[0] == "evaluate.py":
            read_out(words)
        elif name == self.stop_at:
            trained(words, 0.5)
            raise KeyboardInterrupt
        else:
            trained(words)
        return Ended()

    def names(self, script):
        return [words[words.index("--out") + 1].split("/")[-1] for words in self.started
                if words[0] == script and "pace" not in words[words.index("--out") + 1].split("/")]


@pytest.fixture
def stage(monkeypatch):
    stage = Stage()
    monkeypatch.setattr(commands, "start", stage)
    monkeypatch.setattr(commands, "PAUSE", 0)
    monkeypatch.setattr(findings, "draw", lambda found, title: ["chart.png"])                   # see the last test
    return stage


def trained(words, share=1.0):
    """A run's folder."""
    if "--resume" in words:
        args = train.parse(words[1:])
        config = files.read_config(args.out)["arguments"]
        out, steps, size, method = args.out, config["steps"], 64, config["method"]
    else:
        args = train.parse(words[1:])
        out, steps, size, method = args.out, args.steps, args.size, args.method
    folder = studies.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {"batch": 64, "steps": steps, "method": method}
    (folder / "config.json").write_text(json.dumps({"arguments": arguments, "data": {"size": size}}))
    rate, every = SPEEDS.get(method, 50), 10 if "--resume" in words else args.log_every
    done = int(steps * share)
    logged = [step for step in range(1, done + 1) if step % every == 0 or step == steps]
    lines = [{"step": step, "images_per_s": rate / (1 + i % 2)} for i, step in enumerate(logged)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.save({"step": done}, folder / "checkpoint.pt")


def read_out(words, worth=None):
    """A folder of results. worth(model, cell, metric): what a model scores there; the seed of the read-out adds .1."""
    args = evaluate.parse(words[1:])
    chosen = evaluate.chosen(Settings, args)
    models = ["random", "random, normalised", *(name_of(path) for path in args.runs)]
    fits = []
    for task in args.task:
        for cell in plan.cells_of(chosen, task):
            for model in models:
                names = ["rank_me"] if task == "collapse" else SCORES
                trains = task in ("finetune", "unet", "segment")
                if model == "random, normalised" and task in ("finetune", "unet"):
                    continue
                for seed in range(chosen.seeds):
                    scores = {metric: (worth or plain)(model, cell, metric) + 0.1 * seed for metric in names}
                    fits.append({"model": model, "seed": seed, **cell._asdict(), "scores": scores,
                                 "curve": [[0, 0.1], [1, 0.2]] if trains else None})
    folder = studies.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"stopped": False, "fits": fits}))


def name_of(path):
    path = studies.Path(path)
    return f"{path.parent.name}@{path.stem[8:]}" if path.stem.startswith("encoder-") else path.stem


def plain(model, cell, metric):
    """Random weights .2 (normalised .3), a run .5 and a hundredth more for each seed of pretraining."""
    if model.startswith("random"):
        return 0.3 if "," in model else 0.2
    return 0.5 + 0.01 * int(model.split("@")[0].rpartition("-")[2])


def run(*words):
    studies.main([str(word) for word in words])


def given_of(labels=True, masks=True):
    return Given("set", 3, labels, masks, 64, 1, ratios=(1, 3, 10), rare="a", per_epoch=4, weights="net.pth",
                 known_as="net", network="--encoder resnet18 --stem default", removed="set-removed")


# ---- the protocols

def test_the_list_names_every_study_and_every_claim(capsys):
    run()
    said = capsys.readouterr().out
    for name, protocol in STUDIES.items():
        assert f"{name}: {protocol.line}" in said
    assert {claim for protocol in STUDIES.values() for claim in protocol.claims} == set(CLAIMS) == set(range(1, 21))
    for text in CLAIMS.values():
        assert text in said


def test_rows_differ_as_the_works_have_them():
    def rows(name):
        return {each.row: each.words for each in STUDIES[name].commands(given_of()) if isinstance(each, Run)}

    def read(name):
        return [each for each in STUDIES[name].commands(given_of()) if isinstance(each, Evaluation)]
    rubik, apart = rows("rubik"), "--set gap=0.2 jitter=0.1"
    assert rubik == {"shallow": apart, "deep": f"{apart} deep_heads=True", "edges": "--set gap=0.0 jitter=0.0",
                     "plus": f"{apart} mask=True"}
    assert rows("pcrl") == {"here": "", "released": "--set hidden=128", "unpainted": "--set paint=0.0",
                            "plain": "--set decoder.skips=False"}
    assert set(rows("labels")) >= {"spark", "moco", "swav", "byol"}
    assert all(len(each.series["labels"]) >= 5 for each in read("labels"))
    assert {task for each in read("collapse") for task in each.tasks} >= {"segment", "unet", "collapse"}
    assert all(each.kept for each in STUDIES["domain_epochs"].commands(given_of())
               if isinstance(each, Run) and each.row == "domain")
    assert {(each.row, each.data) for each in STUDIES["duplicates"].commands(given_of()) if isinstance(each, Run)} == {
        (f"{name}_{kind}", path) for name in ("simclr", "swav", "spark")
        for kind, path in (("kept", "set"), ("removed", "set-removed"))}


@pytest.mark.parametrize("name", STUDIES)
def test_all_words_of_a_study_are_known_to_the_scripts(name, tmp_path):
    for kinds in ((True, True), (True, False), (False, True)):
        given = given_of(*kinds)
        if not all(getattr(given, need, True) for need in STUDIES[name].needs):
            continue
        asked = list(STUDIES[name].commands(given))
        lengths = {"steps": {each.name: 60 for each in asked if isinstance(each, Run)}, "read": 7, "reading": 1.0}
        lengths["seconds"] = dict.fromkeys(lengths["steps"], 1.0)
        names = [each.name for each in asked]
        assert len(names) == len(set(names)), "two commands would share a folder"
        for command in studies.named(given, asked, lengths, "histology", tmp_path):
            if command.words[0] == "train.py":
                check_run(train.parse(command.words[1:]))
            else:
                args = evaluate.parse(command.words[1:])
                evaluate.check_flags(args, {evaluate.TASKS[task].target for task in args.task}, [False])
            assert set(command.after) <= set(names)


def check_run(args):
    settings.parts_of(METHODS, [args.method], args.set, args.views)
    words = set(inspect.signature(METHODS[args.method]).parameters)
    assert set(cli.read_settings(args.set)) - {"decoder.skips"} <= words


def rubik_logs(folder, **accuracies):
    """What the runs of Rubik's study wrote last."""
    for row in ("shallow", "deep", "edges"):
        for seed in range(3):
            run = folder / "runs" / f"{row}-{seed}"
            run.mkdir(parents=True)
            record = {"step": 1, "order_accuracy": 0.5, "vertical_accuracy": 0.9, **accuracies}
            (run / "log.jsonl").write_text(json.dumps(record) + "\n")


@pytest.mark.parametrize("name", STUDIES)
def test_effects_speak_of_what_was_read_out(name, tmp_path):
    """With a number for every fit, every effect has one, and the claims of the study are those of its effects."""
    given = given_of()
    asked = list(STUDIES[name].commands(given))
    lengths = {"steps": {each.name: 60 for each in asked if isinstance(each, Run)}, "read": 7, "reading": 1.0}
    lengths["seconds"] = dict.fromkeys(lengths["steps"], 1.0)
    for command in studies.named(given, asked, lengths, None, tmp_path):
        if command.words[0] == "evaluate.py":
            read_out(command.words, lambda model, *rest: plain(model if "net" not in model else "net-0", *rest))
    rubik_logs(tmp_path, horizontal_accuracy=0.8)
    found = findings.Found(given, [each for each in asked if isinstance(each, Evaluation)], tmp_path)
    effects = list(STUDIES[name].effects(found))
    assert effects and {effect.claim for effect in effects} - {None} == set(STUDIES[name].claims)
    for effect in effects:
        assert effect.values.shape == (3,) and np.isfinite(effect.values).all(), effect.words


def test_heads_that_learnt_nothing_say_nothing(tmp_path):
    """Two of three tiles are not turned: an accuracy of .67 is chance, of shallow heads and of deep ones."""
    rubik_logs(tmp_path, horizontal_accuracy=0.68)
    claims = {effect.words.split(":")[0]: effect.claim
              for effect in protocols.rubik_effects(findings.Found(given_of(), [], tmp_path)) if "deep" in effect.words}
    assert claims == {"horizontal accuracy": None, "vertical accuracy": 4, "order accuracy": None}


def test_the_slope_is_what_a_halving_costs():
    scores = [[0.9 + 0.02 * np.log2(float(share))] for share in protocols.SHARES]
    assert protocols.slope(scores) == pytest.approx([0.02])


# ---- what is run, and when

def test_everything_runs_once_and_after_what_it_needs(stage, home, tmp_path, capsys):
    out = tmp_path / "out"
    run("collapse", "--data", home, "--budget", 5, "--out", out)
    rows = ("neither", "local", "decorrelation", "both")
    assert stage.names("train.py") == [f"{row}-{seed}" for row in rows for seed in range(3)]
    assert stage.names("evaluate.py") == [row + part for part in ("", "-trained") for row in rows]
    said = capsys.readouterr().out
    assert "12 runs of pretraining, 3 of each" in said and "claim 17" in said and "minutes" in said
    assert said.index("12 runs of pretraining") < said.index(f"--out {out}/runs/neither-0")
    before, table = len(stage.started), (out / "table.md").read_text()
    run("collapse", "--data", home, "--budget", 5, "--jobs", 2, "--out", out)
    assert len(stage.started) == before and (out / "table.md").read_text() == table
    assert (out / "verdicts.json").is_file()


def test_a_stopped_run_goes_on_and_the_others_are_left_alone(stage, home, tmp_path, capsys):
    out, words = tmp_path / "out", ("collapse", "--data", home, "--budget", 5, "--seeds", 2, "--out", tmp_path / "out")
    stage.stop_at = "local-1"
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    assert stage.names("train.py")[-1] == "local-1" and not stage.names("evaluate.py")
    stage.stop_at, stage.started = None, []
    capsys.readouterr()
    run(*words)
    assert "3 of 16 are done already; 13 wait, about" in capsys.readouterr().out
    assert stage.started[0] == ["train.py", "--resume", "--out", str(out / "runs/local-1")]
    assert stage.names("train.py") == ["local-1", "decorrelation-0", "decorrelation-1", "both-0", "both-1"]


def test_a_run_whose_last_checkpoint_is_missing_is_not_done(tmp_path):
    words = ["train.py", "--steps", "10", "--out", str(tmp_path / "a")]
    command = commands.Command("a", words, tmp_path / "a", 10)
    assert not command.done() and command.now() == words
    trained(words)
    assert command.done()
    torch.save({"step": 9}, tmp_path / "a/checkpoint.pt")                   # killed after the log's last line
    assert not command.done() and "--resume" in command.now()


def test_a_stopped_evaluation_is_not_done(tmp_path):
    command = commands.Command("a", ["evaluate.py"], tmp_path)
    assert not command.done()
    (tmp_path / "results.json").write_text('{"stopped": true}')
    assert not command.done()
    (tmp_path / "results.json").write_text('{"stopped": false}')
    assert command.done()


def test_a_failed_run_takes_only_what_needs_it_along(stage, home, tmp_path, capsys):
    stage.fail_at = ("both-1",)
    with pytest.raises(UserError, match="both-1, results-both, results-both-trained"):
        run("collapse", "--data", home, "--budget", 5, "--seeds", 2, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    assert "both-1: FAILED with status 2: train.py: out of luck" in said and "| local |" in said
    assert "local" in stage.names("evaluate.py") and "both" not in stage.names("evaluate.py")
    stage.fail_at, stage.started = (), []
    run("collapse", "--data", home, "--budget", 5, "--seeds", 2, "--out", tmp_path / "out")
    assert stage.names("train.py") == ["both-1"] and stage.names("evaluate.py") == ["both", "both-trained"]


def test_so_many_at_a_time(monkeypatch, tmp_path):
    """Never more than --jobs, a second one starts before the first has ended, but nothing beside what it needs."""
    alive, met = [], {}

    class Slow(Ended):
        looks = 0

        def __init__(self, name):
            self.name, self.returncode = name, 0

        def poll(self):
            self.looks += 1
            if self.looks < 3:
                return None
            alive.remove(self.name)
            return 0

    def start(words, log, lock):
        met[words[0]] = list(alive)
        alive.append(words[0])
        (tmp_path / words[0]).mkdir()
        (tmp_path / words[0] / "results.json").write_text("{}")
        return Slow(words[0])
    monkeypatch.setattr(commands, "start", start)
    monkeypatch.setattr(commands, "PAUSE", 0)
    work = commands.Work(tmp_path, 2)
    work.do([commands.Command(name, [name], tmp_path / name, after=("a",) if name == "b" else ()) for name in "abcde"])
    assert max(map(len, met.values())) == 1 and len(met) == 5 and not work.failed
    assert list(met) == ["a", "c", "b", "d", "e"] and met["c"] == ["a"] and "a" not in met["b"]


def test_second_stage_pretraining_waits_for_the_first(stage, home, tmp_path):
    run("chain", "--data", home, "--budget", 5, "--seeds", 2, "--out", tmp_path / "out")
    names = stage.names("train.py")
    assert names.index("both-1") > names.index("generic-1")
    words = next(words for words in stage.started if words[-1].endswith("runs/both-1"))
    assert words[words.index("--init") + 1] == str(tmp_path / "out/runs/generic-1")
    generic = next(words for words in stage.started if words[-1].endswith("runs/generic-0"))
    assert generic[generic.index("--data") + 1] == "phantoms"


def test_flags_reach_the_commands_that_they_are_for(tmp_path):
    """The label's column goes with the set that has it, views with contrastive methods."""
    given = given_of()
    given.label = "subtype"
    words = {(run.method, run.data): studies.train_words(given, run, "xray", 60)
             for run in (Run("a", 2, "byol"), Run("a", 0, "byol", data="phantoms"), Run("a", 0, "spark"))}
    own = words["byol", None]
    wanted = {"--label": "subtype", "--views": "xray", "--size": "64", "--seed": "2", "--save-every": "6"}
    for flag, value in wanted.items():
        assert own[own.index(flag) + 1] == value
    assert "--label" not in words["byol", "phantoms"] and "--views" not in words["spark", None]
    evaluation = Evaluation((Run("generic", 0, "byol", data="phantoms"),), ("knn",), data=given.data)
    words = studies.evaluate_words(given, evaluation, {"read": 7, "steps": {}}, {"generic-0": tmp_path})
    assert words[-6:] == ["--data", "set", "--channels", "1", "--label", "subtype"]


def test_domain_epochs_reads_out_the_kept_encoders(stage, home, tmp_path):
    run("domain_epochs", "--data", home, "--budget", 60, "--seeds", 2, "--out", tmp_path / "out")
    words = next(words for words in stage.started if words[0] == "evaluate.py")
    steps = json.loads((tmp_path / "out/plan.json").read_text())["steps"]["domain-0"]
    kept = [epochs for epochs in protocols.LOOKS if epochs < steps]         # 12 images, one batch: an epoch is a step
    assert [name_of(path) for path in words[1:words.index("--task")]] == [
        f"domain-{seed}" + (f"@{epochs}" if epochs else "") for seed in range(2) for epochs in [*kept, None]]


def test_duplicates_prepares_the_set_twice(stage, home, tmp_path, monkeypatch):
    original = commands.start

    def start(words, log, lock):
        if words[0] != "-m":
            return original(words, log, lock)
        from medssl.common.data import prepare
        prepare.main(words[2:])
        asked.append(words)
        return Ended()
    asked = []
    monkeypatch.setattr(commands, "start", start)
    out = tmp_path / "out"
    run("duplicates", "--data", home, "--budget", 5, "--seeds", 1, "--out", out)
    assert [("--dedupe" in words) for words in asked] == [False, True]
    data = {name.rsplit("-", 1)[0]: words[words.index("--data") + 1] for name, words in
            ((words[-1].split("/")[-1], words) for words in stage.started if words[0] == "train.py")}
    assert data["simclr_kept"] == str(out / "data") and data["simclr_removed"] == str(out / "data-removed")
    read = [words[words.index("--data") + 1] for words in stage.started if words[0] == "evaluate.py"]
    assert set(read) == {str(out / "data")}


# ---- how long

def test_the_budget_decides_the_steps():
    runs = [Run("a", 0, "simclr"), Run("b", 0, "dcl", share=2.0)]
    paces = {"simclr": studies.Pace(0.5, 64, 10), "dcl": studies.Pace(1.0, 16, 10)}
    images = studies.lengths(runs, paces, 3600, "images")
    assert images["b-0"] * 16 == pytest.approx(2 * images["a-0"] * 64, rel=0.02)
    minutes = studies.lengths(runs, paces, 3600, "minutes")
    assert minutes == {"a-0": 2400, "b-0": 2400}                                # 20 and 40 minutes
    for steps in (images, minutes):
        assert steps["a-0"] * 0.5 + steps["b-0"] * 1.0 == pytest.approx(3600, rel=0.02)
    assert studies.lengths(runs, paces, 0, "minutes") == {"a-0": studies.LEAST, "b-0": studies.LEAST}
    # however little time there is, the images of the runs keep their proportion
    assert studies.lengths(runs, paces, 0, "images") == {"a-0": studies.LEAST, "b-0": 8 * studies.LEAST}


def test_the_whole_takes_about_the_budget(stage, home, tmp_path, capsys):
    run("collapse", "--data", home, "--budget", 100, "--out", tmp_path / "out")
    plan_made = json.loads((tmp_path / "out/plan.json").read_text())
    assert plan_made["pretraining"] + plan_made["reading"] == pytest.approx(100 * 60, rel=0.05)
    assert "note:" not in capsys.readouterr().out
    run("collapse", "--data", home, "--budget", 1, "--out", tmp_path / "less")
    assert "need more than --budget 1" in capsys.readouterr().out


def test_short_read_outs_are_told(stage, home, tmp_path, capsys, monkeypatch):
    """The budget that the note names gives read-outs that are long enough."""
    monkeypatch.setattr(studies, "MOST_READ", 1000)                         # of this small set they may be that long
    run("collapse", "--data", home, "--budget", 20, "--out", tmp_path / "out")
    said = capsys.readouterr().out
    budget = re.search(r"decide little: .* --budget (\d+) gives them 150,", said)[1]
    run("collapse", "--data", home, "--budget", budget, "--out", tmp_path / "more")
    said = capsys.readouterr().out
    assert "decide little" not in said and json.loads((tmp_path / "more/plan.json").read_text())["read"] >= 150


def test_a_pace_leaves_the_looks_out(tmp_path):
    """100 images a second before the first look, 50 with it."""
    trained(shlex.split(f"train.py --method medmoco --steps 10 --log-every 5 --size 64 --out {tmp_path}/a"))
    pace = studies.pace_of(tmp_path / "a")
    assert pace.step == pytest.approx(0.64) and pace.rest == pytest.approx(studies.STARTING + 10 * 5 * 0.64)


# ---- what comes out

def small(given):
    """Two rows."""
    runs = given.runs("one", "simclr") + given.runs("two", "dcl")
    yield from runs
    yield from given.read(runs, ("linear",))


def small_effects(found):
    yield Effect("one less two", found.between("one", "two"), claim=8)
    yield Effect("gain of one", found.gain("one", "linear"), claim=8)


def found_of(tmp_path, worth):
    given = given_of()
    asked = list(small(given))
    evaluations = [each for each in asked if isinstance(each, Evaluation)]
    for each in evaluations:
        folders = " ".join(str(tmp_path / "runs" / one.name) for one in each.runs)
        words = f"evaluate.py {folders} --task linear --seeds 2 --out {tmp_path}/results/{each.name}"
        read_out(shlex.split(words), worth)
    return findings.Found(given, evaluations, tmp_path)


def test_gains_are_paired_and_intervals_are_over_pretraining_seeds(tmp_path):
    table = findings.table(found_of(tmp_path, plain))
    lines = {line.split(" | ")[3]: line.split(" | ")[4:] for line in table.split("\n")[2:]}
    half = 0.01 * 4.303 / math.sqrt(3)                                      # of .50, .51 and .52
    assert lines["one"] == [f"0.560 ± {half:.3f}", f"+0.310 ± {half:.3f}", f"+0.210 ± {half:.3f}", "3 |"]
    assert lines["random"] == ["0.250 ± 0.635", "", "", "2 |"]
    assert list(lines) == ["random", "random, normalised", "one", "two"], "random weights stand there once"


def test_verdicts(tmp_path):
    def verdict(values, **words):
        return findings.verdict(Effect("", np.array(values), **words))
    assert verdict([0.10, 0.11, 0.12]) == "holds"
    assert verdict([-0.10, -0.11, -0.12]) == "does not hold"
    assert verdict([0.10, -0.11, 0.12]) == "open"
    assert verdict([0.10]) == verdict([math.nan] * 3) == "open"
    assert verdict([0.10, 0.11, 0.12], over=0.2) == "does not hold"
    assert verdict([0.001, 0.002, 0.001], within=0.02) == "holds"
    assert verdict([0.10, 0.11, 0.12], within=0.02) == "does not hold"
    assert verdict([0.01, -0.02, 0.03], within=0.02) == "open"
    found = found_of(tmp_path, lambda model, cell, metric: plain(model, cell, metric) + 0.1 * model.startswith("one"))
    told = findings.verdicts((8, 3), list(small_effects(found)))
    assert [each["verdict"] for each in told["claims"]] == ["holds", "not looked at"]
    found = found_of(tmp_path, plain)
    told = findings.verdicts((8,), list(small_effects(found)))
    assert [each["verdict"] for each in told["effects"]] == ["open", "holds"] and told["claims"][0]["verdict"] == "open"


# ---- refusals

def test_refusals(stage, home, tmp_path, monkeypatch):
    def fails(*words):
        with pytest.raises(UserError) as error:
            run(*words, "--out", tmp_path / "out")
        assert "\n" not in str(error.value)
        return str(error.value)
    assert "did you mean collapse" in fails("colapse")
    assert "needs --weights" in fails("imagenet", "--data", home)
    assert "takes no --weights" in fails("rubik", "--data", home, "--weights", "net.pth")
    assert "generic images" in fails("chain")
    assert not stage.started and not (tmp_path / "out").exists()
    (tmp_path / "plain").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "plain/a.png")
    for name in ("collapse", "rubik"):                                      # a start that failed leaves the folder free
        assert "has no labels and no masks" in fails(name, "--data", tmp_path / "plain")
    assert "nothing.pt" in fails("imagenet", "--data", home, "--weights", "nothing.pt")
    assert not (tmp_path / "out").exists()
    run("rubik", "--data", home, "--budget", 5, "--seeds", 1, "--out", tmp_path / "one")
    with pytest.raises(UserError, match="was begun with budget 5.0"):
        run("rubik", "--data", home, "--budget", 6, "--seeds", 1, "--out", tmp_path / "one")
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    assert "start from a checkout" in fails("collapse", "--data", home)


def test_one_study_at_a_time_in_a_folder(stage, home, tmp_path):
    pytest.importorskip("fcntl")
    with commands.held(tmp_path), pytest.raises(UserError, match="still works there"):
        run("rubik", "--data", home, "--out", tmp_path)


# ---- a real one

def test_a_tiny_study_from_end_to_end(home, tmp_path, monkeypatch, capsys):
    """The scripts themselves, in this process."""
    def start(words, log, lock):
        {"train.py": train, "evaluate.py": evaluate}[words[0]].main(words[1:])
        return Ended()

    def tiny(given):
        """One row."""
        runs = given.runs("one", "simclr")
        yield from runs
        yield from given.read(runs, ("knn", "collapse"))

    def effects(found):
        yield Effect("gain", found.gain("one", "knn"), claim=8)
    monkeypatch.setattr(commands, "start", start)
    for name, value in {"PROBE": 2, "LEAST": 2, "FITS": 1, "STARTING": 0, "FROZEN": 0}.items():
        monkeypatch.setattr(studies, name, value)
    monkeypatch.setitem(studies.STUDIES, "tiny", Protocol(tiny, effects, (8,)))
    run("tiny", "--data", home, "--size", 32, "--budget", 1e-3, "--seeds", 2, "--out", tmp_path / "out")
    told = json.loads((tmp_path / "out/verdicts.json").read_text())
    assert len(told["effects"][0]["values"]) == 2 and "| kNN | labels 1.0 |" in capsys.readouterr().out
    assert (tmp_path / "out/runs/one-1/encoder.pt").is_file() and (tmp_path / "out/chart.png").is_file()
