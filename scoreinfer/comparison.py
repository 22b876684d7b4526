"""Comparison of kernels on one model: cost, effective sample size and error of each."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from numpyro.infer import HMC, MCMC
from numpyro.infer.mcmc import MCMCKernel
from numpyro.primitives import Messenger

from scoreinfer._tree import named_leaves
from scoreinfer._typing import Key
from scoreinfer.arviz import file_name, in_file_names
from scoreinfer.mcmc.chain_certificate import ChainCertificate, certify_chains
from scoreinfer.mcmc.score_sde import ScoreSDE

Arrays = Mapping[str, Any]
"""Arrays by site name."""
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""The JAX monitoring event that reports compilation times, in seconds."""


class Result(NamedTuple):
    """Cost and quality of one kernel's run. NaN means "not known".

    Args:
        compile_seconds: seconds of compilation, in warm-up and sampling.
        warmup_seconds: wall seconds of warm-up (including learning), without compilation.
        sampling_seconds: wall seconds of sampling, without compilation.
        cpu_seconds: CPU seconds of this process, including compilation.
        num_evaluations: evaluations of the density, with or without its gradient, in warm-up and sampling. NaN if the
            kernel does not report them.
        bulk_ess: smallest bulk effective sample size of any component.
        tail_ess: smallest tail effective sample size of any component.
        r_hat: largest rank-normalised split R-hat of any component.
        num_divergences: divergent iterations. With thinning, the count of the kept iterations times the thinning. NaN
            if the kernel does not report them.
        log_evidence: log evidence. Only `ScoreSDE` estimates it; NaN for other kernels.
        mean_error: largest error of a mean, in standard deviations of the reference. NaN without a reference.
        sd_error: largest relative error of a standard deviation. NaN without a reference.
        modes: share of the draws in each mode. Empty without a ``modes`` function.
    """

    compile_seconds: float
    warmup_seconds: float
    sampling_seconds: float
    cpu_seconds: float
    num_evaluations: float
    bulk_ess: float
    tail_ess: float
    r_hat: float
    num_divergences: float
    log_evidence: float
    mean_error: float
    sd_error: float
    modes: dict[int, float]

    @property
    def ess_per_second(self) -> float:
        """Bulk effective sample size per second of warm-up and sampling, without compilation."""
        return self.bulk_ess / (self.warmup_seconds + self.sampling_seconds)

    @property
    def ess_per_evaluation(self) -> float:
        """Bulk effective sample size per evaluation of the density, including those of warm-up."""
        return self.bulk_ess / self.num_evaluations


