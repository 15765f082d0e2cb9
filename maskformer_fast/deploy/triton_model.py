"""Former place of `deploy.triton_server.model`: model repositories written by earlier versions import it."""

from maskformer_fast.deploy.triton_server.model import ServedBundle

__all__ = ["ServedBundle"]
