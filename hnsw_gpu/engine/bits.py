"""A bit for each of many: bit i & 31 of the uint32 word i >> 5."""

import numpy as np

from hnsw_gpu.engine.compiled import jit

ONE = np.uint32(1)


def pack_bits(mask):
    """uint32 words (..., words) of a bool mask (..., n)."""
    return bits_of_octets(np.packbits(mask, axis=-1, bitorder="little"), mask.shape[-1])


def bits_of_octets(octets, count):
    """Words (..., words) of the first `count` bits of uint8 (..., octets), packed little-endian."""
    words = np.zeros((*octets.shape[:-1], -(-count // 32) * 4), np.uint8)
    words[..., : -(-count // 8)] = octets[..., : -(-count // 8)]
    bits = words.view("<u4").astype(np.uint32, copy=False)
    if count & 31:
        bits[..., -1] &= (ONE << np.uint32(count & 31)) - ONE
    return bits


def unpack_bits(bits, count):
    """The bool mask (..., count) of words (..., words)."""
    octets = np.ascontiguousarray(bits, "<u4").view(np.uint8)
    return np.unpackbits(octets, axis=-1, count=count, bitorder="little").view(bool)


def are_on(bits, places):
    """bool (m,): whether the bits at places (m,) of words (words,) are set."""
    return (bits[places >> 5] >> (places & 31).astype(np.uint32) & ONE).astype(bool)


def places_on(bits, count):
    """int64 (m,): which of the first `count` bits of words (words,) are set."""
    words = np.flatnonzero(bits)
    if 4 * len(words) > len(bits):
        return np.flatnonzero(unpack_bits(bits, count))
    word, place = np.nonzero(unpack_bits(bits[words, None], 32))
    return 32 * words[word] + place


def count_on(bits):
    """int64 (...): how many bits of words (..., words) are set."""
    return np.bitwise_count(bits).sum(axis=-1, dtype=np.int64)


@jit(is_inlined=True)
def is_on(bits, place):
    """Is the bit at a place of words (words,) set?"""
    return bits[place >> 5] >> np.uint32(place & 31) & np.uint32(1) != 0


def with_bits(bits, places, is_on, count):
    """Words for `count` bits: those of `bits`, zero behind them, but `is_on` at places (m,)."""
    changed = np.zeros(-(-count // 32), np.uint32)
    changed[: len(bits)] = bits
    if 8 * len(places) > count:
        mask = unpack_bits(changed, count)
        mask[places] = is_on
        return pack_bits(mask)
    chosen = ONE << (places & 31).astype(np.uint32)
    if is_on:
        np.bitwise_or.at(changed, places >> 5, chosen)
    else:
        np.bitwise_and.at(changed, places >> 5, ~chosen)
    return changed
