"""Forward processes: how a draw is turned into noise, or a state into a later one."""

from scoreinfer.process.base import AbstractProcess
from scoreinfer.process.noising import VE, VP, AbstractNoising, SubVP
from scoreinfer.process.physics import Physics, PhysicsProcess

__all__ = ["VE", "VP", "AbstractNoising", "AbstractProcess", "Physics", "PhysicsProcess", "SubVP"]
