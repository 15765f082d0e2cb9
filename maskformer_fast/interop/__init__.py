"""Weights in the layouts of other implementations: the official detectron2 files and Hugging Face's folders."""
