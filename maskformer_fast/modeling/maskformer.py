"""MaskFormer (Cheng, Schwing, Kirillov, NeurIPS 2021), a mask-classification network for all three tasks."""

from __future__ import annotations

from torch import Tensor

from maskformer_fast.config import ModelConfig
from maskformer_fast.modeling.mask_head import MaskHead
from maskformer_fast.modeling.network import SegmentationNetwork, checked_sizes
from maskformer_fast.modeling.pixel_decoder import PixelDecoder
from maskformer_fast.structures import Predictions


class MaskFormer(SegmentationNetwork):
    """Network that predicts a set of classes with masks, one for each query."""

    pixel_decoder: PixelDecoder

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, PixelDecoder)
        self.predictor = MaskHead(
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
        """Predict a batch of images of any size.

        Args:
            images: pixels outside ``valid_sizes`` count as the mean colour.
            valid_sizes: ``None`` means that there is no padding.
            all_layers: keep the predictions of every decoder layer (deep supervision); ``None`` does so in training.
            project: compute the pixel embeddings, which losses need. Otherwise the predictions carry the last
                convolution of the pixel decoder, to apply to the needed masks only (`Predictions`). ``None`` computes
                them in training and with all layers. With them, no tensor of the predictions is a parameter.

        Raises:
            TypeError: the images are not uint8.
            ValueError: the images or sizes have another shape.
        """
        sizes = checked_sizes(images, valid_sizes, self.config)
        all_layers = self.training if all_layers is None else all_layers
        project = (self.training or all_layers) if project is None else project
        if project:
            projection = None
            pixel_features, memory = self.embed(images, sizes)
        else:
            projection = self.pixel_decoder.projection
            pixel_features, memory = self.pixel_decoder.fuse(self.backbone(self.normalize(images, sizes)))
        class_logits, mask_embeddings = self.predictor(memory, all_layers)
        height, width = images.shape[-2:]
        return Predictions(class_logits, mask_embeddings, pixel_features, sizes, (height, width), projection)
