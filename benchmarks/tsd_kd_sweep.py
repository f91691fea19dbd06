"""TSD-KD on the embedded pair over learning rates and the weights of its terms: accuracy on validation problems.

    python -m benchmarks.tsd_kd_sweep [--prompts 100] [--seeds 1] [--items 200] [--jobs 2] [--folder runs/tsd-kd-sweep]
    python -m benchmarks.tsd_kd_sweep --rates 2e-4,2e-3 --entropies 0,1 --rankings 0

It is `python -m benchmarks.label_efficiency --systems tsd-kd --vary ...` and takes that command's other options too,
but asks the problems of `embedded-validation` alone, whatever --tasks says: settings are not chosen on a test. The
table goes by accuracy, with the length of an answer and the KL of the text head. The same command goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.label_efficiency.__main__ import main as label_efficiency

DEFAULTS = ["--prompts", "100", "--seeds", "1", "--items", "200", "--folder", "runs/tsd-kd-sweep"]
FIXED = ["--systems", "tsd-kd", "--tasks", "embedded-validation"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="5e-5,2e-4,5e-4,2e-3", help="learning rates (default: %(default)s)")
    parser.add_argument("--entropies", default="0,0.1,1", help="weights of the entropy (default: %(default)s)")
    parser.add_argument("--rankings", default="0,0.01,0.1", help="weights of the ranking (default: %(default)s)")
    options, others = parser.parse_known_args(argv)
    varied = {"learning_rate": options.rates, "entropy": options.entropies, "ranking": options.rankings}
    vary = [part for name, values in varied.items() for part in ("--vary", f"distil.tsd_kd.{name}={values}")]
    return label_efficiency([*DEFAULTS, *others, *vary, *FIXED])


if __name__ == "__main__":
    sys.exit(main())
