"Package metadata for pip, read from settings.ini so that every fact stands once"
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf8")
cfg = parser["DEFAULT"]

extras = {
    key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")
}
extras["all"] = sorted({r for k, rs in extras.items() if k != "flash" for r in rs})


class WithNotebooks(build_py):
    "Puts notebooks, records and settings.ini beside the modules of a wheel; `pgolf_lab` copies them out"

    def run(self):
        super().run()
        if self.editable_mode: return  # a clone has its own
        target = Path(self.build_lib) / "pgolf" / "_lab"
        shutil.rmtree(target, ignore_errors=True)
        skip = shutil.ignore_patterns(".*", "__pycache__")
        for name in ("nbs", "records"):
            if (here / name).is_dir(): shutil.copytree(here / name, target / name, ignore=skip)
        if target.is_dir(): shutil.copy(here / "settings.ini", target / "settings.ini")


setup(
    cmdclass={"build_py": WithNotebooks},
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license=cfg["license"].upper(),
    author=cfg["author"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["pgolf", "pgolf.*"]),
    package_data={"pgolf": ["py.typed"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg.get("console_scripts", "").split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
