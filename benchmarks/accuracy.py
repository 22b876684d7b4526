"""Accuracy against known answers: one table a suite, figures beside the expected ones, exit code 1 if any is outside.

    python benchmarks/accuracy.py --suite oracles
    python benchmarks/accuracy.py --suite untrained
    python benchmarks/accuracy.py --suite sbibm --tasks two_moons slcp --observations 1
    python benchmarks/accuracy.py --suite multimodal
    python benchmarks/accuracy.py --suite unimodal
    python benchmarks/accuracy.py --suite deceived
    python benchmarks/accuracy.py --suite honesty
    python benchmarks/accuracy.py --suite corners
    python benchmarks/accuracy.py --suite reading
    python benchmarks/accuracy.py --suite k2_24
    python benchmarks/accuracy.py --suite lynx_hare
    python benchmarks/accuracy.py --suite smdp
    python benchmarks/accuracy.py --suite trust
    python benchmarks/accuracy.py --suite cost
    python benchmarks/accuracy.py --suite single
    python benchmarks/accuracy.py --suite quick_start
    python benchmarks/accuracy.py --suite filters
    python benchmarks/accuracy.py --suite priors
    python benchmarks/accuracy.py --suite designs
    python benchmarks/accuracy.py --suite sda

The expected figures are in expected.json.
"""

import argparse
import dataclasses
import fnmatch
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from measure import Clock

import scoreinfer as si

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "examples")]

Row = tuple[str, dict[str, float]]
NUM_DRAWS = 10_000


# --- suites: each yields rows (name, figures)


def run_oracles(args) -> Iterator[Row]:
    """Fit each oracle and compare weighted draws, evidence and verdict with the truth."""
    import oracles

    problems = [*oracles.oracles(), oracles.linear_gaussian(50)]
    for i, oracle in enumerate(problems):
        if not _chosen(oracle.name, args.tasks):
            continue
        jax.clear_caches()
        key = jax.random.fold_in(jax.random.key(args.seed), i)
        with Clock() as training:
            posterior = si.NPSE(oracle.model, progress_bar=args.progress, **_options(args)).fit(key)
        with Clock() as drawing:
            draws = posterior.sample(key, NUM_DRAWS, **oracle.data)
        truth = oracle.truth(oracle.data)
        yield (
            oracle.name,
            {
                "disagreement": oracles.disagreement(truth, oracle.flat(draws.sites), draws.log_weight),
                "log_evidence_error": abs(float(draws.certificate.log_evidence) - truth.log_evidence),
                **_verdict(draws),
                **_seconds(training, drawing),
            },
        )


def run_untrained(args) -> Iterator[Row]:
    """Weigh draws of random networks that saw no training: the mean weight is the evidence all the same."""
    import oracles
    from scoreinfer.montecarlo.weights import log_evidence

    oracle, num_networks = oracles.gaussian_mixture(), 20
    posterior = si.NPSE(oracle.model, num_steps=1, progress_bar=False).fit(jax.random.key(args.seed))
    truth = oracle.truth(oracle.data).log_evidence
    samplers = {"flow": si.samplers.ProbabilityFlow(num_steps=8), "sde": si.samplers.ReverseSDE(num_steps=24)}
    for name, sampler in samplers.items():
        errors, shares = [], []
        for key in jax.random.split(jax.random.key(args.seed + 1), num_networks):
            score = _disturb(key, posterior.proposal.score)
            proposal = dataclasses.replace(posterior.proposal, sampler=sampler, score=score)
            draws = dataclasses.replace(posterior, proposal=proposal).sample(key, NUM_DRAWS, **oracle.data)
            value, error = log_evidence(draws.log_weight)
            errors.append((np.exp(value - truth) - 1.0) / (error * np.exp(value - truth)))
            shares.append(draws.certificate.ess / NUM_DRAWS)
        yield (
            name,
            {
                "mean_error": abs(np.mean(errors)) * num_networks**0.5,
                "rms_error": np.sqrt(np.mean(np.square(errors))),
                "worst_error": np.abs(errors).max(),
                "median_ess_share": np.median(shares),
            },
        )