@dataclass(frozen=True)
class ComparisonResult:
    """The results of `Comparison.run`.

    Args:
        results: the `Result` of each kernel, by name.
        mcmc: the `MCMC` object of each kernel, by name.
        certificates: the certificates of the `ScoreSDE` kernels, by name.
        settings: the settings of the comparison, in words.
    """

    results: dict[str, Result]
    mcmc: dict[str, MCMC] = field(repr=False)
    certificates: dict[str, ChainCertificate]
    settings: str

    def to_dataframe(self) -> Any:
        """Make a pandas table with one row for each kernel."""
        import pandas as pd

        rows = {}
        for name, result in self.results.items():
            row = result._asdict()
            shares = row.pop("modes")
            row |= {"ess_per_second": result.ess_per_second, "ess_per_evaluation": result.ess_per_evaluation}
            row |= {f"mode {mode}": share for mode, share in shares.items()}
            rows[name] = row
        return pd.DataFrame.from_dict(rows, orient="index")

    def to_arviz(self) -> dict[str, Any]:
        """Convert every kernel's draws to ArviZ, by kernel name.

        A slash in a site name becomes a dot (see `scoreinfer.to_arviz`).
        """
        import arviz as az

        return {name: az.from_numpyro(_in_file_names(mcmc), log_likelihood=False) for name, mcmc in self.mcmc.items()}

    def plot(self, **options: Any) -> Any:
        """Plot the posteriors of all kernels side by side, by ArviZ's forest plot and its ``options``."""
        import arviz as az

        data = self.to_arviz()
        if hasattr(az, "psislw"):  # ArviZ before 1.0
            return az.plot_forest(list(data.values()), model_names=list(data), **{"combined": True} | options)
        return az.plot_forest(data, **{"combined": True} | options)

    def __str__(self) -> str:
        table = self.to_dataframe().dropna(axis="columns", how="all").T
        lines = [self.settings, table.to_string(float_format=lambda value: f"{value:.4g}")]
        lines += [f"{name}: {certificate}" for name, certificate in self.certificates.items()]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A comparison of kernels on one model, with the same key and the same iterations or time.

    The cost of an iteration differs between kernels. So give all kernels the same ``seconds``, or compare effective
    sample sizes per second or per evaluation. Both count warm-up, which includes the learning of `ScoreSDE`. They are
    meaningful only if R-hat is near one: otherwise each chain may stay in its own mode.

    Args:
        model: the NumPyro model. Its sites are compared. None means that all kernels have the same ``potential_fn``.
        kernels: kernels by name. Evaluations of the density are counted if a kernel reports them: by the extra field
            ``num_steps``, as NUTS does, or by a method ``num_evaluations(num_iterations, state)``.
        init_params: start of the chains (chain axis first), as `MCMC.run` takes it. Required for ``potential_fn``.
        num_warmup: iterations of warm-up.
        num_samples: kept iterations of each chain.
        num_chains: number of chains.
        chain_method: as in NumPyro's `MCMC`.
        seconds: time of warm-up and sampling together, without compilation. Every kernel's chains are thinned so that
            they take about this long. A kernel that is slower without thinning takes longer. Up to three runs measure
            the speed: first without thinning, then about a tenth of the wanted time. They are discarded and not
            counted. None means no thinning.
        reference: correct draws by site, with the draw axis first. The array of a bare density is called ``z``. None
            means that errors are not computed.
        modes: function from draws by site (draw axis first) to the mode number of each draw. None means that modes
            are not counted.
        progress_bar: show NumPyro's progress bars.

    Raises:
        ValueError: if a kernel was made for another model.

    Exactness: all results are estimates. Effective sample sizes and R-hat depend only on the modes that the chains
        have visited.

    References: Vehtari et al. 2021, Bayesian Analysis 16(2) (effective sample sizes and R-hat).
    """

    model: Callable | None
    kernels: Mapping[str, MCMCKernel]
    init_params: PyTree = None
    num_warmup: int = 500
    num_samples: int = 1000
    num_chains: int = 4
    chain_method: str = "vectorized"
    seconds: float | None = None
    reference: Arrays | None = None
    modes: Callable[[Arrays], np.ndarray] | None = None
    progress_bar: bool = False

    def __post_init__(self) -> None:
        """Check that the kernels were made for the model."""
        for name, kernel in self.kernels.items():
            if getattr(kernel, "model", None) not in (None, self.model):
                raise ValueError(f"Expected kernels of the model {self.model!r}, got another model in {name!r}.")

    def run(self, key: Key, *args: Any, **kwargs: Any) -> ComparisonResult:
        """Run every kernel.

        Args:
            key: random key, the same for every kernel.
            *args: arguments of the model, including the data.
            **kwargs: keyword arguments of the model.

        Returns:
            The results. Their text is a table.

        Raises:
            ValueError: if ``init_params`` is missing for a ``potential_fn``; and everything that a kernel raises.
        """
        results, runs, certificates = {}, {}, {}
        for name, kernel in self.kernels.items():
            run = self._run(key, kernel, args, kwargs)
            if isinstance(kernel, ScoreSDE):
                certificates[name] = certify_chains(run.mcmc)
            results[name], runs[name] = self._result(kernel, run, certificates.get(name)), run.mcmc
        iterations = f"{self.num_warmup} + {self.num_samples} iterations each"
        if self.seconds is not None:
            kept = f"{self.num_samples} kept, thinned to {self.seconds:g} s each"
            iterations = f"{self.num_warmup} iterations of warm-up and {kept}"
        settings = f"{self.num_chains} chains ({self.chain_method}), {iterations}, same key and data"
        return ComparisonResult(results, runs, certificates, settings)

    def _run(self, key: Key, kernel: MCMCKernel, args: tuple, kwargs: dict[str, Any]) -> "_Run":
        """Warm up a kernel, find its thinning if ``seconds`` is given, and sample."""
        for_warmup, for_measuring, for_sampling = jax.random.split(key, 3)
        fields, mcmc = _extra_fields(kernel), self._mcmc(kernel, 1)
        with _Clock() as warming:
            mcmc.warmup(
                for_warmup, *args, extra_fields=fields, collect_warmup=True, init_params=self.init_params, **kwargs
            )
            jax.block_until_ready(mcmc.post_warmup_state)
        before = {field: np.asarray(value) for field, value in mcmc.get_extra_fields().items()}
        if self.seconds is not None:
            left = self.seconds - (warming.wall - warming.compile)
            mcmc = self._thinned(for_measuring, kernel, mcmc, left, args, kwargs)
        with _Clock() as sampling:
            mcmc.run(for_sampling, *args, extra_fields=fields, **kwargs)
            jax.block_until_ready(mcmc.last_state)
        after = {field: np.asarray(value) for field, value in mcmc.get_extra_fields().items()}
        return _Run(mcmc, warming, sampling, before, after)

    def _mcmc(self, kernel: MCMCKernel, thinning: int) -> MCMC:
        return MCMC(
            kernel, num_warmup=self.num_warmup, num_samples=self.num_samples * thinning, thinning=thinning,
            num_chains=self.num_chains, chain_method=self.chain_method, progress_bar=self.progress_bar,
        )  # fmt: skip

    def _thinned(
        self, key: Key, kernel: MCMCKernel, mcmc: MCMC, left: float, args: tuple, kwargs: dict[str, Any]
    ) -> MCMC:
        """Make the `MCMC` object that continues from the warm-up and takes the remaining time ``left`` (seconds)."""
        state, measured = mcmc.post_warmup_state, 1
        for _ in range(3):  # a short run is mostly overhead, so a longer run is measured next
            with _Clock() as measuring:
                mcmc.run(key, *args, extra_fields=_extra_fields(kernel), **kwargs)
                jax.block_until_ready(mcmc.last_state)
            thinning = max(1, int(measured * left / (measuring.wall - measuring.compile)))
            if thinning < 4 * measured:
                break
            if thinning >= 20:
                measured = thinning // 10
                mcmc = self._mcmc(kernel, measured)
            mcmc.post_warmup_state = state
        mcmc = self._mcmc(kernel, thinning)
        mcmc.post_warmup_state = state
        return mcmc

    def _result(self, kernel: MCMCKernel, run: "_Run", certificate: ChainCertificate | None) -> Result:
        mcmc, warming, sampling = run.mcmc, run.warming, run.sampling
        samples = {site: np.asarray(value, np.float64) for site, value in _named(mcmc.get_samples()).items()}
        errors = (np.nan, np.nan) if self.reference is None else _errors(samples, self.reference)
        labels, counts = np.unique([] if self.modes is None else self.modes(samples), return_counts=True)
        return Result(
            warming.compile + sampling.compile,
            warming.wall - warming.compile,
            sampling.wall - sampling.compile,
            warming.cpu + sampling.cpu,
            _evaluations(kernel, run),
            *_worth(_named(mcmc.get_samples(group_by_chain=True))),
            float(mcmc.thinning * run.after["diverging"].sum()) if "diverging" in run.after else np.nan,
            np.nan if certificate is None else certificate.weights.log_evidence,
            *errors,
            {int(label): float(count) / counts.sum() for label, count in zip(labels, counts, strict=True)},
        )


def compare(
    key: Key, model: Callable | None, kernels: Mapping[str, MCMCKernel], *args: Any, **kwargs: Any
) -> ComparisonResult:
    """Compare kernels with the default settings: ``Comparison(model, kernels).run(key, *args, **kwargs)``.

    Raises:
        ValueError: if a kernel was made for another model.

    Exactness: see `Comparison`.
    """
    return Comparison(model, kernels).run(key, *args, **kwargs)


class _Run(NamedTuple):
    """A finished run, its clocks, and the extra fields of warm-up (``before``) and sampling (``after``)."""

    mcmc: MCMC
    warming: "_Clock"
    sampling: "_Clock"
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


class _Clock:
    """Measures wall, CPU and compilation seconds of a block."""

    compile: float
    wall: float
    cpu: float

    def __enter__(self):
        self.compile = 0.0
        self._start = time.perf_counter(), time.process_time()
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)
        self.wall, self.cpu = time.perf_counter() - self._start[0], time.process_time() - self._start[1]

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        self.compile += duration_secs if event == _COMPILE_EVENT else 0.0


class _InFileNames(Messenger):
    """Renames sites and plates so that netCDF files can store them."""

    def process_message(self, msg: dict[str, Any]) -> None:
        msg["name"] = file_name(msg["name"])
        frames = msg.get("cond_indep_stack", [])
        msg["cond_indep_stack"] = [frame._replace(name=file_name(frame.name)) for frame in frames]


def _in_file_names(mcmc: MCMC) -> MCMC:
    """Copy an `MCMC` object for ArviZ, with draws and model under the names that files can store."""
    shown, sampler = copy.copy(mcmc), mcmc.sampler
    if sampler.model is None:
        return shown
    shown.sampler = SimpleNamespace(
        model=_InFileNames(sampler.model), _max_tree_depth=getattr(sampler, "_max_tree_depth", None)
    )
    shown.get_samples = lambda **options: in_file_names(_named(mcmc.get_samples(**options)))
    return shown


def _named(samples: PyTree) -> Arrays:
    """Name the arrays of draws: by site, or ``z`` (with a path) for a bare density."""
    if isinstance(samples, Mapping):
        return named_leaves(samples)
    return {f"z{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(samples)}


def _extra_fields(kernel: MCMCKernel) -> tuple[str, ...]:
    if isinstance(kernel, HMC):
        return "num_steps", "diverging", "accept_prob"
    return getattr(kernel, "diagnostics", ())


def _evaluations(kernel: MCMCKernel, run: _Run) -> float:
    """Count evaluations of the density in all chains; NaN if the kernel does not report them."""
    mcmc = run.mcmc
    if "num_steps" in run.after:
        return float(run.before["num_steps"].sum() + mcmc.thinning * run.after["num_steps"].sum())
    counts = getattr(kernel, "num_evaluations", None)
    num_iterations = mcmc.num_chains * (mcmc.num_warmup + mcmc.num_samples)
    return np.nan if counts is None else float(counts(num_iterations, mcmc.last_state))


def _worth(samples: Arrays) -> tuple[float, float, float]:
    """Compute the smallest bulk and tail effective sample size and the largest R-hat of any component, by ArviZ."""
    import arviz as az

    columns = [np.asarray(leaf, np.float64).reshape(*leaf.shape[:2], -1) for leaf in samples.values()]
    parts = [column[..., i] for column in columns for i in range(column.shape[-1])]
    bulk = min(float(az.ess(part, method="bulk")) for part in parts)
    tail = min(float(az.ess(part, method="tail", prob=(0.05, 0.95))) for part in parts)
    return bulk, tail, max(float(az.rhat(part)) for part in parts)


def _errors(samples: Arrays, reference: Arrays) -> tuple[float, float]:
    """Compute the largest error of a mean, in the reference's standard deviations, and of a standard deviation."""
    means, sds = [], []
    for name, truth in reference.items():
        draws, exact = (np.asarray(part, np.float64).reshape(len(part), -1) for part in (samples[name], truth))
        means.append(np.abs(draws.mean(0) - exact.mean(0)) / exact.std(0))
        sds.append(np.abs(draws.std(0) / exact.std(0) - 1))
    return float(np.max(np.concatenate(means))), float(np.max(np.concatenate(sds)))
