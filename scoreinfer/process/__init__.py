"""Forward processes: how a draw is turned into noise, or a state into a later one."""

from scoreinfer.process.base import AbstractLinearSDE, AbstractProcess, Gaussian, LinearGaussian
from scoreinfer.process.langevin import CriticallyDamped
from scoreinfer.process.noising import VE, VP, AbstractSchedule, Angular, Noising, SubVP
from scoreinfer.process.physics import Physics, PhysicsProcess
from scoreinfer.process.terms import from_diffrax

__all__ = [
    "VE",
    "VP",
    "AbstractLinearSDE",
    "AbstractProcess",
    "AbstractSchedule",
    "Angular",
    "CriticallyDamped",
    "Gaussian",
    "LinearGaussian",
    "Noising",
    "Physics",
    "PhysicsProcess",
    "SubVP",
    "from_diffrax",
]
