"""Small valid files of every kind that is read, and what damage does to their readers.

`python tests/fuzz.py --mutants 40 --seed 0` prints one line of JSON per reader; `test_fuzz.py` runs it.
"""

import argparse
import faulthandler
import io
import json
import logging
import random
import re
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
import zarr
from PIL import Image
from test_inputs import PICTURE, SMEAR, encoded, tiff

from segpc_nb.archives import unpack_dataset
from segpc_nb.cells import CYTOPLASM, NUCLEUS, cell_from_parts
from segpc_nb.checkpoints import save_checkpoint
from segpc_nb.config import BundleConfig, TrainConfig
from segpc_nb.files import PictureError, checksum, open_cached
from segpc_nb.history import read_changes, write_changes
from segpc_nb.images import read_mask
from segpc_nb.journal import JOURNAL, read_journal, write_results_table
from segpc_nb.keras_weights import read_keras
from segpc_nb.models import UNet, load_network, save_network
from segpc_nb.overlaps import read_overlaps, write_overlaps
from segpc_nb.pipeline import read_bundle_config
from segpc_nb.presets import load_preset, preset_yaml
from segpc_nb.results import cells_table, read_cells_csv, write_cells_csv
from segpc_nb.review import read_review
from segpc_nb.slides import Slide, pixel_size, read_any
from segpc_nb.submission import read_submission, write_submission
from segpc_nb.training import load_state

SECONDS, BYTES = 20, 2**31  # that one mutant may take, and may need beside what the process has
MASK = np.zeros((60, 80), np.uint8)
MASK[10:30, 10:30], MASK[15:25, 15:25] = CYTOPLASM, NUCLEUS


@dataclass(frozen=True)
class Reader:
    "How a kind of file is made and read, and what holds for everything that was read."

    make: Callable[[Path], Path]  # writes a valid file into a folder
    read: Callable[[Path], object]
    right: Callable[[object], bool]  # for what a damaged file gave
    checked: bool = False  # the format has checksums: what was read is what was written
    cost: int = 1  # a fraction of the mutants is tried of slow readers


def bit_fields():
    sizes = struct.pack("<IHHIIiiHHIIiiII", 66 + 4 * 4800, 0, 0, 66, 40, 80, 60, 1, 32, 3, 4 * 4800, 0, 0, 0, 0)
    rows = np.dstack([SMEAR, np.zeros((60, 80), np.uint8)])[::-1]
    return b"BM" + sizes + struct.pack("<3I", 0xFF, 0xFF00, 0xFF0000) + rows.tobytes()


def file_of(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


def read_and_measure(path):
    image = read_any(path)
    size = pixel_size(path)
    return (image[:64, :64] if isinstance(image, Slide) else image), size


def is_picture(found):
    image, size = found
    return image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and (size is None or 0.02 <= size <= 2)


def is_mask(mask):
    return np.isin(mask, (0, CYTOPLASM, NUCLEUS)).all()


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010F] = 6, "camera"
XML = {"axes": "YXS", "PhysicalSizeX": 0.2, "PhysicalSizeXUnit": "µm"}
PICTURES = {
    "png": encoded(PICTURE, "PNG", dpi=(300, 300)),
    "palette.png": encoded(PICTURE.quantize(64), "PNG"),
    "jpg": encoded(PICTURE, "JPEG", quality=95, exif=EXIF, dpi=(300, 300)),
    "progressive.jpg": encoded(PICTURE, "JPEG", quality=95, progressive=True),
    "mpo.jpg": encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE.resize((40, 30))]),
    "bmp": encoded(PICTURE, "BMP"),
    "fields.bmp": bit_fields(),
    "tif": tiff(resolution=(40000, 40000), resolutionunit="CENTIMETER"),
    "lzw.tif": tiff(compression="lzw", predictor=True),
    "deflate.tif": tiff(compression="zlib", tile=(16, 16)),
    "packbits.tif": tiff(compression="packbits", rowsperstrip=7),
    "jpeg.tif": tiff(compression="jpeg", tile=(32, 32)),
    "big.tif": tiff(bigtiff=True, byteorder=">"),
    "planar.tif": tiff(np.moveaxis(SMEAR, 2, 0).copy(), planarconfig="separate"),
    "palette.tif": encoded(PICTURE.quantize(64), "TIFF"),
    "ome.tif": tiff(metadata=XML, ome=True),
    "imagej.tif": tiff(imagej=True, resolution=(5, 5), metadata={"unit": "um"}),
}
MASKS = {
    "mask.png": encoded(Image.fromarray(MASK), "PNG"),
    "mask.bmp": encoded(Image.fromarray(MASK), "BMP"),
    "mask.tif": tiff(MASK, photometric="minisblack", compression="zlib"),
}


