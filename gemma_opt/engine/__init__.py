"""Everything that answers: queue, scheduler, packed weights, KV cache, forward, kernels, sampling. Its promise: `interface`."""
