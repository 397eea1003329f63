"""The viewer: what it says, how its widgets are wired, and the page that voila serves, in a browser."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from segpc_nb import cli
from segpc_nb.aggregation import select_by_ratio
from segpc_nb.cells import cell_from_parts, same_cell
from segpc_nb.config import BundleConfig
from segpc_nb.images import write_image
from segpc_nb.inspection import (
    LAYERS,
    CachedNetwork,
    explain,
    inner_point,
    inspect,
    nucleus_at,
    scale_table,
    show_layers,
    with_cached_networks,
    with_config,
)
from segpc_nb.models import build_network
from segpc_nb.pipeline import SHIPPED, Segmenter, load_bundle, save_bundle
from segpc_nb.results import read_results
from segpc_nb.synthetic import make_picture
from segpc_nb.viewer import Viewer, draw_png, pyramid_html, threshold_sliders, tuned_config

ROOT = Path(__file__).parent.parent
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCALES = (0.5, 1.75, 3.0)
CONFIG = BundleConfig((60, 80), SCALES, (32, 32, 32), (0.8, 4.0))


def green_below(limit, in_channels):
    "A real network whose logit is 12 * (limit - green)."
    network = build_network("unet", in_channels=in_channels, widths=(2,))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        blocks = (network.down[0][0], network.down[0][1], network.merge[0][0], network.merge[0][1], network.head[0])
        for k, block in enumerate(blocks):
            block[0].weight[0, 0 if k else 1, 1, 1] = 1
        network.head[1].weight[0, 0], network.head[1].bias[0] = -12, 12 * limit
    return network


def smear(places=((15, 15, 9), (15, 60, 10), (45, 35, 15))):
    "Discs in discs: row, column and radius of each cell; nuclei have a radius of 7."
    rows, columns = np.mgrid[:60, :80]
    picture = np.full((60, 80, 3), (232, 215, 225), np.uint8)
    for row, column, radius in places:
        distance = np.hypot(rows - row, columns - column)
        picture[distance < radius], picture[distance < 7] = (150, 140, 200), (90, 40, 130)
    return picture


@pytest.fixture(scope="module")
def segmenter():
    return Segmenter(green_below(0.35, 3), {scale: green_below(0.7, 4) for scale in SCALES}, CONFIG)


@pytest.fixture
def asked(segmenter, monkeypatch):
    "What is really asked of the networks: (scale or nucleus, crops)."
    notes = []

    def noting(name, network):
        def predict_probabilities(batch):
            notes.append((name, len(batch)))
            return network(batch)

        return predict_probabilities

    counting = Segmenter(
        noting("nucleus", segmenter.nucleus_network),
        {scale: noting(scale, segmenter.cell_networks[scale]) for scale in SCALES},
        CONFIG,
    )
    return counting, notes


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def same(a, b):
    return [(c.id, c.scale, c.bbox, c.score) for c in a] == [(c.id, c.scale, c.bbox, c.score) for c in b]


def test_remembering_changes_nothing(segmenter):
    image = smear()
    patient = with_cached_networks(segmenter)
    for config in (
        CONFIG,
        BundleConfig((60, 80), SCALES, (32, 32, 32), (0.2, 0.5), cell_threshold=0.7, nucleus_threshold=0.3, flips=True),
    ):
        for _ in range(2):
            assert same(with_config(patient, config).segment(image), with_config(segmenter, config).segment(image))


def test_crops_of_other_shapes_and_repeated_crops_are_told_apart():
    network = CachedNetwork(lambda batch: batch[:, :1] * batch.shape[-1])
    tall, wide = torch.ones(1, 3, 8, 2), torch.ones(1, 3, 2, 8)
    assert network(tall).shape == (1, 1, 8, 2) and network(wide).shape == (1, 1, 2, 8) and network(wide).max() == 8
    twice = torch.cat([wide, 2 * wide, wide])
    assert torch.equal(network(twice), twice[:, :1] * 8) and len(network.answers) == 3


def test_an_answer_larger_than_the_room_is_given_and_not_kept():
    network = CachedNetwork(lambda batch: batch[:, :1], room=10)
    assert torch.equal(network(torch.ones(2, 3, 4, 4)), torch.ones(2, 1, 4, 4)) and not network.answers


def test_a_network_on_a_device_is_found_through_its_memory(segmenter):
    assert next(CachedNetwork(segmenter.nucleus_network).parameters()).device.type == "cpu"


def test_the_look_is_what_the_pipeline_gives(segmenter):
    inspection = inspect(segmenter, smear(), (45, 35))
    assert (
        same(inspection.cells, segmenter.segment(smear()))
        and len(inspection.cells) == 3
        and inspection.chosen.id == nucleus_at(inspection.nuclei, (44, 36)).id
    )
    (cell,) = select_by_ratio([inspection.candidates], CONFIG.upper_ratios)
    table = scale_table(inspection.candidates, CONFIG)
    assert table.scale[table.picked].tolist() == [cell.scale] and table.picked.sum() == 1
    assert f"scale {cell.scale} is picked" in explain(inspection)
    assert table.accepted.tolist() == [
        candidate.cell.ratio <= limit for candidate, limit in zip(inspection.candidates, (0.8, 4.0, np.inf))
    ]


def test_reasons(segmenter):
    image = smear()

    def told(**change):
        values = {
            "nucleus_size": (60, 80),
            "scales": SCALES,
            "region_sizes": (32, 32, 32),
            "upper_ratios": (0.8, 4.0),
        } | change
        return explain(inspect(with_config(segmenter, BundleConfig(**values)), image, (45, 35)))

    assert "because it is the lowest" in told() and "Refused before: 0.5 (" in told()
    assert "scale 0.5 is picked" in told(upper_ratios=(50, 50)) and "Refused" not in told(upper_ratios=(50, 50))
    assert "scale 3.0 is picked, because it is the last one" in told(upper_ratios=(-1, -1)) and "1.75 (" in told(
        upper_ratios=(-1, -1)
    )
    assert "is not reported" in told(min_score=1.0) and "is not reported" not in told()
    assert told(nucleus_threshold=1.0) == "No nucleus is above the nucleus threshold of 1.00."


def test_the_nucleus_of_a_place():
    rows, columns = np.mgrid[:20, :20]
    ring = (np.hypot(rows - 10, columns - 10) < 9) & (np.hypot(rows - 10, columns - 10) > 5)
    crescent = cell_from_parts(1, (0, 0, 20, 20), ring & (columns < 10), np.zeros((20, 20), bool))
    other = cell_from_parts(2, (30, 30, 50, 50), ring, np.zeros((20, 20), bool))
    row, column = inner_point(crescent)
    assert crescent.nucleus[row - crescent.bbox[0], column - crescent.bbox[1]]
    assert (
        nucleus_at([crescent, other], (29, 29)) is other
        and nucleus_at([crescent, other], (-5, -5)) is crescent
        and nucleus_at([crescent, other], None) is crescent
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_draws_something(segmenter, layer):
    inspection = inspect(segmenter, smear())
    bare, drawn = (
        pixels(draw_png(partial(show_layers, inspection, layers), (60, 80), 240)) for layers in ((), (layer,))
    )
    assert bare.shape == drawn.shape == (180, 240, 3) and (bare != drawn).any()


def test_a_picture_without_nuclei(segmenter):
    inspection = inspect(segmenter, np.full((60, 80, 3), 230, np.uint8))
    assert (inspection.nuclei, inspection.cells, inspection.chosen, pyramid_html(inspection)) == ([], [], None, "")
    assert pixels(draw_png(lambda ax: show_layers(inspection, LAYERS, ax), (60, 80), 80)).min() == 230


def test_sliders_hold_numbers_beyond_the_usual():
    far = BundleConfig((60, 80), SCALES, (32, 32, 32), (-1.0, 40.123456))
    assert tuned_config(far, threshold_sliders(far)) == far


def test_widgets_are_wired(asked):
    segmenter, notes = asked
    viewer = Viewer(
        segmenter, {"a": smear(), "b": smear(((30, 40, 12),)), "empty": np.full((60, 80, 3), 230, np.uint8)}, side=300
    )
    assert (
        viewer.nucleus.options == (1, 2, 3)
        and "Nucleus 1:" in viewer.sentence.value
        and viewer.pyramid.value.count("<figure") == 3
    )
    seen = {name: getattr(viewer, name).value for name in ("picture", "sentence", "pyramid")}
    viewer.nucleus.value = 3
    assert (
        all(getattr(viewer, name).value != value for name, value in seen.items())
        and "Nucleus 3:" in viewer.sentence.value
    )
    asked_once = len(notes)
    for name, value in (("cell_threshold", 0.7), ("cell_threshold", 0.5), ("min_score", 0.99)):
        before = viewer.picture.value
        viewer.sliders[name].value = value
        assert viewer.picture.value != before
    assert (
        len(notes) == asked_once
        and "is not reported" in viewer.sentence.value
        and viewer.status.value.startswith("nuclei found: 3")
    )
    viewer.sliders["upper_ratio_0"].value = viewer.sliders["upper_ratio_1"].value = -1
    assert "scale 3.0 is picked" in viewer.sentence.value
    assert all(name != "nucleus" for name, _ in notes[asked_once:])
    viewer.reset.click()
    assert (
        tuned_config(CONFIG, viewer.sliders) == CONFIG
        and "is not reported" not in viewer.sentence.value
        and viewer.nucleus.value == 3
    )
    for box in viewer.layers.values():
        before = viewer.picture.value
        box.value = not box.value
        assert viewer.picture.value != before
    viewer.id.value = "b"
    assert viewer.nucleus.options == (1,)
    viewer.id.value = "empty"
    assert viewer.nucleus.options == () and "No nucleus" in viewer.sentence.value and viewer.pyramid.value == ""
    viewer.id.value = "a"
    assert viewer.nucleus.options == (1, 2, 3)


def test_the_chosen_nucleus_stays_when_numbers_change(segmenter):
    viewer = Viewer(segmenter, {"a": smear()}, side=300)
    viewer.nucleus.value = 3
    place = viewer.place
    viewer.sliders["nucleus_threshold"].value = 1
    assert viewer.nucleus.value is None
    viewer.sliders["nucleus_threshold"].value = 0.6
    assert viewer.nucleus.value == 3 and viewer.place == place


def test_a_click_chooses(segmenter):
    viewer = Viewer(segmenter, {"a": smear()}, side=300)
    viewer.click._dom_handlers({"dataX": 35 / 80 * 300, "dataY": 45 / 60 * 225})
    assert viewer.nucleus.value == nucleus_at(viewer.inspection.nuclei, (45, 35)).id == 3


def test_bad_pictures_are_told_and_left(segmenter, tmp_path):
    write_image(tmp_path / "1.png", smear())
    (tmp_path / "2.png").write_bytes(b"<script>")
    viewer = Viewer(segmenter, tmp_path, side=300)
    assert viewer.id.options == ("1", "2")
    viewer.id.value = "2"
    assert (
        "no readable picture" in viewer.status.value
        and viewer.picture.value == b""
        and viewer.nucleus.options == ()
        and viewer.pyramid.value == ""
    )
    viewer.sliders["min_score"].value = 0.2
    viewer.click._dom_handlers({"dataX": 1, "dataY": 1})
    viewer.id.value = "1"
    assert viewer.nucleus.options == (1, 2, 3) and viewer.status.value == "nuclei found: 3, cells reported: 3"
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="without pictures"):
        Viewer(segmenter, tmp_path / "none", side=300)


def test_broken_networks_are_told():
    broken = Segmenter(lambda images: images[:, :1] * np.nan, dict.fromkeys(SCALES, lambda crops: crops[:, :1]), CONFIG)
    assert "NaN" in Viewer(broken, {"a": smear()}, side=300).status.value


def test_no_ratios_were_fitted(segmenter):
    unfitted = Segmenter(
        segmenter.nucleus_network, segmenter.cell_networks, BundleConfig((60, 80), SCALES, (32, 32, 32))
    )
    assert "is picked" in Viewer(unfitted, {"a": smear()}, side=300).sentence.value


def open_app(monkeypatch, bundle, pictures):
    "What the notebook of the app shows."
    monkeypatch.setenv("SEGPC_BUNDLE", str(bundle))
    monkeypatch.setenv("SEGPC_PICTURES", str(pictures))
    names = {}
    for cell in json.loads((ROOT / "nbs" / "viewer_app.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    return names["app"]


def test_the_app_opens_what_it_is_given(segmenter, monkeypatch, tmp_path):
    save_bundle(segmenter, tmp_path / "bundle")
    assert len(open_app(monkeypatch, tmp_path / "bundle", "").id.options) == 3
    write_image(tmp_path / "pictures" / "7.bmp", smear())
    app = open_app(monkeypatch, tmp_path / "bundle", tmp_path / "pictures")
    assert app.id.options == ("7",) and same(app.inspection.cells, load_bundle(tmp_path / "bundle").segment(smear()))
    assert "holds no bundle" in open_app(monkeypatch, tmp_path / "none", "").value
    assert "no such file or folder" in open_app(monkeypatch, tmp_path / "bundle", tmp_path / "none").value


def await_server(server, port, log):
    "Wait until it answers, or fail with what it said."
    for _ in range(600):
        try:
            urlopen(f"http://127.0.0.1:{port}/static/none", timeout=5).close()
            return
        except URLError as error:
            if getattr(error, "code", None):  # it answers, if only that there is no such file
                return
        assert server.poll() is None, log.read_text()
        time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def page(tmp_path_factory, segmenter):
    "The app served by voila, in a browser."
    playwright = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("voila")
    if BROWSER is None:
        pytest.skip("needs Chromium")
    folder = tmp_path_factory.mktemp("viewer")
    save_bundle(segmenter, folder / "bundle")
    write_image(folder / "pictures" / "1.png", np.kron(smear(), np.ones((8, 8, 1), np.uint8)))
    write_image(folder / "pictures" / "2.png", np.kron(smear(((30, 40, 12),)), np.ones((8, 8, 1), np.uint8)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "IPYTHONDIR": str(folder), "JUPYTER_RUNTIME_DIR": str(folder)}
    program = "import sys; from segpc_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["view", folder / "pictures", "--bundle", folder / "bundle", "--port", port, "--no-browser"]
    command = [sys.executable, "-c", program, *words]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env=environment,
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        await_server(server, port, folder / "log")
        with playwright.sync_playwright() as p:
            browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.set_default_timeout(60_000)
            tab.trouble, tab.bundle = [], folder / "bundle"
            tab.on("pageerror", lambda error: tab.trouble.append(str(error)))
            tab.on("console", lambda message: tab.trouble.append(message.text) if message.type == "error" else None)
            tab.on(
                "request",
                lambda request: (
                    tab.trouble.append(request.url)
                    if not re.match(rf"http://127\.0\.0\.1:{port}/|data:|blob:", request.url)
                    else None
                ),
            )
            tab.goto(f"http://127.0.0.1:{port}/", timeout=300_000)
            tab.wait_for_selector("figure.scale", timeout=150_000)
            yield tab
            browser.close()
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # the command and voila
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def slider(page, name):
    return page.locator(".widget-slider", has_text=name).locator(".noUi-handle")


def shown(page):
    "What picture, sentence and cards show."
    sentence = page.get_by_text(re.compile("^Nucleus [0-9]+: |^No nucleus"))
    return (
        page.locator("img.widget-image").get_attribute("src"),
        sentence.inner_text(),
        page.locator("figure.scale").all_inner_texts(),
    )


def wait_for(page, words):
    page.get_by_text(words).wait_for()


def test_a_slider_changes_picture_and_sentence(page):
    picture, sentence, cards = shown(page)
    assert sentence.startswith("Nucleus 1: scale ") and len(cards) == 3 and sum("picked" in card for card in cards) == 1
    slider(page, "upper ratio, scale 0.5").press("Home")
    slider(page, "upper ratio, scale 1.75").press("Home")
    wait_for(page, "because it is the last one")
    after = shown(page)
    assert (
        after[0] != picture
        and after[1] != sentence
        and [card.split(":")[1].split()[0] for card in after[2]] == ["refused", "refused", "accepted,"]
    )
    slider(page, "least score").press("End")
    wait_for(page, "is not reported")
    page.get_by_role("button", name="thresholds of the bundle").click()
    page.get_by_text(sentence).wait_for()
    assert shown(page)[2] == cards
    assert page.trouble == []


def test_another_nucleus_and_another_picture(page):
    box = page.locator("img.widget-image").bounding_box()
    before = shown(page)
    page.locator(".widget-dropdown", has_text="nucleus").locator("select").select_option("2")
    wait_for(page, "Nucleus 2:")
    assert all(a != b for a, b in zip(shown(page), before))
    page.mouse.click(box["x"] + box["width"] * 35 / 80, box["y"] + box["height"] * 45 / 60)
    wait_for(page, "Nucleus 3:")
    page.get_by_label("fill").check()
    page.locator(".widget-dropdown", has_text="picture").locator("select").select_option("2")
    wait_for(page, "nuclei found: 1, cells reported: 1")
    page.locator(".widget-dropdown", has_text="picture").locator("select").select_option("1")
    wait_for(page, "nuclei found: 3, cells reported: 3")
    assert page.trouble == []


def test_keys_zoom_and_a_saved_bundle(page):
    page.locator(".widget-dropdown", has_text="nucleus").locator("select").select_option("1")
    wait_for(page, "Nucleus 1:")
    page.mouse.move(0, 0)
    page.locator("img.widget-image").hover()
    page.keyboard.press("j")
    wait_for(page, "Nucleus 2:")
    page.keyboard.press("k")
    wait_for(page, "Nucleus 1:")
    before = shown(page)
    page.mouse.move(0, 0)  # keys belong to the sliders again
    slider(page, "zoom").press("End")
    page.wait_for_function("old => document.querySelector('img.widget-image').src !== old", arg=before[0])
    slider(page, "zoom").press("Home")
    folder = page.bundle.parent / "tuned"
    page.get_by_label("folder").fill(str(folder))
    page.get_by_label("folder").press("Tab")
    slider(page, "least score").press("ArrowRight")
    page.get_by_role("button", name="save as a bundle").click()
    wait_for(page, "saved; use it with")
    assert load_bundle(folder).config.min_score > CONFIG.min_score
    assert (
        cli.main(["predict", str(page.bundle.parent / "pictures"), "--out", str(folder / "o"), "--bundle", str(folder)])
        == 0
    )
    page.get_by_role("button", name="thresholds of the bundle").click()
    assert page.trouble == []


def test_the_page_fits_laptop_and_phone(page, shoot):
    shoot(page, "viewer")
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function("document.documentElement.scrollWidth <= 390")
    rights = "[...document.querySelectorAll('figure.scale')].map(node => node.getBoundingClientRect().right)"
    page.wait_for_function(f"Math.max(...{rights}) <= 390")  # widgets follow the page a moment later
    assert len(page.evaluate(rights)) == len(SCALES)
    page.set_viewport_size({"width": 1280, "height": 900})


@pytest.mark.skipif(not (SHIPPED / "bundle.json").exists(), reason="this copy comes without trained networks")
def test_library_command_and_viewer_give_the_same_cells_of_a_mosaic(tmp_path):
    fields = [make_picture(np.random.default_rng(seed))[0] for seed in range(4)]
    mosaic = np.concatenate([np.concatenate(fields[:2], 1), np.concatenate(fields[2:], 1)])
    write_image(tmp_path / "mosaic.png", mosaic)
    library = load_bundle().segment(mosaic)
    assert len(library) >= 12
    assert cli.main(["predict", str(tmp_path / "mosaic.png"), "--out", str(tmp_path / "out")]) == 0
    command = read_results(tmp_path / "out")[0]["mosaic"]
    viewer = Viewer(load_bundle(), {"mosaic": mosaic}).inspection.cells
    for others in (command, viewer):
        assert len(others) == len(library)
        assert all(same_cell(mine, theirs) for mine, theirs in zip(library, others))