def make_zarr(folder, damaged):
    group = zarr.create_group(folder / "a.zarr")
    group.create_array("0", data=SMEAR.transpose(2, 0, 1), chunks=(3, 32, 32))
    axes = [{"name": name, "unit": "micrometer"} for name in "cyx"]
    scale = [{"type": "scale", "scale": [1, 0.2, 0.2]}]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}]
    return folder / "a.zarr" / damaged


def zarr_of(path):
    return read_and_measure(next(parent for parent in path.parents if parent.suffix == ".zarr"))


def make_archive(folder):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as files:
        files.writestr("x/1.png", PICTURES["png"])
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as files:
        files.writestr("train/y/1_1.png", MASKS["mask.png"])
        files.writestr("train/y/2_1.bmp", MASKS["mask.bmp"])
        files.writestr("train.zip", inner.getvalue())
    return folder / "a.zip"


def unpacked(path):
    with tempfile.TemporaryDirectory(dir=path.parent) as place:
        out = Path(place) / "out"
        try:
            unpack_dataset(path, out)
        except Exception:
            assert not out.exists(), "something was left"
            raise
        return {file.read_bytes() for file in out.rglob("*") if file.is_file()}


NUCLEI, CYTOPLASM_OF = np.zeros((6, 6), bool), np.ones((6, 6), bool)
NUCLEI[2:4, 2:4] = True
CELLS = {
    id: [
        cell_from_parts(k, (10 * k, 5, 10 * k + 6, 11), NUCLEI, CYTOPLASM_OF & ~NUCLEI, scale=0.5, score=0.25 * k)
        for k in (1, 2, 3)
    ]
    for id in ("1", "2a")
}
SHAPES = {"1": (60, 80), "2a": (60, 80)}


def make_submission(name):
    def make(folder):
        write_submission(folder / name, CELLS, dict.fromkeys(CELLS, (1080, 1440)))
        return folder / name

    return make


def submission_masks(path):
    return {id: [(cell.bbox, cell.mask.tobytes()) for cell in cells] for id, cells in read_submission(path).items()}


def fits_the_grid(found):
    boxes = [box for cells in found.values() for box, _ in cells]
    return all(0 <= box[0] < box[2] <= 1080 and 0 <= box[1] < box[3] <= 1440 for box in boxes)


def make_keras(folder):
    with h5py.File(folder / "a.h5", "w") as file:
        group = file.create_group("model_weights")
        group.attrs["layer_names"] = [b"conv", b"norm"]
        for layer, tensors in {"conv": {"kernel": (3, 3, 3, 4), "bias": (4,)}, "norm": {"gamma": (4,)}}.items():
            part = group.create_group(layer)
            part.attrs["weight_names"] = [f"{layer}/{name}:0".encode() for name in tensors]
            for name, shape in tensors.items():
                part.create_dataset(f"{layer}/{name}:0", data=np.ones(shape, np.float32))
    return folder / "a.h5"


def are_layers(layers):
    return all(tensor.dtype == np.float32 for layer in layers for tensor in layer.tensors.values())


