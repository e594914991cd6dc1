"""List the licences of everything that an installed resolvent needs at run time, as THIRD_PARTY.md.

    python scripts/list_licenses.py > THIRD_PARTY.md

Reads the metadata of the packages in the current environment, which should be that of constraints.txt.
"""

import re
from importlib.metadata import Distribution, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ACCELERATOR = re.compile(r"nvidia-|cuda-|triton")
HEAD = """\
# Third-party licences

What `pip install resolvent` brings along, with the versions of `constraints.txt`. Made by `scripts/list_licenses.py`.
A CUDA build of torch brings Triton (MIT) and NVIDIA's libraries (NVIDIA's own licences) as well.

| package | version | licence |
|---|---|---|
"""
TAIL = """
The documentation holds files of two npm packages, with their licences beside them (`scripts/vendor_site_assets.py`).
The wheel holds neither.

* katex 0.19.1, MIT, its fonts SIL OFL 1.1: `docs/assets/katex`
* iframe-worker 1.0.4, MIT: `docs/assets/iframe-worker`
"""


def main() -> None:
    print(HEAD + "\n".join(rows()) + "\n" + TAIL, end="")


def rows() -> list[str]:
    """Return a row of the table for every package, in order of name."""
    found = {canonicalize_name(package.name): package for package in run_time_packages("resolvent")}
    versions = {name: package.version.partition("+")[0] for name, package in found.items()}
    return [f"| {name} | {versions[name]} | {licence(found[name])} |" for name in sorted(found)]


def run_time_packages(name: str) -> list[Distribution]:
    """Return the direct and indirect dependencies of a package, without extras and accelerator libraries."""
    found: dict[str, Distribution] = {}
    open_names = needs(distribution(name))
    while open_names:
        needed = open_names.pop()
        if needed not in found and not ACCELERATOR.match(needed):
            found[needed] = distribution(needed)
            open_names += needs(found[needed])
    return list(found.values())


def needs(package: Distribution) -> list[str]:
    requirements = map(Requirement, package.requires or [])
    return [canonicalize_name(r.name) for r in requirements if not r.marker or r.marker.evaluate({"extra": ""})]


def licence(package: Distribution) -> str:
    """Return the licence of the metadata: an SPDX expression, classifiers, or a first line of text."""
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    prefix = "License :: OSI Approved :: "
    declared = [line.removeprefix(prefix) for line in metadata.get_all("Classifier", []) if line.startswith(prefix)]
    if declared:
        return "; ".join(declared)
    if text := (metadata.get("License") or "").strip():
        return text.splitlines()[0]
    raise SystemExit(f"{package.name} declares no licence")


if __name__ == "__main__":
    main()
