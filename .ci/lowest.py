"""Prints the lowest versions that setup.cfg allows as constraints for pip, completed to releases.

``numpy>=2,<3`` becomes ``numpy==2.0.*``: the first releases of a series are at times withdrawn.
"""

from configparser import ConfigParser
from pathlib import Path

setup = ConfigParser()
setup.read(Path(__file__).parents[1] / "setup.cfg")
wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["test"]
for line in wanted.split():
    name, _, version = line.partition(",")[0].partition(">=")
    numbers = version.split(".") + ["0"] * (version.count(".") == 0)
    print(f"{name}=={'.'.join(numbers)}" + ".*" * (len(numbers) < 3))
