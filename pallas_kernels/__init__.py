"""Speed: the GPU kernels of Native Sparse Attention. Imports jax and jaxtyping, never `nsa_jax`.

There is no kernel here yet; `nsa_jax.nsa_attention(implementation="pallas")` says so with a `NotImplementedError`.
"""
