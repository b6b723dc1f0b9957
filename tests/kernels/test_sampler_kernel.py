"""The kernel of the sampler ``chunks`` against its plain form."""

import torch

import clex.positions


def test_kernel_places_tokens_as_the_plain_sampler_does(device: str) -> None:
    from clex.kernels.positions_triton import chunks

    seeds = torch.tensor([0, 1, -5, 2**62 + 12345, 7], dtype=torch.int64)
    for n, span in ((3, 3.0), (1500, 1500.0), (1500, 60_000.0)):
        spans = torch.full((5,), span, dtype=torch.float64)
        wanted = clex.positions.chunks(n, spans, seeds, n, int(span))
        most = clex.positions.MAX_CHUNKS
        assert torch.equal(chunks(n, spans.to(device), seeds.to(device), most).cpu(), wanted)
