"""Softmax cross-entropy on a GPU, forward and backward in one pass each, also of a vocabulary split over ranks.

With l the log of the sum of exponentials of a row's logits, its loss is ::

    l - (1 - label_smoothing) * logit of the label - label_smoothing * mean of the logits + z_loss * l^2

and 0 where the label is `ignored`, NaN where it names no class. Ranks that have some columns of the logits each make
partials, gather them, and merge them in the order of the ranks, so that all get the same bits.
"""

from __future__ import annotations

from typing import Any

from fivedp.kernels.cuda._extension import extension, raw, stream_of

__all__ = ["IGNORED", "cross_entropy", "cross_entropy_backward", "cross_entropy_merge", "cross_entropy_partials"]

Array = Any

# The label of rows that do not count, unless another is given.
IGNORED = -100


def cross_entropy(
    logits: Array,
    labels: Array,
    loss: Array,
    log_sum_exp: Array | None = None,
    *,
    ignored: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """The loss of every row.

    Parameters
    ----------
    logits : (rows, classes)
        float32, float64, bfloat16 or float16; contiguous along the classes.
    labels : int64 (rows,)
    loss : (rows,)
        Written, in the type of sums: float64 for float64, else float32.
    log_sum_exp : (rows,), optional
        Written for the backward, in the type of sums.
    ignored : int
        The label of rows that do not count.
    label_smoothing : float
        The share of the label's probability that is spread over all classes, 0 to 1.
    z_loss : float
        The weight of log_sum_exp^2.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    extension().cross_entropy_forward(
        raw(logits, "cross_entropy: logits"),
        labels,
        loss,
        log_sum_exp,
        None,
        0,
        logits.shape[-1],
        ignored,
        label_smoothing,
        z_loss,
        stream_of(logits),
    )


def cross_entropy_partials(logits: Array, labels: Array, partials: Array, *, first: int, vocabulary: int) -> None:
    """What one rank knows of every row, for `cross_entropy_merge`.

    Parameters
    ----------
    logits : (rows, classes_local)
        The classes first <= class < first + classes_local.
    labels : int64 (rows,)
        Of the whole vocabulary.
    partials : (4, rows)
        Written, in the type of sums: the largest logit; the sum of exp(logit - largest); the label's logit, 0 where
        another rank has it; the sum of the logits.
    first, vocabulary : int
        The rank's first class; how many classes there are in all.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    extension().cross_entropy_forward(
        raw(logits, "cross_entropy: logits"),
        labels,
        None,
        None,
        partials,
        first,
        vocabulary,
        IGNORED,
        0.0,
        0.0,
        stream_of(logits),
    )


def cross_entropy_merge(
    partials: Array,
    labels: Array,
    loss: Array,
    log_sum_exp: Array | None = None,
    *,
    vocabulary: int,
    ignored: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """The loss of every row from the partials of all ranks.

    Parameters
    ----------
    partials : (ranks, 4, rows)
        In the order of the ranks.
    labels, loss, log_sum_exp, ignored, label_smoothing, z_loss
        As in `cross_entropy`.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    extension().cross_entropy_merge(
        partials, labels, loss, log_sum_exp, vocabulary, ignored, label_smoothing, z_loss, stream_of(partials)
    )


def cross_entropy_backward(
    logits: Array,
    labels: Array,
    log_sum_exp: Array,
    d_loss: Array | None,
    d_logits: Array,
    *,
    scale: float = 1.0,
    first: int = 0,
    vocabulary: int | None = None,
    ignored: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """d_logits = scale * d_loss * the gradient of the loss.

    Parameters
    ----------
    logits : (rows, classes)
        All classes, or a rank's own.
    log_sum_exp : (rows,)
        Of all classes, as the forward or the merge wrote it.
    d_loss : (rows,), or None for ones
        In the type of sums.
    d_logits : (rows, classes)
        Written, in the type of logits; may be logits.
    scale : float
        One over the number of labels that count, for a mean.
    first, vocabulary : int
        Of a rank's own classes; by default logits has all.
    labels, ignored, label_smoothing, z_loss
        As in `cross_entropy`.

    Raises
    ------
    ValueError, TypeError
        Shapes or types that do not fit together.
    """
    extension().cross_entropy_backward(
        raw(logits, "cross_entropy: logits"),
        labels,
        log_sum_exp,
        d_loss,
        raw(d_logits, "cross_entropy: d_logits"),
        scale,
        first,
        logits.shape[-1] if vocabulary is None else vocabulary,
        ignored,
        label_smoothing,
        z_loss,
        stream_of(logits),
    )
