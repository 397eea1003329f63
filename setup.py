"""Everything about the package stands in settings.ini; this file only hands it to setuptools."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

extras = {
    name.removesuffix("_requirements"): settings[name].split() for name in settings if name.endswith("_requirements")
}
extras["all"] = sorted({package for packages in extras.values() for package in packages})

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    keywords=settings["keywords"],
    license_expression=settings["license"],  # the code, and the networks that come with it
    license_files=["LICENSE", "segpc_nb/bundle/LICENSE"],
    packages=find_packages(include=["segpc_nb", "segpc_nb.*"]),
    package_data={"segpc_nb": ["py.typed", "report.[chj]*", "preset_files/*.yaml", "bundle/*", "bundle/*/*"]},
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
