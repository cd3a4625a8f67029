"""Settings, the trainer, and the stages: VAE, quantizer, tokenizer, MaskGIT."""
