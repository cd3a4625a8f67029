"""The paper: quantizer, VAE with adapters, tokenizer, losses, discriminator, MaskGIT and its sampling (Eq. 4-12)."""
