"""Reduces the rank of a product of two factors (Eckart and Young, 1936).

Only k x k matrices are decomposed, where k is the inner size of the product.  A QR decomposition of the tall
factors takes four times as long, and far longer on several threads while other programs run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating[Any]]


def truncated(a: Matrix, b: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """A [d_in, rank] and B [rank, d_out], float64, whose product is closest to a b in the Frobenius norm.

    A and B have the same scale; unused rank is zero.  With square roots of the Gram
    matrices, R_a^T R_a = a^T a and R_b^T R_b = b b^T, the singular values of a b are those of R_a R_b^T =
    U S V^T.  Its left vectors are a R_b^T V / S, its right ones b^T R_a^T U / S.

    Args:
        a, b: [d_in, k] and [k, d_out], finite.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    if a.shape[1] > max(len(a), b.shape[1]):  # the product is smaller than a Gram matrix
        a, b = a @ b, np.eye(b.shape[1])
    a, b = _balanced(a, b)
    root_a, root_b = _root(a.T @ a), _root(b @ b.T)
    left, values, right = np.linalg.svd(root_a @ root_b.T)
    kept = int(np.sum(values[:rank] > len(values) * np.finfo(np.float64).eps * values[0]))
    scale = 1 / np.sqrt(values[:kept])
    new_a, new_b = np.zeros((len(a), rank)), np.zeros((rank, b.shape[1]))
    new_a[:, :kept] = a @ (root_b.T @ right[:kept].T * scale)
    new_b[:kept] = (root_a.T @ left[:, :kept] * scale).T @ b
    return new_a, new_b


def _balanced(a: Matrix, b: Matrix) -> tuple[Matrix, Matrix]:
    """The same product, with each column of a as long as the matching row of b, or both zero."""
    length_a, length_b = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)
    both = (length_a > 0) & (length_b > 0)
    ratio = np.sqrt(np.divide(length_b, length_a, out=np.ones_like(length_a), where=both))
    return a * ratio * both, b * (both / ratio)[:, np.newaxis]


def _root(gram: Matrix) -> Matrix:
    """R with R^T R = gram; gram is positive semidefinite."""
    values, vectors = np.linalg.eigh(gram)
    root: Matrix = np.sqrt(np.maximum(values, 0))[:, np.newaxis] * vectors.T
    return root
