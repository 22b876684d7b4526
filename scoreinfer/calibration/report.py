"""The calibration report: a verdict in words, a table, and one HTML page that needs no network."""

import html
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Integer

from scoreinfer._typing import Key
from scoreinfer.calibration.predictive import Discrepancy, predictive_check
from scoreinfer.calibration.ranks import ALARM, SBC, sbc
from scoreinfer.draws import Draws
from scoreinfer.evidence.certificate import MAX_OUTLYING, Certificate
from scoreinfer.files import write_file

SUSPICIOUS = 0.01
"""Predictive p-value below which the verdict names a statistic of the data. Chosen by judgement."""
TINY = 1e-16
"""Smallest p-value that is printed, near the rounding error of double precision. Chosen by judgement."""


class CalibrationReport(NamedTuple):
    """The results of `calibrate`.

    Args:
        trusted: the verdict. True if the ranks do not reject calibration, the data are no outlier, and draws with a
            density are certified. Predictive checks do not count.
        verdict: the verdict in words.
        sbc: ranks of true parameters.
        certificate: certificate of the given draws. None means no draws were given.
        predictive: predictive checks of the data. Empty without draws, or if data cannot be simulated.
    """

    trusted: bool
    verdict: tuple[str, ...]
    sbc: SBC
    certificate: Certificate | None = None
    predictive: tuple[Discrepancy, ...] = ()

    def __str__(self) -> str:
        parts = [*self.verdict, str(self.sbc)]
        parts += [] if self.certificate is None else [str(self.certificate)]
        parts += [
            f"  {row.name}: {row.observed:.4g}, simulated {row.low:.4g} to {row.high:.4g}, p = {row.p_value:.3g}"
            for row in self.predictive
        ]
        return "\n".join(parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one HTML page that contains its figures and loads no other file."""
        write_file(Path(path), _page(self).encode())


def calibrate(
    key: Key,
    posterior: Any,
    num_simulations: int,
    *,
    draws: Draws | None = None,
    **options: Any,
) -> CalibrationReport:
    """Check a posterior on simulated data with known parameters and, if ``draws`` are given, on their data.

    Args:
        key: random key.
        posterior: a fitted posterior, or a NumPyro kernel.
        num_simulations: number of simulated data sets. 200 detect gross errors; 1000 detect errors of a tenth of a
            standard deviation.
        draws: draws of ``posterior.sample`` for the data of interest. They add predictive checks, and a test whether
            the data are unlike the model's simulations. None means no such checks.
        **options: further arguments of `sbc`.

    Returns:
        The report. Print it, or write it as a page: ``save("report.html")``.

    Raises:
        TypeError, UnsupportedModel, ValueError, UnreadableFile: as for `sbc`. A ValueError also means that there are
            too few simulations for a test.

    Exactness: see `sbc`. Calibration is tested at level 0.01, and once more over all strata if there are any: a
        calibrated posterior is wrongly rejected with at most this probability (twice it with strata). Calibration
        refers to data of the model; it does not show that the model is right.
    """
    for_ranks, for_data = jax.random.split(key)
    ranks = sbc(for_ranks, posterior, num_simulations, **options)
    bad = _uncalibrated(ranks)
    of_ranks = [_of_ranks(ranks), *bad]
    if draws is None:
        return CalibrationReport(ranks.calibrated and not bad, tuple(of_ranks), ranks)
    rows: tuple[Discrepancy, ...] = ()
    if draws.problem is not None and draws.problem.simulate_observation is not None:
        rows = tuple(predictive_check(for_data, draws))
    verdict = [*of_ranks, *_of_data(draws.certificate, rows)]
    outlying = draws.certificate.distance_rank <= MAX_OUTLYING
    refused = draws.log_joint is not None and not draws.certificate.certified
    trusted = ranks.calibrated and not bad and not outlying and not refused
    return CalibrationReport(trusted, tuple(verdict), ranks, draws.certificate, rows)


def _uncalibrated(ranks: SBC) -> list[str]:
    """Name the strata in which calibration is rejected; p-values are multiplied by the number of strata."""
    strata = ranks.strata()
    p_values = {label: len(strata) * within.p_value for label, within in strata.items()}
    return [
        f"In stratum {label} the posterior is not calibrated (p {_told(p_value)}, times {len(strata)} strata)."
        for label, p_value in p_values.items()
        if p_value <= ALARM
    ]


def _told(p_value: float) -> str:
    return f"= {p_value:.2g}" if p_value > TINY else f"< {TINY:g}"


def _of_ranks(ranks: SBC) -> str:
    num, p_value = ranks.num_simulations, _told(ranks.p_value)
    if ranks.calibrated:
        return (
            f"On {num} simulated data sets the posterior contained the true parameters as often as it claims "
            f"(p {p_value} over all quantities)."
        )
    findings = [f"{row.name} ({row.finding})" for row in ranks.rows() if row.finding]
    worst = min(ranks.rows(), key=lambda row: row.p_value)
    told = ", ".join(findings) or f"{worst.name}, without a clear direction"
    return (
        f"The posterior is not calibrated (p {p_value} on {num} simulated data sets): {told}. Its intervals do "
        "not contain the true parameters as often as they claim."
    )


def _of_data(certificate: Certificate, rows: tuple[Discrepancy, ...]) -> list[str]:
    verdict = "certified" if certificate.certified else "not certified"
    told = [f"The draws for your data are {verdict}: {certificate.reason}; {certificate.resolution}."]
    rank = certificate.distance_rank
    if rank <= MAX_OUTLYING:
        told.append(
            f"Your data are unlike the model's simulations: only {rank:.1%} of these lie as far from the others. The "
            "model may be misspecified."
        )
    elif np.isfinite(rank):
        told.append(
            f"Your data are like the model's simulations: {rank:.0%} of these lie at least as far from the others."
        )
    bad = [row.name for row in rows if row.p_value < SUSPICIOUS]
    if bad:
        told.append(f"Simulations from the posterior do not reproduce these statistics of the data: {', '.join(bad)}.")
    elif rows:
        told.append("Simulations from the posterior reproduce mean, spread and extremes of your data.")
    return told


# --- the page

LEFT, WIDE = 45, 240
"""Left end and width of a figure's horizontal axis, in pixels. Chosen by judgement."""

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,td:last-child{text-align:left}
.verdict{padding:.8rem 1rem;border-left:.4rem solid}.yes{border-color:#2a7;background:#eefaf4}
.no{border-color:#c33;background:#fdf0f0}figure{display:inline-block;margin:.5rem}figcaption{text-align:center}
.note{color:#666;font-size:.9rem}
"""
"""Style sheet of the page. Chosen by judgement."""


def _page(report: CalibrationReport) -> str:
    ranks, mark = report.sbc, "yes" if report.trusted else "no"
    verdict = "".join(f"<p>{html.escape(line)}</p>" for line in report.verdict)
    rows = "".join(
        f"<tr><td>{html.escape(row.name)}</td><td>{_told(row.p_value).removeprefix('= ')}</td>"
        + "".join(f"<td>{share:.1%}</td>" for share in row.coverage)
        + f"<td>{html.escape(row.finding)}</td></tr>"
        for row in ranks.rows()
    )
    figures = "".join(_figure(name, values, ranks.num_draws) for name, values, _ in ranks.columns())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Calibration report</title><style>{STYLE}</style></head><body>
<h1>Calibration report</h1>
<section class="verdict {mark}"><h2>{"Trusted" if report.trusted else "Not trusted"}</h2>{verdict}</section>
<h2>Ranks of true parameters</h2>
<table><tr><th>quantity</th><th>p</th><th>in 50 %</th><th>in 80 %</th><th>in 95 %</th><th></th></tr>{rows}</table>
<p class="note">{ranks.num_simulations} simulated data sets; true parameters ranked among {ranks.num_draws} draws each;
{ranks.seconds:.0f} s. p: chi-squared test of uniform ranks. The verdict multiplies the smallest p by the number of
quantities, and rejects the posterior if the result is at most 0.01. <i>log_joint</i>: regions of highest density.
<i>tarp</i>: balls around a reference point that depends on the data.</p>
<h2>Empirical distribution of ranks, minus uniform</h2>{figures}
<p class="note">Ranks of a calibrated posterior stay inside the band with probability 0.99.</p>
{_predictive_table(report.predictive)}</body></html>
"""


def _predictive_table(rows: tuple[Discrepancy, ...]) -> str:
    if not rows:
        return ""
    cells = "".join(
        f"<tr><td>{html.escape(row.name)}</td><td>{row.observed:.4g}</td><td>{row.low:.4g} to {row.high:.4g}</td>"
        f"<td>{row.p_value:.3g}</td></tr>"
        for row in rows
    )
    head = "<tr><th>statistic</th><th>data</th><th>simulated, 95 %</th><th>p</th></tr>"
    return f"<h2>Your data and simulations from the posterior</h2><table>{head}{cells}</table>"


def _figure(name: str, ranks: Integer[np.ndarray, " num"], num_draws: int) -> str:
    """Draw the empirical distribution function of the ranks minus that of uniform ranks, with a 99 % band.

    Half the width of the band is sqrt(log(2 / 0.01) / (2 n)) for n ranks (Dvoretzky-Kiefer-Wolfowitz inequality).
    """
    at = np.arange(num_draws + 2) / (num_draws + 1)
    counts = np.concatenate([[0], np.cumsum(np.bincount(ranks, minlength=num_draws + 1))])
    gap, band = counts / len(ranks) - at, np.sqrt(np.log(2 / 0.01) / (2 * len(ranks)))
    top = 1.25 * max(band, np.abs(gap).max())
    points = " ".join(f"{LEFT + WIDE * x:.1f},{70 - 60 * y / top:.1f}" for x, y in zip(at, gap, strict=True))
    high, low = 70 - 60 * band / top, 70 + 60 * band / top
    label = "fill='#666' font-size='11'"
    return (
        f'<figure><svg width="300" height="152" role="img" aria-label="ranks of {html.escape(name, quote=True)}">'
        f'<rect x="{LEFT}" y="{high:.1f}" width="{WIDE}" height="{low - high:.1f}" fill="#e4ecf7"/>'
        f'<line x1="{LEFT}" y1="70" x2="{LEFT + WIDE}" y2="70" stroke="#999"/>'
        f'<polyline points="{points}" fill="none" stroke="#124" stroke-width="1.5"/>'
        f'<g {label} text-anchor="end"><text x="{LEFT - 5}" y="{high + 4:.1f}">{band:.2f}</text>'
        f'<text x="{LEFT - 5}" y="74">0</text><text x="{LEFT - 5}" y="{low + 4:.1f}">\u2212{band:.2f}</text></g>'
        f'<g {label} text-anchor="middle"><text x="{LEFT}" y="146">0</text>'
        f'<text x="{LEFT + WIDE / 2}" y="146">rank</text><text x="{LEFT + WIDE}" y="146">1</text></g></svg>'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
    )
