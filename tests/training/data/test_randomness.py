import torch

from training.data.randomness import Purpose, StepRandomness

CPU = torch.device("cpu")


def test_a_samples_draws_do_not_depend_on_what_is_drawn_beside_it() -> None:
    randomness = StepRandomness(seed=1, step=5)
    together = randomness.uniform(Purpose.AUGMENT_REAL, range(4), 3)
    apart = [StepRandomness(1, 5).uniform(Purpose.AUGMENT_REAL, [sample], 3) for sample in range(4)]
    assert torch.equal(torch.cat(apart), together)
    together = randomness.normal(Purpose.NOISE, range(4), (16, 8), CPU)
    apart = [randomness.normal(Purpose.NOISE, [sample], (16, 8), CPU) for sample in range(4)]
    assert torch.equal(torch.cat(apart), together)


def test_seed_step_purpose_and_sample_all_matter() -> None:
    draws = [
        StepRandomness(seed, step).uniform(purpose, [sample], 2)
        for seed in (0, 1)
        for step in (0, 1)
        for purpose in (Purpose.NOISE, Purpose.AUGMENT_FAKE)
        for sample in (0, 1)
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)
    crops = [StepRandomness(0, step).shared(Purpose.PERCEPTUAL_CROP).initial_seed() for step in range(9)]
    assert len(set(crops)) == len(crops)


def test_draws_have_their_distributions() -> None:
    randomness = StepRandomness(seed=0, step=0)
    noise = randomness.normal(Purpose.NOISE, range(64), (64, 16), CPU)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    uniform = randomness.uniform(Purpose.NOISE, range(4096), 1)
    assert 0 <= uniform.min() <= uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02
