"""Masks of observed sites: which entries are missing, and what stands in their place."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from numpyro.distributions import constraints

from scoreinfer._typing import Key, Sites
from scoreinfer.model.encoding import fill
from scoreinfer.model.replay import Script, Trace, fixed_key
from scoreinfer.model.survey import Survey, map_probes, mask_of, probe_keys


class Masks:
    """The masks that do not depend on parameters or data: the same for all observations, or part of a design.

    What stands under such a mask is replaced by one constant, so that a sampler learns nothing from it.

    Args:
        survey: the measured properties of the model.
        script: the model with its arguments.
        designs: sites of the design.

    Exactness: that masks depend on the design only is measured on 8 joint draws.
    """

    def __init__(self, survey: Survey, script: Script, designs: tuple[str, ...]) -> None:
        self._survey, self._script, self._designs = survey, script, designs
        self._points = {name: jnp.asarray(survey.points[name][0]) for name in survey.latents}
        self._fixed: Sites = {} if designs else {name: jnp.asarray(mask) for name, mask in survey.masks.items()}
        self._moving = tuple(self._of_design(survey.masked)) if designs and survey.masked else ()

    def of(self, played: Trace) -> Sites:
        """Return the masks in one run of the model."""
        moving = {name: mask_of(played[name]) for name in self._moving}
        return {**self._fixed, **{name: mask for name, mask in moving.items() if mask is not None}}

    def at(self, y: Any) -> Sites:
        """Compute the masks of an observation, from its design."""
        return self.of(self._script.play(fixed_key(), self._points, y)) if self._moving else dict(self._fixed)

    def fill(self, y: Sites, masks: Sites) -> Sites:
        """Replace masked entries by one constant inside the support."""
        supports = self._survey.supports
        return {
            name: fill(supports.get(name, constraints.real), masks[name], value) if name in masks else value
            for name, value in y.items()
        }

    def _of_design(self, names: tuple[str, ...]) -> list[str]:
        """Name the sites whose masks stay, if everything but the design is changed."""
        survey, script = self._survey, self._script
        sites = {name: survey.sites[name] for name in script.names}
        others = {name: value if name in self._designs else np.roll(value, 1, 0) for name, value in sites.items()}
        points = {name: survey.points[name] for name in survey.latents}
        moved = {name: np.roll(value, 1, 0) for name, value in points.items()}

        def masks(key: Key, points: Sites, y: Sites) -> Sites:
            played = script.play(key, points, y)
            return {name: jnp.asarray(mask_of(played[name])) for name in names}

        own, other = (map_probes(masks, probe_keys(), *given) for given in ((points, sites), (moved, others)))
        return [name for name in names if np.array_equal(own[name], other[name])]
