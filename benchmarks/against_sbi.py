"""scoreinfer and sbi's NPSE side by side: two_moons, 10,000 simulations, 10,000 draws, one pinned core.

    python -m venv .venv-sbi && .venv-sbi/bin/pip install "sbi==0.27.*" "torch==2.13.0"
    python benchmarks/against_sbi.py --sbi-python .venv-sbi/bin/python

Both run one after the other on the same core, and the seconds are CPU seconds, so a busy machine disturbs the
comparison little. Compilation is in the first training and the first draw, and not in the second. Scores are classifier
two-sample tests against the 10,000 reference draws of observation 1 (needs sbibm-jax, Python 3.12 or newer).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
NUM = 10_000


def run_sbi(python: str, seed: int, core: int) -> tuple[dict, np.ndarray]:
    """Train and draw with sbi in its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        figures, draws = Path(folder) / "figures.json", Path(folder) / "draws.npz"
        command = [python, str(HERE / "sbi_npse.py"), "--seed", str(seed), "--num-simulations", str(NUM)]
        command += ["--num-draws", str(NUM), "--output", str(figures), "--draws", str(draws)]
        subprocess.run(command, check=True, preexec_fn=lambda: os.sched_setaffinity(0, {core}))
        return json.loads(figures.read_text()), np.load(draws)["theta"]


def run_scoreinfer(seed: int, y: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray]:
    """Train and draw with scoreinfer, both a second time without compilation."""
    import jax
    from accuracy import plain
    from measure import Clock
    from tasks import two_moons

    import scoreinfer as si

    key = jax.random.key(seed)
    problem = si.from_numpyro(two_moons)
    options = {"num_simulations": NUM, "num_steps": 6000, "width": 64, "progress_bar": False}
    with Clock() as first_training:
        si.NPSE(problem, **options).fit(key)
    with Clock() as training:
        posterior = si.NPSE(problem, **options).fit(key)
    with Clock() as first:
        posterior.sample(key, NUM, y=y)
    with Clock() as drawing:
        weighted = posterior.sample(key, NUM, y=y)
    with Clock() as other:
        posterior.sample(key, NUM, y=y + 0.01)
    with Clock() as moving:
        moved = posterior.condition(y=y).sample(key, NUM, max_proposals=10 * NUM)
    figures = {
        "first_train_cpu_s": first_training.times.cpu,
        "train_cpu_s": training.times.cpu,
        "draw_cpu_s": drawing.times.cpu,
        "first_draw_cpu_s": first.times.cpu,
        "moved_cpu_s": moving.times.cpu,
        "new_observation_compilations": other.times.num_compilations,
        "certified": float(weighted.certificate.certified),
        "ess_share": weighted.certificate.ess / NUM,
        "k_hat": weighted.certificate.k_hat,
    }
    raw = plain(posterior).sample(key, NUM, y=y)
    return figures, np.asarray(raw.sites["theta"], float), np.asarray(moved.sites["theta"], float)


def main() -> int:
    """Run both, print one table; ratios are of CPU seconds, ours over theirs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sbi-python", required=True, help="interpreter of the environment with sbi")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int, default=0, help="the core both are pinned to")
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    import jax
    from accuracy import report
    from tasks import TASKS

    import scoreinfer as si

    task = TASKS[0]
    theirs, their_draws = run_sbi(args.sbi_python, args.seed, args.core)
    ours, raw, corrected = run_scoreinfer(args.seed, task.observation(1))
    reference, split = task.reference(1), jax.random.key(1)
    theirs["c2st"] = si.calibration.c2st(split, reference, their_draws)
    ours["before"] = si.calibration.c2st(split, reference, raw)
    ours["after"] = si.calibration.c2st(split, reference, corrected)
    ours |= {
        "train_ratio": ours["train_cpu_s"] / theirs["train_cpu_seconds"],
        "first_train_ratio": ours["first_train_cpu_s"] / theirs["train_cpu_seconds"],
        "draw_ratio": ours["draw_cpu_s"] / theirs["draw_cpu_seconds"],
        "before_less_sbi": ours["before"] - theirs["c2st"],
    }
    report("against_sbi", "sbi", theirs)
    return int(report("against_sbi", "scoreinfer", ours) > 0)


if __name__ == "__main__":
    sys.exit(main())
