"""Products of states with the weights of linear layers, with elementwise operations fused where the hardware allows.

Several layers that read the same input are computed by one product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class LinearProduct(nn.Module):
    """One or several `nn.Linear` as one product, (..., in) -> (..., sum of outs). All of them have a bias or none.

    The weights of several layers become parts of the product's, so that a device holds a large model once.
    """

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        self.weight = layers[0].weight.detach()
        if len(layers) > 1:
            self.weight = torch.cat([layer.weight.detach() for layer in layers])
            widths = [layer.out_features for layer in layers]
            for layer, own in zip(layers, torch.split(self.weight, widths), strict=True):
                layer.weight = nn.Parameter(own, requires_grad=False)
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def silu(self, x: Tensor) -> Tensor:
        """Returns SiLU of the product."""
        return F.silu(self(x), inplace=True)

    def multiplied(self, x: Tensor, other: Tensor) -> Tensor:
        """Returns the product times `other`, element by element."""
        product: Tensor = self(x)
        return product.mul_(other)


class ReorderedProduct(LinearProduct):
    """oneDNN's product with weights reordered once, and elementwise operations done while tiles are in cache."""

    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__(*layers)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), 1024)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, "none")

    def silu(self, x: Tensor) -> Tensor:
        return self._product(x, "swish")

    def multiplied(self, x: Tensor, other: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")
        return product

    def _product(self, x: Tensor, then: str) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], "")
        return product


def product_for(weight: Tensor) -> type[LinearProduct]:
    """Returns the fastest kind of product for layers with the device and dtype of `weight`."""
    has_product = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    is_reordered = has_product and weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return ReorderedProduct if is_reordered else LinearProduct
