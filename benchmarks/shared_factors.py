"""RaSA's best factors of given matrices, by alternating least squares.

    minimise  sum_i || M_i - B_S diag(d_i) A_S - B_i A_i ||^2      over all factors

M is (L, N, K): L matrices of one shape. Weights are stored (rank, features), as in the package, so
B_S is Bt_shared.T. Given the private factors, the shared ones are a CP decomposition of the tensor
M - B_i A_i, in which each factor has small normal equations (Rs, Rs) when the others are held.
Given the shared ones, B_i A_i is the truncated SVD of what they leave; one block power iteration
from the last sweep's factors goes there. No part of a sweep can raise the error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rasa_ext

# Of the mean diagonal of the normal equations: keeps a step finite where columns are nearly equal.
PROXIMITY = 1e-6


@dataclass
class Factors:
    """A (L, Rp, K), Bt (L, Rp, N), A_shared (Rs, K), Bt_shared (Rs, N), d (L, Rs)."""

    A: Tensor
    Bt: Tensor
    A_shared: Tensor
    Bt_shared: Tensor
    d: Tensor

    def private(self) -> Tensor:
        """Return B_i A_i of all layers, (L, N, K)."""
        return self.Bt.mT @ self.A

    def shared(self) -> Tensor:
        """Return B_S diag(d_i) A_S of all layers, (L, N, K)."""
        return (self.Bt_shared.T * self.d[:, None, :]) @ self.A_shared


def squared(x: Tensor) -> float:
    """Return the sum of squares, in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64) ** 2)


def lora_optimum(M: Tensor, r: int) -> Factors:
    """Return the truncated SVD of every matrix, largest singular value first, without a pool.

    By Eckart and Young, no LoRA of rank r has a smaller error.
    """
    # Eigenvectors of the smaller Gram matrix: a fraction of the whole SVD's work.
    wide = M.shape[1] <= M.shape[2]
    X = (M if wide else M.mT).double()
    U = torch.linalg.eigh(X @ X.mT).eigenvectors[..., -r:].flip(-1)
    V = (U.mT @ X).to(M.dtype)  # (L, r, larger side)
    U = U.mT.to(M.dtype).contiguous()
    A, Bt = (V, U) if wide else (U, V)
    L, N, K = M.shape
    return Factors(A, Bt, M.new_empty(0, K), M.new_empty(0, N), M.new_empty(L, 0))


def from_lora(lora: Factors, k: int) -> Factors:
    """Return RaSA's factors of the same approximation: the weakest k ranks of each layer pooled.

    The pool's ranks l*k ... (l + 1)*k - 1 are layer l's, which its gates select. So RaSA starts at
    LoRA's optimum, and its own can't be worse: the theorem of the paper.
    """
    L, r, K = lora.A.shape
    cut = r - k
    return Factors(
        lora.A[:, :cut].clone(),
        lora.Bt[:, :cut].clone(),
        lora.A[:, cut:].reshape(L * k, K),
        lora.Bt[:, cut:].reshape(L * k, lora.Bt.shape[2]),
        torch.eye(L, dtype=lora.A.dtype).repeat_interleave(k, dim=1),
    )


def at_random(M: Tensor, r: int, k: int, seed: int = 0) -> Factors:
    """Return a random start: normal shared factors and gates, private factors without effect."""
    L, N, K = M.shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(M.dtype)

    A, Rs = normal(L, r - k, K), L * k
    return Factors(A, M.new_zeros(L, r - k, N), normal(Rs, K), normal(Rs, N), normal(L, Rs))


def sweeps(M: Tensor, f: Factors, count: int) -> Iterator[float]:
    """Improve f in place and yield the error after each of `count` sweeps."""
    for _ in range(count):
        if f.d.shape[1] > 0:
            _update_shared(M - f.private(), f)
        left = M - f.shared()
        if f.A.shape[1] > 0:
            _update_private(left, f)
        yield squared(left - f.private())


def _update_shared(left: Tensor, f: Factors) -> None:
    """Solve for Bt_shared, A_shared and d in turn; left (L, N, K) is what they approximate."""
    gates = f.d.T @ f.d
    rhs = ((left @ f.A_shared.T) * f.d[:, None, :]).sum(0).T
    f.Bt_shared = _solve((f.A_shared @ f.A_shared.T) * gates, rhs, f.Bt_shared)
    projected = f.Bt_shared @ left  # (L, Rs, K)
    rhs = (projected * f.d[:, :, None]).sum(0)
    f.A_shared = _solve((f.Bt_shared @ f.Bt_shared.T) * gates, rhs, f.A_shared)
    rhs = (projected * f.A_shared).sum(2).T
    products = (f.Bt_shared @ f.Bt_shared.T) * (f.A_shared @ f.A_shared.T)
    f.d = _solve(products, rhs, f.d.T).T.contiguous()
    # A rank's scale may lie in any factor. In d, the normal equations stay well scaled.
    for name in ("A_shared", "Bt_shared"):
        weight = getattr(f, name)
        norms = weight.norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
        setattr(f, name, weight / norms[:, None])
        f.d *= norms


def _solve(normal: Tensor, rhs: Tensor, old: Tensor) -> Tensor:
    """Return X that minimises the quadratic with these normal equations, held near `old`.

    The proximal term keeps the step defined, and the error from rising, when `normal` is singular.
    """
    normal = normal.double()
    weight = PROXIMITY * normal.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    system = normal + weight * torch.eye(len(normal), dtype=torch.float64)
    solution = torch.linalg.solve(system, rhs.double() + weight * old.double())
    return solution.to(old.dtype).contiguous()  # solve() returns columns


def _update_private(left: Tensor, f: Factors) -> None:
    """Go one block power iteration towards the truncated SVD of `left`."""
    Q = torch.linalg.qr(f.A.mT).Q  # (L, K, Rp): the best B for this row space is left @ Q
    Q = torch.linalg.qr(left @ Q).Q  # (L, N, Rp): and the best A for this column space Q.T @ left
    f.A, f.Bt = Q.mT @ left, Q.mT.contiguous()


def residual_layers(M: Tensor, f: Factors) -> nn.ModuleList:
    """Return RaSA layers with base weights M_i whose updates are the negated approximations.

    merge() turns the base weights into the residuals M_i - B_S diag(d_i) A_S - B_i A_i.
    """
    L, N, K = M.shape
    Rp, k = f.A.shape[1], len(f.A_shared) // L
    pool = None
    if k > 0:
        pool = rasa_ext.SharedPool(K, N, k, L, dtype=M.dtype)
        pool.A_shared.data, pool.Bt_shared.data = f.A_shared, -f.Bt_shared
    layers = nn.ModuleList()
    for i in range(L):
        base = nn.Linear(K, N, bias=False, device="meta")
        base.weight = nn.Parameter(M[i].clone())
        r = Rp + k
        layer = rasa_ext.RaSALinear(base, pool, r, k, alpha=r)  # k = 0: d = alpha / r = 1
        layer.A.data, layer.Bt.data = f.A[i], -f.Bt[i]
        if k > 0:
            layer.d.data = torch.cat([f.d[i], f.d.new_ones(Rp)])
        layers.append(layer)
    return layers


def library_error(M: Tensor, f: Factors) -> float:
    """Return the error as the package's layers have it, merged in one grouped launch."""
    layers = residual_layers(M, f)
    rasa_ext.merge(layers)
    return sum(squared(layer.base_layer.weight.detach()) for layer in layers)
