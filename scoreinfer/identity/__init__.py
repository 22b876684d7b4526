"""Identity: plain data by which simulators, models, physics and training runs are compared."""

from scoreinfer.identity.model import (
    check_probe,
    check_sites,
    describe_model,
    describe_sites,
    probe_model,
    same_parameters,
)
from scoreinfer.identity.physics import check_physics, probe_physics
from scoreinfer.identity.run import describe_run, key_bits, versions
from scoreinfer.identity.simulator import Version, continued, differences, fingerprint, is_fingerprint, moved, without

__all__ = [
    "Version",
    "check_physics",
    "check_probe",
    "check_sites",
    "continued",
    "describe_model",
    "describe_run",
    "describe_sites",
    "differences",
    "fingerprint",
    "is_fingerprint",
    "key_bits",
    "moved",
    "probe_model",
    "probe_physics",
    "same_parameters",
    "versions",
    "without",
]
