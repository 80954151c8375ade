"""The studies: the protocols of the works as lists of runs and evaluations, and what each has to show.

A study is a function of what is given (the set, the seeds) that yields Runs of train.py and Evaluations of evaluate.py.
A second function says from the scores by how much each claim is met, one number for each pretraining seed. How long the
runs are is not said here: studies.py deals out the time that there is.

To add one: two functions, and a line in STUDIES.
"""

import numpy as np

from ... import METHODS
from .claims import Effect, Protocol, Run

CONTRASTIVE = ("simclr", "dcl", "simsiam", "byol", "vicreg", "swav", "moco", "medmoco")
PREDICTIVE = ("rotation", "relative", "jigsaw", "rubik")
RESTORING = ("autoencoder", "genesis")
VIEWED = tuple(name for name in CONTRASTIVE if name != "swav")              # SwAV's crops are part of the method
SHARES = ("1.0", "0.5", "0.25", "0.1", "0.05")
ALIKE = 0.02                        # scores that differ by less are called alike
NEAR = 0.05                         # scores that differ by less are called near
LEARNT = 0.05                       # above chance: a task is on the way to being solved
LOOKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)                                # epochs whose encoders are read out


def methods(given):
    """Every method with the same minutes: frozen features, and a tenth of the labels."""
    runs = [run for name in METHODS if name != "together" for run in given.runs(name, name)]
    yield from runs
    yield from given.read(runs, given.frozen)
    yield from given.read(runs, (given.trained,), part="few", series={"labels": ("0.1",)})


def methods_effects(found):
    given = found.given
    if given.labels:
        means = [np.mean([found.score(row, "linear") for row in rows], 0)
                 for rows in (CONTRASTIVE + PREDICTIVE, RESTORING)]
        yield Effect("linear probe: contrastive and predictive less restoring methods", means[0] - means[1], claim=3)
    asked = [(task, "") for task in given.frozen] + [(given.trained, "few")]
    rows = [name for name in METHODS if name != "together"]
    table = np.array([[found.score(row, task, part=part) for row in rows] for task, part in asked])  # (A, rows, seeds)
    best = np.nan_to_num(table.mean((0, 2))).argmax()
    lead = table[:, best] - np.delete(table, best, 1).max(1)                # (A, seeds)
    yield Effect(f"how far {rows[best]}, the best on average, lies behind in the read-out that suits it least",
                 -lead.min(0), claim=8)


def imbalance(given):
    """The other classes made more and more frequent, with and without resampling, and under stronger augmentation."""
    runs = [run for name in ("simclr", "rotation") for run in given.runs(name, name)]
    yield from runs
    yield from given.read(runs, ("finetune",), part="thinned", series={"imbalance": given.ratios},
                          words="--imbalance-varies others")
    yield from given.read(runs, ("finetune",), part="resampled", series={"imbalance": given.ratios},
                          words="--imbalance-varies others --resample")
    yield from given.read(runs, ("finetune",), part="augmented",
                          series={"labels": ("0.1",), "augment": ("S0", "S3", "S6")})


