"""Annotation from other programs: round trips, pairs, and files that are wrong or hostile."""

import json
import re
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
import tifffile
from PIL import Image
from pycocotools import mask as coco_tools

from segpc_nb import cli
from segpc_nb.annotation import draw_polygon, draw_runs, unpack_counts
from segpc_nb.cells import iou_table, same_cell
from segpc_nb.cli_import import import_annotation
from segpc_nb.images import write_image
from segpc_nb.interchange import coco_dataset, export_cells, polygons
from segpc_nb.results import read_masks, read_results
from segpc_nb.synthetic import example_smear


@pytest.fixture(scope="module")
def smear():
    return example_smear()


@pytest.fixture
def place(tmp_path, smear):
    "Two pictures, one without a cell, and their cells."
    image, cells = smear
    for name in ("12", "13"):
        write_image(tmp_path / "x" / f"{name}.png", image)
    return tmp_path, {"12": cells, "13": []}, {"12": image.shape[:2], "13": image.shape[:2]}


def test_polygons_are_those_of_an_independent_drawing():
    shapely, rng = pytest.importorskip("shapely"), np.random.default_rng(0)
    rows, columns = np.mgrid[:60, :90] + 0.5
    for _ in range(20):
        angle, radius = np.linspace(0, 2 * np.pi, 40, endpoint=False), rng.uniform(5, 40, 40)
        ring = np.stack([45 + radius * np.cos(angle), 30 + radius * np.sin(angle)], 1)
        (top, left, bottom, right), mask = draw_polygon([ring.tolist()], (60, 90))
        full = np.zeros((60, 90), bool)
        full[top:bottom, left:right] = mask
        assert np.array_equal(full, shapely.contains_xy(shapely.Polygon(ring), columns, rows))


def test_run_lengths_are_those_of_the_official_tools():
    rng = np.random.default_rng(1)
    for density in (0.001, 0.2, 0.7, 1.0):
        full = np.asfortranarray(rng.random((37, 23)) < density).astype(np.uint8)
        full[5, 7] = 1
        packed = coco_tools.encode(full)["counts"].decode()
        (top, left, bottom, right), mask = draw_runs({"size": [37, 23], "counts": packed}, (37, 23))
        assert np.array_equal(full[top:bottom, left:right] > 0, mask) and full.sum() == mask.sum()
        assert sum(unpack_counts(packed)) == full.size


@pytest.mark.parametrize("kind", ["coco", "geojson", "rois", "labels"])
def test_what_was_exported_comes_back_to_the_pixel(place, kind):
    folder, cells, shapes = place
    out = folder / ("cells.json" if kind == "coco" else kind)
    first = export_cells(kind, out, cells, shapes)
    contents = [path.read_bytes() for path in first]
    result = import_annotation(out, [folder / "x"], folder / "mine")
    assert (result["pictures"], result["cells"], result["errors"], result["left_out"]) == (2, len(cells["12"]), 0, 0)
    back = read_masks(folder / "mine" / "train" / "y")
    assert set(back) == {"12"} and [cell.id for cell in back["12"]] == [cell.id for cell in cells["12"]]
    if kind != "labels":  # they lose the common pixels of cells that overlap
        assert all(same_cell(a, b) for a, b in zip(cells["12"], back["12"], strict=True))
    found, found_shapes = read_results(folder / "mine" / "train")
    again = export_cells(kind, folder / "again" / out.name, found | {"13": []}, found_shapes | {"13": shapes["13"]})
    if kind == "labels":  # files carry a date
        assert all(np.array_equal(tifffile.imread(a), tifffile.imread(b)) for a, b in zip(first, again, strict=True))
    else:
        assert contents == [path.read_bytes() for path in again]


