// bf16x on the device: the linear layer for decode, the encoder and the decoder of whole strips.
//
// Linear: y[m][n] = sum_k x[m][k] w[n][k], weights as operand A of mma.m16n8k16 (16 rows of n), tokens
// as its 8 columns. The K columns of a 64-column block are dealt to the fragments so that a lane's 16
// weights of a row, and its 16 activations, are consecutive in memory: lane (g, q) owns columns
// 16q..16q+15 and mma j takes 4j..4j+3 of them. The same permutation on both operands leaves the sum.
//
// Weights stream through a ring of tiles in shared memory, one ring a warp (cp.async.bulk + mbarrier):
// no block-wide barrier in the loop, and bytes in flight do not cost registers.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "../device.cuh"
#include "format.h"

using namespace bf16x;
using namespace spark_kernels;

namespace {

constexpr int kMaxTokens = 32;
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A block's 32 weights of this lane as 16 packed pairs: a[4j + i] is register i of mma j.
__device__ __forceinline__ void decode_block(const uint8_t* block, int lane, uint32_t lo0, uint32_t lo1, uint32_t (&a)[16]) {
  constexpr uint32_t kHigh = 0x87008700u;
  uint4 upper = *reinterpret_cast<const uint4*>(block + lane * 16);
  uint4 lower = *reinterpret_cast<const uint4*>(block + 512 + lane * 16);
  uint4 nibbles = *reinterpret_cast<const uint4*>(block + 1024 + lane * 16);
  const uint32_t u[4] = {upper.x, upper.y, upper.z, upper.w};
  const uint32_t l[4] = {lower.x, lower.y, lower.z, lower.w};
  const uint32_t e[4] = {nibbles.x, nibbles.y, nibbles.z, nibbles.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    a[4 * j + 0] = (__byte_perm(u[j], 0, 0x4140) | (e[j] & kHigh)) + lo0;
    a[4 * j + 1] = (__byte_perm(l[j], 0, 0x4140) | ((e[j] << 4) & kHigh)) + lo1;
    a[4 * j + 2] = (__byte_perm(u[j], 0, 0x4342) | ((e[j] << 8) & kHigh)) + lo0;
    a[4 * j + 3] = (__byte_perm(l[j], 0, 0x4342) | (__funnelshift_l(e[j], e[j], 12) & kHigh)) + lo1;
  }
}

// Puts an escape's 16 bits into its place; registers cannot be indexed, so all 16 are compared.
__device__ __forceinline__ void patch(uint32_t entry, int lane, uint32_t (&a)[16]) {
  int position = entry >> 16, slot = position & 31;
  if (((position >> 5) & 31) != lane) return;
  int at = ((slot >> 2) & 3) * 4 + ((slot >> 1) & 1) * 2 + (slot >> 4);
  uint32_t selector = (slot & 1) ? 0x5410u : 0x3254u;  // entry's low half into the high or low half
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (i == at) a[i] = __byte_perm(a[i], entry, selector);
}

struct TileView {  // what a lane needs of a tile's header
  uint32_t lo0, lo1, escapes, plain, side, inlined0, inlined1;
  __device__ __forceinline__ TileView(const uint8_t* tile, int lane) {
    uint4 meta = *reinterpret_cast<const uint4*>(tile + kStripRows);
    lo0 = uint32_t(tile[lane >> 2]) * 0x00800080u;
    lo1 = uint32_t(tile[(lane >> 2) + 8]) * 0x00800080u;
    escapes = meta.x & 0xffff, plain = meta.x >> 16, side = meta.y, inlined0 = meta.z, inlined1 = meta.w;
  }
};

// The exact weights of one block of any tile: plain, or coded with escapes.
__device__ __forceinline__ void load_any_block(const TileView& view, const uint8_t* tile, const uint32_t* __restrict__ side, int block,
                                               int blocks, int lane, uint32_t (&a)[16]) {
  if (view.plain) {
    const int stride = blocks * (kBlockCols / 2);
    const uint32_t* rows = side + view.side + (lane >> 2) * stride + block * (kBlockCols / 2) + (lane & 3) * 8;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[4 * j + i] = __ldg(rows + (i & 1) * 8 * stride + 2 * j + (i >> 1));
    return;
  }
  decode_block(tile + kHeaderBytes + block * kBlockBytes, lane, view.lo0, view.lo1, a);
  for (uint32_t i = 0; i < view.escapes; ++i) {
    uint32_t entry = view.escapes > kInlineEscapes ? __ldg(side + view.side + i) : i ? view.inlined1 : view.inlined0;
    if (int(entry >> 26) == block) patch(entry, lane, a);
  }
}

struct LinearArgs {
  const uint8_t* stream;
  const uint32_t* side;
  const __nv_bfloat16* x;
  const __nv_bfloat16* bias;
  __nv_bfloat16* out;
  float* partial;      // [parts][strips][tokens][16], read when parts > 1
  unsigned* arrivals;  // [strips], zero before and after
  int64_t ldx, ldo;
  int m, parts, stages;
  Shape shape;
};

// Walks this warp's tiles: units first + warp, first + warp + warps, ... below last, each a part of a strip.
struct Walk {
  int unit, last, step, strip, tile, end;
  __device__ __forceinline__ void open(const LinearArgs& p, int strips, int tiles) {
    if (unit >= last) return;
    int part = unit / strips;
    strip = unit - part * strips;
    tile = int(int64_t(part) * tiles / p.parts);
    end = int(int64_t(part + 1) * tiles / p.parts);
  }
  __device__ __forceinline__ void next(const LinearArgs& p, int strips, int tiles) {
    if (++tile < end) return;
    unit += step;
    open(p, strips, tiles);
  }
};

__device__ __forceinline__ void store(const LinearArgs& p, int token, int row, float value) {
  if (p.bias) value += __bfloat162float(p.bias[row]);
  p.out[token * p.ldo + row] = __float2bfloat16_rn(value);
}

// Where this lane's activations are: token 8t + g of each group, from column 16q on. Tokens past m
// repeat the last: their sums are never stored, and a clamped address needs no predicate.
template <int kGroups>
struct Tokens {
  const __nv_bfloat16* token[kGroups];
};

template <int kGroups>
__device__ __forceinline__ void load_tokens(const Tokens<kGroups>& rows, int k, uint32_t (&xb)[kGroups][8]) {
#pragma unroll
  for (int t = 0; t < kGroups; ++t) {
    const uint4* from = reinterpret_cast<const uint4*>(rows.token[t] + k);
    uint4 v0 = __ldg(from), v1 = __ldg(from + 1);
    xb[t][0] = v0.x, xb[t][1] = v0.y, xb[t][2] = v0.z, xb[t][3] = v0.w;
    xb[t][4] = v1.x, xb[t][5] = v1.y, xb[t][6] = v1.z, xb[t][7] = v1.w;
  }
}

template <int kGroups>
__device__ __forceinline__ void multiply(float (&c)[kGroups][4], const uint32_t (&a)[16], const uint32_t (&xb)[kGroups][8]) {
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int t = 0; t < kGroups; ++t) mma(c[t], a + 4 * j, xb[t][2 * j], xb[t][2 * j + 1]);
}

