"""Forward processes: how a draw is turned into noise."""

from scoreinfer.process.base import AbstractProcess
from scoreinfer.process.noising import VE, VP, AbstractNoising, SubVP

__all__ = ["VE", "VP", "AbstractNoising", "AbstractProcess", "SubVP"]
