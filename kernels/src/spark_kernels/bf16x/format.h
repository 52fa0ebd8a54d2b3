// The bf16x format, shared by the host encoder and the kernels. README.md draws it.
//
// A matrix of n rows and k columns is cut into strips of 16 rows and tiles of 16 x 256 (the last tile
// of a strip holds what is left of k, in blocks of 64 columns). A bf16 value is s|eeeeeeee|mmmmmmm;
// with the row's base `lo` in a tile, n = e - lo in 0..15 makes it 12 bits: s n3..n0 m6..m0.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define BF16X_BOTH __host__ __device__
#else
#define BF16X_BOTH
#endif

namespace bf16x {

constexpr int kStripRows = 16;
constexpr int kBlockCols = 64;
constexpr int kBlocksPerTile = 4;
constexpr int kTileCols = kBlockCols * kBlocksPerTile;
constexpr int kHeaderBytes = 32;
constexpr int kBlockBytes = kStripRows * kBlockCols * 3 / 2;  // 1024 low bytes, then 512 of nibbles
constexpr int kTileBytes = kHeaderBytes + kBlocksPerTile * kBlockBytes;
constexpr int kInlineEscapes = 2;
constexpr int kMaxEscapes = 128;  // of 4096 weights; more, and the tile is stored plain

// One tile's header. An escape is position << 16 | bf16 bits; a position is block << 10 | lane << 5 |
// slot with lane = (row & 7) * 4 + column / 16 and slot = (row >> 3) * 16 + column % 16 in the block:
// the place of the weight in the tensor-core fragment. Escapes are ordered by position.
struct Header {
  uint8_t lo[kStripRows];
  uint16_t escapes;
  uint16_t plain;  // 1: `side` points to 16 x tile columns of bf16, row-major; the code is unused
  uint32_t side;   // offset into the side array, in 4-byte words, a multiple of 4
  uint32_t inlined[kInlineEscapes];  // the escapes when there are no more than these
};
static_assert(sizeof(Header) == kHeaderBytes, "the header is 32 bytes");

struct Shape {
  int n, k;
  BF16X_BOTH int strips() const { return (n + kStripRows - 1) / kStripRows; }
  BF16X_BOTH int blocks() const { return (k + kBlockCols - 1) / kBlockCols; }
  BF16X_BOTH int tiles() const { return (blocks() + kBlocksPerTile - 1) / kBlocksPerTile; }
  BF16X_BOTH int tile_blocks(int tile) const {
    int left = blocks() - tile * kBlocksPerTile;
    return left < kBlocksPerTile ? left : kBlocksPerTile;
  }
  BF16X_BOTH int64_t strip_bytes() const { return int64_t(tiles()) * kHeaderBytes + int64_t(blocks()) * kBlockBytes; }
};

}  // namespace bf16x