constexpr int max_warps(int groups) { return groups <= 2 ? 16 : 8; }  // 128 registers a thread, or 255

template <int kGroups>  // of 8 tokens
__global__ void __launch_bounds__(32 * max_warps(kGroups), 1) linear(const LinearArgs p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int warps = blockDim.x >> 5, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
  uint8_t* ring = shared + warp * p.stages * kTileBytes;
  uint64_t* bars = reinterpret_cast<uint64_t*>(shared + warps * p.stages * kTileBytes) + warp * p.stages;
  const int strips = p.shape.strips(), tiles = p.shape.tiles(), units = strips * p.parts;
  const int64_t strip_bytes = p.shape.strip_bytes();
  const int first = int(int64_t(blockIdx.x) * units / gridDim.x), last = int(int64_t(blockIdx.x + 1) * units / gridDim.x);

  if (lane == 0) init_barriers(bars, p.stages);
  __syncwarp();

  Walk fetch{first + warp, last, warps, 0, 0, 0};
  fetch.open(p, strips, tiles);
  Walk work = fetch;
  auto issue = [&](int stage) {  // lane 0
    if (fetch.unit >= last) return;
    uint32_t bytes = kHeaderBytes + p.shape.tile_blocks(fetch.tile) * kBlockBytes;
    bulk_load(ring + stage * kTileBytes, p.stream + fetch.strip * strip_bytes + int64_t(fetch.tile) * kTileBytes, bytes, bars + stage);
    fetch.next(p, strips, tiles);
  };
  if (lane == 0)
    for (int s = 0; s < p.stages; ++s) issue(s);
  let_next_kernel_start();
  wait_for_previous_kernel();  // the weights were there already; the activations may not have been

  constexpr int kAhead = kGroups >= 4 ? 1 : 4 / kGroups;  // blocks of activations held in registers
  Tokens<kGroups> rows;
#pragma unroll
  for (int t = 0; t < kGroups; ++t) rows.token[t] = p.x + min(8 * t + g, p.m - 1) * p.ldx + 16 * q;
  int stage = 0;
  uint32_t parity = 0;
  while (work.unit < last) {
    const int strip = work.strip, unit = work.unit;
    float c[kGroups][4] = {};
    do {
      const uint8_t* tile = ring + stage * kTileBytes;
      const int blocks = p.shape.tile_blocks(work.tile), column = work.tile * kTileCols;
      const bool whole = column + kTileCols <= p.shape.k;
      uint32_t xb[kAhead][kGroups][8];
      if (whole) {  // activations are asked for before the wait: their latency hides behind it
#pragma unroll
        for (int b = 0; b < kAhead; ++b) load_tokens<kGroups>(rows, column + b * kBlockCols, xb[b]);
      }
      barrier_wait(bars + stage, parity);
      const TileView view(tile, lane);
      if (whole && !(view.plain | view.escapes)) {
#pragma unroll
        for (int b = 0; b < kBlocksPerTile; ++b) {
          uint32_t a[16];
          decode_block(tile + kHeaderBytes + b * kBlockBytes, lane, view.lo0, view.lo1, a);
          multiply<kGroups>(c, a, xb[b % kAhead]);
          if (b + kAhead < kBlocksPerTile) load_tokens<kGroups>(rows, column + (b + kAhead) * kBlockCols, xb[b % kAhead]);
        }
      } else {
#pragma unroll 1
        for (int b = 0; b < blocks; ++b) {
          const int k = column + b * kBlockCols;
          if (k + kBlockCols <= p.shape.k) {
            load_tokens<kGroups>(rows, k, xb[0]);
          } else {  // past K the code holds finite values, so zeros here keep them out of the sum
            const int left = p.shape.k - k - 16 * q;
#pragma unroll
            for (int t = 0; t < kGroups; ++t)
#pragma unroll
              for (int i = 0; i < 8; ++i)
                xb[0][t][i] = 2 * i < left ? *reinterpret_cast<const uint32_t*>(rows.token[t] + k + 2 * i) : 0;
          }
          uint32_t a[16];
          load_any_block(view, tile, p.side, b, blocks, lane, a);
          multiply<kGroups>(c, a, xb[0]);
        }
      }
      __syncwarp();
      if (lane == 0) issue(stage);
      if (++stage == p.stages) stage = 0, parity ^= 1;
      work.next(p, strips, tiles);
    } while (work.unit == unit);

    const int part = unit / strips;
    if (p.parts == 1) {
#pragma unroll
      for (int t = 0; t < kGroups; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int token = 8 * t + 2 * q + (i & 1), row = strip * kStripRows + g + (i >> 1) * 8;
          if (token < p.m && row < p.shape.n) store(p, token, row, c[t][i]);
        }
      continue;
    }
    // Split over K: every part is written, and the warp that comes last adds them in the order of the
    // parts, so the sum does not depend on who came last (nor on the number of tokens).
    const int64_t part_floats = int64_t(strips) * p.m * kStripRows;
    float* mine = p.partial + part * part_floats + int64_t(strip) * p.m * kStripRows;
#pragma unroll
    for (int t = 0; t < kGroups; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int token = 8 * t + 2 * q + (i & 1);
        if (token < p.m) __stcg(mine + token * kStripRows + g + (i >> 1) * 8, c[t][i]);
      }
    __threadfence();
    __syncwarp();
    unsigned before = 0;
    if (lane == 0) before = atomicAdd(p.arrivals + strip, 1u);
    before = __shfl_sync(kFull, before, 0);
    if (before + 1 != unsigned(p.parts)) continue;
    __threadfence();
    if (lane == 0) p.arrivals[strip] = 0;
    // Lane l adds elements 4l .. 4l + 3 of each group of 8 tokens: one 16-byte load a part, and the loads
    // of several parts in flight, since this is the kernel's last wait.
    const float* all = p.partial + int64_t(strip) * p.m * kStripRows;
#pragma unroll
    for (int t = 0; t < kGroups; ++t) {
      const int element = 128 * t + 4 * lane, token = element / kStripRows, row = strip * kStripRows + element % kStripRows;
      if (token >= p.m) break;
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
      for (int s = 0; s < p.parts; ++s) {
        const float4 v = __ldcg(reinterpret_cast<const float4*>(all + s * part_floats + element));
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
      if (row < p.shape.n) store(p, token, row, sum.x);
      if (row + 1 < p.shape.n) store(p, token, row + 1, sum.y);
      if (row + 2 < p.shape.n) store(p, token, row + 2, sum.z);
      if (row + 3 < p.shape.n) store(p, token, row + 3, sum.w);
    }
  }
}

// One warp a tile: weights back to row-major bf16, for prefill and for tests.
__global__ void decode(const uint8_t* __restrict__ stream, const uint32_t* __restrict__ side, uint16_t* __restrict__ out, int64_t ldo,
                       Shape shape, int first, int count) {
  const int lane = threadIdx.x & 31, tiles = shape.tiles();
  const int64_t id = int64_t(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (id >= int64_t(count) * tiles) return;
  const int strip = int(id / tiles), tile_index = int(id % tiles), blocks = shape.tile_blocks(tile_index);
  const uint8_t* tile = stream + (first + strip) * shape.strip_bytes() + int64_t(tile_index) * kTileBytes;
  const TileView view(tile, lane);
  for (int b = 0; b < blocks; ++b) {
    uint32_t a[16];
    load_any_block(view, tile, side, b, blocks, lane, a);
    const int col = tile_index * kTileCols + b * kBlockCols + (lane & 3) * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = strip * kStripRows + (lane >> 2) + half * 8;
      if (first * kStripRows + row >= shape.n) continue;
      uint16_t* to = out + row * ldo + col;
      if (col + 16 <= shape.k && ldo % 8 == 0) {
        uint4* wide = reinterpret_cast<uint4*>(to);
        wide[0] = make_uint4(a[half], a[2 + half], a[4 + half], a[6 + half]);
        wide[1] = make_uint4(a[8 + half], a[10 + half], a[12 + half], a[14 + half]);
      } else {
#pragma unroll
        for (int w = 0; w < 8; ++w) {
          if (col + 2 * w < shape.k) to[2 * w] = uint16_t(a[2 * w + half]);
          if (col + 2 * w + 1 < shape.k) to[2 * w + 1] = uint16_t(a[2 * w + half] >> 16);
        }
      }
    }
  }
}

// One warp a tile; the same code as encode.cpp, bit for bit. First pass (stream == nullptr): the side
// words each tile needs. Second pass: `side_at` holds their exclusive sums.
__global__ void encode(const uint16_t* __restrict__ w, int64_t ld, Shape shape, int force_plain, uint8_t* stream, uint32_t* side,
                       const int64_t* side_at, int32_t* words, int32_t* escapes) {
  const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, tiles = shape.tiles();
  const int64_t id = int64_t(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (id >= int64_t(shape.strips()) * tiles) return;
  const int strip = int(id / tiles), tile = int(id % tiles), blocks = shape.tile_blocks(tile);
  auto weight = [&](int half, int col) -> uint32_t {
    int row = strip * kStripRows + g + half * 8;
    return row < shape.n && col < shape.k ? w[row * ld + col] : 0u;
  };
  auto base = [&](int half) -> uint32_t {
    uint32_t largest = 0;
    for (int b = 0; b < blocks; ++b)
      for (int i = 0; i < 16; ++i) {
        uint32_t e = weight(half, tile * kTileCols + b * kBlockCols + q * 16 + i) >> 7 & 0xff;
        if (e != 0xff && e > largest) largest = e;
      }
    largest = max(largest, __shfl_xor_sync(kFull, largest, 1));
    largest = max(largest, __shfl_xor_sync(kFull, largest, 2));
    return largest > 15 ? largest - 15 : 0;
  };
  const uint32_t lo0 = base(0), lo1 = base(1);
  int total = 0;
  for (int pass = 0; pass < 2; ++pass) {  // 0 counts the escapes, 1 writes
    const bool plain = pass && (force_plain || total > kMaxEscapes);
    const int64_t at = pass ? side_at[id] : 0;
    uint8_t* out = pass ? stream + strip * shape.strip_bytes() + int64_t(tile) * kTileBytes : nullptr;
    uint32_t* list = nullptr;
    if (pass) {
      const int kept = plain ? 0 : total;
      list = kept > kInlineEscapes ? side + at : reinterpret_cast<uint32_t*>(out + offsetof(Header, inlined));
      if (lane < 8) reinterpret_cast<uint32_t*>(out)[lane] = 0;
      __syncwarp();
      if (q == 0) out[g] = uint8_t(lo0), out[g + 8] = uint8_t(lo1);
      if (lane == 0) {
        Header* h = reinterpret_cast<Header*>(out);
        h->escapes = uint16_t(kept), h->plain = plain, h->side = plain || kept > kInlineEscapes ? uint32_t(at) : 0;
      }
      if (kept > kInlineEscapes)
        for (int i = kept + lane; i < (kept + 3) / 4 * 4; i += 32) list[i] = 0;
    }
    int seen = 0;
    for (int b = 0; b < blocks; ++b) {
      const int col = tile * kTileCols + b * kBlockCols + q * 16;
      uint32_t mine = 0;
      for (int s = 0; s < 32; ++s) {
        int half = s >> 4, row = strip * kStripRows + g + half * 8, c = col + (s & 15);
        uint32_t e = weight(half, c) >> 7 & 0xff, lo = half ? lo1 : lo0;
        bool outside = row < shape.n && c < shape.k && (e < lo || e > lo + 15);
        mine |= uint32_t(outside) << s;
      }
      int count = __popc(mine), before = count;
      for (int d = 1; d < 32; d <<= 1) {
        int other = __shfl_up_sync(kFull, before, d);
        if (lane >= d) before += other;
      }
      int block_total = __shfl_sync(kFull, before, 31);
      before -= count;
      if (pass) {
        uint8_t* code = out + kHeaderBytes + b * kBlockBytes;
        uint32_t nibbles[4] = {};
#pragma unroll
        for (int s = 0; s < 32; ++s) {
          int half = s >> 4, i = s & 15;
          uint32_t v = weight(half, col + i), t = (v & 0x7fff) - ((half ? lo1 : lo0) << 7);
          bool in = t < 0x800;
          code[half * 512 + lane * 16 + i] = in ? uint8_t(t) : 0;
          uint32_t high = in ? (t >> 8 | (v >> 8 & 0x80)) : 0;  // s at bit 7, n3..n1 at bits 2..0
          int reg = (i >> 1 & 1) * 2 + half;
          uint32_t word = high << ((i & 1) ? 24 : 8);
          nibbles[i >> 2] |= reg < 3 ? word >> (4 * reg) : (word >> 12 | word << 20);
          if (mine >> s & 1 && !plain && total <= kMaxEscapes)
            list[seen + before + __popc(mine & ((1u << s) - 1))] = uint32_t(b << 10 | lane << 5 | s) << 16 | v;
          if (plain) reinterpret_cast<uint16_t*>(side + at)[(g + half * 8) * blocks * kBlockCols + b * kBlockCols + q * 16 + i] = uint16_t(v);
        }
        *reinterpret_cast<uint4*>(code + 1024 + lane * 16) = make_uint4(nibbles[0], nibbles[1], nibbles[2], nibbles[3]);
      }
      seen += block_total;
    }
    total = seen;
    if (!stream) break;
  }
  if (!stream && lane == 0) {
    const bool plain = force_plain || total > kMaxEscapes;
    words[id] = plain ? kStripRows * blocks * kBlockCols / 2 : total > kInlineEscapes ? (total + 3) / 4 * 4 : 0;
    escapes[id] = plain ? -1 : total;
  }
}

template <int kGroups>
cudaError_t launch_linear(LinearArgs p, int grid, int warps, cudaStream_t stream) {
  while (warps > max_warps(kGroups)) warps /= 2, p.stages *= 2;  // the same ring, fewer readers
  const int bytes = warps * p.stages * (kTileBytes + int(sizeof(uint64_t)));
  return launch(linear<kGroups>, dim3(grid), warps * 32, bytes, stream, p);
}

constexpr int kTileWarps = 4;

}  // namespace

// out[m][ldo] = x[m][ldx] w^T (+ bias), 1 <= m <= 32, k % 8 == 0, x 16-byte aligned with ldx % 8 == 0.
extern "C" int sk_bf16x_linear(const void* stream, const void* side, const void* x, const void* bias, void* out, void* partial,
                               void* arrivals, int64_t ldx, int64_t ldo, int m, int n, int k, int parts, int grid, int warps, int stages,
                               void* cuda_stream) {
  if (m < 1 || m > kMaxTokens || k % 8 || ldx % 8 || warps > 16 || stages < 1) return int(cudaErrorInvalidValue);
  LinearArgs p{static_cast<const uint8_t*>(stream),
               static_cast<const uint32_t*>(side),
               static_cast<const __nv_bfloat16*>(x),
               static_cast<const __nv_bfloat16*>(bias),
               static_cast<__nv_bfloat16*>(out),
               static_cast<float*>(partial),
               static_cast<unsigned*>(arrivals),
               ldx,
               ldo,
               m,
               parts,
               stages,
               Shape{n, k}};
  auto s = static_cast<cudaStream_t>(cuda_stream);
  if (m <= 8) return int(launch_linear<1>(p, grid, warps, s));
  if (m <= 16) return int(launch_linear<2>(p, grid, warps, s));
  return int(launch_linear<4>(p, grid, warps, s));
}

// Rows 16 * first .. 16 * (first + count) as bf16 into out[rows][ldo].
extern "C" int sk_bf16x_decode(const void* stream, const void* side, void* out, int64_t ldo, int n, int k, int first, int count,
                               void* cuda_stream) {
  Shape shape{n, k};
  int64_t warps = int64_t(count) * shape.tiles();
  if (warps == 0) return 0;
  decode<<<unsigned((warps + kTileWarps - 1) / kTileWarps), kTileWarps * 32, 0, static_cast<cudaStream_t>(cuda_stream)>>>(
      static_cast<const uint8_t*>(stream), static_cast<const uint32_t*>(side), static_cast<uint16_t*>(out), ldo, shape, first, count);
  return int(cudaGetLastError());
}

// With stream null: fills words and escapes (-1: plain) per tile. Else writes stream and side.
extern "C" int sk_bf16x_encode(const void* w, int64_t ld, int n, int k, int force_plain, void* stream, void* side, const void* side_at,
                               void* words, void* escapes, void* cuda_stream) {
  Shape shape{n, k};
  int64_t warps = int64_t(shape.strips()) * shape.tiles();
  encode<<<unsigned((warps + kTileWarps - 1) / kTileWarps), kTileWarps * 32, 0, static_cast<cudaStream_t>(cuda_stream)>>>(
      static_cast<const uint16_t*>(w), ld, shape, force_plain, static_cast<uint8_t*>(stream), static_cast<uint32_t*>(side),
      static_cast<const int64_t*>(side_at), static_cast<int32_t*>(words), static_cast<int32_t*>(escapes));
  return int(cudaGetLastError());
}
