"""Copy what the documentation loads from npm packages into docs/assets: it then needs no network, not even to be built.

    npm pack katex@0.19.1 iframe-worker@1.0.4
    python scripts/vendor_site_assets.py katex-0.19.1.tgz iframe-worker-1.0.4.tgz

KaTeX draws the formulas. The licence of its fonts, fonts/OFL.txt, is not in the package: the metadata of the fonts name
it. The shim of iframe-worker lets the search run from file://.
"""

import re
import sys
import tarfile
from pathlib import Path

TARGET = Path(__file__).parents[1] / "docs" / "assets"
WANTED = re.compile(r"package/(?:dist/|shim/)?(LICENSE|katex\.min\.(?:css|js)|fonts/[\w-]+\.woff2|index\.js)")
OTHER_FORMATS = re.compile(r',url\(fonts/[\w-]+\.(?:woff|ttf)\) format\("\w+"\)')


def main() -> None:
    for archive in map(Path, sys.argv[1:]):
        unpack(archive, TARGET / archive.name.rpartition("-")[0])
    style = TARGET / "katex" / "katex.min.css"
    style.write_text(OTHER_FORMATS.sub("", style.read_text("utf-8")), "utf-8")


def unpack(archive: Path, folder: Path) -> None:
    """Copy the wanted files of an npm package into a folder."""
    with tarfile.open(archive) as package:
        for member in package.getmembers():
            if found := WANTED.fullmatch(member.name):
                path = folder / found[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                content = package.extractfile(member)
                assert content is not None
                path.write_bytes(content.read())


if __name__ == "__main__":
    main()
