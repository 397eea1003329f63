"""Settings of Sphinx; `make docs` builds the site. No font, script or picture is fetched."""

import sys
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert

here = Path(__file__).parent
sys.path.insert(0, str(here))
config = ConfigParser(delimiters=["="])
config.read(here.parent / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

project = settings["lib_name"]
author = settings["author"]
copyright = settings["copyright"]
release = version = settings["version"]

extensions = ["myst_nb", "sphinx_design", "sphinx.ext.autodoc", "docment_tables"]
nb_execution_mode = "off"  # the chapters hold their outputs
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables that a cell displays
nb_code_prompt_show = "imports"
nb_code_prompt_hide = "imports"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
html_math_renderer = "mathml"

html_theme = "sphinx_book_theme"
html_title = project
html_baseurl = f"{settings['doc_host']}{settings['doc_baseurl']}/"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_favicon = "_static/favicon.svg"
html_use_index = False  # the search knows every symbol
html_domain_indices = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "repository_url": settings["git_url"],
    "use_repository_button": True,
    "use_download_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the sidebar has the search
}


def inline_math(self, node: nodes.Node) -> None:
    "A formula in a sentence."
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def display_math(self, node: nodes.Node) -> None:
    "A formula on its own line."
    self.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app) -> None:
    "Formulas as MathML, which browsers draw themselves; MathJax would be fetched."
    app.add_html_math_renderer("mathml", (inline_math, None), (display_math, None))
