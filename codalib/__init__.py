"""CODA: continuous VAEs adapted into discrete tokenizers (arXiv 2503.17760).

The library, from the ground up, each module importing only from those before it:
models: paper, runs, compare, data, rich, features, layouts, vae, assign_triton, assign, quantize, baselines, tokenizer,
released, maskgit;
training and measuring: losses, discriminator, metrics, loop, evaluate, launch, train, ablation, latent_space, variants;
generation: sample, tokens, text, train_maskgit, evaluate_generation;
looking: explore, widgets;
pages and commands: pages, figures, report, execute, fetch, counting, estimate, rehearse, bench.

Shapes are written with these letters everywhere:
B batch, C latent channels, H W latent grid, p side of one level's token map, L tokens, K codes, D attention width;
images are (B, 3, h, w) in [-1, 1].
"""

__version__ = "0.1.0"
