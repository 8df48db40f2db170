"""The job that trains, measures and exports the small latent diffusion model batchgen ships."""
