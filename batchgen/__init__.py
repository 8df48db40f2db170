"""batchgen: distributed batch generation with latent diffusion models.

Importing this package loads no torch, ray or diffusers; each floor loads what it needs when used.
"""

__version__ = "0.1.0"
