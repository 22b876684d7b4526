"""The report of `check`: which parts of a model can be read, which cannot, and why."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from scoreinfer._typing import Sites
from scoreinfer.agreement import misdrawn_data, misdrawn_latents, say_misdrawn
from scoreinfer.errors import UnsupportedModel
from scoreinfer.model.assembly import Facts, read_model
from scoreinfer.model.designs import Designs, with_designs
from scoreinfer.model.replay import LOG_DET, fixed_key, sum_terms
from scoreinfer.model.series import describe, describe_series
from scoreinfer.model.states import StateSpace, observed_of
from scoreinfer.model.survey import NUM_PROBES, map_probes
from scoreinfer.montecarlo.langevin import Differentiation, derivatives, differentiate
from scoreinfer.problem import Problem, Site

_WITHOUT_GRADIENT = (
    "Langevin kernels need a gradient. `ScoreSDE(model)` makes random-walk moves instead. `fit` and weighted draws "
    "need none"
)
"""Advice for a model without a usable gradient."""
_SOME_GRADIENT = "Langevin kernels may get stuck at such points; write the density so that it can be differentiated"
"""Advice for a model whose gradient is not finite at some draws."""


@dataclass(frozen=True)
class Report:
    """The result of `check`. It is true if the model can be used.

    Args:
        ok: whether the model can be used and the data, if given, fit it.
        problem: the problem. None means the model cannot be read.
        messages: one line for each finding: ``✓`` works, ``!`` needs attention, ``✗`` does not work.
    """

    ok: bool
    problem: Problem | None
    messages: tuple[str, ...]

    @property
    def latents(self) -> tuple[Site, ...]:
        """Table of the latent sites."""
        return self.problem.latents if self.problem else ()

    @property
    def observed(self) -> tuple[Site, ...]:
        """Table of the observed sites."""
        return self.problem.observed if self.problem else ()

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        rows = [("site", "role", "support", "shape", "dtype", "unconstrained")]
        rows += [(s.name, "latent", s.support, str(s.shape), s.dtype, str(s.size)) for s in self.latents]
        roles = dict.fromkeys(self.problem.designs if self.problem else (), "design")
        rows += [(s.name, roles.get(s.name, "observed"), s.support, str(s.shape), s.dtype, "-") for s in self.observed]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] if self.problem else []
        return "\n".join([*table, *self.messages])

    __repr__ = __str__


def check(
    model: Callable[..., Any] | StateSpace,
    *args: Any,
    observed: Any = None,
    designs: Designs | None = None,
    missing: tuple[str, ...] = (),
    file: Any = None,
    **kwargs: Any,
) -> Report:
    """Print which parts of a NumPyro model can be read, which cannot, and why.

    It does not raise if a model cannot be read.

    Args:
        model: any callable with NumPyro primitives; or a `scoreinfer.StateSpace`.
        *args: the model's arguments, with or without data.
        observed: see `from_numpyro`.
        designs: see `from_numpyro`.
        missing: see `from_numpyro`.
        file: the text file to print to. None means standard output.
        **kwargs: the model's keyword arguments.

    Returns:
        The report. It is true if the model can be used.

    Exactness: gradients, supports and finite values are tested on 8 joint draws only.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> def model(y=None):
        ...     n = numpyro.sample("n", dist.Poisson(3.0))
        ...     numpyro.sample("y", dist.Normal(n, 1.0), obs=y)
        >>> report = check(model, 1.5)
        ✗ 'n': is a discrete latent site. Sum it out (`dist.MixtureSameFamily`, `dist.MixtureGeneral`), or name it in `observed=` if it is data.
        ✗ verdict: this model cannot be used
        >>> bool(report)
        False
    """  # noqa: E501
    report = _report(model, args, kwargs, observed, designs, missing)
    print(report, file=sys.stdout if file is None else file)
    return report


def _report(
    model: Any, args: tuple, kwargs: dict[str, Any], observed: Any, designs: Designs | None, missing: tuple[str, ...]
) -> Report:
    if isinstance(model, StateSpace):
        return _report_space(model)
    try:
        model, args, kwargs, observed = with_designs(model, args, kwargs, observed, designs, missing)
        problem, facts = read_model(model, args, kwargs, observed)
    except UnsupportedModel as error:
        reasons = [f"✗ {offence}" for offence in error.offences] or [f"✗ {error}"]
        return Report(False, None, (*reasons, "✗ verdict: this model cannot be used"))
    except Exception as error:  # a report never raises: it reports any error of the model
        reason = f"✗ the model failed: {type(error).__name__}: {error}"
        return Report(False, None, (reason, "✗ verdict: this model cannot be used"))
    messages = [f"{problem.dim} unconstrained dimensions"]
    messages += (
        _say_designs(problem)
        + _say_observed(problem, facts)
        + _say_density(problem, facts)
        + _say_simulable(problem, facts)
    )
    messages += _say_agreement(problem) + describe_series(
        facts.script.run, tuple(site.name for site in problem.observed)
    )
    lines, has_gradient = _say_gradient(problem, facts)
    fault = _data_fault(problem, facts, args, kwargs)
    messages += [*lines, f"✗ data: {fault}"] if fault else [*lines, *_say_use(problem, has_gradient)]
    usable = has_gradient or not problem.not_simulable
    verdict = "✗ verdict: the data do not fit the model" if fault else _verdict(problem, usable)
    return Report(usable and not fault, problem, (*messages, verdict))


def _report_space(space: StateSpace) -> Report:
    try:
        lines = [f"✓ `filter`: {line}" for line in describe(observed_of(space))]
    except Exception as error:  # as above
        return Report(False, None, (f"✗ the state space failed: {type(error).__name__}: {error}",))
    return Report(True, None, tuple(lines))


def _say_designs(problem: Problem) -> list[str]:
    if not problem.designs:
        return []
    return [f"✓ designs, drawn with every simulation and without density: {', '.join(problem.designs)}"]


def _say_observed(problem: Problem, facts: Facts) -> list[str]:
    if facts.pseudo and not problem.observed:
        names = ", ".join(sorted(facts.pseudo))
        why = "is observed at a function of the latent sites: this counts in the density, but cannot be simulated"
        return [f"! {names} {why}. To simulate the data, write their own distribution with `obs=data`"]
    if not problem.observed:
        return ["! no observed site: the posterior is the prior. If a site is data, name it: observed=('name',)"]
    lines = []
    if facts.inferred:
        names = ", ".join(site.name for site in problem.observed)
        lines.append(f"✓ no data given; observed, as arguments that are None feed it: {names} (or set `observed=`)")
    lines += [
        f"✓ {site.name}: entries are exchangeable along axis {site.exchangeable}"
        for site in problem.observed
        if site.exchangeable is not None
    ]
    if facts.overlooked:
        lines.append(f"! latent, but data could be given for: {', '.join(sorted(facts.overlooked))}")
    return lines


def _say_density(problem: Problem, facts: Facts) -> list[str]:
    lines = [
        "✓ log density"
        if problem.has_density
        else "✗ no log density (`numpyro.prng_key` in the model): no exact weights, corrected draws or evidence"
    ]
    late = facts.survey.after_data & set(facts.survey.latents)
    if late:
        lines.append(f"! prior of {', '.join(sorted(late))} depends on observed values: it counts as likelihood")
    if facts.fixed:
        lines.append(f"! fixed at their initial values (`param`): {', '.join(facts.fixed)}")
    if facts.survey.masks and not problem.designs:
        lines.append(f"✓ masked entries do not count: {', '.join(facts.survey.masks)}")
    return lines


def _say_simulable(problem: Problem, facts: Facts) -> list[str]:
    if problem.not_simulable:
        return [f"✗ no simulation ({problem.not_simulable}): no amortised training, prior draws or predictive check"]
    finite = np.ones(NUM_PROBES, bool)
    for value in facts.survey.sites.values():
        finite &= np.isfinite(value).reshape(NUM_PROBES, -1).all(1)
    mark = "✓" if finite.all() else "!"
    return [f"{mark} simulation ({finite.sum()} of {NUM_PROBES} draws finite)"]


def _say_agreement(problem: Problem) -> list[str]:
    wrong = misdrawn_latents(problem) + misdrawn_data(problem)
    if not wrong:
        return []
    return [f"! {say_misdrawn(wrong)} `fit` learns from the draws; weights correct them; `sbc` and `calibrate` refuse"]


def _say_gradient(problem: Problem, facts: Facts) -> tuple[list[str], bool]:
    """Test the gradient of the log joint density at the measured draws.

    Returns:
        The lines of the report, and whether kernels can use the gradient.
    """
    if not problem.has_density:
        return [], False
    survey, script = facts.survey, facts.script
    y = {site.name: survey.sites[site.name] for site in problem.observed}
    z = np.asarray(jax.vmap(survey.layout.flatten)({name: jnp.asarray(survey.points[name]) for name in survey.latents}))
    names = [name for name, row in survey.table.items() if row.type == "sample"]

    def term(name: str) -> Callable[[Array, Sites], Array]:
        own = {name, name + LOG_DET}
        return lambda z, y: sum_terms(script.terms(fixed_key(), survey.layout.unflatten(z), y), own.__contains__)

    def mode_of(function: Callable[[Array, Sites], Array]) -> Differentiation:
        first = jax.tree.map(lambda value: jnp.asarray(value[0]), y)
        return derivatives(lambda z: function(z, first), jnp.asarray(z[0]))

    def broken(function: Callable[[Array, Sites], Array]) -> int:
        def slope(z: Array, y: Sites) -> Array:
            return differentiate(lambda z: function(z, y), z)(z)[1]

        return int((~np.isfinite(map_probes(slope, z, y)).reshape(NUM_PROBES, -1).all(1)).sum())

    lines = [
        f"! {name}: its log density is not finite at {count} of {NUM_PROBES} simulated draws"
        for name in names
        if (count := int((~np.isfinite(survey.terms[name]).reshape(NUM_PROBES, -1).all(1)).sum()))
    ]
    mode = mode_of(problem.log_joint)
    if mode is not Differentiation.REVERSE:
        guilty = _listed([name for name in names if mode_of(term(name)) == mode], names)
    if mode is Differentiation.NONE:
        return [*lines, f"✗ {guilty}: no gradient. {_WITHOUT_GRADIENT}"], False
    if mode is Differentiation.FORWARD:
        lines.append(f"! {guilty}: a gradient in forward mode only (a `while_loop`?), slow in many dimensions")
    count = broken(problem.log_joint)
    if not count:
        return lines, True
    guilty = _listed([name for name in names if broken(term(name))], names)
    everywhere, mark = count == NUM_PROBES, "✗" if count == NUM_PROBES else "!"
    told = f"{mark} {guilty}: the gradient is not finite at {count} of {NUM_PROBES} simulated draws."
    return [*lines, f"{told} {_WITHOUT_GRADIENT if everywhere else _SOME_GRADIENT}"], not everywhere


def _listed(guilty: list[str], names: list[str]) -> str:
    return ", ".join(guilty) if 0 < len(guilty) < len(names) else "the model"


def _say_use(problem: Problem, has_gradient: bool) -> list[str]:
    one, many = "`MCMC(ScoreSDE(model), ...)` learns this posterior", "`fit` learns the posteriors of all data"
    if not has_gradient:
        return [] if problem.not_simulable else [f"✓ {many}"]
    if problem.not_simulable:
        return [f"✓ {one}"]
    return [f"✓ {many} at once, from simulations; {one} only, from its density"]


def _data_fault(problem: Problem, facts: Facts, args: tuple, kwargs: dict[str, Any]) -> str:
    if not problem.observed or facts.inferred:
        return ""
    try:
        problem.read(args, kwargs)
    except ValueError as error:
        return str(error)
    return ""


def _verdict(problem: Problem, usable: bool) -> str:
    if not usable:
        return "✗ verdict: this model cannot be used: no simulation and no gradient"
    if problem.not_simulable:
        return "✓ verdict: usable by its density only"
    return "✓ verdict: usable" if problem.has_density else "✓ verdict: usable by simulation only, without weights"
