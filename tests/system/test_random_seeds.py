import torch

from segkit.system.random_seeds import seed_generators


def test_a_seed_gives_the_numbers_of_torch_manual_seed() -> None:
    torch.manual_seed(7)
    expected = torch.randn(5)
    with torch.random.fork_rng():
        seed_generators(7, torch.device("cpu"))
        assert torch.equal(torch.randn(5), expected)
