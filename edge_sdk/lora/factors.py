"""Low-rank matrices as pairs of factors: B @ A, never formed; numpy only.

A stack of matrices, one for each expert, has factors with one more dimension in front, and one rank
for all: B (E, O, R) and A (E, R, I). Everything here counts dimensions from the end, so that a
stack needs no code of its own.

Legend: E experts, R rank, I inputs, O outputs, S sum of ranks, K least of S, I and O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

# Singular values below this share of the largest are float32 rounding and say nothing.
TOLERANCE = 1e-6
# Where large terms cancel, below this share of their size: their own rounding, a few bits of it.
ROUNDING = 2.0**-21


class Factors(NamedTuple):
    """The matrix `b_OR @ a_RI`, or one for each expert; any scale is already inside."""

    b_OR: Array
    a_RI: Array

    @property
    def rank(self) -> int:
        """Number of columns of B; the matrix has at most this rank."""
        return int(self.a_RI.shape[-2])

    def scaled(self, weight: float) -> Factors:
        """Return the same matrix times *weight*."""
        return Factors(self.b_OR * weight, self.a_RI)

    def dense(self) -> Array:
        """Return the matrix itself, (O, I) or (E, O, I); for tests and for small matrices."""
        return self.b_OR @ self.a_RI


def zero(*sizes: int) -> Factors:
    """Return the zero matrix of *sizes*, (O, I) or (E, O, I), of rank 0."""
    *stack, num_outputs, num_inputs = sizes
    b_OR = np.zeros((*stack, num_outputs, 0), np.float32)
    return Factors(b_OR, np.zeros((*stack, 0, num_inputs), np.float32))


def zero_like(term: Factors, rank: int = 0) -> Factors:
    """Return the zero matrix in the shape of *term*, with so many ranks."""
    b_OR = np.zeros((*term.b_OR.shape[:-1], rank), np.float32)
    *stack, _, num_inputs = term.a_RI.shape
    return Factors(b_OR, np.zeros((*stack, rank, num_inputs), np.float32))


def stack(terms: Sequence[Factors]) -> Factors:
    """Return the exact sum of *terms*, of rank S."""
    return Factors(
        np.concatenate([term.b_OR for term in terms], axis=-1),
        np.concatenate([term.a_RI for term in terms], axis=-2),
    )


def norm(term: Factors) -> float:
    """Return the Frobenius norm: |R_left R_right^T| of the two QR decompositions."""
    if term.rank == 0:
        return 0.0
    r_left_SS = np.asarray(np.linalg.qr(term.b_OR.astype(np.float64), mode="r"))
    r_right_SS = np.asarray(np.linalg.qr(_turned(term.a_RI.astype(np.float64)), mode="r"))
    return float(np.linalg.norm(r_left_SS @ _turned(r_right_SS)))


def compress(
    term: Factors,
    max_rank: int | None = None,
    tolerance: float = TOLERANCE,
    *,
    cancels: bool = False,
) -> tuple[Factors, float]:
    """Return *term* with as few ranks as it needs, and the relative error of what was cut.

    QR of both factors, SVD of the small product: O((O + I) S^2 + S^3), no (O, I) matrix while S is
    smaller than O and I. The left factor keeps the singular values' square root as the right one
    does, so that neither becomes tiny. Runs in float64 and returns float32. Of a stack, each matrix
    is compressed by itself, and all keep as many ranks as the one that needs most.

    Args:
        term: The matrix.
        max_rank: Keep at most this many singular values; None keeps all that matter.
        tolerance: Singular values below `tolerance` times the largest are dropped.
        cancels: The term is a stack whose terms may cancel: drop what is only their rounding, too.

    Returns:
        The compressed matrix and |dropped by max_rank|_F / |all|_F (0.0 without a cap).
    """
    if term.rank == 0:
        return term, 0.0
    left_OK, u_KK, sigma_K, vt_KK, right_KI = _decomposed(term)
    least = tolerance * float(sigma_K[..., 0].max())
    if cancels:
        least = max(least, _rounding_of(term))
    kept = int(np.count_nonzero(sigma_K > least, axis=-1).max())
    cut = kept if max_rank is None else min(kept, max_rank)
    total = float(np.sqrt(np.sum(sigma_K**2)))
    error = float(np.sqrt(np.sum(sigma_K[..., cut:kept] ** 2))) / total if total > 0 else 0.0
    root_R = np.sqrt(sigma_K[..., :cut])
    b_OR = _times(left_OK, u_KK[..., :cut]) * root_R[..., None, :]
    a_RI = root_R[..., :, None] * _times(vt_KK[..., :cut, :], right_KI)
    return Factors(b_OR.astype(np.float32), a_RI.astype(np.float32)), error


def condense(kept: Factors, added: Sequence[Factors], *, cancels: bool = False) -> Factors:
    """Return a sum that grows from round to round, in no more numbers than it needs.

    As `compress` without a cap, until *kept* has as many ranks as the matrix can have: what is
    added then seldom takes ranks away. The matrix itself beside an identity has as many numbers,
    and costs one product instead of a decomposition.

    Args:
        kept: The sum until now.
        added: What is added to it, of the same shape.
        cancels: What is added may cancel what is there: drop what is only their rounding.
    """
    term = stack([kept, *added])
    if kept.rank < _side(term):
        return compress(term, cancels=cancels)[0]
    return _whole(term, cancels=cancels)


def difference(first: Factors, second: Factors) -> Factors:
    """Return the first matrix less the second, in no more numbers than it needs.

    Where both together have as many ranks as the matrix can have, that is the matrix itself beside
    an identity, as of `condense`. Of terms that share ranks `compress` finds fewer, at more cost.
    """
    term = stack([first, second.scaled(-1.0)])
    if term.rank < _side(term):
        return compress(term, cancels=True)[0]
    return _whole(term, cancels=True)


def _side(term: Factors) -> int:
    return int(min(term.b_OR.shape[-2], term.a_RI.shape[-1]))


def _whole(term: Factors, *, cancels: bool) -> Factors:
    """Return the matrix itself and an identity; nothing where its terms have cancelled."""
    dense = (term.b_OR.astype(np.float64) @ term.a_RI.astype(np.float64)).astype(np.float32)
    if cancels and np.linalg.norm(dense) <= _rounding_of(term):
        return zero_like(term)
    side = _side(term)
    one = np.tile(np.eye(side, dtype=np.float32), (*dense.shape[:-2], 1, 1))
    return Factors(dense, one) if dense.shape[-1] == side else Factors(one, dense)


def leading(term: Factors, max_rank: int | None = None, tolerance: float = TOLERANCE) -> Factors:
    """Return the best approximation of *term*, a stack whose terms may cancel.

    As `compress`, but the left factor has columns of length 1 and the right one all of the singular
    values: each row of a right factor, and each number of a left one, then has a size of its own,
    as codecs by groups want it.

    Args:
        term: The matrix.
        max_rank: Keep at most this many singular values; None keeps all that matter.
        tolerance: Singular values below `tolerance` times the largest do not matter.
    """
    if term.rank == 0:
        return term
    left_OK, u_KK, sigma_K, vt_KK, right_KI = _decomposed(term)
    least = max(tolerance * float(sigma_K[..., 0].max()), _rounding_of(term))
    kept = int(np.count_nonzero(sigma_K > least, axis=-1).max())
    cut = kept if max_rank is None else min(kept, max_rank)
    b_OR = _times(left_OK, u_KK[..., :cut])
    a_RI = sigma_K[..., :cut, None] * _times(vt_KK[..., :cut, :], right_KI)
    return Factors(b_OR.astype(np.float32), a_RI.astype(np.float32))


def singular_values(term: Factors) -> Array:
    """Return the singular values, largest first, (K,) or (E, K); only rounding beyond the rank."""
    return _decomposed(term)[2]


def _rounding_of(term: Factors) -> float:
    """Return how large a singular value can be that is only the rounding of terms that cancel."""
    left_OS, right_SI = term.b_OR.astype(np.float64), term.a_RI.astype(np.float64)
    size_S = np.linalg.norm(left_OS, axis=-2) * np.linalg.norm(right_SI, axis=-1)
    return ROUNDING * float(np.linalg.norm(size_S))


def _decomposed(
    term: Factors,
) -> tuple[Array | None, Array, Array, Array, Array | None]:
    """Return (left, U, sigma, V^T, right) whose product is the matrix; None is the identity.

    A stack with more ranks than the matrix has rows or columns is larger than the matrix itself:
    then there is nothing to gain from QR.
    """
    b_OR, a_RI = term.b_OR.astype(np.float64), term.a_RI.astype(np.float64)
    if term.rank >= min(b_OR.shape[-2], a_RI.shape[-1]):
        return None, *_svd(b_OR @ a_RI), None
    q_left_OK, r_left_KK = np.linalg.qr(b_OR)
    q_right_IK, r_right_KK = np.linalg.qr(_turned(a_RI))
    return q_left_OK, *_svd(r_left_KK @ _turned(r_right_KK)), _turned(q_right_IK)


def _svd(matrix_OI: Array) -> tuple[Array, Array, Array]:
    """Return (U, sigma, V^T) of a matrix in float64.

    LAPACK's divide and conquer does not converge for some matrices of fewer ranks than columns,
    although all is finite (seen in OpenBLAS 0.3.31). The eigenvectors of the smaller Gram matrix
    then serve: what they get wrong lies below 1e-8 of the largest singular value.

    Raises:
        LinAlgError: the matrix is not finite.
    """
    try:
        return np.linalg.svd(matrix_OI, full_matrices=False)
    except np.linalg.LinAlgError:
        if not np.isfinite(matrix_OI).all():
            raise
    if matrix_OI.shape[-2] < matrix_OI.shape[-1]:
        u_IK, sigma_K, vt_KO = _svd_by_gram(_turned(matrix_OI))
        return _turned(vt_KO), sigma_K, _turned(u_IK)
    return _svd_by_gram(matrix_OI)


def _svd_by_gram(matrix_OK: Array) -> tuple[Array, Array, Array]:
    v_KK = np.linalg.eigh(_turned(matrix_OK) @ matrix_OK)[1][..., ::-1]
    scaled_OK = matrix_OK @ v_KK
    sigma_K = np.linalg.norm(scaled_OK, axis=-2)
    tiny = np.finfo(np.float64).tiny
    return scaled_OK / np.maximum(sigma_K, tiny)[..., None, :], sigma_K, _turned(v_KK)


def _turned(matrix: Array) -> Array:
    return np.swapaxes(matrix, -1, -2)


def _times(left: Array | None, right: Array | None) -> Array:
    assert left is not None or right is not None
    if left is None or right is None:
        return left if right is None else right  # type: ignore[return-value]
    product: Array = left @ right
    return product
