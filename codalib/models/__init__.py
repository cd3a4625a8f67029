"""The paper, arXiv:2503.17760: where each equation stands.

    Eq. 4, 5     the residual scheme                      quantizer.py   ResidualQuantizer.forward
    Eq. 6        queries and keys (values: Eq. 8)         quantizer.py   CodebookAttention
    Eq. 7, 8     softmax attention, straight through      quantizer.py   softmax_assignment
    Eq. 9        the weighted sum of all terms            losses.py      weighted_sum
    Eq. 10, 11   the quantization loss                    quantizer.py   ResidualAttentionQuantizer.assign
    Eq. 12       cross-entropy at the masked tokens       maskgit.py     MaskGIT.forward
    Section 4    schedule and steps of decoding           sampling.py    unmask_counts, generate

`CORE` are the files that state the paper, under 1,000 lines together. Beside them: `baselines` (Eq. 1-2, by distance),
`library_quantizers` and `quantizer_kinds` (other quantizers, and all of them by name), `loss_weights` and `adversary`
(the weights of Eq. 9, the discriminator in training), `masks`, `transformer`, `latent_context`, `sampling_inputs`
(parts of MaskGIT), `checks`, `ranking`, `editing`, and `checkpoints` (loading, saving and finding models).
"""

CORE = ("quantizer", "tokens", "vae", "adapters", "tokenizer", "losses", "discriminator", "maskgit", "sampling")
