"""Parting blocks of pixels × channels × images into channels, in VMEM.

A sublane of a register is a *word* per image: one float32 channel of a pixel, or two neighbouring
bfloat16 channels. A load with a stride takes the same sublane of many registers, which is one or
two channels of many pixels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from convnext_jax.models.depthwise_pallas_tiles import SUBLANES


def channels_in_block(dtype: Any) -> int:
    """Channels that a grid step takes: 8 of float32, 16 of bfloat16."""
    return SUBLANES * 4 // jnp.dtype(dtype).itemsize


def word_type(dtype: Any) -> Any:
    """What words of such channels are held as."""
    return jnp.float32 if jnp.dtype(dtype).itemsize == 4 else jnp.uint32


def load_words(block_ref: Any, words_ref: Any) -> None:
    """Writes a block (P, channels, 128) as words (P · 8, 128)."""
    block = block_ref[...]
    if words_ref.dtype != block.dtype:
        block = pltpu.bitcast(block, words_ref.dtype)
    words_ref[...] = block.reshape(words_ref.shape)


def one_sublane(sublane: int, start: int, pixels: int) -> Any:
    """One sublane of all registers, of pixels from start on."""
    return pl.ds(start * SUBLANES + sublane, pixels, stride=SUBLANES)


def split(words: jax.Array, dtype: Any) -> list[jax.Array]:
    """The channels of words as float32, of which they may hold one or two."""
    if jnp.dtype(dtype).itemsize == 4:
        return [words]
    low, high = words << 16, words & jnp.uint32(0xFFFF0000)
    return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in (low, high)]


def join(channels: list[jax.Array]) -> jax.Array:
    """The inverse of `split`, rounding to bfloat16 where a word holds two channels."""
    if len(channels) == 1:
        return channels[0]
    low, high = (
        jax.lax.bitcast_convert_type(c.astype(jnp.bfloat16).astype(jnp.float32), jnp.uint32)
        for c in channels
    )
    return (low >> 16) | high
