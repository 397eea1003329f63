"""The report in a browser: every switch, key and mark; nothing fetched, no error; what is printed."""

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest

from segpc_nb.cells import Cell, cell_from_parts
from segpc_nb.report import write_report
from segpc_nb.synthetic import make_picture

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TITLE = "<b>Tom & Jerry</b><img src=x onerror=alert(1)>"


def smears():
    "Two drawn smears; predicted are the drawn cells with scores and scales, less the last; one has no cytoplasm."
    found, truth = [], {}
    for seed in (3, 4):
        image, cells = make_picture(np.random.default_rng(seed))
        id = {3: "3", 4: "=4<i>"}[seed]
        truth[id] = cells
        predicted = [
            cell_from_parts(
                c.id, c.bbox, c.nucleus, c.mask, image.shape[:2], scale=(0.5, 1.75)[i % 2], score=0.4 + 0.1 * i
            )
            for i, c in enumerate(cells[:-1])
        ]
        first = predicted[0]
        predicted[0] = Cell(first.id, first.bbox, first.mask, np.zeros_like(first.mask), score=first.score)
        found.append((id, image, predicted))
    return found, truth


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    found, truth = smears()
    write_report(path, found, truth, title=TITLE, pixel_um=0.1)
    return path


def opened(context, path):
    "A tab with the page that notes errors and requests."
    tab = context.new_page()
    tab.trouble = []
    tab.on("pageerror", lambda error: tab.trouble.append(str(error)))
    tab.on("console", lambda message: tab.trouble.append(message.text) if message.type in ("error", "warning") else 0)
    local = ("file:", "data:", "blob:")
    tab.on("request", lambda request: 0 if request.url.startswith(local) else tab.trouble.append(request.url))
    tab.goto(path.as_uri())
    return tab


@pytest.fixture
def page(browser, report):
    "The report, without any marks."
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = opened(context, report)
    yield tab
    assert tab.trouble == []
    context.close()


def visible(page, selector):
    return page.locator(selector).filter(visible=True).count()


def counts(page):
    "How many cells the pictures, the gallery, the table and the bar show."
    said = int(page.locator("#counts").inner_text().split()[0])
    return (
        visible(page, ".pictures .whole"),
        page.locator("#gallery .card").count(),
        visible(page, "#cells tbody tr"),
        said,
    )


def number(page, name):
    return page.locator("#numbers div").filter(has_text=name).locator("b").inner_text()


def slide(page, score):
    page.locator("#score").evaluate(
        "(node, value) => { node.value = value; node.dispatchEvent(new Event('input')); }", score
    )
    page.wait_for_function("value => document.getElementById('score-value').textContent === value", arg=f"{score:.2f}")


def name(page):
    return page.locator("#cell-name").inner_text()


def saved(page, selector):
    with page.expect_download() as download:
        page.click(selector)
    return download.value.suggested_filename, download.value.path().read_text(encoding="utf-8")


TOTAL = sum(len(cells) for *_, cells in smears()[0])


def test_everything_is_there(page):
    truth = sum(map(len, smears()[1].values()))
    assert page.title() == page.locator("h1").inner_text() == TITLE
    assert counts(page) == (TOTAL,) * 4 and visible(page, ".pictures .nucleus") == TOTAL
    assert visible(page, ".pictures .truth") == 0
    assert page.locator(".pictures img").count() == 2 and page.locator("#plots rect").count() > 10
    recall = page.locator("#scores tr").nth(0).locator("th").all_inner_texts().index("recall")
    assert float(page.locator("#scores tr").nth(1).locator("td").nth(recall).inner_text()) < 1
    assert number(page, "plasma cells") == str(TOTAL) and number(page, "doubtful") == "2"
    assert number(page, "missed") == f"{page.locator('#missed .card').count()} of {truth}"
    assert page.locator(".pictures .number").first.text_content() == "1"


