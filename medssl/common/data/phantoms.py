"""The built-in data set: CT-like abdominal slices of synthetic patients, drawn by numpy in seconds from a seed.

A patient is a table of ellipsoids (ANATOMY) whose centres, radii and densities vary a little from patient to patient,
plus ribs, loops of bowel and liver vessels, all bent by one smooth deformation. Eight to ten neighbouring slices cut
the patient from the lung bases (z = 0) to the lower kidneys (z = 1). Most patients carry one lesion, which appears in
three to six of the slices:

    none            no lesion in this slice (the patient may have one in another)
    cyst            a smooth, even, round spot
    tumour          of the same size and darker than its organ too, but lobulated, patchy and with a bright rim
    calcification   the same again, strewn with small bright specks

so the class is a matter of texture and outline, not of brightness or place. A scanner (window, sharpness, noise, rings,
streaks, table) is drawn for each patient as well, and changes the brightness far more than a lesion does.

Densities are Hounsfield units (air -1000, fat -100, water 0, soft tissue 40 to 60, bone above 200); the window turns
them into 8 bits. Coordinates: x to the right of the picture (the patient's left), y to the back, both 1 at the wall of
the abdominal cavity. All lengths are relative to the body, so make(size=64) and make(size=96) draw the same patients.
"""
import math
from dataclasses import replace

import numpy as np

from ..errors import UserError
from .dataset import Dataset, unit

CLASSES = ("none", "cyst", "tumour", "calcification")
ORGANS = ("background", "liver", "spleen", "kidneys", "vessels", "bones", "bowel")
OTHER, LIVER, SPLEEN, KIDNEY, VESSEL, BONE, BOWEL = range(len(ORGANS))
FREE = np.inf                                                       # radius in z of what runs through every slice
STOMACH = (0.36, -0.30, 0.28), (0.25, 0.25, 0.32), 20               # centre (x, y, z), radii (x, y, z), tilt in degrees
RIGHT_LOBE = (-0.46, -0.02, 0.38), (0.45, 0.62, 0.55), 8