def _disturb(key, score, scale: float = 0.02):
    """Add noise to every weight."""
    leaves, tree = jax.tree.flatten(score)
    keys = jax.random.split(key, len(leaves))
    noisy = [x + scale * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def run_sbibm(args) -> Iterator[Row]:
    """Score sbibm tasks by the classifier two-sample test, before and after correction."""
    from tasks import TASKS

    for i, task in enumerate(TASKS):
        if not _chosen(task.name, args.tasks):
            continue
        key = jax.random.fold_in(jax.random.key(args.seed), i)
        with Clock() as training:
            posterior = si.NPSE(task.model, progress_bar=args.progress, **_options(args)).fit(key)
        for number in args.observations:
            y, own = task.observation(number), jax.random.fold_in(key, number)
            conditioned = posterior.condition(y=y)
            with Clock() as drawing:
                draws = conditioned.sample(own, NUM_DRAWS)
            with Clock() as correcting:
                focused = not draws.certificate.certified
                source = conditioned.focus(own) if focused else conditioned
                corrected = source.sample(own, NUM_DRAWS, max_proposals=20 * NUM_DRAWS, num_moves=100)
                values = corrected.resample(own, NUM_DRAWS)["theta"]
            figures = {}
            if not args.no_classifier:
                reference = task.reference(number)
                if not args.only_after:
                    raw = plain(posterior, 32 if args.published_budget else None).sample(own, NUM_DRAWS, y=y)
                    figures["before"] = si.calibration.c2st(own, reference, raw.sites["theta"])
                figures["after"] = si.calibration.c2st(own, reference, values)
            figures |= _verdict(draws)
            figures |= {"certified_after": float(corrected.certificate.certified), "focused": float(focused)}
            figures |= {"num_proposals": corrected.info.num_proposals, "ess_after": float(corrected.certificate.ess)}
            yield (
                f"{task.name}/{number}",
                figures | _seconds(training, drawing) | {"correct_s": correcting.times.wall},
            )


class Target(NamedTuple):
    """A single posterior with many modes.

    Args:
        name: its name.
        model: the NumPyro model; None for a bare density.
        kernel: the learned sampler.
        rivals: other kernels, by name.
        data: keyword arguments of the model.
        init_params: where the chains start; None: where the kernels choose.
        mode_of: number of the mode of every draw.
        modes: the modes' weights.
        log_evidence: log of the normalising constant; None where it is not known.
        reference: makes exact draws.
    """

    name: str
    model: Callable | None
    kernel: si.ScoreSDE
    rivals: dict[str, Any]
    data: dict[str, Any]
    init_params: Any
    mode_of: Callable
    modes: np.ndarray
    log_evidence: float | None
    reference: Callable


def _targets(args) -> Iterator[Target]:
    """Make the targets one by one: densities with known answers, then two tasks with reference draws."""
    from numpyro.infer import NUTS
    from tasks import TASKS

    import oracles

    for i, target in enumerate(oracles.densities()):
        potential = target.potential
        kernel = si.ScoreSDE(potential_fn=potential, start_scale=target.start_scale, num_proposals=8)
        rivals = {"nuts": NUTS(potential_fn=potential), "mala": si.mcmc.MALA(potential_fn=potential)}
        first = 2.0 * jax.random.normal(jax.random.fold_in(jax.random.key(args.seed), i), (4, target.dim))
        yield Target(
            target.name, None, kernel, rivals, {}, first, target.mode_of, target.modes, target.log_evidence,
            lambda target=target: target.sample(np.random.default_rng(0), NUM_DRAWS),
        )  # fmt: skip
    modes_of = {
        "two_moons": lambda theta: (theta.sum(1) > 0).astype(int),
        "slcp": lambda theta: 2 * (theta[:, 2] > 0) + (theta[:, 3] > 0),
    }
    for task in TASKS:
        if task.name in modes_of and _chosen(task.name, args.tasks):
            kernel = si.ScoreSDE(task.model, num_proposals=8)
            rivals = {"nuts": NUTS(task.model), "mala": si.mcmc.MALA(task.model)}
            mode_of, reference = modes_of[task.name], task.reference(1)
            modes = np.bincount(mode_of(reference), minlength=2) / len(reference)
            yield Target(
                task.name, task.model, kernel, rivals, {"y": task.observation(1)}, None, mode_of, modes, None,
                lambda draws=reference: draws,
            )  # fmt: skip


def run_multimodal(args) -> Iterator[Row]:
    """Learn single posteriors with many modes in warm-up; then NUTS and MALA, thinned, for as many seconds."""
    from numpyro.infer import MCMC

    budget = {"num_warmup": (args.num_steps or 10_000) // 10, "num_samples": NUM_DRAWS // 4, "num_chains": 4}
    for i, target in enumerate(_targets(args)):
        if not _chosen(target.name, args.tasks):
            continue
        jax.clear_caches()
        key = jax.random.fold_in(jax.random.key(args.seed), i)
        mcmc = MCMC(target.kernel, chain_method="vectorized", progress_bar=False, **budget)
        with Clock() as running:
            mcmc.run(key, **target.data, init_params=target.init_params, extra_fields=("accept_prob",))
            draws = _only(mcmc.get_samples())
        found = si.mcmc.certify_chains(mcmc, num=NUM_DRAWS)
        print(f"  {found}", flush=True)
        figures = {"score_mode_error": _mode_error(target, target.mode_of(draws)), "score_s": running.times.wall}
        if target.log_evidence is not None:
            figures["log_evidence_error"] = abs(found.weights.log_evidence - target.log_evidence)
        figures |= {"ess_share": found.weights.ess / NUM_DRAWS, "k_hat": found.weights.k_hat, "r_hat": found.r_hat}
        figures |= {"certified": float(found.certified), "accept_prob": found.accept_prob}
        if not args.no_classifier:
            figures["c2st"] = si.calibration.c2st(key, target.reference(), draws)
        comparison = si.Comparison(
            target.model, target.rivals, init_params=target.init_params, seconds=running.times.wall, **budget
        )
        rivals = comparison.run(key, **target.data)
        for name, result in rivals.results.items():
            numbers = target.mode_of(_only(rivals.mcmc[name].get_samples()))
            figures |= {f"{name}_mode_error": _mode_error(target, numbers), f"{name}_r_hat": result.r_hat}
            figures[f"{name}_s"] = result.warmup_seconds + result.sampling_seconds
        yield target.name, figures


def _only(samples) -> np.ndarray:
    """Take the draws of the only site, or those of a bare density."""
    return np.asarray(samples["theta"] if isinstance(samples, dict) else samples, np.float64)


def _mode_error(target: Target, numbers: np.ndarray) -> float:
    """Compute the total variation between the modes' shares among draws and their weights."""
    shares = np.bincount(numbers, minlength=len(target.modes)) / len(numbers)
    return 0.5 * float(np.abs(shares - target.modes).sum())


def run_deceived(args) -> Iterator[Row]:
    """Count false certificates among chains whose sampler was learned under sabotage."""
    import deceived

    key = jax.random.key(args.seed)
    for number, kind in enumerate(deceived.KINDS):
        if not _chosen(kind.__name__, args.tasks):
            continue
        verdicts = []
        for i, case in enumerate(kind()):
            jax.clear_caches()
            v = deceived.judge(jax.random.fold_in(jax.random.fold_in(key, number), i), case)
            verdicts.append(v)
            print(f"  {case.kind:15s} {case.target.name:28s} {'certified' if v.found.certified else 'refused  '} "
                  f"evidence off {v.evidence_error:6.3f}, modes off {v.mode_error:.3f}  {v.found.reason}",
                  flush=True)  # fmt: skip
        yield (
            kind.__name__,
            {
                "num": len(verdicts),
                "certified": sum(v.found.certified for v in verdicts),
                "wrong": sum(v.wrong for v in verdicts),
                "false_certificates": sum(v.found.certified and v.wrong for v in verdicts),
            },
        )


def run_corners(args) -> Iterator[Row]:
    """Count false certificates among posteriors with a mode in a rare corner of the prior."""
    import corners

    found: list[corners.Outcome] = []
    for i, (kind, corner) in enumerate(corners.problems()):
        if not _chosen(kind, args.tasks):
            continue
        for outcome in corners.outcomes(jax.random.fold_in(jax.random.key(args.seed), i), kind, corner):
            found.append(outcome)
            print(f"  {outcome}", flush=True)
        jax.clear_caches()
    for kind in dict.fromkeys(outcome.problem.kind for outcome in found):
        yield kind, _corner_figures([outcome for outcome in found if outcome.problem.kind == kind])
    yield "all", _corner_figures(found)


def _corner_figures(outcomes: list) -> dict[str, float]:
    false = [outcome for outcome in outcomes if outcome.certified and outcome.wrong]
    return {
        "num": len(outcomes),
        "certified": sum(outcome.certified for outcome in outcomes),
        "right_and_certified": sum(outcome.certified and not outcome.wrong for outcome in outcomes),
        "false_certificates": len(false),
        "false_and_covered": sum(outcome.covered for outcome in false),
    }


def run_unimodal(args) -> Iterator[Row]:
    """Learn posteriors with one mode in warm-up, beside NUTS and held against long NUTS."""
    from numpyro.infer import MCMC, NUTS
    from unimodal import models

    for i, task in enumerate(models()):
        if not _chosen(task.name, args.tasks):
            continue
        jax.clear_caches()
        key = jax.random.fold_in(jax.random.key(args.seed), i)
        long = MCMC(
            NUTS(task.reference_model, target_accept_prob=0.9), num_warmup=2000, num_samples=5000, num_chains=4,
            chain_method="sequential", progress_bar=False,
        )  # fmt: skip
        long.run(jax.random.fold_in(key, 1), **task.data)
        reference = {name: np.asarray(value) for name, value in long.get_samples().items()}
        kernels = {"score": si.ScoreSDE(task.model), "nuts": NUTS(task.model)}
        # Everything that both models have: the reference's may be the same posterior in other coordinates.
        latent = [site.name for site in si.from_numpyro(task.model, **task.data).latents]
        comparison = si.Comparison(
            task.model, kernels, num_warmup=(args.num_steps or 10_000) // 10, num_samples=1000,
            reference={name: reference[name] for name in latent},
        )  # fmt: skip
        compared = comparison.run(key, **task.data)
        figures: dict[str, float] = {}
        for name, result in compared.results.items():
            figures |= {f"{name}_mean_error": result.mean_error, f"{name}_sd_error": result.sd_error}
            figures |= {f"{name}_r_hat": result.r_hat, f"{name}_bulk_ess": result.bulk_ess}
            figures |= {f"{name}_ess_per_second": result.ess_per_second}
        found = compared.certificates["score"]
        print(f"  {found}", flush=True)
        figures |= {"certified": float(found.certified), "ess_share": found.weights.ess / found.weights.num}
        yield task.name, figures


def run_reading(args) -> Iterator[Row]:
    """Read a model of 150 sites and its data, beside NumPyro's own preparation of the same."""
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer.util import initialize_model

    num = 150

    def observed(y=None):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        for i in range(num):
            numpyro.sample(f"y{i}", dist.Normal(a, 1.0), obs=None if y is None else y[i])

    def latent(y=None):
        total = sum(numpyro.sample(f"a{i}", dist.Normal(0.0, 1.0)) for i in range(num))
        numpyro.sample("y", dist.Normal(total, 1.0), obs=y)

    data = np.random.default_rng(args.seed).normal(size=num)
    for model, y in ((observed, data), (latent, data[0])):
        if not _chosen(model.__name__, args.tasks):
            continue
        with Clock() as ours:
            si.from_numpyro(model, y=y).read((), {"y": y})
        with Clock() as theirs:
            jax.block_until_ready(initialize_model(jax.random.key(args.seed), model, model_kwargs={"y": y}).param_info)
        seconds = ours.times.wall, theirs.times.wall
        yield model.__name__, {"read_s": seconds[0], "numpyro_s": seconds[1], "ratio": seconds[0] / seconds[1]}


def run_honesty(args) -> Iterator[Row]:
    """Count false certificates among sabotaged posteriors, and certificates among healthy ones."""
    import honesty

    key = jax.random.key(args.seed)
    totals: Counter = Counter()
    for number, kind in enumerate((honesty.healthy, *honesty.SABOTAGES)):
        own = jax.random.fold_in(key, number)
        verdicts = []
        for i, case in enumerate(kind(own)):
            verdicts.append(honesty.judge(jax.random.fold_in(own, i), case))
            v = verdicts[-1]
            print(f"  {v.kind:18s} {v.problem:18s} {'certified' if v.certified else 'refused  '} "
                  f"z {v.disagreement:8.1f}  ESS {v.ess:7.0f}  k-hat {v.k_hat:5.2f}  {v.reason}")  # fmt: skip
        figures = {
            "num": len(verdicts),
            "certified": sum(v.certified for v in verdicts),
            "false_certificates": sum(v.false_certificate for v in verdicts),
        }
        yield kind.__name__, figures
        jax.clear_caches()  # every problem keeps its compiled programs, and the system's memory maps are limited
        if kind is not honesty.healthy:
            totals.update(figures)
    yield "sabotaged", dict(totals)


def run_k2_24(args) -> Iterator[Row]:
    """Hold the periods of K2-24's planets under three kernels against the exact answer on a grid."""
    import k2_24_velocities

    folder = Path("outputs/k2_24")
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in ((1, "one_planet"), (2, "two_planets")):
        if not _chosen(name, args.tasks):
            continue
        settings = argparse.Namespace(smoke=False, seed=args.seed, output_dir=folder)
        aliases, log_evidence, comparison = k2_24_velocities.run(number, settings)
        found = comparison.certificates["ScoreSDE"]
        errors = k2_24_velocities.largest_errors(aliases, comparison)
        figures = {f"{kernel.lower()}_mode_error": float(error) for kernel, error in errors.items()}
        figures["log_evidence_error"] = abs(found.weights.log_evidence - log_evidence)
        figures |= {"ess_share": found.weights.ess / found.weights.num, "k_hat": found.weights.k_hat}
        yield name, figures | {"r_hat": found.r_hat, "certified": float(found.certified)}


def run_lynx_hare(args) -> Iterator[Row]:
    """Compare corrected draws of the lynx-hare model with long NUTS, parameter by parameter."""
    import lynx_hare

    reference = json.loads((HERE / "data" / "lynx_hare_reference.json").read_text())["parameters"]
    key = jax.random.key(args.seed)
    with Clock() as training:
        options = {"num_steps": 8000} | _options(args)
        posterior = si.NPSE(lynx_hare.model, target_score=False, progress_bar=args.progress, **options).fit(key)
    with Clock() as drawing:
        draws = posterior.condition(pelts=lynx_hare.PELTS).focus(key).sample(key, NUM_DRAWS)
    yield "batch", _verdict(draws) | _seconds(training, drawing)
    values = draws.resample(key, NUM_DRAWS)
    for site in sorted(values):
        columns = np.asarray(values[site], np.float64).reshape(NUM_DRAWS, -1)
        for i in range(columns.shape[1]):
            name = site if columns.shape[1] == 1 else f"{site}[{i}]"
            truth = reference[name]
            yield (
                name,
                {
                    "mean": columns[:, i].mean(),
                    "nuts_mean": truth["mean"],
                    "mean_error": abs(columns[:, i].mean() - truth["mean"]) / truth["sd"],
                    "sd_error": abs(columns[:, i].std(ddof=1) / truth["sd"] - 1.0),
                },
            )


def run_smdp(args) -> Iterator[Row]:
    """Physics in reverse: linear processes against the smoother, the toy process against its exact grid answer."""
    import heat_source_holzschuh2023 as heat_source
    import paths_mcmc
    import toy_process_holzschuh2023 as toy

    from modes import UnknownRate, heat, moments_off, ornstein_uhlenbeck

    key = jax.random.key(args.seed)
    for modes in (ornstein_uhlenbeck(), heat()):
        name = modes.name
        if not _chosen(name, args.tasks):
            continue
        jax.clear_caches()
        end = np.sqrt(modes.covariances()[:, -1, -1]) * np.linspace(-1.5, 1.2, len(modes.rates))
        options = {"reverse": (lambda t0, t1, x: x) if name == "heat" else None, "num_steps": 2000} | _options(args)
        with Clock() as training:
            posterior = si.SMDP(modes.model, "x", progress_bar=args.progress, **options).fit(key)
        with Clock() as drawing:
            draws = posterior.sample(key, NUM_DRAWS, y=jax.numpy.asarray(end, jax.numpy.float32))
        figures = {
            "disagreement": modes.disagreement(draws.sites["x"], draws.log_weight, end),
            "log_evidence_error": abs(float(draws.certificate.log_evidence) - modes.smoother(end)[2]),
        }
        yield name, figures | _verdict(draws) | _seconds(training, drawing)
    if _chosen("unknown_rate", args.tasks):
        jax.clear_caches()
        one = ornstein_uhlenbeck()._replace(rates=np.ones(1), start_sd=np.ones(1))
        rate, y = UnknownRate(one, (0, 2, 4, 6, 8)), np.array([[1.2], [0.3], [0.6], [-0.2], [0.1]], np.float32)
        options = {"depth": 1, "num_steps": 1000} | _options(args)
        with Clock() as training:
            posterior = si.SMDP(rate.model, "x", progress_bar=args.progress, **options).fit(key)
        with Clock() as drawing:
            draws = posterior.sample(key, NUM_DRAWS, y=y)
        centre, sd, log_evidence, mean, covariance = rate.truth(y)
        found = np.log(np.asarray(draws.sites["rate"], np.float64)), np.exp(np.asarray(draws.log_weight, np.float64))
        middle = np.average(found[0], weights=found[1])
        particles = posterior.resampled(32).sample(key, NUM_DRAWS // 5, y=y).certificate
        figures = {
            "disagreement": moments_off(draws.sites["x"], draws.log_weight, mean, covariance),
            "log_evidence_error": abs(float(draws.certificate.log_evidence) - log_evidence),
            "resampled_ess_share": particles.ess / (NUM_DRAWS // 5),
            "resampled_log_evidence_error": abs(float(particles.log_evidence) - log_evidence),
            "rate_mean_error": abs(middle - centre) / sd,
            "rate_sd_error": abs(np.average((found[0] - middle) ** 2, weights=found[1]) ** 0.5 / sd - 1),
        }
        yield "unknown_rate", figures | _verdict(draws) | _seconds(training, drawing)
    if _chosen("heat_32x32", args.tasks):
        jax.clear_caches()
        field = heat_source.Heat()
        with Clock() as training:
            posterior = heat_source.learn(key, field)
        figures = heat_source.measure(jax.random.fold_in(key, 1), field, posterior)
        yield "heat_32x32", figures | {"train_s": training.times.wall}
    truth = toy.exact()
    for num in (2500, 250, 25):
        for name, learn, measure in (
            (f"toy/{num}", toy.learn, toy.measure),
            (f"toy_resimulated/{num}", partial(toy.learn, resimulate=True), toy.measure),
            (f"toy_implicit/{num}", toy.learn_score, toy.measure_score),
        ):
            if not _chosen(name, args.tasks):
                continue
            jax.clear_caches()
            with Clock() as training:
                learned = learn(key, num, progress_bar=args.progress, **_options(args))
            yield name, measure(key, learned, truth) | {"train_s": training.times.wall}
    yield from _burgers(key, args)
    yield from paths_mcmc.rows(key, lambda name: _chosen(name, args.tasks), args.num_steps, args.progress)


def _burgers(key, args) -> Iterator[Row]:
    """Stochastic Burgers: coverage over fresh cases on a fine grid, particles and NUTS on a coarse one."""
    import burgers_initial_state as burgers

    for name, grid, measure in (
        ("burgers", burgers.Burgers(), burgers.measure),
        ("burgers_coarse", burgers.COARSE, burgers.compare),
    ):
        if not _chosen(name, args.tasks):
            continue
        jax.clear_caches()
        with Clock() as training:
            posterior = burgers.learn(key, grid, args.num_steps or 1000, progress_bar=args.progress)
        yield name, measure(jax.random.fold_in(key, 1), grid, posterior) | {"train_s": training.times.wall}


def run_trust(args) -> Iterator[Row]:
    """Calibrate, fail, spread over threads; learn and weigh a C program."""
    import trust

    for name, figures in (
        ("threads", trust.threads), ("failures", trust.failures), ("calibration", trust.calibration),
        ("rainfall", lambda: trust.rainfall(args.seed)),
    ):  # fmt: skip
        if _chosen(name, args.tasks):
            yield name, figures()


def run_priors(args) -> Iterator[Row]:
    """Guide scores by likelihoods, weigh the draws exactly: linear Gaussian, mixtures, critically damped diffusion."""
    import priors

    for name, figures in priors.rows(args.seed):
        if _chosen(name, args.tasks):
            yield name, figures()


def run_designs(args) -> Iterator[Row]:
    """Fit once for masks, times and groups of many kinds; weigh old draws anew for changed models."""
    import designs

    yield from designs.rows(args.seed, lambda name: _chosen(name, args.tasks))


def run_sda(args) -> Iterator[Row]:
    """Draw paths of Lorenz-63 by score-based data assimilation, unfinished and finished, beside particles."""
    import assimilation

    for name, figures in assimilation.rows(args.seed):
        if _chosen(name, args.tasks):
            yield name, figures()


def run_cost(args) -> Iterator[Row]:
    """Memory of physics in reverse: flat in the window and the number of steps, linear in the size of the state."""
    import cost

    yield "memory", cost.growth()


def run_single(args) -> Iterator[Row]:
    """One posterior with `ScoreSDE`, cold, beside NUTS; then both with JAX's compilation cache warm (`single.py`)."""
    import single

    for name in single.TARGETS:
        if not _chosen(name, args.tasks):
            continue
        figures: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as cache:
            for run in ("cold", "cached"):
                own, nuts = (single.measure(method, name, args.seed, 0, cache) for method in ("scoreinfer", "nuts"))
                figures |= {
                    f"{run}_s": single.total(own), f"{run}_times_nuts": single.total(own) / single.total(nuts),
                    f"{run}_again_times_nuts": own["again"]["cpu"] / nuts["again"]["cpu"],
                }  # fmt: skip
                if run == "cold":
                    figures["programs"] = sum(own[stage]["programs"] for stage in ("learn", "first", "certify"))
                    figures["xla_s"] = sum(own[stage]["xla"] for stage in ("learn", "first", "certify"))
                    asked = ("share", "k_hat", "certified", "mode_error", "log_evidence_error", "mean_error")
                    figures |= {key: float(own[key]) for key in asked if key in own}
        yield name, figures


def run_quick_start(args) -> Iterator[Row]:
    """The quick starts in cold processes: CPU seconds, shares, milliseconds of warm draws (`quick_start.py`)."""
    for name in ("posterior", "physics"):
        if _chosen(name, args.tasks):
            command = [sys.executable, str(HERE / "quick_start.py"), name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            yield name, json.loads(done.stdout.splitlines()[-1])


def run_filters(args) -> Iterator[Row]:
    """Filters of Lorenz-96 beside rivals tuned in the same run (`filters.py`)."""
    import filters

    yield from filters.rows(lambda name: _chosen(name, args.tasks), first_seed=1000 + 100 * args.seed)


SUITES: dict[str, Callable] = {
    "oracles": run_oracles, "untrained": run_untrained, "sbibm": run_sbibm, "multimodal": run_multimodal,
    "unimodal": run_unimodal, "deceived": run_deceived, "honesty": run_honesty, "k2_24": run_k2_24,
    "corners": run_corners, "reading": run_reading,
    "lynx_hare": run_lynx_hare, "smdp": run_smdp, "cost": run_cost, "trust": run_trust, "priors": run_priors,
    "designs": run_designs,
    "sda": run_sda,
    "single": run_single, "quick_start": run_quick_start,
    "filters": run_filters,
}  # fmt: skip


# --- figures


def _options(args) -> dict:
    """Options of `fit` given on the command line."""
    given = {"num_steps": args.num_steps, "num_simulations": args.num_simulations}
    if args.published_budget:
        given |= {"num_steps": 31_250, "batch_size": 1024}
    return {name: value for name, value in given.items() if value is not None}


def plain(posterior, num_steps=None):
    """Draw as one would without weights: the flow without its wider start, with other steps where given."""
    sampler = posterior.proposal.sampler
    sampler = dataclasses.replace(sampler, inflation=0.0, num_steps=num_steps or sampler.num_steps)
    return dataclasses.replace(posterior, proposal=dataclasses.replace(posterior.proposal, sampler=sampler))


def _chosen(name: str, patterns: list[str] | None) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _verdict(draws) -> dict[str, float]:
    found = draws.certificate
    num = max(found.num, 1)
    return {"ess_share": float(found.ess) / num, "k_hat": float(found.k_hat), "certified": float(found.certified)}


def _seconds(training: Clock, drawing: Clock) -> dict[str, float]:
    return {"train_s": training.times.wall, "draw_s": drawing.times.wall}


# --- table


def bounds(suite: str, row: str) -> dict[str, dict[str, float]]:
    """Collect the expected figures of a row: patterns in the order of the file, later ones win."""
    merged: dict[str, dict[str, float]] = {}
    for pattern, figures in json.loads(EXPECTED.read_text()).get(suite, {}).items():
        if fnmatch.fnmatch(row, pattern):
            for name, bound in figures.items():
                merged[name] = merged.get(name, {}) | bound
    return merged


def outside(value: float, bound: dict[str, float]) -> bool:
    """Say whether a figure breaks its bound (NaN breaks any)."""
    return not bound.get("min", -np.inf) <= value <= bound.get("max", np.inf) and ("min" in bound or "max" in bound)


def describe(bound: dict[str, float]) -> str:
    """Write a bound, and the best published figure where there is one."""
    words = {"max": "<= {:g}", "min": ">= {:g}", "published": "(published {:g})", "reached": "[reached {:g}]"}
    return " ".join(words[name].format(value) for name, value in bound.items() if name in words)


def report(suite: str, row: str, figures: dict[str, float]) -> int:
    """Print one row, a figure a line, and count the figures outside."""
    expected, misses = bounds(suite, row), 0
    print(f"{suite}: {row}")
    for name, value in figures.items():
        bound = expected.get(name, {})
        miss = outside(value, bound)
        misses += miss
        print(f"    {name:20s} {value:10.4g}  {describe(bound):32s}{'  OUTSIDE' if miss else ''}".rstrip(), flush=True)
    return misses


def main() -> int:
    """Run the suites asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, action="append", help="repeat for several; all by default")
    parser.add_argument("--tasks", nargs="+", help="oracles or sbibm tasks, with wildcards")
    parser.add_argument("--observations", nargs="+", type=int, default=[1, 2, 3], help="of each sbibm task")
    parser.add_argument("--num-simulations", type=int, help="fixed budget; fresh simulations without it")
    parser.add_argument("--num-steps", type=int, help="optimiser steps")
    parser.add_argument(
        "--published-budget",
        action="store_true",
        help="sbibm: 32 million fresh simulations, as behind the best published scores; raw draws by 32 steps",
    )
    parser.add_argument("--no-classifier", action="store_true", help="skip the classifier test (minutes of CPU each)")
    parser.add_argument("--only-after", action="store_true", help="classifier test of the corrected draws alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    misses, record = 0, {}
    for suite in args.suite or SUITES:
        label = suite if args.num_simulations is None else f"{suite}_{args.num_simulations}"
        label += "_published" if args.published_budget else ""
        for row, figures in SUITES[suite](args):
            misses += report(label, row, figures)
            record.setdefault(label, {})[row] = {name: float(value) for name, value in figures.items()}
            if args.output:
                args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{misses} figures outside what is expected")
    return int(misses > 0)


if __name__ == "__main__":
    sys.exit(main())
