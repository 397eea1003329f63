"""The picture that the authors' released procedure was run on, drawn again from its seed."""

import hashlib

import numpy as np

SHAPE = (1920, 2560)
SHA256 = "a0706053da41ab22e5ba61ea682e59b830adde5f456a5f642f9650b1c5cf713c"


def ellipse(rows: np.ndarray, columns: np.ndarray, angle: float, semi_axes: tuple[float, float]) -> np.ndarray:
    "A turned ellipse around the origin of the coordinates, as a mask."
    along = columns * np.cos(angle) + rows * np.sin(angle)
    across = -columns * np.sin(angle) + rows * np.cos(angle)
    return (along / semi_axes[0]) ** 2 + (across / semi_axes[1]) ** 2 < 1


def draw_smear() -> np.ndarray:  # (1920, 2560, 3) uint8 RGB
    "Eight cells; the first touches the upper border, the second comes close to the right one."
    height, width = SHAPE
    rng = np.random.RandomState(8000)
    image = np.ones((*SHAPE, 3)) * np.array([228, 196, 206.0]) + rng.normal(0, 6, (*SHAPE, 3))
    rows, columns = np.mgrid[:height, :width]
    cells = []  # row, column and radius of the nuclei
    while len(cells) < 8:
        r = rng.uniform(80, 110)
        y, x = rng.uniform(r * 0.8, height - r * 0.8), rng.uniform(r * 0.8, width - r * 0.8)
        y, x = {0: (r * 0.9, width * 0.4), 1: (height * 0.5, width - r * 1.05)}.get(len(cells), (y, x))
        if all((y - a) ** 2 + (x - b) ** 2 > (1.75 * (r + c)) ** 2 for a, b, c in cells):
            cells.append((y, x, r))
    for y, x, r in cells:
        angle = rng.uniform(0, np.pi)
        down, right = rng.uniform(-0.25, 0.25, 2) * r
        cytoplasm = ellipse(rows - y - down, columns - x - right, angle, (1.65 * r, 1.4 * r))
        image[cytoplasm] = np.array([160, 165, 222.0]) + rng.normal(0, 6, (int(cytoplasm.sum()), 3))
    for y, x, r in cells:
        nucleus = (rows - y) ** 2 + (columns - x) ** 2 < r * r
        image[nucleus] = np.array([88, 44, 122.0]) + rng.normal(0, 8, (int(nucleus.sum()), 3))
    image = np.clip(image, 1, 255).round().astype(np.uint8)
    digest = hashlib.sha256(image.tobytes()).hexdigest()
    if digest != SHA256:
        raise RuntimeError(f"the drawn picture has the digest {digest} instead of {SHA256}: NumPy draws other numbers")
    return image
