"""The benchmarks are scripts, not a package: let their tests import what they import."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