def make_bundle(folder):
    config = BundleConfig((24, 32), (0.5, 1.75), (32, 32), (1.5,), operating_points={"precise": 0.5})
    (folder / "bundle.json").write_text(json.dumps(asdict(config), indent=2))
    return folder / "bundle.json"


def make_network(damaged):
    def make(folder):
        torch.manual_seed(0)
        save_network(UNet(3, 1, (4, 8)), folder / "nucleus")
        return folder / "nucleus" / damaged

    return make


def weights_of(path):
    return {name: tensor.numpy() for name, tensor in load_network(path.parent).state_dict().items()}


def are_weights(found):
    return all(array.size < 10**6 for array in found.values())


def make_journal(folder):
    lines = []
    for id, cells in CELLS.items():
        rows = cells_table({id: cells}, SHAPES).drop(columns=["nc_ratio", "doubtful"]).to_dict("records")
        about = {"picture": id, "path": f"{id}.png", "content": "0" * 32, "shape": [60, 80], "key": "0" * 16}
        lines.append(json.dumps(about | {"way": {}, "slide": False, "cells": rows}))
    (folder / JOURNAL).write_text("\n".join(lines) + "\n")
    return folder / JOURNAL


def table_of_journal(path):
    journal = read_journal(path.parent)
    write_results_table(path.parent, cells_table({}, {}), journal)
    return read_cells_csv(path.parent / "cells.csv")


def make_cells(folder):
    write_cells_csv(folder / "cells.csv", CELLS, SHAPES)
    return folder / "cells.csv"


def are_rows(table):
    numbered = table["id"].to_numpy(float)
    areas = [table[name].to_numpy(float) for name in table if name.endswith("_area")]
    return (
        table["score"].between(0, 1).all()
        and (numbered == numbered.round()).all()
        and (numbered >= 1).all()
        and all((area >= 0).all() and np.isfinite(area).all() for area in areas)
        and not table.duplicated(["picture", "id"]).any()
    )


KEYS = [("train", id) for id in "1234"]


def make_overlaps(folder):
    columns = ["split", "id", "other_split", "other_id", "dx", "dy", "fraction", "correlation", "matches"]
    write_overlaps(
        folder / "overlaps.csv",
        KEYS,
        pd.DataFrame([["train", "1", "train", "2", 5, -3, 0.5, 0.9, 12]], columns=columns),
    )
    return folder / "overlaps.csv"


def pairs_of(path):
    return read_overlaps(path, "train", set("1234"))


def are_pairs(pairs):
    return all(len(pair) == 2 and set(pair) <= set("1234") for pair in pairs)


CONFIG = TrainConfig(network={"name": "unet"}, size=(24, 32))


def make_state(folder):
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 4, 3)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": {"epoch": 3, "best": 0.5},
    }
    save_checkpoint(folder / "latest.pt", state | {"config": json.dumps(asdict(CONFIG)), "data": ""})
    return folder / "latest.pt"


def state_of(path):
    return load_state(path.parent, CONFIG)


def make_preset(folder):
    (folder / "own.yaml").write_text(preset_yaml(load_preset("smoke")))
    return folder / "own.yaml"


def make_review(folder):
    mark = {"picture": "1", "cell": 1, "outline": "abc", "mark": "reject", "type": "", "note": "no cell"}
    review = {"format": "segpc review", "version": 1, "cells": [mark, mark | {"cell": 2, "outline": "d", "mark": ""}]}
    (folder / "review.json").write_text(json.dumps(review, indent=1))
    return folder / "review.json"


def are_marks(review):
    marks = [mark for cells in review.values() for mark in cells.values()]
    return all(mark["mark"] in ("accept", "reject", "other", "") and isinstance(mark["cell"], int) for mark in marks)


def make_changes(folder):
    row = {"picture": "1", "id": 1, "new_id": "", "outline": "abc", "mark": "reject", "type": "", "note": "=no"}
    write_changes(folder, pd.DataFrame([row, row | {"id": 2, "new_id": "1", "outline": "d", "mark": ""}]))
    return folder / "changes.csv"


