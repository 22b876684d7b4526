"""scoreinfer and sbi's NPSE side by side: two_moons, 10,000 simulations, 10,000 draws, one pinned core.

    python -m venv .venv-sbi && .venv-sbi/bin/pip install "sbi==0.27.*" "torch==2.13.0"
    python benchmarks/against_sbi.py --sbi-python .venv-sbi/bin/python

Both run one after the other on the same core, and the seconds are CPU seconds, so a busy machine disturbs the
comparison little. Compilation is stated apart. Scores are classifier two-sample tests against the 10,000 reference
draws of observation 1 (needs sbibm-jax, Python 3.12 or newer).
"""

import argparse
import json
import os
import subprocess
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
    """Train and draw with scoreinfer; every block twice the second time warm, so that compilation stands apart."""
    import jax
    from measure import Clock
    from tasks import two_moons

    import scoreinfer as si

    key = jax.random.key(seed)
    with Clock() as training:
        posterior = si.fit(key, two_moons, num_simulations=NUM, num_steps=4000, width=64, progress_bar=False)
    options = {"y": y}
    with Clock() as first:
        posterior.sample(key, NUM, **options)
    with Clock() as drawing:
        corrected = posterior.sample(key, NUM, **options)
    with Clock() as other:
        posterior.sample(key, NUM, y=y + 0.01)
    with Clock() as moving:
        moved = posterior.sample(key, NUM, max_proposals=10 * NUM, y=y)
    figures = {
        "train_cpu_seconds": training.times.cpu,
        "of_it_compiling": min(training.times.compile, training.times.cpu),
        "draw_cpu_seconds": drawing.times.cpu,
        "first_draw_cpu_seconds": first.times.cpu,
        "compilations_for_a_new_observation": other.times.num_compilations,
        "certified": corrected.certificate.certified,
        "ess_share": corrected.certificate.ess / NUM,
        "k_hat": corrected.certificate.k_hat,
        "moved_draws_cpu_seconds_with_compilation": moving.times.cpu,
    }
    raw = np.asarray(corrected.sites["theta"], float)
    return figures, raw, np.asarray(moved.sites["theta"], float)


def main() -> None:
    """Run both, print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sbi-python", required=True, help="interpreter of the environment with sbi")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int, default=0, help="the core both are pinned to")
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    from c2st import c2st
    from tasks import TASKS

    task = TASKS[0]
    theirs, their_draws = run_sbi(args.sbi_python, args.seed, args.core)
    ours, raw, corrected = run_scoreinfer(args.seed, task.observation(1))
    reference = task.reference(1)
    print("sbi NPSE    ", json.dumps(theirs | {"c2st": c2st(reference, their_draws)}))
    print(
        "scoreinfer  ", json.dumps(ours | {"c2st": c2st(reference, raw), "c2st_corrected": c2st(reference, corrected)})
    )
    training = (ours["train_cpu_seconds"] - ours["of_it_compiling"]) / theirs["train_cpu_seconds"]
    print(f"training, compilation apart: {training:.3f} of sbi's CPU time (wanted: 0.25)")
    print(f"10,000 corrected draws: {ours['draw_cpu_seconds'] / theirs['draw_cpu_seconds']:.3f} of sbi's (wanted: 0.1)")


if __name__ == "__main__":
    main()
