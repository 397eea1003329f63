"""Scores against independent programs: full frames with OpenCV, COCO, cellseg-metrics, and plain loops."""

import contextlib
import io
import itertools
import os
from dataclasses import replace

import cv2
import numpy as np
import pytest
from cellseg_metrics import aggregated_jaccard_index
from cellseg_metrics import panoptic_quality as cellseg_pq
from faster_coco_eval import COCO, COCOeval_faster
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from segpc_nb import metrics
from segpc_nb.cells import Cell, cell_from_parts, encode_rle, iou_table, mask_from_cell, resize_cell
from segpc_nb.dataset import list_samples
from segpc_nb.metrics import (
    OFFICIAL_SHAPE,
    RATIOS,
    _ordered,
    aggregated_jaccard,
    average_precision,
    class_ious,
    evaluate_cells,
    match_cells,
    official_ious,
    official_score,
    panoptic_quality,
    score_picture,
    score_table,
)

fast = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)
SHAPE = (40, 52)


def random_cells(rng, n, shape=SHAPE, smallest=3):
    "Elliptic cells anywhere, overlapping as they like, cut at the border."
    cells = []
    for k in range(n):
        height, width = rng.integers(smallest, 16, 2)
        rows, columns = np.mgrid[:height, :width]
        distance = np.hypot((rows - height / 2 + 0.5) / height, (columns - width / 2 + 0.5) / width)
        top, left = rng.integers(0, shape[0] - 2), rng.integers(0, shape[1] - 2)
        box = (top, left, top + height, left + width)
        with contextlib.suppress(ValueError):
            cells.append(
                cell_from_parts(k + 1, box, distance < rng.uniform(0.1, 0.4), distance < 0.5, shape, score=rng.random())
            )
    return cells


def shake(rng, cells, shape=SHAPE):
    "The cells a little off, some lost, some added."
    moved = []
    for cell in cells:
        down, right = rng.integers(-2, 3, 2)
        top, left, bottom, end = cell.bbox
        if rng.random() < 0.85:
            with contextlib.suppress(ValueError):
                box = (top + down, left + right, bottom + down, end + right)
                moved.append(cell_from_parts(cell.id, box, cell.nucleus, cell.cytoplasm, shape, score=rng.random()))
    return moved + random_cells(rng, rng.integers(0, 3), shape)


def random_set(seed, pictures=4, cells=6):
    rng = np.random.default_rng(seed)
    truth = {str(i): random_cells(rng, rng.integers(0, cells)) for i in range(pictures)}
    truth["0"] = truth["0"] or random_cells(rng, 5)
    pred = {id: shake(rng, members) for id, members in truth.items() if rng.random() < 0.9}
    return truth, pred, dict.fromkeys(truth, SHAPE)


def frames(cells, shape=SHAPE):
    return [mask_from_cell(cell, shape) > 0 for cell in cells]


def flat(cells, shape=SHAPE):
    "Label image of the cells, and the cells as they look in it: nothing overlaps any more."
    labels = np.zeros(shape, int)
    for number, mask in enumerate(frames(cells, shape), 1):
        labels[mask] = number
    none = np.zeros(shape, bool)
    kept = [k for k in range(1, len(cells) + 1) if (labels == k).any()]
    return labels, [cell_from_parts(k, (0, 0, *shape), labels == k, none) for k in kept]


# the official score


def organisers_score(truth, pred, shapes):
    "Every mask as a full frame of 1080 x 1440, as the organisers' program compares them."
    total = cells = 0
    for id, members in truth.items():
        grid = [
            cv2.resize(mask_from_cell(cell, shapes[id]), OFFICIAL_SHAPE[::-1], interpolation=cv2.INTER_NEAREST) > 0
            for cell in pred.get(id, [])
        ]
        for cell in members:
            mask = (
                cv2.resize(mask_from_cell(cell, shapes[id]), OFFICIAL_SHAPE[::-1], interpolation=cv2.INTER_NEAREST) > 0
            )
            total += max(((mask & other).sum() / max((mask | other).sum(), 1) for other in grid), default=0)
            cells += 1
    return total / cells