# organ (OTHER: background in the masks), density, what contrast medium adds, centre, radii, tilt; later rows cover
ANATOMY = (
    (OTHER, 50, 10, (-0.21, 0.80, 0.5), (0.19, 0.14, FREE), 0),     # back muscles
    (OTHER, 50, 10, (0.21, 0.80, 0.5), (0.19, 0.14, FREE), 0),
    (OTHER, -850, 0, (-0.52, 0.10, -0.25), (0.42, 0.80, 0.50), 0),  # lung bases
    (OTHER, -850, 0, (0.52, 0.10, -0.25), (0.42, 0.80, 0.50), 0),
    (OTHER, 45, 90, (0.15, -0.40, -0.15), (0.42, 0.36, 0.30), 20),  # heart
    (OTHER, 50, 10, (-0.19, 0.47, 1.0), (0.10, 0.13, 0.45), 0),     # psoas muscles
    (OTHER, 50, 10, (0.19, 0.47, 1.0), (0.10, 0.13, 0.45), 0),
    (BOWEL, 60, 30, (0.36, -0.30, 0.28), (0.30, 0.30, 0.36), 20),   # stomach: wall, then content
    (BOWEL, 15, 0, *STOMACH),
    (LIVER, 55, 50, (-0.02, -0.42, 0.30), (0.40, 0.26, 0.30), 10),  # left lobe, right lobe
    (LIVER, 55, 50, *RIGHT_LOBE),
    (OTHER, 40, 50, (0.10, -0.02, 0.52), (0.34, 0.09, 0.13), -15),  # pancreas
    (OTHER, 8, 0, (-0.22, -0.22, 0.60), (0.11, 0.14, 0.16), 20),    # gallbladder
    (SPLEEN, 48, 70, (0.66, 0.24, 0.32), (0.22, 0.40, 0.34), -15),
    (KIDNEY, 32, 140, (-0.43, 0.42, 0.66), (0.18, 0.23, 0.36), -25),
    (KIDNEY, 32, 140, (0.43, 0.42, 0.60), (0.18, 0.23, 0.36), 25),
    (KIDNEY, -40, 60, (-0.37, 0.39, 0.66), (0.09, 0.1, 0.17), -25),  # fat and collecting system in the kidneys
    (KIDNEY, -40, 60, (0.37, 0.39, 0.60), (0.09, 0.10, 0.17), 25),
    (BOWEL, 50, 20, (-0.64, 0.12, 1.0), (0.17, 0.20, 0.30), 0),     # colon: wall, then content
    (BOWEL, -60, 0, (-0.64, 0.12, 1.0), (0.13, 0.16, 0.28), 0),
    (BOWEL, 50, 20, (0.70, 0.16, 1.0), (0.13, 0.15, 0.35), 0),
    (BOWEL, -250, 0, (0.70, 0.16, 1.0), (0.09, 0.11, 0.33), 0),
    (VESSEL, 42, 170, (0.07, 0.27, 0.5), (0.075, 0.09, FREE), 0),   # aorta, inferior vena cava
    (VESSEL, 42, 90, (-0.14, 0.24, 0.5), (0.09, 0.09, FREE), 0),
    (BONE, 420, 0, (0.00, 0.50, 0.5), (0.16, 0.18, FREE), 0),       # vertebral body: cortex, then marrow
    (BONE, 210, 0, (0.00, 0.50, 0.5), (0.125, 0.14, FREE), 0),
    (BONE, 400, 0, (0.00, 0.73, 0.5), (0.13, 0.11, FREE), 0),       # arch, spinal canal
    (BONE, 350, 0, (-0.18, 0.70, 0.5), (0.12, 0.045, FREE), 20),    # transverse processes, spinous process
    (BONE, 350, 0, (0.18, 0.70, 0.5), (0.12, 0.045, FREE), -20),
    (BONE, 380, 0, (0.00, 0.88, 0.5), (0.04, 0.13, FREE), 0),
    (OTHER, 30, 0, (0.00, 0.715, 0.5), (0.075, 0.065, FREE), 0),
)
HOSTS = [row for row in ANATOMY if row[0] in (LIVER, SPLEEN, KIDNEY) and row[1] > 0]                # where lesions sit
DECK = (3, 8, 4, 2)                                                 # of 17 patients, by class
LESIONS = (9, 15)                                                   # from, up to but not, how many a patient has
SPLITS = np.array(("train", "test", "val", "train", "train", "val", "test", "train", "train", "train"))  # of ten


def make(count=2000, size=96, seed=0):
    """`count` slices of size x size pixels with labels, organ masks, patients and splits; a seed fixes every bit."""
    if count < 1 or size < 32:
        raise UserError(f"phantoms: cannot draw count={count}, size={size}; give a count from 1 and a size from 32 up")
    patients = max(1, round(count / 9))
    groups = np.arange(count) * patients // count                   # (N,)
    kinds, splits = _deal(patients, np.random.default_rng(seed))
    images, masks = np.empty((count, 1, size, size), np.uint8), np.empty((count, size, size), np.uint8)
    labels = np.empty(count, np.int64)
    for patient in range(patients):
        rows = np.flatnonzero(groups == patient)
        scene = _Scene(len(rows), size, np.random.default_rng((seed, patient)))
        scene.draw_anatomy()
        labels[rows] = scene.draw_lesions(kinds[patient])
        masks[rows] = scene.organs
        images[rows, 0] = scene.scan()
    splits = splits[groups]
    seen = unit(images[splits == "train"])
    mean, std = (float(seen.mean()),), (float(seen.std()),)
    return Dataset("phantoms", images, labels, CLASSES, masks, groups, splits, mean, std)


def opened(size=None, channels=None, seed=0):
    """As the other sets are opened: in its usual size and in gray unless something else is asked for."""
    try:
        dataset = make(size=size or 96, seed=seed)
    except MemoryError:
        raise UserError(f"phantoms: size={size} needs more memory than there is") from None
    if channels == 3:
        images = dataset.images.repeat(3, axis=1)                   # (N, 3, H, W)
        return replace(dataset, images=images, mean=dataset.mean * 3, std=dataset.std * 3)
    return dataset