def test_switches(page):
    for switch, part in (("nucleus", "nucleus"), ("cytoplasm", "whole"), ("numbers", "number")):
        shown = visible(page, f".pictures .{part}")
        page.uncheck(f"#show-{switch}")
        assert (visible(page, f".pictures .{part}"), shown) == (0, TOTAL)
        page.check(f"#show-{switch}")
    page.check("#show-truth")
    assert visible(page, ".pictures .truth") == sum(map(len, smears()[1].values()))

    def colors():
        strokes = page.locator(".pictures .whole").evaluate_all("nodes => nodes.map(n => getComputedStyle(n).stroke)")
        return len(set(strokes))

    before = colors()
    page.check("#by-scale")
    assert (before, colors()) == (1, 3) and visible(
        page, "#legend"
    ) == 1  # scale 0 is that of the cell without cytoplasm


def test_one_slider_filters_everything(page):
    sure = sum(cell.score >= 0.55 for *_, cells in smears()[0] for cell in cells)
    missed = page.locator("#missed .card").count()
    bars = page.locator("#plots svg").nth(2).get_attribute("aria-label")
    slide(page, 0.55)
    assert counts(page) == (sure,) * 4 and number(page, "plasma cells") == str(sure) and 0 < sure < TOTAL
    assert page.locator("#missed .card").count() == missed + TOTAL - sure
    assert page.locator("#plots svg").nth(2).get_attribute("aria-label") != bars
    slide(page, 0.0)
    assert counts(page) == (TOTAL,) * 4


def test_filter_and_search(page):
    page.select_option("#filter", "uncertain")
    assert counts(page) == (4,) * 4  # 0.4 and 0.5, in both pictures
    page.select_option("#filter", "doubtful")
    assert counts(page) == (2,) * 4 and visible(page, ".pictures figure") == 2
    page.select_option("#filter", "all")
    page.fill("#search", "=4<")
    page.wait_for_function("document.querySelectorAll('.pictures figure[hidden]').length === 1")
    assert counts(page) == (len(smears()[0][1][2]),) * 4
    page.fill("#search", "nothing like this")
    page.wait_for_function("document.querySelectorAll('#cells tbody tr').length === 0")
    assert counts(page) == (0,) * 4


def test_gallery_and_table_sort_together(page):
    def column(title):
        heads = page.locator("#cells th").all_inner_texts()
        return page.locator(f"#cells tbody td:nth-child({heads.index(title) + 1})").all_inner_texts()

    assert column("doubtful")[:3] == ["yes", "yes", ""]  # doubtful first, from the start
    page.get_by_role("button", name="cell area, µm²").click()
    areas = [float(text) for text in column("cell area, µm²")]
    assert areas == sorted(areas) and len(set(areas)) > 1
    assert page.locator("#cells th[aria-sort=ascending]").inner_text() == "cell area, µm²"
    page.get_by_role("button", name="cell area, µm²").click()
    assert [float(text) for text in column("cell area, µm²")] == areas[::-1]
    for field, title in (("nc", "N:C ratio"), ("score", "score"), ("area", "cell area, µm²"), ("iou", "IoU")):
        page.select_option("#sort", field)
        cards = page.locator("#gallery .card").evaluate_all("nodes => nodes.map(node => node.dataset.key)")
        assert cards == column("cell") and len(cards) == TOTAL
        known = [float(text) for text in column(title) if text != "\u2013"]
        assert known in (sorted(known), sorted(known, reverse=True))
    page.select_option("#sort", "nc")
    assert column("N:C ratio")[-2:] == ["\u2013", "\u2013"]  # unknown values are last, whatever the direction
    page.click("#direction")
    assert column("N:C ratio")[-2:] == ["\u2013", "\u2013"]
    page.select_option("#sort", "key")
    assert column("cell")[:2] == ["=4<i>_1", "=4<i>_2"]


