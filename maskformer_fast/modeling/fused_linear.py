"""Linear layers and Swin blocks for inference on the CPU, by oneDNN's matrix products and our window attention.

PyTorch multiplies float32 matrices on the CPU by MKL, which uses half of what AMD's processors with AVX-512 can do, and
applies nothing to the product. oneDNN multiplies by weights in a layout of its own choice, and applies GELU, ReLU or
the addition of a residual when it writes the product; `cpu_choices` tells where it is faster. Results equal the
network's up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer_fast.core.arrays import dtype_name
from maskformer_fast.modeling.attention import MultiHeadAttention
from maskformer_fast.modeling.cpu_choices import PLAIN, packed_linear_is_faster
from maskformer_fast.modeling.swin import PatchMerging, SwinBlock, SwinStage
from maskformer_fast.ops.window_attention import pack_window_bias, window_attention

_ADVICE = "maskformer_fast.inference.load.load_network gives one as it was trained"
_ACTIVATIONS: dict[str, tuple[str, list[Any], str]] = {
    "none": PLAIN, "gelu": ("gelu", [], "none"), "relu": ("relu", [], ""),
}  # fmt: skip


class FusedLayer(nn.Module):
    """Base of layers with weights in oneDNN's layout. They can be copied and pickled, but not moved or saved."""

    weight: Tensor

    def pack(self) -> None:
        """Convert ``weight`` to a layout that oneDNN chooses; such an opaque tensor cannot be copied or pickled."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        weight = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
        return {**self.__dict__, "weight": weight, "packed": self.weight.is_mkldnn}

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed = state.pop("packed")
        super().__setstate__(state)
        if packed:
            self.pack()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLayer:
        """Refuse to be moved or converted; modules do both by this method."""
        probe = fn(torch.empty(0))
        if probe.device.type != "cpu" or probe.dtype != torch.float32:
            raise RuntimeError(f"network: it was rebuilt for the CPU and stays in its precision; {_ADVICE}")
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise RuntimeError(f"network: it was rebuilt for inference and has no checkpoint's weights; {_ADVICE}")


class FusedLinear(FusedLayer):
    """Linear layer in float32 or bfloat16, optionally with GELU or ReLU after it or a residual added."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype,
        activation: Literal["none", "gelu", "relu"] = "none",
    ) -> None:  # fmt: skip
        super().__init__()
        self.dtype, self.activation = dtype, activation
        self.weight = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype)
        if dtype == torch.bfloat16 or packed_linear_is_faster(weight.shape[1], activation == "gelu"):
            self.pack()

    @property
    def implementation(self) -> str:
        """Library and dtype of the products."""
        return f"{'oneDNN' if self.weight.is_mkldnn else 'PyTorch'} {dtype_name(self.weight)}"

    def forward(
        self,
        x: Tensor,  # [..., C]
        residual: Tensor | None = None,  # [..., N] of the layer's dtype
    ) -> Tensor:
        """Output [..., N] in the layer's dtype."""
        x = x.to(self.dtype).contiguous()
        if not self.weight.is_mkldnn or not x.numel():
            x = F.linear(x, self.weight.to_dense() if self.weight.is_mkldnn else self.weight, self.bias)
            if self.activation != "none":
                x = F.gelu(x) if self.activation == "gelu" else F.relu_(x)
            return x if residual is None else x.add_(residual)
        products = torch.ops.mkldnn._linear_pointwise
        if residual is not None:
            return products.binary(x, residual, self.weight, self.bias, "add")
        return products(x, self.weight, self.bias, *_ACTIVATIONS[self.activation])

    def pack(self) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)


class FusedAttention(nn.Module):
    """`MultiHeadAttention` for inference."""

    def __init__(self, attention: MultiHeadAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        self.inputs = nn.ModuleList(FusedLinear(*part, dtype) for part in zip(weights, biases, strict=True))
        self.output = FusedLinear(attention.out_proj.weight, attention.out_proj.bias, dtype)

    def forward(
        self,
        query: Tensor,  # [B, N, C]
        key: Tensor,  # [B, M, C]
        value: Tensor,  # [B, M, C]
        visible: Tensor | None = None,  # bool, as for `MultiHeadAttention`
    ) -> Tensor:
        """Output [B, N, C]."""
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear, x in zip(self.inputs, (query, key, value), strict=True)
        )
        return self.output(F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2))


class FusedSwinBlock(nn.Module):
    """`SwinBlock` for inference."""

    def __init__(self, block: SwinBlock, dtype: torch.dtype) -> None:
        super().__init__()
        attention, mlp = block.attn, block.mlp
        self.window, self.shift = block.window, block.shift
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.qkv = FusedLinear(attention.qkv.weight, attention.qkv.bias, dtype)
        self.proj = FusedLinear(attention.proj.weight, attention.proj.bias, dtype)
        self.fc1 = FusedLinear(mlp.fc1.weight, mlp.fc1.bias, dtype, "gelu")
        self.fc2 = FusedLinear(mlp.fc2.weight, mlp.fc2.bias, dtype)
        bias = attention.relative_position_bias_table[attention.relative_position_index].permute(2, 0, 1)
        self.bias = pack_window_bias(bias.detach())
        assert self.qkv.bias is not None
        self.padding = self.qkv.bias  # tokens of padding are zero before the layer

    def forward(
        self,
        x: Tensor,  # [B, H, W, C] of the layers' dtype
    ) -> Tensor:
        """Output [B, H, W, C]."""
        attended = window_attention(self.qkv(self.norm1(x)), self.padding, self.bias, self.window, self.shift)
        x = self.proj(attended, x)
        return self.fc2(self.fc1(self.norm2(x)), x)


class FusedSwinStage(nn.Module):
    """`SwinStage` for inference."""

    def __init__(self, stage: SwinStage, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.blocks = nn.ModuleList(FusedSwinBlock(block, dtype) for block in stage.blocks)  # type: ignore[arg-type]
        self.downsample: nn.Module | None = None
        if stage.downsample is not None:
            self.downsample = FusedPatchMerging(stage.downsample, dtype)

    def forward(
        self,
        x: Tensor,  # [B, H, W, C]
        next_height: int,
        next_width: int,
    ) -> tuple[Tensor, Tensor]:
        """Output as of `SwinStage`."""
        x = x.to(self.dtype)
        for block in self.blocks:
            x = block(x)
        return x, x if self.downsample is None else self.downsample(x, next_height, next_width)


class FusedPatchMerging(PatchMerging):
    """`PatchMerging` for inference."""

    def __init__(self, merging: PatchMerging, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.norm = merging.norm
        self.reduction = FusedLinear(merging.reduction.weight, None, dtype)  # type: ignore[assignment]