def _deal(patients, rng):
    """A lesion kind and a split for every patient; each kind is dealt to the splits in turn, so that none lacks it."""
    deck = np.repeat(np.arange(4), DECK)
    kinds = np.concatenate([rng.permutation(deck) for _ in range(-(-patients // len(deck)))])[:patients]
    splits = np.empty(patients, SPLITS.dtype)
    for kind in range(4):
        members = rng.permutation(np.flatnonzero(kinds == kind))
        splits[members] = SPLITS[np.arange(len(members)) % len(SPLITS)]
    return kinds, splits


class _Scene:
    """The slices of one patient while they are being painted.

    Arrays are float32. They stay so next to Python's numbers but not next to numpy's, hence float() and tolist() here.
    """

    def __init__(self, slices, size, rng):
        self.rng, self.size = rng, size
        top, bottom = rng.uniform((0.02, 0.72), (0.25, 0.98))
        self.z = np.linspace(top, bottom, slices, dtype=np.float32)[:, None, None]  # (S, 1, 1)
        width, depth, self.fat = rng.uniform((0.82, 0.74, 0.05), (0.96, 0.90, 0.22)).tolist()
        self.scale = np.array((width, width * depth), np.float32) / (1.09 + self.fat)               # half pictures
        self.shift = rng.uniform((-0.05, -0.10), (0.05, 0.0)).astype(np.float32)
        turn = rng.normal(0, 0.05)
        self.line = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1  # pixel centres; the picture is -1 to 1
        row, col = self.line[:, None] - self.shift[1], self.line[None] - self.shift[0]
        self.straight = (col + turn * row) / self.scale[0], (row - turn * col) / self.scale[1]      # x, y (H, W)
        self.x, self.y = (axis + sum(self._wave(*self.straight, 0.018, 3.5) for _ in range(3))      # bent
                          for axis in self.straight)                # (S, H, W)
        self.hu = np.full((slices, size, size), -1000, np.float32)
        self.organs = np.zeros((slices, size, size), np.uint8)

    def _wave(self, x, y, height, frequency):
        kx, ky, kz, phase = (self.rng.normal(0, 1, 4) * (frequency, frequency, 4, 6)).tolist()
        return height * np.sin(kx * x + ky * y + kz * self.z + phase)               # (S, H, W)

    def _pixels(self, radii):
        return float(np.sqrt(radii[0] * radii[1] * self.scale.prod())) * self.size / 2

    def _ellipsoid(self, centre, radii, tilt):
        """The window (slices, rows, columns) an ellipsoid may touch; there 1 inside, 0 outside, soft edges."""
        cut = np.sqrt(np.maximum(0, 1 - ((self.z - float(centre[2])) / float(radii[2])) ** 2))      # (S, 1, 1)
        present = np.flatnonzero(cut) if cut.any() else np.array((0, -1))           # (0, -1) makes an empty window
        middle = (self.scale * centre[:2] + self.shift + 1) * self.size / 2
        reach = (max(radii[:2]) + 0.2) * self.scale * self.size / 2  # 0.2: room for bending and turning
        (left, top), (right, bottom) = np.clip((middle - reach, middle + reach + 1), 0, self.size).astype(int)
        window = np.s_[present[0]:present[-1] + 1, top:bottom, left:right]
        dx, dy = self.x[window] - float(centre[0]), self.y[window] - float(centre[1])
        c, s = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
        q = np.sqrt(((c * dx + s * dy) / float(radii[0])) ** 2 + ((c * dy - s * dx) / float(radii[1])) ** 2)
        return window, np.clip(0.5 + (cut[window[0]] - q) * self._pixels(radii), 0, 1)

    def _paint(self, organ, density, window, inside):
        self.hu[window] += inside * (float(density) - self.hu[window])
        self.organs[window][inside > 0.5] = organ

    def draw_anatomy(self):
        rng, edge = self.rng, float(self.scale.mean()) * self.size / 2
        skin, wall = (np.sqrt(x ** 2 + np.abs(y) ** 2.3) for x, y in (self.straight, (self.x, self.y)))
        for density, radius, border in ((-20, skin, 1.09 + self.fat), (-105, skin, 1.06 + self.fat),  # skin, fat
                                        (52, wall, 1.09), (-95, wall, 1.0)):        # muscle, fat
            self.hu += np.clip(0.5 + (border - radius) * edge, 0, 1) * (density - self.hu)
        strands = self._wave(self.x, 0.3 * self.y, 1, 12) * self._wave(0.3 * self.x, self.y, 1, 12)
        self.hu += 150 * np.maximum(0, strands - 0.45) * (wall < 0.95)              # small vessels in the fat

        medium = rng.uniform(0, 1)                                  # how much contrast medium flows in the patient
        for organ, density, further, centre, radii, tilt in ANATOMY:
            centre, radii = centre + rng.normal(0, 0.02, 3), radii * np.exp(rng.normal(0, 0.06, 3))
            density, tilt = (density + further * medium, tilt) + rng.normal(0, 6, 2)
            self._paint(organ, density, *self._ellipsoid(centre, radii, tilt))
        for _ in range(7):                                          # vessels of the liver
            centre = RIGHT_LOBE[0] + rng.uniform(-0.6, 0.6, 3) * RIGHT_LOBE[1]
            window, inside = self._ellipsoid(centre, (0.035, rng.uniform(0.06, 0.16), 0.12), rng.uniform(0, 180))
            self._paint(LIVER, 45 + 110 * medium, window, inside * (self.organs[window] == LIVER))
        for _ in range(8):                                          # bowel: wall, then fluid, medium or gas
            centre = rng.uniform((-0.5, -0.65, 0.7), (0.5, -0.05, 1.1))
            radii = rng.uniform((0.11, 0.11, 0.21), (0.19, 0.19, 0.29))
            tilt, content = rng.uniform(0, 180), rng.choice((10, 30, 220, -600))
            self._paint(BOWEL, 50 + 40 * medium, *self._ellipsoid(centre, radii, tilt))
            self._paint(BOWEL, content, *self._ellipsoid(centre, radii - 0.04, tilt))
        window, inside = self._ellipsoid(*STOMACH)                  # gas above the fluid in the stomach
        above = np.clip((rng.uniform(-0.5, -0.2) - self.straight[1][window[1:]]) * edge, 0, 1)
        self._paint(BOWEL, -900, window, inside * above * (self.organs[window] == BOWEL))
        for angle in np.linspace(0, 2 * np.pi, 15)[:-1] + rng.uniform(0, 0.4):      # ribs: cortex, then marrow
            centre = (1.03 * np.cos(angle), np.sin(angle), rng.uniform(0.1, 0.8) + 0.3 * np.sin(angle))
            for density, radii in ((400, (0.13, 0.045, 0.25)), (200, (0.10, 0.02, 0.22))):
                self._paint(BONE, density, *self._ellipsoid(centre, radii, np.degrees(angle) + 90))

    def draw_lesions(self, kind):
        """Draws the patient's lesions and returns the label of each slice."""
        labels = np.zeros(len(self.z), np.int64)
        for _ in range(int(self.rng.integers(*LESIONS)) if kind else 0):
            labels[self.draw_lesion(kind)] = kind
        return labels

    def draw_lesion(self, kind):
        """Draws one into some neighbouring slices and returns which."""
        rng = self.rng
        volumes = np.array([np.prod(radii) for *_, radii, _ in HOSTS])
        *_, host, extent, _ = HOSTS[rng.choice(len(HOSTS), p=volumes / volumes.sum())]
        centre = host + rng.uniform(-0.55, 0.55, 3) * extent
        count = min(len(self.z), int(rng.integers(4, 8)))
        first = np.clip(np.abs(self.z - centre[2]).argmin() - count // 2, 0, len(self.z) - count)
        here = slice(first, first + count)

        radius, stretch, density = rng.uniform(0.15, 0.30), rng.uniform(0.8, 1.25), rng.uniform(-120, -70)
        t = (np.arange(count, dtype=np.float32)[:, None, None] - (count - 1) / 2) / (count / 2)     # (K, 1, 1)
        taper = radius * (1 - t ** 2) ** 0.25                       # |t| < 1: every slice has its section
        u = (self.x[here] - float(centre[0])) / (taper * stretch)   # (K, H, W)
        v = (self.y[here] - float(centre[1])) / (taper / stretch)   # (K, H, W)
        patches = 0                                                 # waves from six sides: none stands out
        for side in range(6):
            c, s, number = math.cos(side * math.pi / 6), math.sin(side * math.pi / 6), rng.uniform(5, 9)
            drift, phase = rng.uniform((-3, 0), (3, 2 * math.pi)).tolist()
            patches += np.sin(number * (c * u + s * v) + drift * t + phase) / math.sqrt(3)  # deviation 1 in the end
        q = np.sqrt(u ** 2 + v ** 2)                                # 1 at the edge of a round lesion
        if CLASSES[kind] == "tumour":
            q *= 1 + 0.15 * np.sin(3 * np.arctan2(v, u) + rng.uniform(0, 2 * math.pi)) + 0.1 * patches  # lobes
        inside, hu = np.clip(0.5 + (1 - q) * self._pixels((radius, radius)), 0, 1), self.hu[here]
        if CLASSES[kind] == "tumour":
            density += 110 * patches + 90 * np.exp(-((q - 0.85) / 0.15) ** 2)        # the rim takes up contrast medium
        if CLASSES[kind] == "calcification":
            peaks = patches - float(np.quantile(patches[inside > 0.9], 0.82))
            density += 400 * np.clip(2 * peaks, 0, 1) - 50          # -50 keeps the mean where it was
        hu += inside * (density - hu)
        return here

    def scan(self):
        """The picture, (S, H, W) uint8, that a scanner drawn for this patient makes.

        The noise comes last, as how much is drawn depends on the size. Its level grows with the size like the blur,
        which keeps its strength and its grain the same relative to the body.
        """
        rng, (row, col), zoom = self.rng, (self.line[:, None], self.line[None]), self.size / 96
        noise_level, ring_level, streak_level = rng.uniform((10, 0, 0), (22, 6, 5)).tolist()
        level, width, blur = rng.uniform((10, 340, 0.45), (60, 500, 0.80)).tolist()  # blur in pixels at 96
        distance, curvature, shell = rng.uniform((0.0, 0.05, 850), (0.03, 0.25, 1000)).tolist()
        spokes, phases = rng.integers(12, 40, 3).tolist(), np.float32(rng.uniform(0, 6.3, (3, len(self.hu), 1, 1)))

        gap = row - (self.shift[1] + self.scale[1] * (1.06 + self.fat) + distance - curvature * col ** 2)
        table = (np.exp(-(gap / 0.03) ** 4) + np.exp(-((gap - 0.14) / 0.03) ** 4)) * (np.abs(col) < 0.8)  # two shells
        hu = np.maximum(self.hu, shell * table - 1000)
        rings = ring_level * rng.standard_normal(self.size, np.float32)
        rings = rings[(np.hypot(row, col) * self.size / 2).astype(int)]             # (H, W)
        angle = np.arctan2(row - self.shift[1] - self.scale[1] / 2, col - self.shift[0])  # streaks start at the spine
        waves = (np.sin(number * angle + phase) for number, phase in zip(spokes, phases, strict=True))
        streaks = streak_level * sum(waves)                         # (S, H, W)
        noise = noise_level * zoom * rng.standard_normal(hu.shape, np.float32)
        hu += (noise + rings + streaks) * np.where(hu > -500, np.float32(1.3), np.float32(0.3))     # less in air
        fx, fy = np.fft.rfftfreq(self.size), np.fft.fftfreq(self.size)[:, None]
        transfer = np.exp(-2 * (math.pi * blur * zoom) ** 2 * (fx ** 2 + fy ** 2)).astype(np.float32)  # of a Gaussian
        hu = np.fft.irfft2(np.fft.rfft2(hu) * transfer, s=hu.shape[1:])
        return np.clip((hu - level) / width * 255 + 127.5, 0, 255).astype(np.uint8)