def test_the_viewer_zooms_and_moves(page):
    def box():
        return [float(value) for value in page.locator("#stage").get_attribute("viewBox").split()]

    page.locator(".pictures img").first.click(position={"x": 2, "y": 2})
    assert name(page) == "Picture 3"
    whole = box()
    page.mouse.move(500, 400)
    page.mouse.wheel(0, -600)
    page.wait_for_function("before => document.getElementById('stage').viewBox.baseVal.width < before", arg=whole[2])
    near, scrolled = box(), page.evaluate("scrollY")
    page.mouse.down()
    page.mouse.move(560, 450, steps=4)
    page.mouse.up()
    moved = box()
    assert moved[0] < near[0] and moved[1] < near[1] and moved[2] == near[2] and page.evaluate("scrollY") == scrolled
    page.click("#zoom-fit")
    assert box() == whole
    page.keyboard.press("+")
    assert box()[2] == pytest.approx(0.8 * whole[2])
    page.keyboard.press("0")
    page.locator('#stage g[data-key="3_2"] .whole').click(force=True)
    assert name(page) == "Cell 3_2" and page.locator("#stage g.chosen").get_attribute("data-key") == "3_2"
    page.keyboard.press("Escape")
    assert (
        not page.locator("#viewer").is_visible() and page.locator("#cells tr.chosen").get_attribute("data-key") == "3_2"
    )


def test_rows_cards_and_missed_cells_open(page):
    page.locator("#cells tbody tr").nth(2).click()
    assert name(page) == "Cell " + page.locator("#cells tr.chosen").get_attribute("data-key")
    page.click("#close")
    page.locator("#gallery .card").nth(1).click()
    assert name(page) == "Cell " + page.locator("#gallery .card").nth(1).get_attribute("data-key")
    page.click("#close")
    page.locator("#missed .card").first.click()
    assert name(page) == "Missed cell of picture 3" and visible(page, "#stage .truth") == 1
    assert not page.locator("#mark-accept").is_visible()


