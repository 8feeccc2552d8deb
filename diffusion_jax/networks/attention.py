"""Softmax attention, computed in the way that is fastest where it runs.

    attention(q, k, v) = softmax(q k^T / sqrt(d)) v          (Vaswani et al. 2017, eq. 1)

Logits and the softmax's statistics are float32 whatever the arrays are.
"""

import jax
import jax.numpy as jnp

from diffusion_jax.errors import require
from diffusion_jax.types import Array


def attention(q: Array, k: Array, v: Array, implementation: str = "auto", mask: Array | None = None) -> Array:
    """Attention of q [B,T,heads,d] to k, v [B,S,heads,d]: [B,T,heads,d] in q's dtype.

    Args:
      q: queries.
      k: keys.
      v: values.
      implementation: a row of IMPLEMENTATIONS, or "auto": what `choose` says for the platform that this process runs
        on. cudnn and splash have no forward-mode derivative.
      mask: bool [B or 1,T,S], the keys that each query sees, at least one; all where None. splash has none.

    Raises:
      UserError: for a row that this platform does not have, or that does not take such arrays.
    """
    platform = jax.default_backend()
    if implementation == "auto":
        implementation = choose(platform, q, k, mask is not None)
    home = {"cudnn": "gpu", "splash": "tpu"}.get(implementation, platform)
    require(platform == home, "attention", implementation, f"is for a {home.upper()}, and this is a {platform.upper()}")
    if mask is None:
        return IMPLEMENTATIONS[implementation](q, k, v)
    require(implementation in MASKED, "attention", implementation, f"has no mask; take one of {', '.join(MASKED)}")
    return IMPLEMENTATIONS[implementation](q, k, v, mask)


def choose(platform: str, q: Array, k: Array, masked: bool = False) -> str:
    """The row of IMPLEMENTATIONS for q [B,T,heads,d], k [B,S,heads,d] on "cpu", "gpu" or "tpu".

    A single query, as a step of generation has, is not worth a kernel; cuDNN has no gradient under a mask whose sides
    are odd.
    """
    T, S, d = q.shape[1], k.shape[1], q.shape[3]
    if platform == "tpu" and min(T, S) >= 1024 and T % 128 == S % 128 == 0 and not masked:
        return "splash"
    odd = masked and (T % 2 or S % 2)
    if platform == "gpu" and q.dtype == jnp.bfloat16 and d % 8 == 0 and d <= 128 and T > 1 and not odd:
        return "cudnn"
    return "exact" if platform == "cpu" else "xla"


def exact(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Plain products: w v / sum(w) with w = exp((q k^T - max) / sqrt(d)). Every transformation accepts it.

    With the heads beside the batch, and T x d numbers divided rather than T x S, it is faster than `xla` on CPUs.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    logits = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    highest = largest(jax.lax.stop_gradient(logits))
    w = jnp.exp((logits - highest) * q.shape[-1] ** -0.5).astype(v.dtype)
    ones = jnp.ones((*v.shape[:-1], 1), v.dtype)
    y = jnp.einsum("bhts,bhsd->bhtd", w, jnp.concatenate([v, ones], -1), preferred_element_type=jnp.float32)
    return (y[..., :-1] / y[..., -1:]).astype(q.dtype).swapaxes(1, 2)


def largest(x: Array) -> Array:
    """[..., n] -> [..., 1]: the maximum of a row, by halves.

    The CPU's vector units compare two halves, but not the numbers of a row in turn: `exact` takes a quarter less time.
    """
    while x.shape[-1] % 2 == 0:
        a, b = jnp.split(x, 2, axis=-1)
        x = jnp.maximum(a, b)
    return jnp.max(x, axis=-1, keepdims=True)


def xla(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """JAX's own in plain products, for XLA to fuse."""
    with jax.numpy_dtype_promotion("standard"):  # it mixes bfloat16 and float32
        return jax.nn.dot_product_attention(q, k, v, mask=_over_heads(mask), implementation="xla")


def cudnn(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """Flash attention (Dao et al. 2022) of NVIDIA's cuDNN: bfloat16, d a multiple of 8; no T x S numbers are kept."""
    return jax.nn.dot_product_attention(q, k, v, mask=_over_heads(mask), implementation="cudnn")


def _over_heads(mask: Array | None) -> Array | None:
    return None if mask is None else mask[:, None]


def splash(q: Array, k: Array, v: Array, interpret: bool = False) -> Array:
    """Flash attention by JAX's Pallas kernel for TPUs: T and S multiples of 128.

    The kernel has no scale of its own: in bfloat16, q / sqrt(d) is rounded once more unless sqrt(d) is a power of 2.
    `interpret` runs the kernel's steps on any platform, slowly.
    """
    # Here, since importing Pallas takes longer than importing all of this package.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    T, S, heads, d = q.shape[1], k.shape[1], *q.shape[2:]
    rule = f"needs a number of tokens that 128 divides, and {T} and {S} are not"
    require(T % 128 == S % 128 == 0, "attention", "splash", rule)
    block_q, block_k = (next(size for size in (512, 256, 128) if n % size == 0) for n in (T, S))
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((T, S))] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
        interpret=interpret,
    )
    scaled = (q.astype(jnp.float32) * d**-0.5).astype(q.dtype)
    fill = [(0, 0), (0, 0), (0, 0), (0, -d % 128)]  # zeros, which add nothing to the products: TPUs work in 128s
    y = jax.vmap(kernel)(*(jnp.pad(x.swapaxes(1, 2), fill) for x in (scaled, k, v)))
    return y[..., :d].swapaxes(1, 2)


IMPLEMENTATIONS = {"exact": exact, "xla": xla, "cudnn": cudnn, "splash": splash}
MASKED = ("exact", "xla", "cudnn")
"""Those that take a mask."""


def check(implementation: str) -> None:
    """Raise a ValueError where `implementation` is neither "auto" nor a row of IMPLEMENTATIONS."""
    names = ("auto", *IMPLEMENTATIONS)
    if implementation not in names:
        raise ValueError(f"the implementation of attention must be one of {', '.join(names)}, not {implementation!r}")
