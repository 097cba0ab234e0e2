"""Differences between two series of a run in any measure, paired over test samples: what docs/methods.md says beside its table.

python scripts/paired_differences.py runs/methods_result base_forgetting full,full_soft_targets joint,routed:analytic
"""

import sys
from pathlib import Path

import numpy as np

from alula.evaluation.bootstrap import percentile_interval
from alula.report.reading import read_run
from alula.report.series import series_of


def main() -> None:
    folder, measure, *pairs = sys.argv[1:]
    series = {one.name: one for one in series_of(read_run(Path(folder)))}
    for pair in pairs:
        first, second = ({(m.cell.seed, m.cell.order): m for m in series[name].members} for name in pair.split(","))
        shared = sorted(first.keys() & second.keys())  # the same seed and order
        gaps = [first[key].summaries[measure] - second[key].summaries[measure] for key in shared]
        draws = np.mean([first[key].resampled[measure] - second[key].resampled[measure] for key in shared], axis=0)
        found = percentile_interval(draws)
        shown = f"[{found.low:+.4f}, {found.high:+.4f}]" if found else ""
        above, name = sum(gap > 0 for gap in gaps), pair.replace(",", " - ")
        print(f"{measure}, {name}: {np.mean(gaps):+.4f} {shown}, above in {above} of {len(gaps)} cells")


if __name__ == "__main__":
    main()
