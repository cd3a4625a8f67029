"""CODA: continuous VAEs adapted into discrete tokenizers (arXiv 2503.17760).

The library, from the ground up, each module importing only from those above it: paper, runs, compare, data, features,
vae, assign, quantize, tokenizer, losses, discriminator, metrics, loop, train, figures, pages, report, execute.

Shapes are written with these letters everywhere:
B batch, C latent channels, H W latent grid, p side of one level's token map, L tokens, K codes, D attention width;
images are (B, 3, h, w) in [-1, 1].
"""

__version__ = "0.1.0"
