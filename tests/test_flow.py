"""The pure mathematics: path, loss, samplers, randomness."""

import pytest
import torch

from acestep_lora import flow
from acestep_lora.randomness import generator, key
from acestep_lora.timesteps import Discrete, LogitNormal, Mixture, Uniform, schedule


def test_velocity_leads_from_noise_to_data():
    data, noise = torch.randn(3, 5, 2), torch.randn(3, 5, 2)
    t = torch.tensor([1.0, 0.5, 0.0])
    x = flow.noisy(data, noise, t)
    torch.testing.assert_close(x[0], noise[0])
    torch.testing.assert_close(x[2], data[2])
    v = flow.velocity(data, noise)
    torch.testing.assert_close(flow.euler_step(x[:1], v[:1], 1.0, 0.0), data[:1])
    half = flow.euler_step(noise, v, 1.0, 0.5)
    torch.testing.assert_close(half, flow.noisy(data, noise, torch.full((3,), 0.5)))


def test_loss_counts_every_item_once_and_no_padding():
    prediction, target = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    target[0, 2:] = 1e6
    torch.testing.assert_close(flow.item_losses(prediction, target, torch.tensor([2, 4])), torch.ones(2))


def test_logit_normal_is_the_larger_of_two_draws():
    torch.manual_seed(0)
    draws = torch.sigmoid(-0.4 + torch.randn(2, 400_000)).amax(0)
    ours = LogitNormal()(torch.rand(400_000))
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95, 0.99])
    torch.testing.assert_close(ours[:200_000].quantile(levels), draws[:200_000].quantile(levels), atol=4e-3, rtol=0)
    published = torch.tensor([0.239, 0.402, 0.537, 0.671, 0.827, 0.898])  # upstream's sampler, 200k draws
    torch.testing.assert_close(ours[:200_000].quantile(levels), published, atol=4e-3, rtol=0)


def test_discrete_is_the_turbo_table():
    table = [1.0, 0.9545454545, 0.9, 0.8333333333, 0.75, 0.6428571429, 0.5, 0.3]
    torch.testing.assert_close(schedule(8, 3.0), torch.tensor(table))
    torch.testing.assert_close(Discrete()((torch.arange(8) + 0.5) / 8), torch.tensor(table))
    assert Discrete()(torch.tensor([1.0])).item() == pytest.approx(0.3)


def test_mixture_takes_each_component_by_its_weight():
    t = Mixture([Uniform(0, 0.5), Uniform(0.9, 1.0)], [3, 1])(torch.rand(100_000))
    assert (t > 0.8).float().mean() == pytest.approx(0.25, abs=0.01)
    assert ((t <= 0.5) | (t >= 0.9)).all()
    assert t[t < 0.6].mean() == pytest.approx(0.25, abs=0.01)
    with pytest.raises(ValueError, match=r"got \[1\]"):
        Mixture([Uniform(), Uniform()], [1])


@pytest.mark.parametrize("sampler", [LogitNormal(), Uniform(), Mixture([LogitNormal(), Uniform()], [1, 1])])
def test_stratified_numbers_give_stratified_timesteps(sampler):
    """One uniform number per n-th of [0, 1): the variance of the mean timestep falls far below independent draws'."""
    torch.manual_seed(0)
    independent = sampler(torch.rand(4000)).view(-1, 8).mean(1).var()
    stratified = sampler(((torch.arange(8) + torch.rand(500, 8)) / 8).flatten()).view(-1, 8).mean(1).var()
    assert stratified < independent / 5


def test_randomness_depends_on_names_alone():
    first = torch.rand(3, generator=generator(1, "noise", "a"))
    torch.rand(100)
    assert torch.equal(first, torch.rand(3, generator=generator(1, "noise", "a")))
    assert not torch.equal(first, torch.rand(3, generator=generator(1, "noise", "b")))
    assert key(42, "noise", 0, 3, "音楽/曲.mp3") == key(42, "noise", 0, 3, "音楽/曲.mp3") < 2**63
