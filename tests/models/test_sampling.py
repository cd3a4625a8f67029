import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn import functional as F

from codalib.base.seeds import sample_generators
from codalib.kernels.decoding import compile_decoding
from codalib.models import sampling as sample
from codalib.models.editing import keep_outside, with_token
from codalib.models.maskgit import MaskGIT, TextCondition
from codalib.models.sampling import generate, guidance_at, unmask_counts
from codalib.models.tokens import Tokens, join_levels, token_levels

SCALES = (1, 2, 3, 4)  # 30 tokens
K = 13
LABELS = torch.tensor([0, 1, 2])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MaskGIT(K, SCALES, 16, 2, 2, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that what is drawn depends on what is seen
            if parameter.ndim > 1:
                parameter.mul_(10)
        model.head.weight.mul_(2)
    return model.eval()


def draw(model, labels=LABELS, numbers=(0, 1, 2), seed=0, **settings):
    return join_levels(generate(model, labels, generator=sample_generators(seed, numbers), **settings))


# --- schedules --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(1, 3000), data=st.data(), schedule=st.sampled_from(sorted(sample.SCHEDULES)))
def test_a_schedule_uncovers_every_token_once_and_one_a_step_at_least(tokens, data, schedule):
    steps = data.draw(st.integers(1, min(tokens, 64)))
    counts = unmask_counts(tokens, steps, schedule)
    assert len(counts) == steps
    assert sum(counts) == tokens
    assert min(counts) >= 1


def test_schedules_are_their_formulas():
    assert unmask_counts(100, 4, "linear") == [25, 25, 25, 25]
    assert unmask_counts(100, 4, "square") == [7, 18, 32, 43]  # masked: 93.75, 75, 43.75, 0
    assert unmask_counts(100, 4, "cosine") == [8, 22, 32, 38]  # masked: 92.4, 70.7, 38.3, 0
    assert unmask_counts(5, 5, "cosine") == [1, 1, 1, 1, 1]
    assert unmask_counts(10, 8, "cosine") == [1, 1, 1, 1, 1, 2, 2, 1]  # masked: 9, 9, 8, 7, but one a step at least
    assert unmask_counts(680, 1) == [680]


def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_number():
    logits = torch.tensor([0.0, 0.25, 0.25, 0.5]).log().expand(5, 4)
    tokens, sure = sample.draw_tokens(logits, 1.0, torch.tensor([0.0, 0.2, 0.25, 0.5, 0.99]))
    assert tokens.tolist() == [1, 1, 2, 3, 3]
    assert sure.exp().tolist() == pytest.approx([0.25, 0.25, 0.25, 0.5, 0.5])


@pytest.mark.parametrize("steps", [0, 31, -1])
def test_more_steps_than_tokens_is_one_sentence(model, steps):
    with pytest.raises(ValueError, match=f"expected 1 to 30 steps for 30 masked tokens, .*got {steps}"):
        draw(model, steps=steps)


def test_guidance_is_constant_or_rises():
    assert [guidance_at(t, 5, 2.0) for t in range(5)] == [2.0] * 5
    assert [guidance_at(t, 5, 2.0, "linear") for t in range(5)] == [0, 0.5, 1, 1.5, 2]
    assert guidance_at(0, 1, 2.0, "linear") == 2.0


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", sample.ORDERS)
@pytest.mark.parametrize("schedule", sorted(sample.SCHEDULES))
@pytest.mark.parametrize("steps", [1, 5, 30])
def test_each_token_is_uncovered_once_in_the_schedules_numbers(model, order, schedule, steps):
    seen = []
    drawn = draw(model, steps=steps, schedule=schedule, order=order, on_step=seen.append)
    counts = unmask_counts(30, steps, schedule)
    before = torch.full((3, 30), -1)
    for number, (step, count) in enumerate(zip(seen, counts, strict=True)):
        after = join_levels(step.indices)
        unmasked = (before == -1) & (after != -1)
        assert step.number == number
        assert unmasked.sum(dim=1).tolist() == [count] * 3
        assert torch.equal(after[before != -1], before[before != -1])  # once unmasked, it stays
        assert torch.equal(after[unmasked], join_levels(step.drawn)[unmasked])
        assert join_levels(step.drawn).min() >= 0
        before = after
    assert torch.equal(before, drawn)
    assert drawn.min() >= 0
    assert drawn.max() < K


def test_coarse_to_fine_never_goes_back_to_a_level(model):
    levels, seen = token_levels(SCALES), []
    draw(model, steps=9, order="coarse-to-fine", on_step=seen.append)
    for step in seen:
        masked = join_levels(step.indices) == -1
        for row in masked:
            assert not row.any() or row.all() or levels[~row].max() <= levels[row].min()
    anywhere = []
    draw(model, steps=9, order="confidence", on_step=anywhere.append)
    masked = join_levels(anywhere[3].indices) == -1
    assert any(levels[~row].max() > levels[row].min() for row in masked)


def test_a_sample_depends_on_its_own_seed_and_label_alone(model):
    whole = draw(model, steps=6, guidance=1.0)
    for i in range(3):
        assert torch.equal(draw(model, LABELS[i : i + 1], (i,), steps=6, guidance=1.0)[0], whole[i])
    assert torch.equal(draw(model, LABELS.flip(0), (2, 1, 0), steps=6, guidance=1.0).flip(0), whole)
    again = draw(model, steps=6, guidance=1.0)
    assert torch.equal(again, whole)
    assert not torch.equal(draw(model, steps=6, guidance=1.0, seed=1), whole)


def test_compiled_decoding_draws_the_same(model, monkeypatch):
    compile_, modes, graphs = torch.compile, [], []

    def graph_alone(run, mode):
        modes.append(mode)
        return compile_(run, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)

    monkeypatch.setattr(torch, "compile", graph_alone)
    compiled = copy.deepcopy(model)
    compile_decoding(compiled)
    assert modes == ["reduce-overhead"]  # CUDA graphs, where there is CUDA
    for guidance in (0.0, 1.0):
        assert torch.equal(draw(compiled, steps=6, guidance=guidance), draw(model, steps=6, guidance=guidance))
    assert graphs


def test_one_generator_seeds_all_samples(model):
    first = generate(model, LABELS, generator=torch.Generator().manual_seed(5))
    second = generate(model, LABELS, generator=torch.Generator().manual_seed(5))
    third = generate(model, LABELS, generator=torch.Generator().manual_seed(6))
    assert torch.equal(join_levels(first), join_levels(second))
    assert not torch.equal(join_levels(first), join_levels(third))
    same_label = join_levels(generate(model, torch.tensor([1, 1]), generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(same_label[0], same_label[1])
    with pytest.raises(ValueError, match="expected a generator for each of 3 samples, got 2"):
        generate(model, LABELS, generator=sample_generators(0, [0, 1]))


def test_one_step_draws_from_the_models_distribution(model):
    count = 1500
    labels = torch.ones(count, dtype=torch.long)
    tokens = draw(model, labels, range(count), steps=1, temperature=2.0)
    masked = model.features(torch.full((1, 30), K), torch.tensor([1]))
    wanted = (model.logits(masked)[0] / 2.0).softmax(dim=1)  # (L, K)
    found = F.one_hot(tokens, K).double().mean(dim=0)
    assert (found - wanted).abs().max() < 0.06
    assert (found - model.logits(masked)[0].softmax(dim=1)).abs().max() > 0.06


def test_near_temperature_zero_the_likeliest_is_drawn(model):
    tokens = draw(model, steps=1, temperature=1e-6)
    masked = model.features(torch.full((3, 30), K), LABELS)
    assert torch.equal(tokens, model.logits(masked).argmax(dim=2))


def test_without_choice_noise_the_most_confident_stay(model):
    seen = []
    draw(model, steps=10, choice_temperature=0.0, on_step=seen.append)
    drawn, kept = join_levels(seen[0].drawn), join_levels(seen[0].indices) != -1
    logits = model.logits(model.features(torch.full((3, 30), K), LABELS))
    confidence = logits.log_softmax(dim=2).gather(2, drawn[..., None])[..., 0]
    for row, stays in zip(confidence, kept, strict=True):
        assert row[stays].min() >= row[~stays].max()
    noisy = []
    draw(model, steps=10, choice_temperature=50.0, on_step=noisy.append)
    assert not torch.equal(join_levels(noisy[0].indices) != -1, kept)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_every_step_is_the_formula_on_the_samples_own_numbers(model, temperature):
    """Tokens by their cumulative probability, then those of highest log-probability + fading Gumbel noise."""
    steps, seen, owns = 4, [], sample_generators(7, range(3))
    draw(model, seed=7, steps=steps, temperature=temperature, choice_temperature=4.5, on_step=seen.append)
    before = torch.full((3, 30), K)
    for t, (step, count) in enumerate(zip(seen, unmask_counts(30, steps), strict=True)):
        logits = model.logits(model.features(before, LABELS)).double()
        drawn, masked = join_levels(step.drawn), before == K
        after = join_levels(step.indices)
        for i, own in enumerate(owns):
            token_number, noise_number = torch.rand(2, 30, generator=own).double()
            cumulative = (logits[i] / temperature).softmax(dim=1).cumsum(dim=1)
            wanted = (cumulative <= token_number[:, None]).sum(dim=1)
            assert torch.equal(drawn[i][masked[i]], wanted[masked[i]])
            score = logits[i].log_softmax(dim=1).gather(1, drawn[i][:, None])[:, 0]
            score += 4.5 * (1, 0.75, 0.5, 0.25, 0)[t + 1] * -(-noise_number.log()).log()
            kept = score.masked_fill(~masked[i], -torch.inf).topk(count).indices
            assert sorted(kept.tolist()) == (masked[i] & (after[i] != -1)).nonzero()[:, 0].tolist()
        before = after.masked_fill(after == -1, K)


def test_the_choices_noise_is_gone_at_the_end_and_of_gumbels_sign(model, monkeypatch):
    noise = []
    unfilled = torch.Tensor.masked_fill

    def noted(self, mask, value):
        if value == -torch.inf:
            noise.append(self)
        return unfilled(self, mask, value)

    monkeypatch.setattr(torch.Tensor, "masked_fill", noted)
    monkeypatch.setattr(
        sample, "_draw", lambda model, tokens, *_: (torch.zeros_like(tokens), torch.zeros(tokens.shape).double())
    )
    draw(model, torch.zeros(2000).long(), range(2000), steps=2, choice_temperature=2.0)
    first, last = noise
    assert first.mean() == pytest.approx(0.5772, abs=0.03)  # Euler's constant: the mean of Gumbel's law
    assert first.max() > 7 > 4 > -first.min()  # its long tail is upwards
    assert not last.any()


# --- guidance ---------------------------------------------------------------------------------------------------------


def test_guidance_zero_is_the_conditional_model_and_one_pass(model, monkeypatch):
    batches = []
    masked = MaskGIT.features

    def counted(self, tokens, condition=None, dropped=None):
        batches.append(len(tokens))
        return masked(self, tokens, condition, dropped)

    monkeypatch.setattr(MaskGIT, "features", counted)
    plain = draw(model, steps=4)
    assert batches == [3] * 4
    batches.clear()
    draw(model, steps=4, guidance=2.0)
    assert batches == [6] * 4  # the conditional and the unconditional pass share one batch
    batches.clear()
    draw(model, steps=4, guidance=2.0, guidance_schedule="linear")
    assert batches == [3, 6, 6, 6]  # it starts from 0
    tiny = draw(model, steps=4, guidance=1e-12)  # through the guided path, the same to rounding
    assert torch.equal(tiny, plain)
    assert not torch.equal(draw(model, steps=4, guidance=2.0), plain)


def test_guidance_is_its_formula(model):
    weight, masked = 1.5, torch.full((3, 30), K)
    with_class = model.logits(model.features(masked, LABELS))
    without = model.logits(model.features(masked, LABELS, torch.ones(3, dtype=torch.bool)))
    wanted = ((1 + weight) * with_class - weight * without).argmax(dim=2)
    assert torch.equal(draw(model, steps=1, temperature=1e-6, guidance=weight), wanted)
    assert not torch.equal(wanted, with_class.argmax(dim=2))


def test_logits_are_computed_at_hidden_positions_alone(model, monkeypatch):
    rows = []
    logits = MaskGIT.logits
    monkeypatch.setattr(MaskGIT, "logits", lambda self, states: rows.append(len(states)) or logits(self, states))
    draw(model, steps=5)
    left, wanted = 30, []
    for count in unmask_counts(30, 5):
        wanted.append(3 * left)
        left -= count
    assert rows == wanted


def test_tiles_of_logits_change_nothing(model, monkeypatch):
    whole = draw(model, steps=5, guidance=1.0)
    monkeypatch.setattr(sample, "TILE_LOGITS", 7 * K)
    assert torch.equal(draw(model, steps=5, guidance=1.0), whole)


def test_captions_guide_too():
    torch.manual_seed(0)
    model = MaskGIT(K, SCALES, 16, 2, 2, text_dim=6).eval()
    text = TextCondition(torch.randn(2, 5, 6), torch.arange(5) < torch.tensor([[2], [5]]))
    tokens = join_levels(generate(model, text, generator=sample_generators(0, [0, 1]), guidance=1.0))
    assert tokens.shape == (2, 30)


# --- fixed tokens -----------------------------------------------------------------------------------------------------


def test_fixed_tokens_stay_and_the_others_follow_the_schedule(model):
    image = generate(model, LABELS, generator=sample_generators(3, range(3)))
    fixed = keep_outside(image, (0, 0, 0.5, 1))
    count = (join_levels(fixed)[0] == -1).sum().item()
    assert 0 < count < 30
    seen = []
    result = generate(
        model, LABELS.flip(0), steps=4, fixed=fixed, generator=sample_generators(4, range(3)), on_step=seen.append
    )
    kept = join_levels(fixed) != -1
    assert torch.equal(join_levels(result)[kept], join_levels(image)[kept])
    assert not torch.equal(join_levels(result), join_levels(image))
    before, counts = join_levels(fixed), []
    for step in seen:
        after = join_levels(step.indices)
        counts.append(((before == -1) & (after != -1))[0].sum().item())
        before = after
    assert counts == unmask_counts(count, 4)


def test_samples_may_fix_different_numbers(model):
    image = generate(model, LABELS, generator=sample_generators(3, range(3)))
    fixed = [level.clone() for level in image]
    fixed[3][0] = -1
    fixed[2][1] = -1  # sample 0 masks 16 tokens, sample 1 9, sample 2 none
    result = join_levels(generate(model, LABELS, steps=4, fixed=fixed, generator=sample_generators(4, range(3))))
    assert result.min() >= 0
    assert torch.equal(result[2], join_levels(image)[2])
    with pytest.raises(ValueError, match="expected 1 to 9 steps"):
        generate(model, LABELS, steps=10, fixed=fixed)


def test_a_box_hides_the_cells_that_meet_it():
    image = [torch.zeros(1, p, p, dtype=torch.long) for p in SCALES]
    kept = keep_outside(image, (0.0, 0.0, 0.5, 0.25), coarse_kept=1)
    assert kept[0].item() == 0
    assert (kept[1][0] == -1).tolist() == [[True, False], [False, False]]
    assert (kept[2][0] == -1).tolist() == [[True, False, False], [True, False, False], [False, False, False]]
    assert (kept[3][0] == -1).sum() == 2
    assert keep_outside(image, (0.0, 0.0, 0.5, 0.25))[0].item() == -1
    assert all((level == 0).all() for level in image)  # the caller's own stay as they are
    for box in ((0.5, 0, 0.5, 1), (-0.1, 0, 1, 1), (0, 0, 1.1, 1), (0, 0.5, 1, 0.5), (0, -0.1, 1, 1), (0, 0, 1, 1.1)):
        with pytest.raises(ValueError, match="expected a box with 0 <= top < bottom <= 1"):
            keep_outside(image, box)
    assert keep_outside(image, (0.0, 0.0, 1.0, 1.0))[3].eq(-1).all()


def test_one_token_is_changed_or_masked_and_a_place_outside_is_refused():
    tokens = Tokens([torch.zeros(2, p, p, dtype=torch.long) for p in SCALES], K)
    changed = with_token(tokens, 2, 1, 0, K - 1)
    assert [(level == K - 1).nonzero().tolist() for level in changed] == [[], [], [[0, 1, 0], [1, 1, 0]], []]
    assert changed.codebook_size == K
    assert all((level == 0).all() for level in tokens)
    assert with_token(tokens, 0, 0, 0, -1)[0].tolist() == [[[-1]], [[-1]]]
    for place, message in (
        ((-1, 0, 0, 0), "a level from 0 to 3, got -1"),
        ((4, 0, 0, 0), "a level from 0 to 3, got 4"),
        ((2, 3, 0, 0), "row and column from 0 to 2 at level 2, got 3 and 0"),
        ((2, 0, 3, 0), "row and column from 0 to 2 at level 2, got 0 and 3"),
        ((2, 0, -1, 0), "row and column from 0 to 2 at level 2, got 0 and -1"),
        ((2, 0, 0, K), f"a code from -1 \\(masked\\) to {K - 1}, got {K}"),
        ((2, 0, 0, -2), f"a code from -1 \\(masked\\) to {K - 1}, got -2"),
    ):
        with pytest.raises(ValueError, match=f"^expected {message}$"):
            with_token(tokens, *place)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": torch.tensor([0, 1, 3])}, "expected labels from 0 to 2, got 3"),
        ({"order": "random"}, "expected an order of confidence, coarse-to-fine"),
        ({"schedule": "cube"}, "expected a schedule of cosine, linear, square"),
        ({"guidance_schedule": "cube"}, "expected a guidance_schedule of constant, linear"),
        ({"temperature": 0.0}, "expected a temperature above 0"),
        ({"temperature": 1e-45}, "expected a temperature above 0"),  # by which logits overflow
        ({"guidance": -1.0}, "expected guidance of 0"),
        ({"guidance": float("nan")}, "expected guidance of 0"),
        ({"guidance": float("inf")}, "expected guidance of 0"),
        ({"choice_temperature": float("nan")}, "expected choice_temperature from 0"),
        ({"choice_temperature": float("inf")}, "expected choice_temperature from 0"),
        ({"batch": 5}, "for each of 5 samples, the batch, got 3"),
        ({"fixed": [torch.full((3, p, p), 0.7) for p in SCALES]}, "expected fixed tokens of int64, got torch.float32"),
        ({"fixed": [torch.zeros(3, 1, 1)]}, "fixed tokens of shapes"),
        ({"fixed": [torch.full((3, p, p), K) for p in SCALES]}, "another tokenizer"),
    ],
)
def test_bad_values_are_one_sentence(model, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        draw(model, **settings)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_condition_and_one_in_training(model):
    free = MaskGIT(K, SCALES, 16, 1, 2).eval()
    assert join_levels(generate(free, batch=2)).shape == (2, 30)
    with pytest.raises(ValueError, match="number of samples is not known"):
        generate(free)
    with pytest.raises(ValueError, match="without condition"):
        generate(free, batch=2, guidance=1.0)
    with pytest.raises(ValueError, match="training mode"):
        generate(free.train(), batch=2)