def are_changes(table):
    return table["id"].str.fullmatch("[0-9]+").all() and table["new_id"].str.fullmatch("[0-9]*").all()


def make_cached(folder):
    np.save(folder / "a.npy", SMEAR)
    with open(folder / "a.npy", "ab") as file:
        file.write(checksum(SMEAR))
    return folder / "a.npy"


def from_cache(path):
    array = open_cached(path, SMEAR.shape)
    return SMEAR if array is None else np.array(array)


def anything(found):
    return True


READERS = (
    {
        f"picture {name}": Reader(file_of(f"a.{name}", content), read_and_measure, is_picture, name.endswith("png"))
        for name, content in PICTURES.items()
    }
    | {
        name: Reader(file_of(f"1_1.{name}", content), read_mask, is_mask, "png" in name)
        for name, content in MASKS.items()
    }
    | {
        "OME-Zarr metadata": Reader(lambda folder: make_zarr(folder, "zarr.json"), zarr_of, is_picture, cost=4),
        "OME-Zarr array": Reader(lambda folder: make_zarr(folder, "0/zarr.json"), zarr_of, is_picture, cost=4),
        "OME-Zarr chunk": Reader(lambda folder: make_zarr(folder, "0/c/0/0/0"), zarr_of, is_picture, cost=4),
        "data set zip": Reader(make_archive, unpacked, lambda found: found <= {PICTURES["png"], *MASKS.values()}),
        "submission zip": Reader(make_submission("s.zip"), submission_masks, fits_the_grid, True),
        "submission txt": Reader(make_submission("s.txt"), submission_masks, fits_the_grid),
        "HDF5 of Keras": Reader(make_keras, read_keras, are_layers),
        "bundle.json": Reader(make_bundle, lambda path: read_bundle_config(path.parent), anything),
        "config.json": Reader(make_network("config.json"), weights_of, are_weights, cost=2),
        "model.safetensors": Reader(make_network("model.safetensors"), weights_of, are_weights, cost=2),
        "journal": Reader(make_journal, table_of_journal, are_rows, cost=4),
        "cells.csv": Reader(make_cells, read_cells_csv, are_rows, cost=2),
        "overlaps.csv": Reader(make_overlaps, pairs_of, are_pairs, cost=4),
        "latest.pt": Reader(make_state, state_of, anything, True),
        "preset YAML": Reader(make_preset, load_preset, anything, cost=8),
        "review.json": Reader(make_review, read_review, are_marks),
        "changes.csv": Reader(make_changes, lambda path: read_changes(path.parent), are_changes),
        "cached array": Reader(make_cached, from_cache, anything, True),
    }
)  # fmt: skip

