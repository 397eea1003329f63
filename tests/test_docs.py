"""The documentation site, built once: complete, no broken link, nothing fetched; clicked through in a browser."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from inspect import isclass, isfunction
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

root = Path(__file__).parent.parent
notebooks = [
    root / "nbs" / "index.ipynb",
    *sorted((root / "nbs").glob("[0-9][0-9]_*.ipynb")),
    *sorted((root / "nbs").glob("runs/*.ipynb")),
    *sorted((root / "nbs").glob("studies/*.ipynb")),
]
modules = sorted(path.stem for path in (root / "segpc_nb").glob("[a-z]*.py"))
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    "What a page links to, loads and says."

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.said, self.silent = set(), [], [], [], 0
        self.feed(path.read_text(encoding="utf-8"))
        self.text = "".join(self.said)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        self.silent += tag in ("script", "style")
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        elif tag == "link" and not {"canonical", "author"} & set(attrs["rel"].split()):
            self.loads.append(attrs["href"])
        elif attrs.get("src"):
            self.loads.append(attrs["src"])

    def handle_endtag(self, tag):
        self.silent -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.silent:
            self.said.append(data)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    for package in ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx_design", "latex2mathml"):
        pytest.importorskip(package, reason="needs the extra: pip install 'segpc_nb[docs]'")
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, root / "docs" / "build.py", out], check=False, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return out / "html"


@pytest.fixture(scope="session")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


def figures(path):
    return sum("image/png" in output.get("data", {}) for cell in cells(path) for output in cell.get("outputs", []))


def page_of(path, site):
    return site / path.relative_to(root).with_suffix(".html")


def test_links_and_pictures_are_there(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids
            ):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []
    assert sum(len(page.links) for page in pages.values()) > 1000


def test_nothing_is_fetched(site, pages):
    outside = [
        (path.name, load)
        for path, page in pages.items()
        for load in page.loads
        if urlsplit(load).scheme not in ("", "data") or urlsplit(load).netloc
    ]
    for path in site.rglob("*.css"):
        outside += [
            (path.name, found)
            for found in re.findall(
                r"(?:url\(|@import\s)\s*['\"]?((?:https?:)?//[^)'\"]*)", path.read_text(encoding="utf-8")
            )
        ]
    assert outside == []


@pytest.mark.parametrize("path", notebooks, ids=lambda path: path.stem)
def test_a_notebook_is_a_page(path, site, pages):
    page, shown, hidden = pages[page_of(path, site)], [], []
    for cell in cells(path):
        lines = source(cell).splitlines()
        code = "\n".join(line for line in lines if not line.startswith("#|")).strip()
        if cell["cell_type"] == "code" and code:
            (hidden if "#| hide" in lines or "hide-input" in cell["metadata"].get("tags", []) else shown).append(code)
    assert [code for code in shown if code not in page.text] == []
    assert [code for code in hidden if code in page.text] == []
    assert "#|" not in page.text and "skip_exec" not in page.text
    assert sum("_images/" in load for load in page.loads) >= figures(path)


def test_the_gallery_has_every_figure(site, pages):
    gallery = pages[site / "gallery.html"]
    kept = {path.name: path for path in (root / "results" / "benchmarks").glob("*.ipynb")}  # shown in place of the runs
    count = sum(figures(kept.get(path.name, path)) for path in notebooks)
    assert (
        sum("_images/cell-" in load for load in gallery.loads)
        == len([link for link in gallery.links if "#cell-" in link])
        == count
        > 20
    )


@pytest.mark.parametrize("name", modules)
def test_a_module_has_a_page(name, site, pages):
    from fastcore.docments import docments

    def words(text):
        return " ".join(re.findall(r"\w+", text))

    module, page = import_module(f"segpc_nb.{name}"), pages[site / "api" / f"{name}.html"]
    said = words(page.text)
    for symbol in module.__all__:
        assert re.search(rf"\b{symbol}\b", page.text), symbol
        if isfunction(getattr(module, symbol)) or isclass(getattr(module, symbol)):
            assert f"segpc_nb.{name}.{symbol}" in page.ids
            for parameter, comment in docments(getattr(module, symbol)).items():
                assert words(comment or "") in said, (symbol, parameter)


@pytest.fixture(scope="module")
def tab(site):
    playwright = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("needs Chromium")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            "Nothing."

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900}, base_url=home)
        tab.trouble = []
        tab.on("pageerror", lambda error: tab.trouble.append(str(error)))
        tab.on("console", lambda message: tab.trouble.append(message.text) if message.type == "error" else None)
        tab.on(
            "request",
            lambda request: tab.trouble.append(request.url) if not request.url.startswith((home, "data:")) else None,
        )
        yield tab
        assert tab.trouble == []
        browser.close()
    server.shutdown()


def test_the_search_finds_a_chapter(tab):
    tab.goto("search.html?q=aggregation")
    tab.locator("#search-results ul.search a[href*='nbs/29_aggregation.html']").first.click()
    assert tab.locator("article h1").inner_text().startswith("Aggregation")


def test_the_sidebar_leads_to_a_chapter(tab):
    tab.goto("index.html")
    tab.locator("nav.bd-links a[href$='nbs/02_metrics.html']").click()
    tab.wait_for_url("**/nbs/02_metrics.html")
    assert tab.locator("article h1").inner_text().startswith("Metrics")


def test_a_figure_leads_to_its_code(tab):
    tab.goto("gallery.html")
    tab.locator(".sd-card").first.click()
    tab.wait_for_url("**/nbs/*.html#cell-*")
    assert tab.locator(":target").count() == 1


def test_pages_look_like_pages(tab, shoot):
    for name in ("index", "gallery", "nbs/29_aggregation", "api/aggregation"):
        tab.goto(f"{name}.html")
        shoot(tab, f"site_{name.replace('/', '_')}")


def test_every_page_fits(tab, site, pages):
    wide = []
    for path in pages:
        tab.goto(path.relative_to(site).as_posix())
        for width in (1280, 390):
            tab.set_viewport_size({"width": width, "height": 900})
            if tab.evaluate("document.documentElement.scrollWidth") > width:
                wide.append((path.name, width))
    assert wide == []
