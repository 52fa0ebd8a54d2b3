// The host encoder: plain loops over one tile, written so that the compiler vectorises them.
#include <algorithm>
#include <cstring>

#include "format.h"

using namespace bf16x;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BF16X_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define BF16X_CLONES
#endif

namespace {

struct Tile {
  alignas(64) uint16_t v[kStripRows][kTileCols];     // weights, padding as zeros
  alignas(64) uint8_t low[kStripRows][kTileCols];    // n0 m6..m0
  alignas(64) uint8_t high[kStripRows][kTileCols];   // s at bit 7, n3..n1 at bits 2..0
  uint8_t lo[kStripRows];
  uint32_t escapes[kMaxEscapes];
  int count;
  bool plain;
};

// The base of a row: 15 below the largest finite exponent, so that the window ends at the largest.
BF16X_CLONES int row_base(const uint16_t* v) {
  uint16_t largest = 0;
  for (int c = 0; c < kTileCols; ++c) {
    uint16_t e = (v[c] >> 7) & 0xff;
    uint16_t finite = e == 0xff ? uint16_t(0) : e;
    largest = finite > largest ? finite : largest;
  }
  return largest > 15 ? largest - 15 : 0;
}

// Codes one row and returns how many of its weights lie outside the window (padding included).
BF16X_CLONES int code_row(const uint16_t* v, int base, uint8_t* low, uint8_t* high) {
  uint16_t outside = 0;
  for (int c = 0; c < kTileCols; ++c) {
    uint16_t t = uint16_t((v[c] & 0x7fff) - (base << 7));  // n m, 11 bits when inside the window
    uint16_t in = t < 0x800 ? 0xffff : 0;
    outside += uint16_t(in + 1) & 1;
    t &= in;
    low[c] = uint8_t(t);
    high[c] = uint8_t((t >> 8) | ((v[c] & in) >> 8 & 0x80));
  }
  return outside;
}

int lane_of(int row, int col) { return (row & 7) * 4 + (col % kBlockCols) / 16; }
int slot_of(int row, int col) { return (row >> 3) * 16 + col % 16; }

void code_tile(const uint16_t* w, int64_t ld, int rows, int cols, Tile& t) {
  int escapes[kStripRows] = {}, total = 0;
  for (int r = 0; r < kStripRows; ++r) {
    int real = r < rows ? cols : 0;
    if (real) std::memcpy(t.v[r], w + r * ld, real * 2);
    std::memset(t.v[r] + real, 0, (kTileCols - real) * 2);
    int base = t.lo[r] = uint8_t(row_base(t.v[r]));
    int outside = code_row(t.v[r], base, t.low[r], t.high[r]);
    escapes[r] = outside - (base > 0 ? kTileCols - real : 0);  // padding is zeros, outside of any such window
    total += escapes[r];
  }
  t.plain = total > kMaxEscapes;
  t.count = 0;
  if (t.plain || total == 0) return;
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; escapes[r] && c < cols; ++c) {
      int e = t.v[r][c] >> 7 & 0xff;
      if (e < t.lo[r] || e > t.lo[r] + 15) {
        uint32_t position = c / kBlockCols << 10 | lane_of(r, c) << 5 | slot_of(r, c);
        t.escapes[t.count++] = position << 16 | t.v[r][c];
      }
    }
  }
  std::sort(t.escapes, t.escapes + t.count);
}

// Four weights of row g (a) and of row g + 8 (b) into the nibble word of one mma: its four registers
// read `word`, `word << 4`, `word << 8` and `word` rotated left by 12, each under 0x87008700.
inline uint32_t nibble_word(uint32_t a, uint32_t b) {
  uint32_t w0 = (a & 0x87u) << 8 | (a & 0x8700u) << 16;
  uint32_t w2 = (a >> 16 & 0x87u) | (a >> 8 & 0x870000u);
  uint32_t w1 = (b & 0x87u) << 4 | (b & 0x8700u) << 12;
  uint32_t w3 = (b >> 8 & 0x8700u) | (b & 0x87000000u);
  return w0 | w1 | w2 | (w3 >> 12 | w3 << 20);
}

BF16X_CLONES void write_blocks(const Tile& t, int blocks, uint8_t* out) {
  for (int b = 0; b < blocks; ++b, out += kBlockBytes) {
    for (int r = 0; r < kStripRows; ++r) std::memcpy(out + r * kBlockCols, t.low[r] + b * kBlockCols, kBlockCols);
    for (int g = 0; g < 8; ++g) {
      uint32_t upper[16], lower[16], words[16];
      std::memcpy(upper, t.high[g] + b * kBlockCols, 64);
      std::memcpy(lower, t.high[g + 8] + b * kBlockCols, 64);
      for (int i = 0; i < 16; ++i) words[i] = nibble_word(upper[i], lower[i]);
      std::memcpy(out + kStripRows * kBlockCols + g * 64, words, 64);
    }
  }
}

int64_t side_words(const Tile& t, int blocks) {
  if (t.plain) return int64_t(kStripRows) * blocks * kBlockCols / 2;
  return t.count > kInlineEscapes ? (t.count + 3) / 4 * 4 : 0;
}

}  // namespace

// Encodes strips [first, last) of `w` (n x k bf16, row stride ld elements) into `stream` (the whole
// matrix's) and appends to `side`. Returns the side words used from `side_at` on, or, when they would
// pass side_capacity, the negative of how many were needed up to there. stats: escapes, plain tiles.
extern "C" int64_t sk_bf16x_encode_host(const uint16_t* w, int n, int k, int64_t ld, int first, int last, uint8_t* stream,
                                        uint32_t* side, int64_t side_at, int64_t side_capacity, int64_t* stats) {
  Shape shape{n, k};
  static thread_local Tile t;
  int64_t used = side_at;
  for (int strip = first; strip < last; ++strip) {
    int rows = std::min(kStripRows, n - strip * kStripRows);
    uint8_t* out = stream + strip * shape.strip_bytes();
    for (int tile = 0; tile < shape.tiles(); ++tile) {
      int blocks = shape.tile_blocks(tile);
      int cols = std::min(blocks * kBlockCols, k - tile * kTileCols);
      code_tile(w + int64_t(strip) * kStripRows * ld + tile * kTileCols, ld, rows, cols, t);
      int64_t words = side_words(t, blocks);
      if (used + words > side_capacity) return -(used + words - side_at);
      Header h{};
      std::memcpy(h.lo, t.lo, sizeof h.lo);
      h.escapes = uint16_t(t.count);
      h.plain = t.plain;
      h.side = words ? uint32_t(used) : 0;
      if (t.count <= kInlineEscapes) std::copy(t.escapes, t.escapes + t.count, h.inlined);
      std::memcpy(out, &h, sizeof h);
      write_blocks(t, blocks, out + kHeaderBytes);
      if (t.plain) {
        for (int r = 0; r < kStripRows; ++r)
          std::memcpy(side + used + int64_t(r) * blocks * kBlockCols / 2, t.v[r], blocks * kBlockCols * 2);
      } else if (words) {
        std::fill(side + used, side + used + words, 0u);
        std::copy(t.escapes, t.escapes + t.count, side + used);
      }
      used += words;
      stats[0] += t.count;
      stats[1] += t.plain;
      out += kHeaderBytes + blocks * kBlockBytes;
    }
  }
  return used - side_at;
}