@pytest.mark.parametrize("shape", [(40, 52), (384, 512), (1536, 2040), (1920, 2560)])
def test_official_score_equals_full_frames(shape):
    rng = np.random.default_rng(3)
    zoom = shape[0] / SHAPE[0]
    small = random_cells(rng, 4), random_cells(rng, 3)
    large = [[resize_cell(cell, SHAPE, shape) for cell in cells] for cells in small] if zoom > 1 else small
    truth, pred = {"a": large[0], "b": large[1]}, {"a": [*large[1], *large[0][:1]]}
    shapes = dict.fromkeys("ab", shape)
    assert official_score(truth, pred, shapes) == pytest.approx(organisers_score(truth, pred, shapes), abs=1e-12)


@settings(max_examples=8, deadline=None)
@given(seeds)
def test_official_score_equals_full_frames_on_random_sets(seed):
    truth, pred, shapes = random_set(seed, pictures=2, cells=4)
    assert official_score(truth, pred, shapes) == pytest.approx(organisers_score(truth, pred, shapes), abs=1e-12)


def test_official_score_counts_a_cell_that_vanishes_on_the_grid():
    shape = (4 * 1080, 4 * 1440)
    one, none = np.ones((1, 1), bool), np.zeros((1, 1), bool)
    lost, kept = Cell(1, (1, 1, 2, 2), one, none), Cell(2, (4, 4, 5, 5), one, none)
    assert official_ious([lost, kept], [lost, kept], shape).tolist() == [0, 1]


def test_official_score_never_falls_with_more_masks():
    truth, pred, shapes = random_set(5)
    more = {id: pred.get(id, []) + random_cells(np.random.default_rng(8), 4) for id in truth}
    assert official_score(truth, more, shapes) >= official_score(truth, pred, shapes)


@fast
@given(seeds)
def test_the_size_of_predictions_may_be_told(seed):
    truth, pred, shapes = random_set(seed, pictures=2)
    reduced = {id: [resize_cell(cell, SHAPE, OFFICIAL_SHAPE) for cell in cells] for id, cells in pred.items()}
    assert official_score(truth, reduced, shapes, dict.fromkeys(truth, OFFICIAL_SHAPE)) == official_score(
        truth, pred, shapes
    )


# matching, panoptic quality, F1


def best_pairing(ious, threshold):
    "All ways to pair, tried one by one: most pairs, then highest sum."
    n, m = ious.shape
    best = (0, 0.0)
    for columns in itertools.permutations([*range(m), *[None] * n], n):
        taken = [ious[i, j] for i, j in enumerate(columns) if j is not None and ious[i, j] > threshold]
        best = max(best, (len(taken), sum(taken)))
    return best


@fast
@given(seeds, st.sampled_from([0.1, 0.3, 0.5, 0.7]))
def test_matching_is_the_best_of_all(seed, threshold):
    rng = np.random.default_rng(seed)
    a = random_cells(rng, 3)
    b = (shake(rng, a) + shake(rng, a))[:3]
    matches = match_cells(a, b, threshold)
    count, total = best_pairing(iou_table(a, b), threshold) if a else (0, 0)
    assert len(matches.pairs) == count and matches.ious.sum() == pytest.approx(total)
    assert (matches.ious > threshold).all()
    for side in matches.pairs.T:
        assert len(set(side)) == len(side)


def test_a_match_needs_more_than_one_half():
    a = [Cell(1, (0, 0, 1, 2), np.ones((1, 2), bool), np.zeros((1, 2), bool))]
    b = [Cell(1, (0, 0, 1, 1), np.ones((1, 1), bool), np.zeros((1, 1), bool))]
    assert iou_table(a, b)[0, 0] == 0.5 and len(match_cells(a, b).pairs) == 0
    assert average_precision({"a": a}, {"a": b}, [0.5]) == pytest.approx(1)  # COCO's threshold includes equality