def imbalance_effects(found):
    ratios, rare = found.given.ratios, f"recall {found.given.rare}"
    for row in ("simclr", "rotation"):
        def gain(part, row=row, **cell):
            return found.gain(row, "finetune", part=part, **cell)

        inner, ends = ratios[1:-1] or ratios[-1:], (ratios[0], ratios[-1])
        inside = np.mean([gain("thinned", imbalance=ratio) for ratio in inner], 0)
        others = [np.mean([gain("thinned", metric=name, imbalance=ratio) for name in found.recalls if name != rare], 0)
                  for ratio in inner]
        own = [gain("thinned", metric=rare, imbalance=ratio) for ratio in inner]
        yield Effect(f"{row}: gain in recall of the rare class less that of the others, ratios within the range",
                     np.mean(own, 0) - np.mean(others, 0), claim=1)
        yield Effect(f"{row}: gain within the range of ratios less that at its ends",
                     inside - np.mean([gain("thinned", imbalance=ratio) for ratio in ends], 0), claim=1)
        middle = inner[len(inner) // 2]
        yield Effect(f"{row}: gain at {middle}:1 without resampling less that with it",
                     gain("thinned", imbalance=middle) - gain("resampled", imbalance=middle), claim=5)
        yield Effect(f"{row}: gain without augmentation less that with S6",
                     gain("augmented", augment="S0") - gain("augmented", augment="S6"), claim=6)


def speed(given):
    """How fast the validation score rises, and how far, with all labels and with a tenth."""
    runs = [run for name in ("simclr", "medmoco", "rotation") for run in given.runs(name, name)]
    yield from runs
    yield from given.read(runs, (given.trained,), series={"labels": ("1.0", "0.1")})


def speed_effects(found):
    task = found.given.trained
    for row in ("simclr", "medmoco", "rotation"):
        yield Effect(f"{row}: epochs that random weights need more to 95 % of their last score",
                     -found.gain(row, task, "epochs_to_95_of_random", labels="1.0"), claim=2)
        yield Effect(f"{row}: gain at the end, all labels", found.gain(row, task, labels="1.0"), claim=2, within=ALIKE)


def rubik(given):
    """Rubik's heads as deep as the order head; with gap and jitter or neither; with masked tiles (RKB+)."""
    apart = "gap=0.2 jitter=0.1"
    variants = {"shallow": apart, "deep": f"{apart} deep_heads=True", "edges": "gap=0.0 jitter=0.0",
                "plus": f"{apart} mask=True"}
    runs = [run for row, words in variants.items() for run in given.runs(row, "rubik", f"--set {words}")]
    yield from runs
    yield from given.read(runs, given.frozen)


def rubik_effects(found):
    for name, claim in (("horizontal_accuracy", 4), ("vertical_accuracy", 4), ("order_accuracy", None)):
        shallow, words = found.logged("shallow", name), name.replace("_", " ")
        learnt = shallow.mean() > 2 / 3 + LEARNT                            # else the runs were too short to tell
        yield Effect(f"{words}: shallow less deep heads", shallow - found.logged("deep", name),
                     claim=claim if learnt else None)
        yield Effect(f"{words} of shallow heads", shallow)
    yield Effect("order accuracy: without gap and jitter less with both",
                 found.logged("edges", "order_accuracy") - found.logged("shallow", "order_accuracy"))
    for row, words in (("edges", "without gap and jitter"), ("plus", "RKB+")):
        yield Effect(f"{found.given.main}: {words} less RKB with both", found.between(row, "shallow"))


def byol_copies(given):
    """BYOL's online encoder and the slow copy, from the same training."""
    runs = [run for row in ("online", "target") for run in given.runs(row, "byol", f"--set export={row}")]
    yield from runs
    yield from given.read(runs, given.frozen)
    yield from given.read(runs, (given.trained,), part="few", series={"labels": ("0.1",)})


def byol_copies_effects(found):
    for task, part in ((found.given.main, ""), (found.given.trained, "few")):
        yield Effect(f"{task}: online less target encoder", found.between("online", "target", task, part), claim=7,
                     within=ALIKE)


def pcrl(given):
    """PCRL as it stands; with the released code's projector; unpainted; with a decoder without skip connections."""
    variants = {"here": "", "released": "hidden=128", "unpainted": "paint=0.0", "plain": "decoder.skips=False"}
    runs = [run for row, words in variants.items() for run in given.runs(row, "pcrl", words and f"--set {words}")]
    yield from runs
    yield from given.read(runs, given.frozen)
    yield from given.read(runs, (given.trained,), part="few", series={"labels": ("0.1",)})


def pcrl_effects(found):
    for row, words in (("released", "the released projector"), ("unpainted", "unpainted"), ("plain", "no skips")):
        yield Effect(f"{found.given.main}: {words} less as it stands", found.between(row, "here"))


def skips(given):
    """Restoring with and without skip connections, and whether the decoder is worth keeping."""
    runs = [run for name in RESTORING for kind, on in (("skips", True), ("plain", False))
            for run in given.runs(f"{name}_{kind}", name, f"--set decoder.skips={on}")]
    yield from runs
    few = {"labels": ("0.1",)}
    yield from given.read(runs, ("unet",), part="encoder", series=few)
    yield from given.read([run for run in runs if run.row.endswith("skips")], ("unet",), part="decoder", series=few,
                          words="--transfer encoder+decoder")


def skips_effects(found):
    for name in RESTORING:
        yield Effect(f"{name}: Dice with skips less without", found.between(f"{name}_skips", f"{name}_plain", "unet",
                                                                            "encoder"))
        yield Effect(f"{name}: Dice with the decoder transferred too less encoder alone",
                     found.score(f"{name}_skips", "unet", part="decoder")
                     - found.score(f"{name}_skips", "unet", part="encoder"))


# ---- small sets

def small_batches(given):
    """SimCLR and the decoupled loss with 16 and 128 images a step, as many images in all."""
    runs = [run for name in ("simclr", "dcl") for batch in (16, 128)
            for run in given.runs(f"{name}_{batch}", name, f"--batch {batch} --set temperature=0.1")]
    yield from runs
    yield from given.read(runs, given.frozen)


def small_batches_effects(found):
    dcl, simclr = (found.between(f"{name}_16", f"{name}_128") for name in ("dcl", "simclr"))
    yield Effect(f"{found.given.main}: what dcl loses less than simclr with 16 images a step", dcl - simclr, claim=11)


def readouts(given):
    """The same features read out by neighbours, by a linear probe, and by fine-tuning."""
    runs = [run for name in ("simclr", "medmoco") for run in given.runs(name, name)]
    tasks = ("knn", "linear", "finetune") if given.labels else ("segment", "unet")
    yield from runs
    yield from given.read(runs, tasks, series={"labels": ("1.0", "0.1")})


def readouts_effects(found):
    tasks = ("knn", "linear", "finetune") if found.given.labels else ("segment", "unet")
    for row in ("simclr", "medmoco"):
        for low, high in zip(tasks, tasks[1:]):
            yield Effect(f"{row}: {high} less {low}, all labels",
                         found.score(row, high, labels="1.0") - found.score(row, low, labels="1.0"), claim=10)


def imagenet(given):
    """Random weights, in-domain pretraining, the weights of --weights, and these followed by in-domain pretraining."""
    runs = given.runs("own", "simclr", given.network)
    both = given.runs("both", "simclr", given.network, init=given.weights)
    yield from runs + both
    for part, tasks in (("frozen", given.frozen), ("trained", (given.trained,))):
        more = {"part": part, "series": {"labels": ("1.0", "0.1")}}
        yield from given.read(runs, tasks, files=(given.weights,), **more)
        yield from given.read(both, tasks, **more)


def imagenet_effects(found):
    given, weights = found.given, found.given.known_as
    for task, part in ((given.main, "frozen"), (given.trained, "trained")):
        for labels in ("1.0", "0.1"):
            own = found.score("own", task, part=part, labels=labels)
            yield Effect(f"{task}, labels {labels}: in-domain over random weights",
                         found.gain("own", task, part=part, labels=labels), claim=9)
            yield Effect(f"{task}, labels {labels}: in-domain less {weights}",
                         own - found.score(weights, task, part=part, labels=labels), claim=9, over=-NEAR)
            yield Effect(f"{task}, labels {labels}: {weights} and then in-domain, less in-domain alone",
                         found.score("both", task, part=part, labels=labels) - own)


# ---- segmentation, and small CT sets

def chain(given):
    """BYOL on phantoms (generic), on the set's own images, and on the one after the other."""
    generic = given.runs("generic", "byol", data="phantoms")
    own = given.runs("own", "byol")
    both = [Run("both", run.seed, "byol", init=run.name) for run in generic]
    yield from generic + own + both
    yield from given.read(generic + own + both, (given.trained,), series={"labels": ("1.0", "0.05")}, data=given.data)


def chain_effects(found):
    task = found.given.trained
    for labels in ("1.0", "0.05"):
        both = found.score("both", task, "epochs_to_95", labels=labels)
        for row in ("random", "generic", "own"):
            beside = "both" if row == "random" else None
            other = found.score(row, task, "epochs_to_95", labels=labels, beside=beside)
            yield Effect(f"epochs to 95 %, labels {labels}: those of {row} by those of generic, then own",
                         other / both, claim=12 if row in ("random", "generic") else None, over=2)


def domain_epochs(given):
    """BYOL on phantoms, then on the set's own images, with the encoder kept after each epoch."""
    generic = given.runs("generic", "byol", data="phantoms") if given.data != "phantoms" else []
    domain = [Run("domain", seed, "byol", init=f"generic-{seed}" if generic else None, kept=True)
              for seed in range(given.seeds)]
    yield from generic + domain
    yield from given.read(domain, (given.trained,), series={"labels": ("1.0",)})


def domain_epochs_effects(found):
    task, five = found.given.trained, f"domain@{5 * found.given.per_epoch}"
    early, last = (found.score(row, task, "epochs_to_95_of_random") for row in (five, "domain"))
    yield Effect("epochs to 95 % of random weights' last score: random less five domain epochs",
                 found.score("random", task, "epochs_to_95", beside="domain") - early, claim=13)
    yield Effect("the same: five domain epochs less all of them", early - last, claim=13, within=0.5)
    yield Effect("score: five domain epochs less all", found.score(five, task) - found.score("domain", task))


def labels(given):
    """Fewer and fewer labels: what is lost with each halving."""
    runs = [run for name in ("simclr", "medmoco", "moco", "swav", "byol", "spark") for run in given.runs(name, name)]
    yield from runs
    yield from given.read(runs, (given.trained,), series={"labels": SHARES})


def labels_effects(found):
    task, rows = found.given.trained, ("simclr", "medmoco", "moco", "swav", "byol", "spark")
    lost = {row: slope([found.score(row, task, labels=share) for share in SHARES]) for row in rows}
    for row, values in lost.items():
        yield Effect(f"{row}: lost with each halving of the labels", values)
    contrastive = np.mean([lost[row] for row in ("moco", "swav", "byol")], 0)
    yield Effect("lost with each halving: moco, swav and byol less spark", contrastive - lost["spark"], claim=15)
    few, full = (np.mean([found.gain(row, task, labels=share) for row in rows], 0) for share in (SHARES[-1], SHARES[0]))
    yield Effect(f"gain with {SHARES[-1]} of the labels less that with all, mean of the methods", few - full, claim=14)
    yield Effect("gain with a tenth of the labels, mean of the methods",
                 np.mean([found.gain(row, task, labels="0.1") for row in rows], 0), claim=9)


def slope(values):
    """What is lost with each halving, by least squares. values (shares, seeds), as SHARES has them."""
    halvings = -np.log2([float(share) for share in SHARES])
    away = halvings - halvings.mean()
    return -(away @ np.array(values)) / (away @ away)                       # (seeds,)


def duplicates(given):
    """The set with its near-duplicate slices and without them; both are read out on the one with all slices."""
    sets = {"kept": given.data, "removed": given.removed}
    runs = [run for name in ("simclr", "swav", "spark") for kind, path in sets.items()
            for run in given.runs(f"{name}_{kind}", name, data=path)]
    yield from runs
    yield from given.read(runs, given.frozen, data=given.data)
    yield from given.read(runs, (given.trained,), part="few", series={"labels": ("0.1",)}, data=given.data)


def duplicates_effects(found):
    for name in ("simclr", "swav", "spark"):
        for task, part in ((found.given.main, ""), (found.given.trained, "few")):
            yield Effect(f"{name}, {task}: without near-duplicates less with them",
                         found.between(f"{name}_removed", f"{name}_kept", task, part),
                         claim=None if name == "spark" else 16)


# ---- dimensional collapse

def collapse(given):
    """MoCo v2 against each remedy: spectrum, linear read-out and full fine-tuning."""
    variants = {"neither": "regions=0 decorrelation=None", "local": "decorrelation=None", "decorrelation": "regions=0",
                "both": "regions=20"}
    runs = [run for row, words in variants.items() for run in given.runs(row, "medmoco", f"--set {words}")]
    yield from runs
    yield from given.read(runs, (*given.frozen, "collapse"))
    yield from given.read(runs, ("unet" if given.masks else "finetune",), part="trained")


def collapse_effects(found):
    given = found.given
    frozen, trained = ("segment", "unet") if given.masks else ("linear", "finetune")
    over = found.gain("neither", "collapse", "rank_me", over="random, normalised")
    yield Effect("RankMe: random weights, normalised, less MoCo v2", -over, claim=17)
    yield Effect("RankMe: decorrelation less MoCo v2", found.between("decorrelation", "neither", "collapse"), claim=18)
    local, both = found.between("local", "neither", frozen), found.between("both", "neither", frozen)
    yield Effect(f"{frozen}: local less MoCo v2", local, claim=19 if given.masks else None)
    tuned = found.between("both", "neither", trained, "trained")
    yield Effect(f"gain of both remedies over MoCo v2: {frozen} less {trained}", both - tuned,
                 claim=20 if given.masks else None)


# ---- the table

STUDIES = {
    "methods": Protocol(methods, methods_effects, (3, 8), alike="minutes"),
    "labels": Protocol(labels, labels_effects, (9, 14, 15), alike="minutes"),
    "imbalance": Protocol(imbalance, imbalance_effects, (1, 5, 6), needs=("labels",)),
    "speed": Protocol(speed, speed_effects, (2,)),
    "chain": Protocol(chain, chain_effects, (12,), needs=("other images than the phantoms",)),
    "domain_epochs": Protocol(domain_epochs, domain_epochs_effects, (13,)),
    "small_batches": Protocol(small_batches, small_batches_effects, (11,)),
    "collapse": Protocol(collapse, collapse_effects, (17, 18, 19, 20)),
    "duplicates": Protocol(duplicates, duplicates_effects, (16,), alike="minutes", needs=("patients",)),
    "rubik": Protocol(rubik, rubik_effects, (4,)),
    "byol_copies": Protocol(byol_copies, byol_copies_effects, (7,)),
    "readouts": Protocol(readouts, readouts_effects, (10,)),
    "imagenet": Protocol(imagenet, imagenet_effects, (9,), needs=("--weights",)),
    "pcrl": Protocol(pcrl, pcrl_effects, ()),
    "skips": Protocol(skips, skips_effects, (), needs=("masks",)),
}