EXTREMES = (0, 1, -1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (
    b"1e999", b"-1", b"0", b"NaN", b"Infinity", b"9" * 40, b"1" + b"0" * 400, b"true", b"null", b'""', b"[]", b"{}",
    b"-0.0", b"1e-320", b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"=1+1", b"0x10", b"1_0", b"", b"\0", b"*a",
    b"!!python/object:os.system",
)  # fmt: skip
NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")


def mutated(content: bytes, chance: random.Random) -> bytes:
    "A file with one to three kinds of damage."
    for _ in range(chance.choice((1, 1, 2, 3))):
        content = chance.choice(DAMAGE)(bytearray(content), chance)
    return bytes(content)


def place(content, chance):
    "A random place, often in the head or the end, where the numbers are."
    size = max(1, len(content))
    return chance.choice(
        (chance.randrange(size), chance.randrange(min(size, 300)), size - 1 - chance.randrange(min(size, 300)))
    )


def flip_bits(content, chance):
    for _ in range(chance.choice((1, 1, 4, 30))):
        if content:
            content[place(content, chance)] ^= 1 << chance.randrange(8)
    return content


def overwrite(content, chance):
    start, length = place(content, chance), chance.choice((1, 2, 8, 64, 512))
    length = min(length, len(content) - start)
    byte = chance.choice((0, 255, None))
    content[start : start + length] = chance.randbytes(length) if byte is None else bytes([byte]) * length
    return content


def cut(content, chance):
    start = place(content, chance)
    return (
        content[:start]
        if chance.random() < 0.5
        else content[:start] + content[start + chance.choice((1, 2, 8, 64, 512)) :]
    )


def splice(content, chance):
    start, other, length = place(content, chance), place(content, chance), chance.choice((1, 4, 16, 128, 1024))
    piece = content[other : other + length]
    return content[:start] + piece + content[start + chance.choice((0, len(piece))) :]


def extreme_field(content, chance):
    size, order = chance.choice((1, 2, 4, 8)), chance.choice(("little", "big"))
    start = place(content, chance)
    content[start : start + size] = (chance.choice(EXTREMES) % 256**size).to_bytes(size, order)
    return content


def extreme_number(content, chance):
    found = list(NUMBER.finditer(content))
    if not found:
        return content
    match = chance.choice(found)
    return content[: match.start()] + chance.choice(WORDS) + content[match.end() :]


def lines(content, chance):
    "Lose, double or exchange lines."
    rows = content.split(b"\n")
    a, b = chance.randrange(len(rows)), chance.randrange(len(rows))
    kind = chance.randrange(3)
    if kind == 0:
        del rows[a]
    elif kind == 1:
        rows.insert(a, rows[b])
    else:
        rows[a], rows[b] = rows[b], rows[a]
    return bytearray(b"\n".join(rows))


DAMAGE = (flip_bits, overwrite, cut, splice, extreme_field, extreme_number, lines)


def same(a, b):
    "Equal, whatever they are made of."
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return np.array_equal(a, b)


def is_ours(error, folder):
    "An error of the project that names a file of the folder."
    return type(error) in (ValueError, PictureError, FileNotFoundError) and str(folder) in str(error)


def fault_of(reader, path, folder, whole):
    "Read a damaged file in a folder: whether it was refused, and what is wrong with that."
    try:
        found = reader.read(path)
    except Exception as error:  # noqa: BLE001 - which one, is the question
        return True, None if is_ours(error, folder) else "".join(traceback.format_exception(error)[-3:])
    if not reader.right(found):
        return False, f"read as {str(found)[:200]}"
    return False, "damage was not noticed" if reader.checked and not same(found, whole) else None


def fuzz(name, reader, mutants, seed, keep):
    "Read damaged files of one kind, and count."
    chance, counts = random.Random(f"{name} {seed}"), {"mutants": 0, "refused": 0, "read": 0, "wrong": []}
    with tempfile.TemporaryDirectory() as folder:
        path = reader.make(Path(folder))
        whole, content = reader.read(path), path.read_bytes()
        assert reader.right(whole), name
        while counts["mutants"] < max(1, mutants // reader.cost):
            if (damaged := mutated(content, chance)) == content:
                continue
            path.write_bytes(damaged)
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            refused, fault = fault_of(reader, path, folder, whole)
            faulthandler.cancel_dump_traceback_later()
            counts["mutants"] += 1
            counts["refused" if refused else "read"] += 1
            if fault:
                counts["wrong"].append(fault.replace(folder, "FOLDER"))
                if keep:
                    (keep / f"{name} {counts['mutants']}{path.suffix}".replace("/", "_")).write_bytes(damaged)
    return counts


def limit_memory():
    "Let the process have only BYTES more than it has."
    if sys.platform == "linux":
        import resource

        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, resource.RLIM_INFINITY))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutants", type=int, default=40, help="per reader; fewer of slow ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="readers whose name contains this")
    parser.add_argument("--keep", type=Path, help="folder that gets files on which a reader failed")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    limit_memory()
    for name, reader in READERS.items():
        if given.only in name:
            counts = fuzz(name, reader, given.mutants, given.seed, given.keep)
            print(json.dumps({"reader": name, **counts}), flush=True)


if __name__ == "__main__":
    main()