@fast
@given(seeds)
def test_panoptic_quality_and_f1_equal_cellseg_metrics(seed):
    rng = np.random.default_rng(seed)
    cells = random_cells(rng, 6)
    (labels, a), (guess, b) = flat(cells), flat(shake(rng, cells))
    assume(a and b)
    theirs = cellseg_pq(labels, guess, eps=1e-12)
    ours = evaluate_cells({"x": a}, {"x": b}, {"x": SHAPE}, n_boot=0)
    assert ours["pq"] == pytest.approx(theirs["pq"], abs=1e-9) == panoptic_quality({"x": a}, {"x": b})
    assert ours["f1"] == pytest.approx(theirs["dq"], abs=1e-9)


# aggregated Jaccard index


def tied(a, b):
    "Has a cell two best partners of equal IoU? Then the algorithm leaves the choice open."
    ious = np.sort(iou_table(a, b), 1)
    return ious.shape[1] > 1 and ((ious[:, -1] > 0) & (ious[:, -1] == ious[:, -2])).any()


def kumar(a, b):
    "Algorithm 1 of Kumar et al. (2017) on full frames."
    common = joint = 0
    used = set()
    for mask in a:
        ious = [(mask & other).sum() / (mask | other).sum() for other in b]
        if ious and max(ious) > 0:
            j = int(np.argmax(ious))
            common, joint = common + (mask & b[j]).sum(), joint + (mask | b[j]).sum()
            used.add(j)
        else:
            joint += mask.sum()
    joint += sum(other.sum() for j, other in enumerate(b) if j not in used)
    return common / joint


@fast
@given(seeds)
def test_aggregated_jaccard_equals_kumars_algorithm(seed):
    rng = np.random.default_rng(seed)
    a = random_cells(rng, 5)
    b = shake(rng, a)
    assume((a or b) and not tied(a, b))
    assert aggregated_jaccard(a, b) == pytest.approx(kumar(frames(a), frames(b)), abs=1e-12)


@fast
@given(seeds)
def test_aggregated_jaccard_equals_cellseg_metrics_where_definitions_agree(seed):
    rng = np.random.default_rng(seed)
    cells = random_cells(rng, 5)
    (labels, a), (guess, b) = flat(cells), flat(shake(rng, cells))
    assume(a and b and not tied(a, b))
    shared = np.array([[(x & y).sum() for y in frames(b)] for x in frames(a)])
    ious = iou_table(a, b)
    single = (shared == shared.max(1, keepdims=True)).sum(
        1
    ) == 1  # it takes the largest intersection, and all of them when they tie
    assume(((shared.argmax(1) == ious.argmax(1)) & single | (shared.max(1) == 0)).all())
    assert aggregated_jaccard(a, b) == pytest.approx(aggregated_jaccard_index(labels, guess, eps=1e-12), abs=1e-9)


# average precision


def coco_precision(truth, pred):
    "AP and AP50 of faster-coco-eval."
    ids = sorted(truth)
    images = [{"id": i, "height": SHAPE[0], "width": SHAPE[1], "file_name": id} for i, id in enumerate(ids)]

    def entries(cells_of):
        cells = [(i, cell) for i, id in enumerate(ids) for cell in cells_of.get(id, [])]
        for number, (i, cell) in enumerate(cells, 1):
            mask = mask_from_cell(cell, SHAPE) > 0
            top, left, bottom, right = map(float, cell.bbox)
            yield {
                "id": number,
                "image_id": i,
                "category_id": 1,
                "iscrowd": 0,
                "area": float(mask.sum()),
                "bbox": [left, top, right - left, bottom - top],
                "score": float(cell.score),
                "segmentation": {"size": list(SHAPE), "counts": encode_rle(mask)},
            }

    from pycocotools import mask as packer

    def packed(entry):
        return entry | {"segmentation": packer.frPyObjects(entry["segmentation"], *SHAPE)}

    categories = [{"id": 1, "name": "plasma cell"}]
    with contextlib.redirect_stdout(io.StringIO()):
        ours = COCO(
            {"images": images, "categories": categories, "annotations": [packed(e) for e in entries(truth)], "info": {}}
        )
        guess = COCO(
            {"images": images, "categories": categories, "annotations": [packed(e) for e in entries(pred)], "info": {}}
        )
        run = COCOeval_faster(ours, guess, "segm")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats[0], run.stats[1]


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_average_precision_equals_coco(seed):
    truth, pred, _ = random_set(seed)
    assume(any(pred.values()))
    ap, ap50 = coco_precision(truth, pred)
    assert average_precision(truth, pred) == pytest.approx(ap, abs=1e-9)
    assert average_precision(truth, pred, [0.5]) == pytest.approx(ap50, abs=1e-9)


