"""The part of the build that pyproject.toml cannot say: the engine is a cffi module, manual and guides are made."""

import sys
from collections import defaultdict
from pathlib import Path

from setuptools import Distribution, setup

ROOT = Path(__file__).parent


class InstallManual(Distribution().get_command_class("install_data")):
    """Put manual pages, completions and guides of this source into a wheel, where pip and pipx find them: `share`."""

    def run(self) -> None:
        """Make them, and install them."""
        sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
        from installed_guides import write_guides

        from tapfs.cli.manual.__main__ import write_all

        made = Path("build/share")
        files = defaultdict(list)
        guides = Path("doc/tapfs")
        names = write_all(ROOT / made, version=self.distribution.get_version())
        for name in [*names, *(guides / each for each in write_guides(ROOT / made / guides))]:
            files[f"share/{name.parent}"].append(str(made / name))
        self.data_files = list(files.items())
        super().run()


setup(
    cffi_modules=["tapfs/kernel/build_engine.py:ffibuilder"],
    cmdclass={"install_data": InstallManual},
    data_files=[("share", [])],  # InstallManual has the list: without any it would not be asked
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
