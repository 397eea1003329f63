"""What happens to every kind of file: each is made, given to `segpc`, and compared with results/inputs.csv.

`SEGPC_WRITE=1 pytest tests/test_inputs.py` writes that table anew; the chapter 07_inputs shows it.
"""

import csv
import io
import os
import shutil
import struct
import sys
import unicodedata
import zipfile
import zlib
from functools import cache
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from segpc_nb.cli import main, make_parser
from segpc_nb.inputs import folder_files

TABLE = Path(__file__).parent.parent / "results" / "inputs.csv"
COLUMNS = ("group", "kind", "outcome", "exit", "words")
SMEAR = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8), (0, 0), 3)
PICTURE = Image.fromarray(SMEAR)


def encoded(image, form, **options):
    handle = io.BytesIO()
    image.save(handle, form, **options)
    return handle.getvalue()


def tiff(array=SMEAR, **options):
    handle = io.BytesIO()
    tifffile.imwrite(handle, array, **{"photometric": "rgb"} | options)
    return handle.getvalue()


def pages(*arrays):
    handle = io.BytesIO()
    with tifffile.TiffWriter(handle) as file:
        for array in arrays:
            file.write(array, photometric="rgb")
    return handle.getvalue()


def damaged(content, places=8):
    "Eight bytes in a row are others."
    middle = len(content) // 2
    return (
        content[:middle] + bytes(255 - byte for byte in content[middle : middle + places]) + content[middle + places :]
    )


