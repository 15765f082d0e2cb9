"""Running a bundle without torch: ``with load("bundle") as runtime: runtime.predict(frame)``."""

from maskformer_fast.deploy.runtime.session import Runtime, load

__all__ = ["Runtime", "load"]