def test_marks_by_key_are_kept_and_downloaded(browser, report, page):
    page.select_option("#sort", "key")
    page.keyboard.press("j")
    assert page.locator("#gallery .card.chosen").get_attribute("data-key") == "=4<i>_1"
    page.keyboard.press("r")  # goes on to the next cell
    assert page.locator("#gallery .card.chosen").get_attribute("data-key") == "=4<i>_2"
    page.keyboard.press("Enter")
    page.keyboard.press("a")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("k")
    assert name(page) == "Cell =4<i>_3"
    page.keyboard.press("o")
    page.keyboard.type("lymphocyte ajrk")  # letters are text here
    page.keyboard.press("Enter")
    assert name(page) == "Cell 3_1"
    page.keyboard.press("n")
    page.keyboard.type('=1+1, "two"')
    page.keyboard.press("Escape")
    assert page.locator("#viewer").is_visible()
    page.keyboard.press("Escape")
    marked = {"=4<i>_1": ("reject", "", ""), "=4<i>_2": ("accept", "", "")}
    marked |= {"=4<i>_3": ("other", "lymphocyte ajrk", ""), "3_1": ("", "", '=1+1, "two"')}

    def shown(tab):
        return number(tab, "plasma cells"), number(tab, "reviewed"), tab.locator("#download").inner_text()

    wanted = (str(TOTAL - 2), f"3 of {TOTAL}", "Download review (4)")
    assert shown(page) == wanted
    file, text = saved(page, "#download")
    review = json.loads(text)
    found = {
        f"{cell['picture']}_{cell['cell']}": (cell["mark"], cell["type"], cell["note"]) for cell in review["cells"]
    }
    assert (file, review["format"], review["version"], found) == ("review.json", "segpc review", 1, marked)
    page.reload()
    assert shown(page) == wanted
    page.select_option("#filter", "reject")
    assert page.locator("#cells tbody td").nth(1).inner_text() == "✕ rejected"
    page.select_option("#filter", "all")
    file, text = saved(page, "#csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    by_cell = {(row["picture"], row["cell"]): row for row in rows}
    assert file == "cells-of-report.csv" and len(rows) == TOTAL and "cell_area_um2" in rows[0]
    assert by_cell["'=4<i>", "3"]["type"] == "lymphocyte ajrk" and by_cell["3", "1"]["note"] == '\'=1+1, "two"'
    other = opened(browser.new_context(), report)  # another browser knows nothing until it loads the file
    assert number(other, "reviewed") == f"0 of {TOTAL}"
    other.set_input_files(
        "#load-file", files=[{"name": "r.json", "mimeType": "", "buffer": json.dumps(review).encode()}]
    )
    other.wait_for_selector("text=4 marks loaded from r.json.")
    assert shown(other) == wanted
    other.set_input_files("#load-file", files=[{"name": "x.json", "mimeType": "", "buffer": b"[1"}])
    other.wait_for_selector("text=x.json is no review")
    other.context.close()


def test_a_mark_is_taken_back(page):
    page.locator("#gallery .card").first.click()
    page.uncheck("#advance")
    missed = number(page, "missed")
    page.click("#mark-reject")
    assert page.locator("#mark-reject").get_attribute("aria-pressed") == "true" and number(page, "missed") != missed
    page.click("#mark-reject")
    assert (
        page.locator("#mark-reject").get_attribute("aria-pressed") == "false"
        and page.locator("#download").is_disabled()
    )
    page.keyboard.press("a")
    page.keyboard.press("u")
    assert page.locator("#mark-accept").get_attribute("aria-pressed") == "false" and number(page, "missed") == missed


def test_stored_marks_that_make_no_sense_are_left_out(page):
    page.locator("#gallery .card").first.click()
    page.keyboard.press("a")
    page.evaluate(
        """() => { const key = Object.keys(localStorage)[0], ref = Object.keys(JSON.parse(localStorage[key]))[0];
        localStorage[key] = JSON.stringify({[ref]: {mark: "toString", type: 7}, "no/cell": {mark: "reject"}}); }"""
    )
    page.reload()
    assert number(page, "reviewed") == f"0 of {TOTAL}"
    page.evaluate("localStorage[Object.keys(localStorage)[0]] = '{'")
    page.reload()
    assert "does not keep marks" in page.locator("#message").inner_text() and counts(page) == (TOTAL,) * 4


def test_marks_of_an_earlier_review_are_shown(browser, tmp_path):
    from segpc_nb.report import outline_keys

    found, _ = smears()
    key = outline_keys(found[0][2])[1]
    write_report(tmp_path / "r.html", found, reviews={"3": {key: {"mark": "accept", "note": "sure"}}})
    tab = opened(browser.new_context(), tmp_path / "r.html")
    assert number(tab, "reviewed") == f"1 of {TOTAL}" and tab.locator("#download").is_disabled()
    assert not tab.locator("#missed-section").is_visible() and not tab.locator("#scores-section").is_visible()
    tab.locator("#cells tr[data-key='3_2']").click()
    tab.keyboard.press("u")
    tab.keyboard.press("Escape")
    assert json.loads(saved(tab, "#download")[1])["cells"][0] | {"outline": ""} == {
        "picture": "3",
        "cell": 2,
        "outline": "",
        "mark": "",
        "type": "",
        "note": "sure",
    }
    assert tab.trouble == []
    tab.context.close()


def test_the_page_allows_no_other_script(page):
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.bad = 1'}))"
    )
    assert page.evaluate("window.bad") is None
    assert any("Content Security Policy" in text for text in page.trouble)
    page.trouble.clear()


def test_print_has_the_whole_table_and_no_bar(page):
    page.emulate_media(media="print")
    assert not page.locator(".bar").is_visible() and page.locator("#shown").inner_text().startswith(
        f"{TOTAL} of {TOTAL}"
    )
    box = page.locator("#cells-section .scroll").evaluate("node => [node.scrollHeight, node.clientHeight]")
    assert box[0] == box[1] and visible(page, "#cells tbody tr") == TOTAL
    page.emulate_media(media="screen")


