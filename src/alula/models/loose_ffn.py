"""Feed-forward networks whose two linears lie in the decoder layer itself (OPT, BART, XGLM, TrOCR, Whisper), made one module."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class FFN(nn.Module):
    """``fc2(dropout(activation_fn(fc1(x))))``, under the names that such layers have for its parts."""

    def __init__(self, fc1: nn.Module, activation_fn: nn.Module, fc2: nn.Module, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.activation_fn, self.fc2, self.dropout = fc1, activation_fn, fc2, dropout

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        """The output of the network for each token."""
        return self.fc2(functional.dropout(self.activation_fn(self.fc1(x)), self.dropout, self.training))


def is_loose(layer: nn.Module) -> bool:
    """Whether a decoder layer holds the linears of its feed-forward network itself."""
    return all(isinstance(getattr(layer, name, None), nn.Module) for name in ("fc1", "activation_fn", "fc2"))


def gathered(layer: nn.Module) -> FFN:
    """The network of a loose layer as one module, in the place of `fc1`; what the layer did after it does nothing any more.

    Example:
        >>> import torch
        >>> layer = nn.Module()
        >>> layer.fc1, layer.activation_fn, layer.fc2 = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)
        >>> x = torch.ones(1, 4)
        >>> before = layer.fc2(layer.activation_fn(layer.fc1(x)))
        >>> network = gathered(layer)
        >>> bool((layer.fc2(layer.activation_fn(layer.fc1(x))) == before).all())
        True
    """
    fc1, activation_fn, fc2 = (layer.get_submodule(name) for name in ("fc1", "activation_fn", "fc2"))
    network = FFN(fc1, activation_fn, fc2, dropout=getattr(layer, "activation_dropout", 0.0)).train(layer.training)
    layer.fc1, layer.activation_fn, layer.fc2 = network, nn.Identity(), nn.Identity()
    vars(layer)["activation_dropout"] = 0.0
    return network
