"""README.md from index.ipynb, without Quarto: `make readme`."""

import re
from pathlib import Path

from nbconvert import MarkdownExporter
from traitlets.config import Config

here = Path(__file__).parent


def readme() -> str:
    "The text of the README: cells tagged hide-input show their output only, links start at the project's root."
    config = Config(
        {
            "TagRemovePreprocessor": {"enabled": True, "remove_input_tags": {"hide-input"}},
            "ClearMetadataPreprocessor": {"enabled": False},
        }
    )
    text, _ = MarkdownExporter(config=config).from_filename(here / "index.ipynb")
    text = re.sub(r"\]\((?=images/|\d\d_\w+\.ipynb)", "](nbs/", text)
    return text.replace("](../", "](").strip() + "\n"


if __name__ == "__main__":
    (here.parent / "README.md").write_text(readme(), encoding="utf-8")
