"""Drop-in speed for models of transformers: the same calls and the same results, by this package's operators."""

from maskformer_fast.drop_in.losses import equip_loss, unequip_loss
from maskformer_fast.drop_in.models import equip_model, unequip_model
from maskformer_fast.drop_in.processors import equip, unequip

__all__ = ["equip", "equip_loss", "equip_model", "unequip", "unequip_loss", "unequip_model"]