def polygon_coco(cells, shape):
    "Cells as polygons, nuclei first, without a word about pairs."
    annotations = []
    for category, part in ((2, "nucleus"), (1, "mask")):
        for cell in reversed(cells):
            geometry = polygons(getattr(cell, part), cell.bbox[:2])
            assert geometry["type"] == "Polygon"
            entry = {"id": len(annotations) + 1, "image_id": 1, "category_id": category}
            annotations.append(
                entry | {"segmentation": [np.ravel(ring[:-1]).tolist() for ring in geometry["coordinates"]]}
            )
    return {
        "images": [{"id": 1, "file_name": "12.png", "height": shape[0], "width": shape[1]}],
        "categories": [{"id": 1, "name": "Cell"}, {"id": 2, "name": "Nucleus"}],
        "annotations": annotations,
    }


def test_polygons_and_packed_masks_without_pairs(place):
    folder, cells, shapes = place
    drawn = polygon_coco(cells["12"], shapes["12"])
    packed = coco_dataset({"12": cells["12"]}, {"12": shapes["12"]})
    for entry in packed["annotations"]:
        runs = coco_tools.frPyObjects(entry["segmentation"], *shapes["12"])
        entry["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
        entry |= {"iscrowd": 1}
        del entry["partner"]
    for name, coco in (("polygons", drawn), ("packed", packed)):
        (folder / "cells.json").write_text(json.dumps(coco))
        import_annotation(folder / "cells.json", [folder / "x"], folder / name)
        back = read_masks(folder / name / "train" / "y")["12"]
        for part in ("mask", "nucleus"):
            assert (iou_table(cells["12"], back, part).max(1) >= 0.98).all()


def test_cytoplasm_as_a_category_of_its_own(place):
    folder, cells, shapes = place
    coco = coco_dataset({"12": cells["12"]}, {"12": shapes["12"]})
    for entry in coco["annotations"]:
        del entry["partner"]
        if entry["category_id"] == 1:
            cell = cells["12"][entry["cell"] - 1]
            full = np.zeros(shapes["12"], np.uint8, order="F")
            full[cell.bbox[0] : cell.bbox[2], cell.bbox[1] : cell.bbox[3]] = cell.cytoplasm
            entry["segmentation"] = {"size": list(full.shape), "counts": coco_tools.encode(full)["counts"].decode()}
    coco["categories"] = [{"id": 1, "name": "Zytoplasma"}, {"id": 2, "name": "Kern"}]
    (folder / "cells.json").write_text(json.dumps(coco))
    words = ["import", str(folder / "cells.json"), "--pictures", str(folder / "x"), "--out", str(folder / "mine")]
    assert cli.main([*words, "--cytoplasm-names", "Zytoplasma", "--nucleus-names", "Kern"]) == 0
    back = read_masks(folder / "mine" / "train" / "y")["12"]
    assert all(same_cell(a, b) for a, b in zip(cells["12"], back, strict=True))


def test_labels_in_two_folders_paired_by_overlap(place):
    folder, cells, shapes = place
    layers = np.zeros((2, *shapes["12"]), np.uint16)
    for cell in cells["12"]:
        box = np.s_[cell.bbox[0] : cell.bbox[2], cell.bbox[1] : cell.bbox[3]]
        layers[0][box][cell.mask] = 100 * cell.id
        layers[1][box][cell.nucleus] = 60_000 - cell.id
    for name, layer in zip(("cells", "nuclei"), layers):
        (folder / name).mkdir()
        Image.fromarray(layer).save(folder / name / "12_cp_masks.png")
    result = import_annotation(folder / "cells", [folder / "x"], folder / "mine", nuclei=folder / "nuclei")
    back = read_masks(folder / "mine" / "train" / "y")["12"]
    assert (iou_table(cells["12"], back).argmax(1) == np.arange(len(back))).all()
    assert (np.diag(iou_table(cells["12"], back, "nucleus")) > 0.9).all()  # overlaps are lost
    assert [remark["picture"] for remark in result["remarks"]] == ["13"]  # was not annotated, so it is left out
    assert [path.name for path in (folder / "mine" / "train" / "x").iterdir()] == ["12.png"]


def wrong(document, **changes):
    return json.dumps(document | changes)


def test_hostile_files_are_refused_in_words(place, capsys):
    folder, cells, shapes = place
    good = polygon_coco(cells["12"], shapes["12"])
    image, entry = good["images"][0], good["annotations"][-1]
    outside = folder / "outside.png"
    cases = {
        "not JSON": "{",
        "no list 'images'": '{"a": 1, "images": 3}',
        "not JSON (maximum recursion": "[" * 100_000,
        "leads out of the folder": wrong(good, images=[image | {"file_name": f"../{outside.name}"}]),
        "the name '/etc/passwd' leads out": wrong(good, images=[image | {"file_name": "/etc/passwd"}]),
        "no picture of the name 'x": wrong(good, images=[image | {"file_name": "x" * 300}]),
        "without file_name": wrong(good, images=[image | {"file_name": 3}]),
        "annotated at 99x99 px": wrong(good, images=[image | {"height": 99, "width": 99}]),
        "not a number": wrong(good, annotations=[entry | {"segmentation": [[float("nan")] * 6]}]),
        "far outside of": wrong(good, annotations=[entry | {"segmentation": [[0, 0, 10**300, 1, 5, 5]]}]),
        "allowed are 100,000": wrong(good, annotations=[entry | {"segmentation": [[1.0] * 300_000]}]),
        "allowed are 10,000,000": wrong(good, annotations=[entry | {"segmentation": [[1, 1, 2, 200] * 45_000]}]),
        "size [4, 4]": wrong(good, annotations=[entry | {"segmentation": {"size": [4, 4], "counts": [16]}}]),
        "run lengths that are not": wrong(good, annotations=[entry | {"segmentation": {"size": [*shapes["12"]]}}]),
        "without outline": wrong(good, annotations=[entry | {"segmentation": None}]),
        "three points": wrong(good, annotations=[entry | {"segmentation": [["a", "b", "c", "d", "e", "f"]]}]),
        "category 'without a name'": wrong(good, annotations=[entry | {"category_id": [1]}]),
    }
    for words, text in cases.items():
        (folder / "cells.json").write_text(text)
        with pytest.raises(ValueError, match=re.escape(words)):
            import_annotation(folder / "cells.json", [folder / "x"], folder / "o")
        assert not (folder / "o").exists()
    words = ["import", str(folder / "cells.json"), "--pictures", str(folder / "x"), "--out", str(folder / "o")]
    assert cli.main(words) == 2
    assert "segpc: error: " in capsys.readouterr().err


def test_one_damaged_outline_does_not_stop_the_others(place):
    folder, cells, shapes = place
    coco = polygon_coco(cells["12"], shapes["12"])
    coco["annotations"][-1]["segmentation"] = [[1, 2, float("inf"), 4, 5, 6]]
    coco["annotations"].append({"id": "=cmd", "image_id": 1, "category_id": 9})
    (folder / "cells.json").write_text(json.dumps(coco))
    result = import_annotation(folder / "cells.json", [folder / "x"], folder / "mine")
    levels = {remark["source"]: remark["level"] for remark in result["remarks"]}
    assert result["cells"] == len(cells["12"]) - 1 and result["errors"] == 1
    last = coco["annotations"][-2]["id"]
    assert levels[f"annotation {last}"] == "error" and levels["annotation =cmd"] == "left out"
    assert sorted(levels.values()) == ["error", "left out", "left out", "left out"]  # its nucleus, and picture 13


def test_geojson_of_damaged_files(place):
    folder, cells, shapes = place
    export_cells("geojson", folder / "q", cells, shapes)
    (folder / "q" / "13.geojson").write_text("{")
    (folder / "q" / "14.geojson").write_text("[]")
    result = import_annotation(folder / "q", [folder / "x"], folder / "mine")
    assert {remark["source"]: remark["level"] for remark in result["remarks"]} == {
        "14.geojson": "error",
        "13.geojson": "error",
    }
    assert result["pictures"] == 1


def test_an_import_replaces_nothing_and_adds_to_a_data_set(place):
    folder, cells, shapes = place
    export_cells("coco", folder / "cells.json", cells, shapes)
    for name in ("12", "13"):
        import_annotation(folder / "cells.json", [folder / "x" / f"{name}.png"], folder / "mine")
    table = (folder / "mine" / "imported_train.csv").read_text().splitlines()
    assert sum("taken" in line for line in table) == len(cells["12"]) + 1
    with pytest.raises(ValueError, match="holds picture 12 already"):
        import_annotation(folder / "cells.json", [folder / "x"], folder / "mine")
    assert cli.main(["check", str(folder / "mine")]) == 0


@pytest.mark.parametrize("name", ["12.tif", "12.png"])
def test_label_pictures_of_other_sizes_and_types(place, name):
    folder = place[0]
    (folder / "l").mkdir()
    for values in (np.zeros((5, 5), np.uint16), np.zeros((9, 5, 5, 3), np.uint8)[0]):
        write = tifffile.imwrite if name.endswith("tif") else lambda path, array: Image.fromarray(array).save(path)
        write(Path(folder / "l" / name), values)
        with pytest.raises(ValueError, match=r"12\.\w+: labels of shape"):
            import_annotation(folder / "l", [folder / "x"], folder / "mine")


def test_training_goes_on_from_a_bundle_and_makes_one(place, monkeypatch):
    from segpc_nb import recipes
    from segpc_nb.cli_train import train
    from segpc_nb.config import BundleConfig
    from segpc_nb.models import build_network
    from segpc_nb.pipeline import Segmenter, load_bundle

    folder = place[0]
    networks = [build_network("unet", in_channels=channels, widths=(4, 8)) for channels in (3, 4)]
    Segmenter(networks[0], {1.75: networks[1]}, BundleConfig((96, 128), (1.75,), (48,))).save_bundle(folder / "old")
    seen = []

    def finish(config, train_set, valid_set, out, files, seed, preset, start=None, options=None, **facts):
        seen.append((config.network, start))
        recipes.save_network(networks[0], out / "weights")
        return networks[0], None

    monkeypatch.setattr(recipes, "train_network", finish)
    monkeypatch.setattr(recipes, "write_nuclei", lambda *arguments: None)
    words = {"data": folder / "mine", "start": str(folder / "old"), "train": {"size": (96, 128), "crop": None}}
    cli.synth(folder / "mine", pictures=14)
    made = train("nucleus", folder / "run", "smoke", **words)
    assert made == [folder / "run" / "nucleus" / "main", folder / "run" / "bundle"]
    assert seen[0][1] == folder / "old" / "nucleus" and seen[0][0]["widths"] == [4, 8]
    assert load_bundle(folder / "run" / "bundle").config == load_bundle(folder / "old").config
    with pytest.raises(ValueError, match=r"cytoplasm_0.5|works at"):
        train("cytoplasm", folder / "run", "smoke", folder / "mine", scale=0.5, start=str(folder / "old"))


def test_an_excel_table_is_read_back_and_holds_no_formula(place):
    folder, cells, shapes = place
    (path,) = export_cells("table", folder / "cells.xlsx", {"=1+1": cells["12"]}, {"=1+1": shapes["12"]})
    sheet = pytest.importorskip("openpyxl").load_workbook(path).active
    rows = list(sheet.iter_rows(values_only=True))
    assert rows[0][:2] == ("picture", "id") and {row[0] for row in rows[1:]} == {"'=1+1"}
    assert [row[rows[0].index("cell_area")] for row in rows[1:]] == [cell.area for cell in cells["12"]]


def test_measurements_name_units_and_objects_keep_their_uuid(place):
    folder, cells, shapes = place
    (path, _) = export_cells("geojson", folder / "q", cells, shapes)
    features = json.loads(path.read_text())["features"]
    ids = [str(UUID(feature["id"])) for feature in features]
    assert len(set(ids)) == len(features) == len(cells["12"])
    assert {"cell area px^2", "row px", "score"} <= features[0]["properties"]["measurements"].keys()
    export_cells("geojson", folder / "again", cells, shapes)
    assert [f["id"] for f in json.loads((folder / "again" / "12.geojson").read_text())["features"]] == ids
