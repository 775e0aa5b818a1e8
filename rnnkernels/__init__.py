"""Fused recurrent layers: change one import, same weights, same numbers, faster.

>>> import torch, rnnkernels
>>> layer = rnnkernels.LSTM(8, 16)
>>> output, (h_n, c_n) = layer(torch.randn(5, 2, 8))
>>> output.shape
torch.Size([5, 2, 16])
"""

from . import functional, ops
from .modules import GRU, LSTM, RNN, Explanation, GRUCell, LSTMCell, RNNCell, explain

__version__ = str(ops.build_info()["version"])

__all__ = ["GRU", "LSTM", "RNN", "Explanation", "GRUCell", "LSTMCell", "RNNCell", "__version__", "explain", "functional", "ops"]
