"""Synthetic smears: reproducible, resumable, in the official layout, and no gift."""

import hashlib
import json
import os

import numpy as np
import pytest

from segpc_nb.baselines import otsu_watershed
from segpc_nb.cells import intersections
from segpc_nb.dataset import check_samples, list_samples, split_holdout
from segpc_nb.synthetic import CAMERAS, KINDS, default_data, draw_kind, make_dataset, make_picture


def digest(folder):
    "Hash of every file below a folder."
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def smears(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("synthetic") / "smears", 12, 5)


def test_same_seed_same_files(smears, tmp_path):
    assert digest(make_dataset(tmp_path / "again", 12, 5)) == digest(smears)


def test_more_pictures_leave_the_first_as_they_are(smears, tmp_path):
    more = digest(make_dataset(tmp_path / "more", 13, 5))
    assert all(
        more[name] == value for name, value in digest(smears).items() if name not in ("synthetic.json", "overlaps.csv")
    )


def test_an_interrupted_run_goes_on(smears, tmp_path, monkeypatch):
    from segpc_nb import synthetic

    real, drawn = synthetic.make_picture, []

    def stops(*arguments):
        drawn.append(1)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(synthetic, "make_picture", stops)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "cut", 12, 5)
    make_dataset(tmp_path / "cut", 12, 5)
    assert digest(tmp_path / "cut") == digest(smears)
    assert len(drawn) == 5 + 12 - 4  # the four finished ones were kept


def test_the_set_is_clean_and_has_the_official_habits(smears):
    samples = list_samples(smears)
    assert check_samples(samples).empty
    assert {sample.image().shape[:2] for sample in samples} == set(CAMERAS.values())
    assert {int(sample.id) < 1000 for sample in samples} == {True, False}
    assert any(
        [cell.id for cell in sample.cells()] != list(range(1, len(sample.cells()) + 1)) for sample in samples
    )  # gaps
    kept, holdout = split_holdout(list_samples(smears))
    assert kept and holdout


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "train" / "x").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="choose another folder"):
        make_dataset(tmp_path, 2)
    with pytest.raises(ValueError, match="pictures = 0"):
        make_dataset(tmp_path / "none", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_stays_inside_its_window(kind):
    for seed in range(10):
        nucleus, whole, _ = draw_kind(np.random.default_rng(seed), kind, 1.0)
        rim = np.concatenate([whole[0], whole[-1], whole[:, 0], whole[:, -1]])
        assert rim.max() == 0 and (nucleus <= whole).all()


def test_annotation_is_what_was_drawn():
    for seed in range(6):
        image, cells = make_picture(np.random.default_rng(seed))
        assert image.dtype == np.uint8 and image.shape == (*CAMERAS["olympus"], 3)
        for cell in cells:
            top, left, bottom, right = cell.bbox
            window = image[top:bottom, left:right].mean(2)
            if cell.cytoplasm.sum() > 200:
                assert window[cell.nucleus].mean() < window[cell.cytoplasm].mean()
        shared = np.triu(intersections(cells, cells, "nucleus"), 1)
        assert shared.max(initial=0) < 400  # nuclei hardly overlap: they have about 1700 px


def test_cells_overlap_and_leave_the_picture_somewhere():
    fields = [make_picture(np.random.default_rng([1, seed]))[1] for seed in range(20)]
    tables = [intersections(cells, cells) for cells in fields if len(cells) > 1]
    assert sum(int((np.triu(table, 1) > 0).sum()) for table in tables) > 0
    height, width = CAMERAS["olympus"]
    assert any(
        cell.bbox[0] == 0 or cell.bbox[1] == 0 or cell.bbox[2] == height or cell.bbox[3] == width
        for cells in fields
        for cell in cells
    )


def test_thresholds_find_too_many():
    image, cells = make_picture(np.random.default_rng([1, 1]))
    assert len(otsu_watershed(image)) > len(cells)


def test_default_data_is_kept_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SEGPC_DATA", raising=False)
    root = default_data(3, 1)
    assert root.is_relative_to(tmp_path) and json.loads((root / "synthetic.json").read_text(encoding="utf-8")) == {
        "pictures": 3,
        "seed": 1,
    }
    before = os.stat(root / "synthetic.json").st_mtime_ns
    assert default_data(3, 1) == root and os.stat(root / "synthetic.json").st_mtime_ns == before


def test_segpc_data_wins(smears, monkeypatch):
    monkeypatch.setenv("SEGPC_DATA", str(smears))
    assert default_data(99) == smears