def test_equal_scores_enter_together():
    truth, pred, _ = random_set(11)
    tied = {id: [replace(cell, score=1.0) for cell in cells] for id, cells in pred.items()}
    hits = sum(len(match_cells(truth[id], cells).pairs) for id, cells in tied.items())
    found, taken = hits / sum(map(len, truth.values())), hits / sum(map(len, tied.values()))
    assert average_precision(truth, tied, [0.5]) == pytest.approx(taken * (np.linspace(0, 1, 101) <= found).mean())


# the whole table


@fast
@given(seeds)
def test_order_of_cells_and_pictures_changes_nothing(seed):
    truth, pred, shapes = random_set(seed)
    rng = np.random.default_rng(seed)
    pred = {
        id: [replace(cell, score=round(cell.score, 1)) for cell in cells] for id, cells in pred.items()
    }  # with ties
    before = evaluate_cells(truth, pred, shapes, n_boot=20)

    def shuffled(cells):
        ids = rng.permutation(list(cells))
        return {str(id): [cells[id][i] for i in rng.permutation(len(cells[id]))] for id in ids}

    assert evaluate_cells(shuffled(truth), shuffled(pred), shapes, n_boot=20) == before
    assert official_score(shuffled(truth), shuffled(pred), shapes) == official_score(truth, pred, shapes)
    assert official_score(truth, pred, shapes) == pytest.approx(before["official"], abs=1e-12)
    for score in (panoptic_quality, average_precision):
        assert score(shuffled(truth), shuffled(pred)) == pytest.approx(score(truth, pred), abs=1e-12)
    for id, cells in truth.items():
        one, other = (
            aggregated_jaccard(*sets) for sets in ((cells, pred.get(id, [])), (cells[::-1], pred.get(id, [])[::-1]))
        )
        assert one == other or np.isnan([one, other]).all()


@example(142899)  # two partners of equal IoU
@example(8607458)  # no matched cell has cytoplasm
@fast
@given(seeds)
def test_scores_agree_with_their_own_functions_and_intervals(seed):
    truth, pred, shapes = random_set(seed)
    result = evaluate_cells(truth, pred, shapes, n_boot=50)
    assert result["pq"] == pytest.approx(panoptic_quality(truth, pred))
    assert result["ap"] == pytest.approx(average_precision(truth, pred))
    assert result["ap50"] == pytest.approx(average_precision(truth, pred, [0.5]))
    pictures = [aggregated_jaccard(truth[id], pred.get(id, [])) for id in truth]
    assert result["aji"] == pytest.approx(np.nanmean(pictures))
    pairs = [
        (_ordered(truth[id]), _ordered(pred[id])) for id in pred
    ]  # where two pairings are equally good, the same is taken
    parts = np.concatenate([np.zeros((0, 2)), *[class_ious(a, b, match_cells(a, b)) for a, b in pairs]])
    means = np.nansum(parts, 0) / np.maximum(np.isfinite(parts).sum(0), 1)  # 0 if there is nothing to compare
    assert [result["nucleus_iou"], result["cytoplasm_iou"]] == pytest.approx(means)
    assert set(result["ci"]) == {*RATIOS, "ap", "ap50"}
    for name, (low, high) in result["ci"].items():
        assert 0 <= low <= high <= 1 and 0 <= result[name] <= 1


def test_bootstrap_equals_evaluating_each_drawn_set():
    truth, pred, shapes = random_set(2, pictures=5)
    ids = sorted(truth)
    draws = np.random.default_rng(7).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), 12)
    names = [*RATIOS, "ap50", "ap"]
    drawn = []
    for draw in draws:
        copies = [(f"{id}-{n}", id) for id, times in zip(ids, draw) for n in range(times)]
        sets = [{new: cells.get(old, []) for new, old in copies} for cells in (truth, pred)]
        one = evaluate_cells(*sets, dict.fromkeys(sets[0], SHAPE), n_boot=0)
        drawn.append([one[name] for name in names])
    expected = np.percentile(drawn, [2.5, 97.5], axis=0).T
    result = evaluate_cells(truth, pred, shapes, n_boot=12, seed=7)
    assert np.array([result["ci"][name] for name in names]) == pytest.approx(expected, abs=1e-12)


