"""What bf16x must produce, in NumPy: the format written out plainly, without a thought for speed."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

STRIP_ROWS = 16
BLOCK_COLS = 64
TILE_COLS = 256
HEADER_BYTES = 32
BLOCK_BYTES = 1536
INLINE_ESCAPES = 2
MAX_ESCAPES = 128
WINDOW = 15  # a base and the 15 exponents above it
NOT_FINITE = 0xFF
ROTATED = 3  # the mma register whose nibbles are rotated, not shifted, into place

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Shape:
    """The layout's sizes for a matrix of ``n`` rows and ``k`` columns."""

    n: int
    k: int

    @property
    def strips(self) -> int:
        """Groups of 16 rows."""
        return -(-self.n // STRIP_ROWS)

    @property
    def blocks(self) -> int:
        """Blocks of 64 columns."""
        return -(-self.k // BLOCK_COLS)

    @property
    def tiles(self) -> int:
        """Tiles of up to 256 columns in a strip."""
        return -(-self.k // TILE_COLS)

    @property
    def strip_bytes(self) -> int:
        """Bytes of one strip in the stream."""
        return self.tiles * HEADER_BYTES + self.blocks * BLOCK_BYTES

    @property
    def stream_bytes(self) -> int:
        """Bytes of the whole stream: 12 bits a weight and 32 bytes a tile."""
        return self.strips * self.strip_bytes

    def tile_blocks(self, tile: int) -> int:
        """Blocks in one tile: 4, or what is left in the last."""
        return min(4, self.blocks - 4 * tile)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A coded matrix: ``stream`` of fixed-size tiles, ``side`` of long escape lists, plain tiles."""

    shape: Shape
    stream: U8
    side: U32
    escapes: int
    plain_tiles: int


def _nibble_words(high: U8) -> U32:
    """Pack a block's (16, 64) nibbles (s at bit 7, n3..n1 at bits 2..0) into (8, 16) words.

    Register i of an mma holds row g (i even) or g + 8 (odd), columns 0-1 (i < 2) or 2-3 of the
    four that the mma takes; it finds its two nibbles under the mask 0x87008700 after the word is
    shifted left by 4 i (i < 3) or rotated left by 12 (i = 3).
    """
    words = np.zeros((8, 16), np.uint32)
    for i in range(4):
        rows = high[8 * (i % 2) : 8 * (i % 2) + 8].astype(np.uint32)
        first = rows[:, 2 * (i // 2) :: 4]
        second = rows[:, 2 * (i // 2) + 1 :: 4]
        register = (first << 8) | (second << 24)
        words |= register >> (4 * i) if i < ROTATED else (register >> 12) | (register << 20)
    return words


def encode(weight: U16, *, force_plain: bool = False) -> Encoded:
    """Encode an (n, k) matrix of bf16 bit patterns.

    A row's base in a tile is 15 below its largest finite exponent (0 at least): the window holds
    the 16 largest exponents, what lies outside is an escape, and a tile with more than 128 of
    those is stored plain.
    """
    n, k = weight.shape
    shape = Shape(n, k)
    padded = np.zeros((shape.strips * STRIP_ROWS, shape.blocks * BLOCK_COLS), np.uint16)
    padded[:n, :k] = weight
    real = np.zeros(padded.shape, np.bool_)
    real[:n, :k] = True
    stream = bytearray()
    side: list[U32] = []
    side_at = total = plain_tiles = 0
    for strip in range(shape.strips):
        rows = slice(strip * STRIP_ROWS, (strip + 1) * STRIP_ROWS)
        for index in range(shape.tiles):
            blocks = shape.tile_blocks(index)
            cols = slice(index * TILE_COLS, index * TILE_COLS + blocks * BLOCK_COLS)
            tile, inside = padded[rows, cols], real[rows, cols]
            exponent = (tile >> 7) & 0xFF
            largest = np.where(exponent == NOT_FINITE, 0, exponent).max(axis=1)
            base = np.maximum(largest.astype(np.int32) - WINDOW, 0)
            offset = exponent.astype(np.int32) - base[:, None]
            coded = (offset >= 0) & (offset <= WINDOW)
            escape_at = np.argwhere(~coded & inside)
            entries = sorted(
                ((c // 64) << 10 | ((r & 7) * 4 + c % 64 // 16) << 5 | ((r >> 3) * 16 + c % 16))
                << 16
                | int(tile[r, c])
                for r, c in escape_at.tolist()
            )
            plain = force_plain or len(entries) > MAX_ESCAPES
            kept = [] if plain else entries
            total += len(kept)
            plain_tiles += plain
            words = np.zeros(0, np.uint32)
            if plain:
                words = np.ascontiguousarray(tile).view(np.uint32).ravel()
            elif len(kept) > INLINE_ESCAPES:
                words = np.array(kept + [0] * (-len(kept) % 4), np.uint32)
            inlined = kept if len(kept) <= INLINE_ESCAPES else []
            meta = [len(kept) | plain << 16, side_at if words.size else 0]
            stream += base.astype(np.uint8).tobytes()
            stream += np.array([*meta, *inlined, *[0] * (2 - len(inlined))], np.uint32).tobytes()
            code = np.where(coded, (offset << 7) | (tile & 0x7F), 0)
            low = (code & 0xFF).astype(np.uint8)
            high = ((code >> 8) | np.where(coded, tile >> 8 & 0x80, 0)).astype(np.uint8)
            for b in range(blocks):
                part = slice(b * BLOCK_COLS, (b + 1) * BLOCK_COLS)
                stream += low[:, part].tobytes() + _nibble_words(high[:, part]).tobytes()
            side.append(words)
            side_at += words.size
    return Encoded(
        shape,
        np.frombuffer(bytes(stream), np.uint8),
        np.concatenate(side) if side else np.zeros(0, np.uint32),
        total,
        plain_tiles,
    )


def decode(encoded: Encoded) -> U16:
    """Return the (n, k) bf16 bit patterns that were encoded."""
    shape = encoded.shape
    out = np.zeros((shape.strips * STRIP_ROWS, shape.blocks * BLOCK_COLS), np.uint16)
    at = 0
    for strip in range(shape.strips):
        for index in range(shape.tiles):
            blocks = shape.tile_blocks(index)
            head = encoded.stream[at : at + HEADER_BYTES]
            meta, side_at, *inlined = head[16:].view(np.uint32).tolist()
            count, plain = meta & 0xFFFF, meta >> 16
            tile = np.zeros((STRIP_ROWS, blocks * BLOCK_COLS), np.uint16)
            base = head[:16].astype(np.uint16)[:, None]
            for b in range(blocks):
                start = at + HEADER_BYTES + b * BLOCK_BYTES
                block = encoded.stream[start : start + BLOCK_BYTES]
                low = block[:1024].reshape(16, 64).astype(np.uint16)
                words = block[1024:].view(np.uint32).reshape(8, 16)
                high = np.zeros((16, 64), np.uint16)
                for i in range(4):
                    moved = words << (4 * i) if i < ROTATED else (words << 12) | (words >> 20)
                    rows = slice(8 * (i % 2), 8 * (i % 2) + 8)
                    high[rows, 2 * (i // 2) :: 4] = moved & 0x8700
                    high[rows, 2 * (i // 2) + 1 :: 4] = moved >> 16 & 0x8700
                tile[:, b * 64 : b * 64 + 64] = (low | high) + (base << 7)
            if plain:
                raw = encoded.side[side_at : side_at + tile.size // 2]
                tile = raw.view(np.uint16).reshape(tile.shape)
            else:
                listed = encoded.side[side_at : side_at + count].tolist()
                for entry in listed if count > INLINE_ESCAPES else inlined[:count]:
                    position = entry >> 16
                    lane, slot = position >> 5 & 31, position & 31
                    row = (lane >> 2) + 8 * (slot >> 4)
                    tile[row, (position >> 10) * 64 + (lane & 3) * 16 + slot % 16] = entry & 0xFFFF
            rows = slice(strip * STRIP_ROWS, (strip + 1) * STRIP_ROWS)
            out[rows, index * TILE_COLS : index * TILE_COLS + tile.shape[1]] = tile
            at += HEADER_BYTES + blocks * BLOCK_BYTES
    return out[: shape.n, : shape.k]


def to_float64(bits: U16) -> npt.NDArray[np.float64]:
    """Return the values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def linear(x: U16, weight: U16, bias: U16 | None = None) -> npt.NDArray[np.float64]:
    """Return ``x @ weight.T + bias`` in float64: x is (m, k), weight (n, k), all bf16 patterns."""
    out = to_float64(x) @ to_float64(weight).T
    return out if bias is None else out + to_float64(bias)
