"""Weights of other implementations: official detectron2 files, Hugging Face's folders and ImageNet backbones."""