def test_perfect_and_empty_predictions():
    truth, _, shapes = random_set(1)
    distinct = {id: flat(cells)[1] for id, cells in truth.items()}
    perfect, nothing = (
        evaluate_cells(distinct, distinct, shapes, n_boot=0),
        evaluate_cells(distinct, {}, shapes, n_boot=5),
    )
    for name in (*RATIOS, "ap", "ap50"):
        if name != "cytoplasm_iou":  # these cells are nuclei only
            assert perfect[name] == pytest.approx(1), name
        assert nothing[name] == 0 and nothing["ci"][name] == [0, 0], name


def test_predictions_on_pictures_without_truth_are_superfluous():
    cells = random_cells(np.random.default_rng(0), 3)
    alone = evaluate_cells({"a": cells}, {"a": cells}, {"a": SHAPE}, n_boot=0)
    for truth in ({"a": cells}, {"a": cells, "b": []}):
        both = evaluate_cells(truth, {"a": cells, "b": cells}, dict.fromkeys("ab", SHAPE), n_boot=0)
        assert both["official"] == alone["official"] == 1
        assert both["precision"] == pytest.approx(0.5) and both["aji"] == pytest.approx(alone["aji"] / 2)
        assert both["pictures"] == 2 and both["cells"] == 3


def test_errors_name_the_fault():
    cells = random_cells(np.random.default_rng(0), 3)
    with pytest.raises(ValueError, match="shapes lacks picture 'b' of pred"):
        evaluate_cells({"a": cells}, {"b": cells}, {"a": SHAPE})
    with pytest.raises(ValueError, match="outside the picture's \\(10, 10\\)"):
        evaluate_cells({"a": cells}, {}, {"a": (10, 10)})
    with pytest.raises(ValueError, match="truth holds no cell"):
        evaluate_cells({"a": []}, {"a": cells}, {"a": SHAPE})


def test_table_of_methods():
    truth, pred, shapes = random_set(4)
    table = score_table(
        {"ours": evaluate_cells(truth, pred, shapes, n_boot=9), "none": evaluate_cells(truth, {}, shapes, n_boot=0)}
    )
    assert table.loc["none", "pq"] == "0.000" and "[" in table.loc["ours", "pq"]
    assert list(score_table({}).columns) == []


data = pytest.mark.skipif("SEGPC_DATA" not in os.environ, reason="needs SEGPC_DATA")


@data
def test_real_cells_against_coco_and_full_frames():
    samples = list_samples()[:12]
    truth = {sample.id: sample.cells() for sample in samples}
    shapes = {sample.id: sample.image().shape[:2] for sample in samples}
    rng = np.random.default_rng(0)
    pred = {id: shake(rng, cells, shapes[id]) for id, cells in truth.items()}
    few = dict(itertools.islice(truth.items(), 3))
    assert official_score(few, pred, shapes) == pytest.approx(organisers_score(few, pred, shapes), abs=1e-12)
    nuclei = {
        id: [replace(c, cytoplasm=np.zeros_like(c.nucleus)) for c in cells if c.nucleus.any()]
        for id, cells in truth.items()
    }
    assert official_score(few, nuclei, shapes) == pytest.approx(organisers_score(few, nuclei, shapes), abs=1e-12)


def test_the_bootstrap_evaluates_each_picture_once(monkeypatch):
    truth, pred, shapes = random_set(5)
    asked = []
    monkeypatch.setattr(metrics, "score_picture", lambda *args: asked.append(args) or score_picture(*args))
    many = evaluate_cells(truth, pred, shapes, n_boot=1000)
    assert len(asked) == len(truth)
    assert many["ci"]["official"][0] < many["official"] < many["ci"]["official"][1]
    assert {**many, "ci": {}} == evaluate_cells(truth, pred, shapes, n_boot=0)
