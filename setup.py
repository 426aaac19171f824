"""Puts the repository's configs and launcher into the package that is installed, as ``lora_ms/share``."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHARED = ("run_mindformer.py", "scripts/common.sh", "scripts/msrun_launcher.sh")


class BuildWithShare(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # then they are found in the repository
            return
        share = Path(self.build_lib) / "lora_ms" / "share"
        for name in (*SHARED, *(str(file.relative_to(ROOT)) for file in sorted(ROOT.glob("configs/*/*.yaml")))):
            (share / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, share / name)


setup(cmdclass={"build_py": BuildWithShare})