def contrast(page, selector):
    "Contrast of a text with what is behind it, as WCAG counts it."
    ink, paper = page.locator(selector).first.evaluate(
        """node => { const color = getComputedStyle(node).color; let back;
        while (node && /, 0\\)$|transparent/.test(back = getComputedStyle(node).backgroundColor))
            node = node.parentElement;
        return [color, back].map(text => text.match(/[\\d.]+/g).slice(0, 3).map(Number)); }"""
    )

    def luminance(color):
        parts = np.array(color) / 255
        return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    dark, light = sorted((luminance(ink), luminance(paper)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_contrast(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.locator("#gallery .card").first.click()
    page.keyboard.press("r")
    for selector in ("#what", ".bar a", "#counts", ".card b", ".card .sign.reject", "#cells td", "#cells tr.reject td"):
        assert contrast(page, selector) >= 4.5, selector
    page.keyboard.press("k")
    for selector in ("#mark-reject", "#place", "dt", "kbd"):
        assert contrast(page, selector) >= 4.5, selector
    backs = page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")
    assert (int(backs[0]) > 128) == (scheme == "light")


def test_a_long_table_is_short_until_it_is_printed(browser, tmp_path):
    nucleus = np.zeros((9, 9), bool)
    nucleus[2:6, 2:6] = True
    cells = [Cell(k, (k, k, k + 9, k + 9), nucleus, ~nucleus) for k in range(205)]
    write_report(tmp_path / "r.html", [("1", np.full((300, 300, 3), 230, np.uint8), cells)])
    tab = opened(browser.new_context(), tmp_path / "r.html")
    assert visible(tab, "#cells tbody tr") == 200 and tab.locator("#more-rows").inner_text() == "Show all 205 rows"
    tab.emulate_media(media="print")
    assert visible(tab, "#cells tbody tr") == 205 and not tab.locator("#more-rows").is_visible()
    tab.emulate_media(media="screen")
    tab.click("#more-rows")
    assert visible(tab, "#cells tbody tr") == 205 and not tab.locator("#more-rows").is_visible()
    tab.context.close()


def test_it_fits_laptop_and_phone(page, shoot):
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.evaluate("window.scrollTo(0, 0)")
        shoot(page, f"report_{scheme}")
    page.locator("#cells tbody tr").nth(1).click()
    shoot(page, "report_viewer")


def test_nothing_found_and_no_annotation(browser, tmp_path):
    write_report(tmp_path / "r.html", [("1", np.full((40, 60, 3), 230, np.uint8), [])])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert data["scores"] is None and data["pictures"][0]["cells"] == [] and data["unit"] == "px"
    tab = opened(browser.new_context(), tmp_path / "r.html")
    assert (
        counts(tab) == (0,) * 4 and number(tab, "median N:C ratio") == "\u2013" and visible(tab, ".pictures img") == 1
    )
    tab.keyboard.press("j")
    tab.keyboard.press("a")
    assert tab.trouble == []
    tab.context.close()


def test_three_hundred_pictures_stay_light(tmp_path):
    rng = np.random.default_rng(0)
    noise = np.repeat(np.repeat(rng.integers(90, 250, (192, 256, 3), np.uint8), 8, 0), 8, 1)  # 2048 x 1536
    cells = make_picture(rng)[1]
    write_report(tmp_path / "r.html", ((str(i), noise, cells) for i in range(60)), count=300)
    assert (tmp_path / "r.html").stat().st_size < 25_000_000 / 5


def test_operating_points_move_the_slider(browser, tmp_path):
    found, _ = smears()
    about, points = {"3": {"patient": "anna", "nuclei": 9}}, {"sensitive": 0.1, "precise": 0.55}
    write_report(tmp_path / "r.html", found, about=about, points=points)
    page = opened(browser.new_context(), tmp_path / "r.html")
    assert page.locator("#points button").all_inner_texts() == ["sensitive", "precise"]
    page.locator("#points button").last.click()
    left = [cell for _, _, cells in found for cell in cells if cell.score >= 0.55]
    assert counts(page) == (len(left),) * 4 and 0 < len(left) < TOTAL
    rows = [row.split("\t") for row in page.locator("#summary tbody tr").all_inner_texts()]
    assert [row[3] for row in rows] == [
        "\N{EN DASH}",
        "9",
        "9",
        "\N{EN DASH}",
    ]  # nobody counted the nuclei of the second picture
    assert sum(int(row[2]) for row in rows[2:]) == len(left) and page.trouble == []
