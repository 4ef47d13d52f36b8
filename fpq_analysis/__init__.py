"""Loss-landscape and Hessian analysis of quantized networks, with a compact trainer for FPQ and its baselines.

The public names are listed in `__init__.pyi`, and are imported when they are first used, so that the command line
answers without waiting for torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
