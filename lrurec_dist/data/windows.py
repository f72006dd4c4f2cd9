"""Where training parts are cut into windows: functions of their lengths alone.

A window is given by the places of its targets, begin..end-1; a target's input is the place before it.
"""

import numpy as np


def cut_windows(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training windows as the paper cuts them: (sequence, begin, end) with targets begin..end-1.

    A sequence shorter than 2 * max_length gives one window, its last max_length interactions. A
    longer one is cut from its end in steps of max_length; what is left at its start, fewer than
    max_length interactions, is no target (`untrained_targets` counts it).
    """
    cuts = np.where(lengths < 2 * max_length, np.minimum(lengths, 1), lengths // max_length)
    sequence = np.repeat(np.arange(len(lengths)), cuts)
    nth_from_end = np.arange(len(sequence)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    end = lengths[sequence] - nth_from_end * max_length
    return sequence, np.maximum(end - max_length, 0), end


def slide_windows(lengths: np.ndarray, max_length: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Overlapping windows that leave no target out: (sequence, end, targets), targets end-targets..end-1.

    Windows end at a sequence's end and every `stride` before it, and each predicts its last
    `stride` positions from a full window of max_length; the earliest, that has no more than
    max_length before its end, predicts all it has. So every interaction is a target exactly once,
    and all but the earliest max_length of a sequence are predicted from at least max_length - stride.
    """
    cuts = np.where(lengths <= max_length, np.minimum(lengths, 1), 1 - (max_length - lengths) // stride)
    sequence = np.repeat(np.arange(len(lengths)), cuts)
    nth_from_end = np.arange(len(sequence)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    end = lengths[sequence] - nth_from_end * stride
    return sequence, end, np.where(end <= max_length, end, stride)


def chain_windows(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows that follow each other: (sequence, begin, end) with targets begin..end-1.

    Cut from a sequence's start in steps of max_length; the last has what is left. Windows of a
    sequence come one after the other, so that each can go on from the state the one before left.
    """
    cuts = -(-lengths // max_length)
    sequence = np.repeat(np.arange(len(lengths)), cuts)
    begin = (np.arange(len(sequence)) - np.repeat(np.cumsum(cuts) - cuts, cuts)) * max_length
    return sequence, begin, np.minimum(begin + max_length, lengths[sequence])
