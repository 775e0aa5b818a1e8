"""Layers and cells that stand in for torch.nn's, and ``explain``, which tells what would run them.

What torch.nn defines for all its recurrent modules (constructor checks, initial weights, state, sizes) is inherited from its two base
classes, so it cannot drift. They subclass those bases and not ``torch.nn.LSTM`` itself, because torch.compile refuses every instance of it.
"""

from .cells import GRUCell, LSTMCell, RNNCell
from .explained import Explanation, Plan, explain
from .layers import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "Explanation", "GRUCell", "LSTMCell", "Plan", "RNNCell", "explain"]
