"""Fused recurrent layers: change one import, same weights, same numbers, faster.

>>> import torch, rnnkernels
>>> layer = rnnkernels.LSTM(8, 16)
>>> output, (h_n, c_n) = layer(torch.randn(5, 2, 8))
>>> output.shape
torch.Size([5, 2, 16])
"""

from . import conversion, functional, modules, onnx, ops, own, scrn, streaming, variants
from .conversion import *  # noqa: F403
from .modules import *  # noqa: F403
from .own import *  # noqa: F403
from .scrn import *  # noqa: F403
from .streaming import *  # noqa: F403
from .variants import *  # noqa: F403

__version__ = str(ops.build_info()["version"])

__all__ = ["__version__", "functional", "onnx", "ops"]
__all__ += [*conversion.__all__, *modules.__all__, *own.__all__, *scrn.__all__, *streaming.__all__, *variants.__all__]
