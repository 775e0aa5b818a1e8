"""Layers that stand in for torch.nn's."""

from typing import Any

from .layer import OF_ONE, OF_TWO, LayerBase, PairLayerBase, signed
from .shared import SRNS


class RNN(LayerBase):
    r"""A stack of simple recurrent networks (Elman 1990), as ``torch.nn.RNN``.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.RNN, in
            this order. ``nonlinearity`` is also "sigmoid" or "identity", besides "tanh" and "relu".
        engine, recompute: keyword only; see :func:`rnnkernels.ops.sequence`.
        weight_dtype: keyword only, for inference on a CPU: ``torch.bfloat16``, ``torch.int8`` or the layer's own: what the recurrent
            weights are in while they stay packed from call to call; see :class:`rnnkernels.ops.Packed`. None: the layer's own, and changes
            that torch does not count are noticed too.
        learn_initial: keyword only: whether the states that a call without hx starts from are Parameters (initial_h and so on,
            ``[L · D, ·]``, zeros at first) instead of zeros.
        recurrent_init: keyword only: what each block of U starts from: "uniform" as torch.nn, "orthogonal" (Saxe 2013), "identity" (IRNN,
            Le 2015).
        zoneout: keyword only: how probably each unit keeps its old value at a step (Krueger 2017), one number or one for each state; out of
            training, the expectation. recurrent_dropout: how probably U does not see a unit of h, for a whole sequence (Gal 2016).
            Masks come from torch's generator. Combinations that are not in the library are compiled when first used, as ``load_cell`` does.
        layer_norm: keyword only: "gates" normalises W x and U h, each over all gates, "gate" each over every gate by itself (Ba 2016), with
            gains norm_ih and weight_v and the shift bias_ih.
        grad_clip: keyword only: v, above 0: the gradient of h_t, all that others ask of it together, is clipped to [-v, v] at every step of
            backward (after Graves 2013, who clips that of the pre-activations); None: not. Forward is the same.
            Thresholds are no parameters; assigning another takes effect at the next call.

    Shape, with D = 2 if bidirectional else 1 and L = num_layers:
        * input: ``(T, B, I)``, ``(B, T, I)`` if batch_first, ``(T, I)`` unbatched, or a PackedSequence.
        * hx: ``(L · D, B, H)``, or ``(L · D, H)`` unbatched; zeros if None.
        * output: as the input with D · H in place of I; h_n: as hx.

    Dtypes: float64, float32, bfloat16, float16; input, hx and weights share one. Parameters are named and laid out as torch.nn's.

    Raises:
        ValueError: a wrong option; input not 2-D or 3-D; input and weights of different dtypes.
        TypeError: an option of the wrong type.
        RuntimeError: T = 0; wrong sizes; wrong rank, dtype or device of hx.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.RNN(3, 5, nonlinearity="sigmoid")
    >>> output, h_n = layer(torch.zeros(7, 2, 3))
    >>> output.shape, h_n.shape
    (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """

    nonlinearity: str
    _rank_text = "RNN: Expected input to be 2D or 3D, got {}D tensor instead"

    @signed("num_layers", "nonlinearity", *OF_ONE[1:])
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in SRNS:
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh', 'relu', 'sigmoid' or 'identity'.")
        super().__init__(SRNS[nonlinearity], *args, **kwargs)
        self.nonlinearity = nonlinearity


class GRU(LayerBase):
    r"""A stack of gated recurrent units (Cho 2014, reset after the matrix product), as ``torch.nn.GRU``.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.GRU, in this order.
        engine, recompute, weight_dtype, learn_initial, recurrent_init, zoneout, recurrent_dropout, layer_norm, grad_clip: keyword only, as
            :class:`RNN`.
        candidate_dropout: keyword only: how probably a step drops a unit of its candidate n (Semeniuta 2016), h_t = z_t h_{t-1} +
            (1 - z_t) m_t n_t, with a mask m_t drawn for each step and scaled by 1 / (1 - p); nothing in eval.

    Shapes, dtypes and errors: as :class:`RNN`.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.GRU(3, 5, bidirectional=True, batch_first=True)
    >>> output, h_n = layer(torch.zeros(2, 7, 3))
    >>> output.shape, h_n.shape
    (torch.Size([2, 7, 10]), torch.Size([2, 2, 5]))
    """

    _rank_text = "GRU: Expected input to be 2D or 3D, got {}D instead"

    @signed(*OF_ONE)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)

    _candidate = True


class LSTM(PairLayerBase):
    r"""A stack of LSTMs (Hochreiter & Schmidhuber 1997, forget gate of Gers 2000, projection of Sak 2014), as ``torch.nn.LSTM``.

    .. math::
        i_t, f_t, o_t &= \sigma(W_{i*} x_t + b_{i*} + W_{h*} h_{t-1} + b_{h*}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t) \quad\text{or, with proj\_size,}\quad W_{hr} (o_t \odot \tanh(c_t))

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as torch.nn.LSTM, in
            this order.
        engine, recompute, weight_dtype, learn_initial, recurrent_init, zoneout, recurrent_dropout, layer_norm, grad_clip: keyword only, as
            :class:`RNN`.
        forget_bias: keyword only: what the forget gate's bias starts from; None: as torch.nn.
        cell_norm: keyword only: normalises the cell state on its way out.
        candidate_dropout: keyword only: how probably a step drops a unit of its candidate g (Semeniuta 2016), c_t = f_t c_{t-1} +
            i_t m_t g_t, with a mask m_t drawn for each step and scaled by 1 / (1 - p); nothing in eval.
        cell_clip, proj_clip: keyword only: v, above 0: c_t, before it goes into the output, is clipped to [-v, v] (TensorFlow's LSTMCell,
            cuDNN's cudnnRNNSetClip), so that h_t = o_t tanh(clip(f_t c_{t-1} + i_t g_t)); and h_t = clip(W_hr ...), of a layer with
            proj_size. Gradients pass where nothing was clipped. None: not.

    Shapes, dtypes and errors: as :class:`RNN`, but hx is a pair (h_0, c_0) and the layer returns ``output, (h_n, c_n)``; with P =
    proj_size or else hidden_size, the output is D · P wide, h ``(L · D, B, P)`` and c ``(L · D, B, H)``.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.LSTM(3, 5, proj_size=2)
    >>> output, (h_n, c_n) = layer(torch.zeros(7, 1, 3))
    >>> output.shape, h_n.shape, c_n.shape
    (torch.Size([7, 1, 2]), torch.Size([1, 1, 2]), torch.Size([1, 1, 5]))
    """

    _rank_text = "LSTM: Expected input to be 2D or 3D, got {}D instead"

    @signed(*OF_TWO)
    def __init__(self, *args: Any, cell_norm: bool = False, **kwargs: Any) -> None:
        self.__dict__["cell_norm"] = cell_norm  # the base asks for the cell before it lets attributes be set
        super().__init__("LSTM", *args, **kwargs)

    @property
    def _base_cell(self) -> str:
        return "lstm_cell_norm" if self.cell_norm else "lstm"
