"""Which formulas, with which defaults. One algorithm = one file here (it registers itself) + one yaml.

`build(name, hyperparameters)` returns a frozen object; `names()` lists what is registered.
"""

from rlhf.algorithms.base import Algorithm, Needs, TokenLoss
from rlhf.algorithms.registry import build, names, register

__all__ = ["Algorithm", "Needs", "TokenLoss", "build", "names", "register"]
