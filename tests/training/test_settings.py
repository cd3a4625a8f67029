"""Values that no run can have are refused when the settings are made, before data or networks are loaded."""

import math

import pytest

from codalib.evaluation.generation import GenerationSettings, SamplerConfig
from codalib.evaluation.reconstruction import EvaluationSettings
from codalib.training.settings import EncodingSettings, MaskGITSettings, QuantizerSettings, TokenizerSettings

QUANTIZER = QuantizerSettings, {"steps": 1, "batch_size": 1}
TOKENIZER = TokenizerSettings, {"steps": 1, "batch_size": 1}
EVALUATION = EvaluationSettings, {"dataset": "emoji", "resolution": 64}
GENERATION = GenerationSettings, {"dataset": "emoji"}


@pytest.mark.parametrize(
    ("made", "wrong", "words"),
    [
        (QUANTIZER, {"kind": "atention"}, "a quantizer kind of attention or nearest"),
        (QUANTIZER, {"norm": "batch"}, "a norm of rms or layer or None"),
        (QUANTIZER, {"codebook_size": 0}, "codebook_size of at least 1"),
        (QUANTIZER, {"scales": (4, 2)}, "the largest, got"),
        (QUANTIZER, {"scales": ()}, "expected scales"),
        (QUANTIZER, {"beta": -0.1}, "beta"),
        (QUANTIZER, {"attention_dim": 0}, "attention_dim"),
        (QUANTIZER, {"entropy_temperature": 0.0}, "entropy_temperature"),
        (QUANTIZER, {"entropy_weight": -1.0}, "entropy_weight"),
        (QUANTIZER, {"quantization_weight": float("nan")}, "quantization_weight"),
        (QUANTIZER, {"backend": "cuda"}, "expected a backend of auto|expected a backend of reference"),
        (QUANTIZER, {"start": "Data"}, "a start of random or data, got 'Data'"),
        (TOKENIZER, {"steps": 2.5}, "steps to be a whole number of at least 1, got 2.5"),  # which no step equals
        (TOKENIZER, {"steps": math.nan}, "steps to be a whole number"),
        (TOKENIZER, {"steps": True}, "steps to be a whole number"),
        (TOKENIZER, {"warmup_steps": -1}, "warmup_steps to be a whole number of at least 0"),
        (TOKENIZER, {"evaluate_every": 1.5}, "evaluate_every to be a whole number"),
        (TOKENIZER, {"clip": -1.0}, "clip above 0, got -1.0"),  # which would turn the gradients round
        (TOKENIZER, {"clip": 0.0}, "clip above 0"),
        (TOKENIZER, {"clip": math.nan}, "clip above 0"),
        (TOKENIZER, {"learning_rate": "1e-4"}, "learning_rate from 0"),
        (TOKENIZER, {"learning_rate": math.nan}, "learning_rate from 0"),
        (TOKENIZER, {"final_learning_rate": -0.1}, "final_learning_rate from 0"),
        (TOKENIZER, {"weight_decay": math.inf}, "weight_decay from 0"),
        (TOKENIZER, {"ema": 1.5}, "ema from 0 to 1, got 1.5"),
        (TOKENIZER, {"rank": 0}, "expected rank to be a whole number of at least 1, got 0"),
        (TOKENIZER, {"adapters": "all"}, "expected adapters of both, encoder, decoder, none, scratch, got 'all'"),
        (TOKENIZER, {"adapted_layers": "conv1"}, "adapted_layers as a list"),
        (TOKENIZER, {"perceptual_weight": -1.0}, "loss weight perceptual"),
        ((EncodingSettings, {}), {"views": 0}, "views"),
        ((MaskGITSettings, {}), {"dropout": 1.5}, "dropout"),
        ((SamplerConfig, {}), {"steps": 0}, "steps"),
        ((SamplerConfig, {}), {"temperature": 0.0}, "a temperature above 0"),
        ((SamplerConfig, {}), {"order": "random"}, "an order of confidence"),
        ((SamplerConfig, {}), {"schedule": "cosin"}, "a schedule of cosine"),
        ((SamplerConfig, {}), {"guidance": -1.0}, "guidance"),
        ((SamplerConfig, {}), {"guidance_schedule": "cosine"}, "a guidance_schedule of constant"),
        (EVALUATION, {"batch_size": 0}, "batch_size"),
        (EVALUATION, {"workers": -1}, "workers"),
        (EVALUATION, {"seed": -1}, "seed"),
        (GENERATION, {"batch_size": 0}, "batch_size"),
        (GENERATION, {"neighbours": 0}, "neighbours"),
        (GENERATION, {"seed": 2**32}, "seed"),
        (GENERATION, {"samples": 1}, "at least 2 samples"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_value_that_no_run_can_have_is_refused_at_once(made, wrong, words):
    settings, needed = made
    settings(**needed)  # as it stands it is taken
    with pytest.raises(ValueError, match=words):
        settings(**needed | wrong)