def claims(width, height):
    "A small PNG whose header announces another size."
    content = bytearray(encoded(PICTURE, "PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def bit_fields():
    sizes = struct.pack("<IHHIIiiHHIIiiII", 66 + 4 * 4800, 0, 0, 66, 40, 80, 60, 1, 32, 3, 4 * 4800, 0, 0, 0, 0)
    rows = np.dstack([SMEAR, np.zeros((60, 80), np.uint8)])[::-1]
    return b"BM" + sizes + struct.pack("<3I", 0xFF, 0xFF00, 0xFF0000) + rows.tobytes()


def circle():
    "A TIFF whose page is followed by itself."
    content = tiff()
    start = int.from_bytes(content[4:8], "little")
    end = start + 2 + 12 * int.from_bytes(content[start : start + 2], "little")
    return content[:end] + content[4:8] + content[end + 4 :]


def bomb():
    handle = io.BytesIO()
    with tifffile.TiffWriter(handle) as file:
        options = {"shape": SMEAR.shape, "dtype": np.uint8, "photometric": "rgb", "tile": (30_000, 30_000)}
        file.write(iter([zlib.compress(bytes(10**6))]), compression="deflate", **options)
    return handle.getvalue()


def orientation(form):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(PICTURE, form, **({"exif": exif, "quality": 95} if form == "JPEG" else {"tiffinfo": {0x0112: 6}}))


GLASS = PICTURE.convert("RGBA")
GLASS.putpixel((3, 3), (1, 2, 3, 100))
XML = '<OME><Image ID="Image:0"><Pixels ID="Pixels:0" Type="uint8" SizeX="80" SizeY="60" SizeC="3"/></Image></OME>'
PNG, JPEG, LZW = encoded(PICTURE, "PNG"), encoded(PICTURE, "JPEG", quality=95), tiff(compression="lzw")
FILES = {
    "zero bytes": ("a.png", b""),
    "cut off in the middle, PNG": ("a.png", PNG[: len(PNG) // 2]),
    "cut off in the middle, JPEG": ("a.jpg", JPEG[: len(JPEG) // 2]),
    "cut off in the middle, BMP": ("a.bmp", encoded(PICTURE, "BMP")[:7000]),
    "cut off in the middle, TIFF": ("a.tif", tiff()[:7000]),
    "8 damaged bytes, PNG": ("a.png", damaged(PNG)),
    "8 bytes lost, JPEG": ("a.jpg", JPEG[:1000] + JPEG[1008:]),
    "8 damaged bytes that no decoder notices, JPEG": ("a.jpg", damaged(JPEG)),
    "8 damaged bytes, TIFF with LZW": ("a.tif", damaged(LZW)),
    "8 damaged bytes, TIFF with Deflate": ("a.tif", damaged(tiff(compression="zlib"))),
    "8 damaged bytes, TIFF of JPEG tiles": ("a.tif", damaged(tiff(compression="jpeg"))),
    "another suffix than the content": ("a.bmp", PNG),
    "text called .png": ("a.png", b"<!DOCTYPE html>"),
    "1 bit": ("a.png", encoded(PICTURE.convert("1"), "PNG")),
    "16 bits": ("a.png", cv2.imencode(".png", SMEAR.astype(np.uint16))[1].tobytes()),
    "floats": ("a.tif", tiff(SMEAR.astype(np.float32))),
    "grey": ("a.png", encoded(PICTURE.convert("L"), "PNG")),
    "grey with alpha": ("a.png", encoded(PICTURE.convert("LA"), "PNG")),
    "palette": ("a.png", encoded(PICTURE.quantize(64), "PNG")),
    "RGBA, opaque": ("a.png", encoded(PICTURE.convert("RGBA"), "PNG")),
    "RGBA, not opaque": ("a.png", encoded(GLASS, "PNG")),
    "CMYK": ("a.jpg", encoded(PICTURE.convert("CMYK"), "JPEG")),
    "CIELAB": ("a.tif", tiff(photometric="cielab")),
    "five channels": ("a.tif", tiff(np.zeros((20, 30, 5), np.uint8), photometric="minisblack", planarconfig="contig")),
    "EXIF orientation in a JPEG": ("a.jpg", orientation("JPEG")),
    "orientation in a TIFF": ("a.tif", orientation("TIFF")),
    "32-bit BMP with bit fields": ("a.bmp", bit_fields()),
    "1 x 1 pixel": ("a.png", encoded(PICTURE.crop((0, 0, 1, 1)), "PNG")),
    "1 x 5000 pixels": ("a.png", encoded(PICTURE.resize((1, 5000)), "PNG")),
    "a header that claims 30,000 x 20,000": ("a.png", claims(30_000, 20_000)),
    "a tile of 30,000 x 30,000": ("a.tif", bomb()),
    "animated PNG": ("a.png", encoded(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(180)])),
    "two JPEGs in one file (MPO)": ("a.jpg", encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE])),
    "TIFF of three pages": ("a.tif", pages(SMEAR, SMEAR, SMEAR)),
    "TIFF, thumbnail first": ("a.tif", pages(SMEAR[::4, ::4], SMEAR)),
    "TIFF with smaller copies": ("a.tif", pages(SMEAR, SMEAR[::2, ::2], SMEAR[::4, ::4])),
    "TIFF of pages in a circle": ("a.tif", circle()),
    "ImageJ stack": ("a.tif", tiff(np.stack([SMEAR, SMEAR]), imagej=True)),
    "OME-XML that breaks the rules": ("a.tif", tiff(description=XML, metadata=None)),
    ".jfif": ("a.jfif", JPEG),
    ".jpe": ("a.jpe", JPEG),
    ".heic": ("a.heic", JPEG),
    ".jp2": ("a.jp2", JPEG),
    ".svs": ("a.svs", tiff()),
    ".webp": ("a.webp", encoded(PICTURE, "WEBP")),
    "no suffix": ("a", PNG),
    "hidden": (".a.png", PNG),
    "name with umlaut in NFD": (unicodedata.normalize("NFD", "Präparat.png"), PNG),
    "name that is not UTF-8": (os.fsdecode(b"Pr\xe4parat.png"), PNG),
    "name beyond Latin": ("μυελός 骨髄 \N{MICROSCOPE}.png", PNG),
    "name of 250 characters": ("a" * 246 + ".png", PNG),
    "name with spaces": ("a b (1).png", PNG),
    "name with a newline": ("a\nb.png", PNG),
    "name with a leading dash": ("-a.png", PNG),
}


def make_zarr(folder):
    group = zarr.create_group(folder / "a.zarr")
    group.create_array("0", data=SMEAR.transpose(2, 0, 1))
    group.attrs["multiscales"] = [{"axes": [{"name": name} for name in "cyx"], "datasets": [{"path": "0"}]}]


def sparse(folder):
    with open(folder / "a.png", "wb") as file:
        file.truncate(3 * 10**9)


def two_of_a_name(folder):
    (folder / "a.png").write_bytes(PNG)
    (folder / "a.jpg").write_bytes(JPEG)


def link(target):
    return lambda folder: (folder / "a.png").symlink_to(target)


def linked_picture(folder):
    (folder / ".store").write_bytes(PNG)
    (folder / "a.png").symlink_to(".store")


def same_content(folder):
    (folder / "a.png").write_bytes(PNG)
    (folder / "b.png").write_bytes(PNG)


def folders_in_a_circle(folder):
    (folder / "a").mkdir()
    (folder / "a" / "p.png").write_bytes(PNG)
    (folder / "a" / "back").symlink_to("..")


OTHERS = {
    "the same picture under two names": same_content,
    "folders in a circle of links": folders_in_a_circle,
    "OME-Zarr": make_zarr,
    "folder called .png": lambda folder: (folder / "a.png").mkdir(),
    "link to a picture": linked_picture,
    "link that leads nowhere": link("nowhere.png"),
    "link to itself": link("a.png"),
    "link to /dev/zero": link("/dev/zero"),
    "pipe": lambda folder: os.mkfifo(folder / "a.png"),
    "sparse file of 3 GB": sparse,
    "two pictures of one name": two_of_a_name,
}


PARSER = cache(make_parser)  # making it takes longer than all else


class Nothing:
    "A segmenter that finds nothing, at once."

    def numbered(self, index):
        return self

    def segment(self, image, *_):
        assert image[0:1, 0:1].shape == (1, 1, 3)
        return []


def run(words, capsys, folder):
    "Exit code, and what was said, without the names of folders."
    capsys.readouterr()
    with (
        mock.patch("segpc_nb.batch.load_segmenter", lambda options: Nothing()),
        mock.patch("segpc_nb.cli.make_parser", PARSER),
    ):
        code = main(list(map(str, words)))
    said = "".join(capsys.readouterr())
    return code, said.replace(f"{folder}{os.sep}", "").replace(str(folder), "FOLDER")


def words_of(said):
    "The lines that complain."
    lines = [line for line in said.splitlines() if line.startswith(("error", "warning", "note", "segpc:", "left out"))]
    texts = [line.removeprefix("segpc: ").removeprefix("error: ").removeprefix("failed: ") for line in lines]
    texts = [
        text.partition(" ")[2].strip() if text.startswith(("error ", "warning ", "note ")) else text for text in texts
    ]
    return " | ".join(dict.fromkeys(texts)).encode(errors="backslashreplace").decode()


def picture_row(kind, folder, capsys):
    out = folder.parent / "out"
    (folder / "good.png").write_bytes(PNG)  # whatever the file is, this one is predicted
    checked, _ = run(["check", folder], capsys, folder)
    code, said = run(["predict", folder, "--out", out], capsys, folder)
    done = (out / "predicted.jsonl").read_text() if (out / "predicted.jsonl").exists() else ""
    stems = [path.stem for path in folder_files(folder)[0] if path.stem != "good"]
    if "left out" in said:
        outcome = "left out"
    elif code:
        outcome = "refused"
    else:
        outcome = "read" if stems else "ignored"
    assert done.count('"picture"') >= 1 + (outcome == "read") or code == 2, kind
    assert bool(checked) == bool(code), kind
    return dict(zip(COLUMNS, ("pictures", kind, outcome, code, words_of(said))))


def mask(values=((20, 20), (20, 40)), size=(60, 80), at=(10, 10)):
    full, part = np.zeros(size, np.uint8), np.repeat(np.repeat(np.array(values, np.uint8), 8, 0), 8, 1)
    full[at[0] : at[0] + part.shape[0], at[1] : at[1] + part.shape[1]] = part
    return full


def palette(colours, numbers=(20, 40)):
    image = Image.fromarray(mask()).convert("P")
    table = [0] * 768
    for number, colour in zip(numbers, colours):
        table[3 * number : 3 * number + 3] = colour
    image.putpalette(table)
    return encoded(image, "PNG")


def grey_png(values, **options):
    return encoded(Image.fromarray(values), "PNG", **options)


EMPTY = np.zeros((60, 80), np.uint8)
OTHER = mask().T[:60, :60].repeat(2, 1)[:, :80]
OPAQUE = np.where(mask(), 255, 0).astype(np.uint8)
MASKS = {  # files of y beside the picture 1; a good mask is 1_1.png
    "as it should be": {"1_1.png": grey_png(mask())},
    "three equal channels": {"1_1.png": grey_png(np.dstack([mask()] * 3))},
    "one of three channels": {"1_1.png": grey_png(np.dstack([mask(), EMPTY, EMPTY]))},
    "three channels that differ": {"1_1.png": grey_png(np.dstack([mask(), OTHER, EMPTY]))},
    "palette of 20 and 40, any colours": {"1_1.png": palette([(0, 255, 0), (255, 0, 0)])},
    "palette, same blue for both": {"1_1.png": palette([(0, 255, 20), (255, 0, 20)])},
    "transparent background": {"1_1.png": grey_png(np.dstack([mask()] * 3 + [OPAQUE]))},
    "TIFF": {"1_1.tif": tiff(mask(), photometric="minisblack")},
    "JPEG": {"1_1.jpg": encoded(Image.fromarray(mask()), "JPEG", quality=70)},
    "values 1 and 2": {"1_1.png": grey_png(mask() // 20)},
    "values 128 and 255": {"1_1.png": grey_png(np.array([0, 128, 255], np.uint8)[mask() // 20])},
    "value 60": {"1_1.png": grey_png(mask(((20, 60), (40, 40))))},
    "16 bits": {"1_1.png": cv2.imencode(".png", mask().astype(np.uint16))[1].tobytes()},
    "1 bit": {"1_1.png": encoded(Image.fromarray(mask() > 0), "PNG")},
    "no cell": {"1_1.png": grey_png(EMPTY)},
    "no nucleus": {"1_1.png": grey_png(mask(((20, 20), (20, 20))))},
    "nucleus only": {"1_1.png": grey_png(mask(((40, 40), (40, 40))))},
    "several nuclei": {"1_1.png": grey_png(mask(((20, 40, 20, 40),)))},
    "other size": {"1_1.png": grey_png(mask(size=(58, 78)))},
    "the same cell twice": {"1_1.png": grey_png(mask()), "1_2.png": grey_png(mask())},
    "gap in the numbers": {"1_1.png": grey_png(mask()), "1_3.png": grey_png(mask(at=(30, 40)))},
    "no picture of that name": {"1_1.png": grey_png(mask()), "2_1.png": grey_png(mask())},
    "no number": {"1_1.png": grey_png(mask()), "1.png": grey_png(mask())},
    "none": {},
    "cut off": {"1_1.png": grey_png(mask())[:-30]},
}  # fmt: skip


def mask_row(kind, folder, capsys):
    code, said = run(["check", folder], capsys, folder)
    words = words_of(said).replace("train ", "")
    outcome = "refused" if code else "warned" if "\nwarning" in said else "noted" if "\nnote" in said else "read"
    return dict(zip(COLUMNS, ("masks", kind, outcome, code, words)))


def entry(name, content=b"x", **options):
    info = zipfile.ZipInfo("x")
    info.filename, info.compress_type = name, zipfile.ZIP_DEFLATED
    for option, value in options.items():
        setattr(info, option, value)
    return info, content


def zipped(*entries):
    handle = io.BytesIO()
    with zipfile.ZipFile(handle, "w") as files:
        for info, content in entries:
            files.writestr(info, content)
    return handle.getvalue()


def flagged(content, local, central, value):
    "A zip in which a field of every entry is another."
    content = bytearray(content)
    for sign, offset in ((b"PK\3\4", local), (b"PK\1\2", central)):
        place = -1
        while (place := content.find(sign, place + 1)) >= 0:
            content[place + offset] = value
    return bytes(content)


DATA = [entry("train/x/1.png", PNG), entry("train/y/1_1.png", grey_png(mask()))]
BOMB = zipped(entry("train/x/1.bmp", bytes(209_000_000)))
ARCHIVES = {
    "a split": zipped(*DATA),
    "zips in a zip": zipped(entry("SegPC/train.zip", zipped(*DATA))),
    "made on Windows, with backslashes": zipped(
        *[entry(info.filename.replace("/", "\\"), content, create_system=0) for info, content in DATA]
    ),
    "upper case": zipped(*[entry(info.filename.upper(), content) for info, content in DATA]),
    "with folders of a Mac": zipped(*DATA, entry("__MACOSX/train/x/._1.png"), entry("train/x/.DS_Store")),
    "the same entry twice": zipped(*DATA, DATA[0]),
    "a link to /etc/passwd": zipped(*DATA, entry("train/x/2.png", b"/etc/passwd", external_attr=0o120777 << 16)),
    "8 damaged bytes in a picture": damaged(zipped(*DATA)),
    "no split in it": zipped(entry("readme.txt")),
    "cut off": zipped(*DATA)[:-40],
    "password": flagged(zipped(*DATA), 6, 8, 1),
    "Deflate64": flagged(zipped(*DATA), 8, 10, 9),
    "RAR": b"Rar!\x1a\7\1\0" + bytes(200),
    "a web page": b"<html>please log in</html>",
    "an entry with ..": zipped(*DATA, entry("../escaped.txt")),
    "an absolute entry": zipped(*DATA, entry("/escaped.txt")),
    "a bomb: 209 MB in 0.2 MB": BOMB,
    "a bomb in a zip": zipped(entry("train.zip", BOMB)),
    "many bombs: 1.9 GB in 2 MB": zipped(*[entry(f"train/x/{k}.bmp", bytes(62_000_000)) for k in range(31)]),
}


def archive_row(kind, folder, capsys):
    out = folder / "out"
    code, said = run(["download", out, "--archive", folder / "a.zip"], capsys, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["a.zip"] + ["out"] * (not code), "something was left"
    return dict(zip(COLUMNS, ("archives", kind, "refused" if code else "read", code, words_of(said))))


def rows(tmp_path, capsys):
    "The whole table."
    for group, kinds, row in (
        ("pictures", FILES | OTHERS, picture_row),
        ("masks", MASKS, mask_row),
        ("archives", ARCHIVES, archive_row),
    ):
        for number, (kind, given) in enumerate(kinds.items()):
            folder = tmp_path / f"{group}_{number}" / "kind"
            folder.mkdir(parents=True)
            if group == "masks":
                for part, files in (("x", {"1.png": PNG}), ("y", given)):
                    (folder / "train" / part).mkdir(parents=True)
                    for name, content in files.items():
                        (folder / "train" / part / name).write_bytes(content)
            elif group == "archives":
                (folder / "a.zip").write_bytes(given)
            elif callable(given):
                given(folder)
            else:
                (folder / given[0]).write_bytes(given[1])
            yield row(kind, folder, capsys)
            shutil.rmtree(folder.parent)


@pytest.mark.skipif(sys.platform != "linux", reason="the words of the system are those of Linux")
def test_the_table_of_inputs_is_what_happens(tmp_path, capsys):
    found = [{name: str(value) for name, value in row.items()} for row in rows(tmp_path, capsys)]
    if os.environ.get("SEGPC_WRITE"):
        with open(TABLE, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
    with open(TABLE, newline="", encoding="utf-8") as file:
        kept = list(csv.DictReader(file))
    assert [row["kind"] for row in found] == [row["kind"] for row in kept]
    for now, then in zip(found, kept):
        assert now == then
