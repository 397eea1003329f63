"""The report in a browser: switches, rows, cells, sorting; nothing fetched, no error."""

import json
import re
import shutil

import numpy as np
import pytest

from segpc_nb.cells import cell_from_parts
from segpc_nb.report import write_report
from segpc_nb.synthetic import make_picture

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def smears():
    "Two drawn smears; the predicted cells are the drawn ones with scores and scales, less the last."
    found, truth = [], {}
    for seed in (3, 4):
        image, cells = make_picture(np.random.default_rng(seed))
        truth[str(seed)] = cells
        predicted = [
            cell_from_parts(
                c.id, c.bbox, c.nucleus, c.mask, image.shape[:2], scale=(0.5, 1.75)[i % 2], score=0.4 + 0.1 * i
            )
            for i, c in enumerate(cells[:-1])
        ]
        found.append((str(seed), image, predicted))
    return found, truth


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("needs Chromium")
    path = tmp_path_factory.mktemp("report") / "report.html"
    found, truth = smears()
    write_report(path, found, truth, title="<b>Tom & Jerry</b>", pixel_um=0.1)
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.trouble = []
        tab.on("pageerror", lambda error: tab.trouble.append(str(error)))
        tab.on("console", lambda message: tab.trouble.append(message.text) if message.type == "error" else None)
        tab.on(
            "request",
            lambda request: tab.trouble.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
        )
        tab.goto(path.as_uri())
        yield tab
        assert tab.trouble == []
        browser.close()


def visible(page, selector):
    return page.locator(selector).filter(visible=True).count()


def test_everything_is_there(page):
    found, truth = smears()
    count = sum(len(cells) for *_, cells in found)
    assert page.title() == page.locator("h1").inner_text() == "<b>Tom & Jerry</b>"
    assert (
        visible(page, ".pictures .whole")
        == visible(page, ".pictures .nucleus")
        == page.locator("#cells tbody tr").count()
        == count
    )
    assert visible(page, ".pictures .truth") == 0
    assert page.locator(".pictures img").count() == 2 and page.locator("#plots rect").count() > 10
    official = float(page.locator("#scores td").nth(1).inner_text())
    assert official == pytest.approx(count / sum(map(len, truth.values())), abs=0.01)


def test_switches(page):
    whole, nuclei = visible(page, ".pictures .whole"), visible(page, ".pictures .nucleus")
    page.uncheck("#show-nucleus")
    assert (visible(page, ".pictures .nucleus"), visible(page, ".pictures .whole")) == (0, whole)
    page.check("#show-nucleus")
    page.uncheck("#show-cytoplasm")
    assert (visible(page, ".pictures .nucleus"), visible(page, ".pictures .whole")) == (nuclei, 0)
    page.check("#show-cytoplasm")
    page.check("#show-truth")
    assert visible(page, ".pictures .truth") == sum(map(len, smears()[1].values()))
    page.uncheck("#show-truth")
    page.check("#only-uncertain")
    assert visible(page, ".pictures .whole") == 4  # 0.4 and 0.5, in both pictures
    page.uncheck("#only-uncertain")
    colors = {
        page.locator(".pictures .whole").nth(i).evaluate("node => getComputedStyle(node).stroke") for i in range(2)
    }
    page.check("#by-scale")
    assert (
        len(colors) == 1
        and len(
            {
                page.locator(".pictures .whole").nth(i).evaluate("node => getComputedStyle(node).stroke")
                for i in range(2)
            }
        )
        == 2
    )
    page.uncheck("#by-scale")


def test_rows_and_cells_point_at_each_other(page):
    page.locator("#cells tbody tr").nth(2).click()
    assert (
        page.locator("g.chosen").get_attribute("data-key")
        == page.locator("#cells tr.chosen").get_attribute("data-key")
        == "3_3"
    )
    page.locator('.pictures g[data-key="4_1"] .whole').click()
    assert page.locator("#cells tr.chosen").get_attribute("data-key") == "4_1"
    page.locator("#worst figure").first.click()
    assert page.locator("g.chosen").count() == 1


def test_columns_sort(page):
    def column(number):
        return page.locator(f"#cells tbody td:nth-child({number})").all_inner_texts()

    page.locator("#cells th").nth(3).click()
    areas = [float(text) for text in column(4)]
    assert areas == sorted(areas) and len(set(areas)) > 1
    page.locator("#cells th").nth(3).click()
    assert [float(text) for text in column(4)] == sorted(areas, reverse=True)
    page.locator("#cells th").nth(0).click()
    assert column(1)[0] == "3_1"


def test_it_fits_laptop_and_phone(page, shoot):
    page.evaluate("window.scrollTo(0, 0)")
    shoot(page, "report")
    page.locator("#cells tbody tr").nth(1).click()
    shoot(page, "report_a_chosen_cell")


def test_nothing_found_and_no_annotation(tmp_path):
    write_report(tmp_path / "r.html", [("1", np.full((40, 60, 3), 230, np.uint8), [])])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert data["scores"] is None and data["pictures"][0]["cells"] == [] and data["unit"] == "px"


def test_fifty_pictures_stay_light(tmp_path):
    rng = np.random.default_rng(0)
    noise = np.repeat(np.repeat(rng.integers(90, 250, (96, 128, 3), np.uint8), 16, 0), 16, 1)  # 2048 x 1536
    write_report(tmp_path / "r.html", ((str(i), noise, []) for i in range(50)))
    assert (tmp_path / "r.html").stat().st_size < 20_000_000
