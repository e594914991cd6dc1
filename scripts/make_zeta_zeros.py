"""Compute the table of zeta zeros that the package ships.

    python scripts/make_zeta_zeros.py [COUNT]

Writes the imaginary parts of the first COUNT (default 1024) non-trivial zeros of the Riemann zeta function, rounded to
17 significant digits, which float64 holds exactly. Takes a few minutes; needs mpmath.
"""

import sys
from pathlib import Path

import mpmath

TABLE = Path(__file__).parents[1] / "src/resolvent/layers/zeta_zeros.txt"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    mpmath.mp.dps = 25
    zeros = [mpmath.nstr(mpmath.zetazero(n).imag, 17) for n in range(1, count + 1)]
    TABLE.write_text("\n".join(zeros) + "\n")


if __name__ == "__main__":
    main()
