"""The ridge memory on GPUs: what the tokens of a chunk tell each other, in Triton.

The sums before each chunk and their Cholesky factors are fp64, and batched by torch. In the coordinates of
the factor the condition is the root of what it was: there fp32 is enough, for chunks this short. A constant
ridge under a decay takes a factorisation a token, which torch's batched Cholesky does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import implements
from ..torch.ridge import prepare, whiten
from .launch import OPTIONS

# With a ridge of 1e-3 an error of 3e-6 in fp32, where chunks of 64 tokens have up to 3e-5.
CHUNK = 32
# fp32's digits on the tensor cores.
PRECISION = "tf32x3"


def chunk_launch(values: int) -> dict[str, int]:
    """Return the launch configuration for values of a size: the largest that compiles without spills."""
    columns = min(64, max(16, triton.next_power_of_2(values)))
    if columns == 32 and values % 16:  # with an address of its own for each entry
        columns = 16
    blocks = {"CHUNK": CHUNK, "BLOCK_KEYS": 16, "BLOCK_VALUES": columns}
    return {**blocks, "num_warps": 8, "num_stages": 1, **OPTIONS}


@triton.jit
def ridge_chunk_kernel(
    queries, keys, memory, values, diagonal, out, count, width, latent,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_VALUES: tl.constexpr,
):  # fmt: skip
    """O = Y N + tril(Y Aᵀ) E of one chunk and head, a block of columns a program.

    With L̃ D L̃ᵀ = diag(d) + X Xᵀ it is Y N + tril(Y Xᵀ L̃⁻ᵀ) D⁻¹ L̃⁻¹ (V − X N): the elimination of one token
    after the other from the system, from the rows V − X N and from the columns of Y Xᵀ.
    """
    blocks = tl.cdiv(latent, BLOCK_VALUES)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.arange(0, CHUNK)  # [CHUNK]
    c = (tl.program_id(0) % blocks) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)  # [BLOCK_VALUES]
    queries += n * count * width
    keys += n * count * width
    memory += n * width * latent
    place = n * count * latent + i[:, None] * latent + c[None, :]
    inside = (i < count)[:, None] & (c < latent)[None, :]

    rest = tl.load(values + place, mask=inside, other=0.0)
    own = tl.load(diagonal + n * count + i, mask=i < count, other=1.0)
    system = tl.where(i[:, None] == i[None, :], own[:, None], 0.0)
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    known = tl.zeros((CHUNK, BLOCK_VALUES), tl.float32)
    read = tl.zeros((CHUNK, BLOCK_VALUES), tl.float32)
    for start in range(0, width, BLOCK_KEYS):
        k = start + tl.arange(0, BLOCK_KEYS)  # [BLOCK_KEYS]
        row = i[:, None] * width + k[None, :]
        in_row = (i < count)[:, None] & (k < width)[None, :]
        y = tl.load(queries + row, mask=in_row, other=0.0)
        x = tl.load(keys + row, mask=in_row, other=0.0)
        m = tl.load(
            memory + k[:, None] * latent + c[None, :],
            mask=(k < width)[:, None] & (c < latent)[None, :],
            other=0.0,
        )
        turned = tl.trans(x.to(tl.float32))
        system = tl.dot(x, turned, system, input_precision=PRECISION)
        scores = tl.dot(y, turned, scores, input_precision=PRECISION)
        known = tl.dot(x, m, known, input_precision=PRECISION)
        read = tl.dot(y, m, read, input_precision=PRECISION)
    rest -= known

    for j in range(CHUNK):
        in_column = (i == j)[None, :]
        column = tl.sum(tl.where(in_column, system, 0.0), axis=1)  # [CHUNK], what j shares with each token
        share = 1.0 / tl.sum(tl.where(i == j, column, 0.0), axis=0)
        factor = tl.where(i > j, column * share, 0.0)
        error = tl.sum(tl.where((i == j)[:, None], rest, 0.0), axis=0)  # [BLOCK_VALUES]
        score = tl.sum(tl.where(in_column, scores, 0.0), axis=1)  # [CHUNK]
        read = tl.fma(tl.where(i >= j, score * share, 0.0)[:, None], error[None, :], read)
        rest = tl.fma(-factor[:, None], error[None, :], rest)
        scores = tl.fma(-score[:, None], factor[None, :], scores)
        system = tl.fma(-column[:, None], factor[None, :], system)
    tl.store(out + place, read, mask=inside)


def _declines(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    ridge: Tensor,
    gram: Tensor,
    cross: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    ridge_decays: bool,
) -> str | None:
    if torch.float64 in (q.dtype, k.dtype, v.dtype):
        return "leaves fp64 to the reference"
    if decay is not None and not ridge_decays:
        return "leaves a constant ridge under a decay to the library's batched Cholesky"
    return None


@implements("ridge_memory", "triton", _declines)
def ridge_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    ridge: Tensor,
    gram: Tensor,
    cross: Tensor,
    log_decay: Tensor,
    cu_seqlens: Tensor | None,
    ridge_decays: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = prepare(q, k, v, beta, decay, ridge, gram, cross, log_decay, cu_seqlens, ridge_decays, CHUNK)
    _, queries, keys, memory = whiten(p)
    values = p.v * p.beta.sqrt().unsqueeze(-1)
    diagonal = torch.ones_like(p.beta) if p.log_decay is None else p.log_decay.exp()
    inputs = [x.float().contiguous() for x in (queries, keys, memory, values, diagonal)]
    out = torch.empty_like(inputs[3])
    count, width, latent = p.k.shape[-2], p.k.shape[-1], p.v.shape[-1]
    launch = chunk_launch(latent)
    programs = p.beta[..., 0].numel() * triton.cdiv(latent, launch["BLOCK_VALUES"])
    with torch.cuda.device(q.device):
        ridge_chunk_kernel[(programs,)](*inputs, out, count, width, latent, PRECISION=PRECISION, **launch)
    return p.chunks.join(out).to(v.dtype), *p.after
