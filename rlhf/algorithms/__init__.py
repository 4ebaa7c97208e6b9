"""Which formulas, with which defaults. One algorithm = one file here (it registers itself) + one yaml.

`build(name, hyperparameters)` returns a frozen object; `names()` lists what is registered.
"""

from rlhf.algorithms.base import About, Algorithm, Needs, TokenLoss
from rlhf.algorithms.registry import algorithm, build, names, register

__all__ = ["About", "Algorithm", "Needs", "TokenLoss", "algorithm", "build", "names", "register"]
