"""Mask2Former (Cheng et al., CVPR 2022): mask classification with masked attention to three levels of features."""

from __future__ import annotations

from torch import Tensor

from maskformer_fast.config import ModelConfig
from maskformer_fast.modeling.deformable_encoder import DeformablePixelDecoder
from maskformer_fast.modeling.masked_decoder import MaskedDecoder
from maskformer_fast.modeling.network import SegmentationNetwork, checked_sizes
from maskformer_fast.structures import Predictions


class Mask2Former(SegmentationNetwork):
    """Network that predicts a set of classes with masks, one for each query."""

    pixel_decoder: DeformablePixelDecoder

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, DeformablePixelDecoder)
        self.predictor = MaskedDecoder(
            self.pixel_decoder.memory_channels, config.num_classes, config.pixel_decoder.mask_dim, config.decoder
        )

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W] uint8 RGB
        valid_sizes: Tensor | None = None,  # [B, 2] int64: height, width of each image inside its padding
        *,
        all_layers: bool | None = None,
        project: bool | None = None,
    ) -> Predictions:
        """Predict a batch of images of any size; arguments and errors as for `MaskFormer.forward`.

        With all layers there is one more prediction than layers: the first is that of the learned queries.
        """
        sizes = checked_sizes(images, valid_sizes, self.config)
        all_layers = self.training if all_layers is None else all_layers
        project = (self.training or all_layers) if project is None else project
        pixel_features, levels = self.pixel_decoder.fuse(self.backbone(self.normalize(images, sizes)))
        projection = self.pixel_decoder.projection
        class_logits, mask_embeddings = self.predictor(pixel_features, projection, levels, all_layers)
        height, width = images.shape[-2:]
        if project:
            pixel_features = self.pixel_decoder.mask_features(pixel_features)
        return Predictions(
            class_logits, mask_embeddings, pixel_features, sizes, (height, width), None if project else projection
        )
