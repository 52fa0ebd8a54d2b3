// The screened LM head: int8 logits with an error bound, then bf16 for the rows that can still win.
//
// Four kernels a step, without a host round trip: `prepare` (activations to two int8 limbs, norms),
// `coarse` (every row: int8 tensor cores, exact int32 sums), `pick` (rows whose upper bound reaches
// the best lower bound), `rescore` (those rows in bf16 x bf16 -> fp32; all rows if too many are left).
// README.md derives the bound.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../device.cuh"

using namespace spark_kernels;

namespace {

constexpr int kStripRows = 16;
constexpr int kBlockCols = 64;
constexpr int kTileBlocks = 4;
constexpr int kBlockBytes = kStripRows * kBlockCols;
constexpr int kTileBytes = kTileBlocks * kBlockBytes;
constexpr int kLimbs = 2;  // an activation is 256 hi + lo, in units of max|x| / 32512
constexpr int kGroupTokens = 8 / kLimbs;
constexpr int kMaxTokens = 16;
constexpr float kInfinity = __builtin_huge_valf();

struct Row {  // of the weight; `screen` bounds |w - scale q|, `norm` bounds |w| and |scale q|
  float scale, screen, norm, unused;
};

struct Token {  // of a step; device memory, written by `prepare`
  float unit, norm, fine;  // value of one count, |x| and |x - counts| + gamma |x|, both from above
  unsigned floor;          // ordered(best lower bound)
  unsigned count;          // candidates found
  unsigned everything;     // 1: rescore all rows (activations not finite)
  unsigned finished;       // blocks of `rescore` that are done
  unsigned unused;
  unsigned long long best;
};

// Floats as unsigned integers in the same order, NaN above everything (as torch.argmax has it).
__device__ __forceinline__ unsigned ordered(float v) {
  if (v != v) return 0xffffffffu;
  unsigned u = __float_as_uint(v == 0.0f ? 0.0f : v);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float unordered(unsigned u) { return __uint_as_float(u & 0x80000000u ? u & 0x7fffffffu : ~u); }
__device__ __forceinline__ float rounded(float v) { return __bfloat162float(__float2bfloat16_rn(v)); }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(kFull, v, d);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v = fmaxf(v, __shfl_xor_sync(kFull, v, d));
  return v;
}

// ---- after loading: one warp a row of w (n x k) -> int8 blocks and the row's bounds
__global__ void quantise(const __nv_bfloat16* __restrict__ w, int64_t ld, int n, int k, int8_t* codes, Row* rows) {
  const int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  const int blocks = (k + kBlockCols - 1) / kBlockCols;
  if (row >= (n + kStripRows - 1) / kStripRows * kStripRows) return;
  int8_t* out = codes + (int64_t(row / kStripRows) * blocks * kStripRows + row % kStripRows) * kBlockCols;
  float largest = 0, odd = 0;
  if (row < n)
    for (int c = lane; c < k; c += 32) {
      float v = __bfloat162float(w[row * ld + c]);
      if (!isfinite(v)) odd = 1;
      largest = fmaxf(largest, fabsf(v));
    }
  largest = warp_max(largest), odd = warp_max(odd);
  const float scale = largest / 127.0f;
  float error = 0, square = 0;
  for (int c = lane; c < blocks * kBlockCols; c += 32) {
    float v = row < n && c < k && odd == 0 ? __bfloat162float(w[row * ld + c]) : 0.0f;
    float q = scale > 0 && odd == 0 ? fminf(fmaxf(rintf(v / scale), -127.0f), 127.0f) : 0.0f;
    float r = fmaf(-scale, q, v);
    error = fmaf(r, r, error), square = fmaf(v, v, square);
    out[int64_t(c / kBlockCols) * kBlockBytes + c % kBlockCols] = int8_t(q);
  }
  error = sqrtf(warp_sum(error)), square = sqrtf(warp_sum(square));
  if (lane == 0) {
    float slack = 1.0f + 1e-4f;  // the sums above carry at most k / 32 + 5 roundings of 2^-24 each
    rows[row] = Row{scale, odd != 0 ? kInfinity : error * slack + square * 1e-6f, (square + error) * slack, 0.0f};
  }
}

// ---- one block a token
__global__ void prepare(const __nv_bfloat16* __restrict__ x, int64_t ldx, int k, int8_t* limbs, Token* tokens) {
  __shared__ float shared[3][32];
  const int token = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  const int padded = (k + kBlockCols - 1) / kBlockCols * kBlockCols;
  const __nv_bfloat16* row = x + token * ldx;
  let_next_kernel_start();
  wait_for_previous_kernel();
  float largest = 0, odd = 0;
  for (int c = threadIdx.x; c < k; c += blockDim.x) {
    float v = __bfloat162float(row[c]);
    if (!isfinite(v)) odd = 1;
    largest = fmaxf(largest, fabsf(v));
  }
  largest = warp_max(largest), odd = warp_max(odd);
  if (lane == 0) shared[0][warp] = largest, shared[1][warp] = odd;
  __syncthreads();
  largest = odd = 0;
  for (int i = 0; i < warps; ++i) largest = fmaxf(largest, shared[0][i]), odd = fmaxf(odd, shared[1][i]);
  __syncthreads();
  const float unit = largest / 32512.0f;
  float square = 0, error = 0;
  int8_t* hi = limbs + int64_t(token) * kLimbs * padded;
  for (int c = threadIdx.x; c < padded; c += blockDim.x) {
    float v = c < k && odd == 0 ? __bfloat162float(row[c]) : 0.0f;
    int count = unit > 0 ? int(rintf(fminf(fmaxf(v / unit, -32512.0f), 32512.0f))) : 0;
    int high = (count + 128) >> 8;
    hi[c] = int8_t(high), hi[padded + c] = int8_t(count - 256 * high);
    float r = fmaf(-unit, float(count), v);
    error = fmaf(r, r, error), square = fmaf(v, v, square);
  }
  error = warp_sum(error), square = warp_sum(square);
  if (lane == 0) shared[0][warp] = error, shared[1][warp] = square;
  __syncthreads();
  if (threadIdx.x == 0) {
    error = square = 0;
    for (int i = 0; i < warps; ++i) error += shared[0][i], square += shared[1][i];
    const float slack = 1.0f + 1e-4f, norm = sqrtf(square) * slack;
    // gamma: k roundings of 2^-24 bound a float32 sum in any order; 4 more stand for the coarse logit's own
    const float gamma = float(k + 4) * 5.9604645e-8f;
    tokens[token] = Token{unit, norm, sqrtf(error) * slack + norm * (gamma + 1e-6f), ordered(-kInfinity), 0u, odd != 0, 0u, 0u, 0ull};
  }
}

__device__ __forceinline__ void mma(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

struct CoarseArgs {
  const int8_t* codes;
  const Row* rows;
  const int8_t* limbs;
  Token* tokens;
  float* upper;  // [m][n]
  float* lower;  // the same, or null
  int m, n, k, stages;
};

// One warp a strip of 16 rows, its tiles through a ring in shared memory; see bf16x/kernel.cu.
// Column 2t + l of the tensor-core product is limb l of token t.
template <int kGroups>
__global__ void __launch_bounds__(512, 1) coarse(const CoarseArgs p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int warps = blockDim.x >> 5, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
  uint8_t* ring = shared + warp * p.stages * kTileBytes;
  uint64_t* bars = reinterpret_cast<uint64_t*>(shared + warps * p.stages * kTileBytes) + warp * p.stages;
  const int strips = (p.n + kStripRows - 1) / kStripRows, blocks = (p.k + kBlockCols - 1) / kBlockCols;
  const int padded = blocks * kBlockCols;
  const int first = int(int64_t(blockIdx.x) * strips / gridDim.x) + warp, last = int(int64_t(blockIdx.x + 1) * strips / gridDim.x);

  if (lane == 0) init_barriers(bars, p.stages);
  __syncwarp();
  int fetch_strip = first, fetch_block = 0;
  auto issue = [&](int stage) {
    if (fetch_strip >= last) return;
    int count = min(kTileBlocks, blocks - fetch_block);
    bulk_load(ring + stage * kTileBytes, p.codes + (int64_t(fetch_strip) * blocks + fetch_block) * kBlockBytes, count * kBlockBytes,
              bars + stage);
    if ((fetch_block += kTileBlocks) >= blocks) fetch_block = 0, fetch_strip += warps;
  };
  if (lane == 0)
    for (int s = 0; s < p.stages; ++s) issue(s);
  let_next_kernel_start();
  wait_for_previous_kernel();

  const int8_t* limbs[kGroups];
  float unit[kGroups], norm[kGroups], fine[kGroups], floor[kGroups];
#pragma unroll
  for (int t = 0; t < kGroups; ++t) {
    limbs[t] = p.limbs + int64_t(min(8 * t + g, p.m * kLimbs - 1)) * padded + 16 * q;
    const Token& token = p.tokens[min(kGroupTokens * t + q, p.m - 1)];
    unit[t] = token.unit, norm[t] = token.norm, fine[t] = token.fine, floor[t] = -kInfinity;
  }
  int stage = 0;
  uint32_t parity = 0;
  for (int strip = first; strip < last; strip += warps) {
    int c[kGroups][4] = {};
    const Row row0 = p.rows[strip * kStripRows + g], row1 = p.rows[strip * kStripRows + g + 8];
    for (int block = 0; block < blocks; block += kTileBlocks) {
      const int count = min(kTileBlocks, blocks - block);
      constexpr int kAhead = kGroups == 1 ? 4 : kGroups == 2 ? 2 : 1;
      uint4 xb[kAhead][kGroups];
#pragma unroll
      for (int b = 0; b < kAhead; ++b)
#pragma unroll
        for (int t = 0; t < kGroups; ++t)
          xb[b][t] = *reinterpret_cast<const uint4*>(limbs[t] + (block + min(b, count - 1)) * kBlockCols);
      barrier_wait(bars + stage, parity);
      const uint8_t* tile = ring + stage * kTileBytes + lane * 16;
#pragma unroll
      for (int b = 0; b < kTileBlocks; ++b) {
        if (b >= count) break;
        const uint4 upper = *reinterpret_cast<const uint4*>(tile + b * kBlockBytes);
        const uint4 lower = *reinterpret_cast<const uint4*>(tile + b * kBlockBytes + kBlockBytes / 2);
#pragma unroll
        for (int t = 0; t < kGroups; ++t) {
          const uint4 v = xb[b % kAhead][t];
          mma(c[t], upper.x, lower.x, upper.y, lower.y, v.x, v.y);
          mma(c[t], upper.z, lower.z, upper.w, lower.w, v.z, v.w);
        }
        if (b + kAhead < kTileBlocks)
#pragma unroll
          for (int t = 0; t < kGroups; ++t)
            xb[b % kAhead][t] = *reinterpret_cast<const uint4*>(limbs[t] + (block + min(b + kAhead, count - 1)) * kBlockCols);
      }
      __syncwarp();
      if (lane == 0) issue(stage);
      if (++stage == p.stages) stage = 0, parity ^= 1;
    }
#pragma unroll
    for (int t = 0; t < kGroups; ++t) {
      const int token = kGroupTokens * t + q;
      if (token >= p.m) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = strip * kStripRows + g + 8 * half;
        if (row >= p.n) continue;
        const Row r = half ? row1 : row0;
        const float sum = fmaf(256.0f, float(c[t][2 * half]), float(c[t][2 * half + 1]));
        const float logit = r.scale * unit[t] * sum, bound = fmaf(r.screen, norm[t], r.norm * fine[t]);
        p.upper[int64_t(token) * p.n + row] = logit + bound;
        if (p.lower) p.lower[int64_t(token) * p.n + row] = logit - bound;
        floor[t] = fmaxf(floor[t], logit - bound);
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kGroups; ++t) {
#pragma unroll
    for (int d = 4; d < 32; d <<= 1) floor[t] = fmaxf(floor[t], __shfl_xor_sync(kFull, floor[t], d));
    const int token = kGroupTokens * t + q;
    if (g == 0 && token < p.m) atomicMax(&p.tokens[token].floor, ordered(floor[t]));
  }
}

// ---- rows that can still win, in no particular order; everything else is minus infinity in `logits`
__global__ void pick(const float* __restrict__ upper, const float* __restrict__ threshold, int n, int capacity, Token* tokens, int* list,
                       __nv_bfloat16* logits) {
  const int token = blockIdx.y;
  let_next_kernel_start();
  wait_for_previous_kernel();
  const float floor = rounded(threshold ? threshold[token] : unordered(tokens[token].floor));
  const float* row = upper + int64_t(token) * n;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    // compared after rounding to bf16: rounding keeps the order, so a row below here cannot reach the winner's bf16 logit
    if (!(rounded(__ldcg(row + i)) < floor)) {
      unsigned at = atomicAdd(&tokens[token].count, 1u);
      if (at < unsigned(capacity)) list[int64_t(token) * capacity + at] = i;
    }
    if (logits) logits[int64_t(token) * n + i] = __float2bfloat16_rn(-kInfinity);
  }
}

// ---- one warp a row: a lane's columns in order, then a tree; the order does not depend on the list
__global__ void __launch_bounds__(256) rescore(const __nv_bfloat16* __restrict__ w, int64_t ld, const __nv_bfloat16* __restrict__ x, int64_t ldx,
                                               int n, int k, int capacity, Token* tokens, const int* list, __nv_bfloat16* logits,
                                               int64_t* winners, int* counts) {
  const int token = blockIdx.y, lane = threadIdx.x & 31, warps = gridDim.x * (blockDim.x >> 5);
  let_next_kernel_start();
  wait_for_previous_kernel();
  Token& state = tokens[token];
  const unsigned found = __ldcg(&state.count);
  const bool everything = state.everything || found > unsigned(capacity);
  const int items = everything ? n : int(found);
  const __nv_bfloat16* activations = x + token * ldx;
  unsigned long long best = 0;
  for (int i = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); i < items; i += warps) {
    const int row = everything ? i : list[int64_t(token) * capacity + i];
    const __nv_bfloat16* weights = w + row * ld;
    float sum = 0;
#pragma unroll 4
    for (int c = lane * 8; c < k; c += 256) {
      const uint4 a = __ldg(reinterpret_cast<const uint4*>(weights + c)), b = __ldg(reinterpret_cast<const uint4*>(activations + c));
      const uint32_t u[4] = {a.x, a.y, a.z, a.w}, v[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum = fmaf(__uint_as_float(u[j] << 16), __uint_as_float(v[j] << 16), sum);
        sum = fmaf(__uint_as_float(u[j] & 0xffff0000u), __uint_as_float(v[j] & 0xffff0000u), sum);
      }
    }
    sum = warp_sum(sum);
    const __nv_bfloat16 logit = __float2bfloat16_rn(sum);
    if (lane == 0 && logits) logits[int64_t(token) * n + row] = logit;
    const unsigned long long key = (unsigned long long)ordered(__bfloat162float(logit)) << 32 | (0xffffffffu - unsigned(row));
    best = key > best ? key : best;
  }
  if (lane == 0 && best) atomicMax(&state.best, best);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(&state.finished, 1u) == gridDim.x - 1) {
    __threadfence();
    winners[token] = 0xffffffffu - unsigned(__ldcg(&state.best));
    counts[token] = everything ? n : int(found);
  }
}

template <int kGroups>
cudaError_t launch_coarse(const CoarseArgs& p, int grid, int warps, cudaStream_t stream) {
  const int bytes = warps * p.stages * (kTileBytes + int(sizeof(uint64_t)));
  return launch(coarse<kGroups>, dim3(grid), warps * 32, bytes, stream, p);
}

}  // namespace

extern "C" int sk_lm_head_token_bytes() { return int(sizeof(Token)); }

// codes: strips x ceil(k / 64) x 16 x 64 int8; rows: strips x 16 x 4 floats.
extern "C" int sk_lm_head_quantise(const void* w, int64_t ld, int n, int k, void* codes, void* rows, void* stream) {
  const int padded = (n + kStripRows - 1) / kStripRows * kStripRows;
  quantise<<<(padded + 3) / 4, 128, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const __nv_bfloat16*>(w), ld, n, k,
                                                                            static_cast<int8_t*>(codes), static_cast<Row*>(rows));
  return int(cudaGetLastError());
}

// Coarse logits of m <= 16 tokens: upper (and lower, unless null) [m][n] float, tokens[m] with the floor.
extern "C" int sk_lm_head_coarse(const void* codes, const void* rows, const void* x, int64_t ldx, void* limbs, void* tokens, void* upper,
                                 void* lower, int m, int n, int k, int grid, int warps, int stages, void* stream) {
  if (m < 1 || m > kMaxTokens || warps > 16) return int(cudaErrorInvalidValue);
  auto s = static_cast<cudaStream_t>(stream);
  cudaError_t error = launch(prepare, dim3(m), 512, 0, s, static_cast<const __nv_bfloat16*>(x), ldx, k, static_cast<int8_t*>(limbs),
                             static_cast<Token*>(tokens));
  if (error != cudaSuccess) return int(error);
  CoarseArgs p{static_cast<const int8_t*>(codes), static_cast<const Row*>(rows), static_cast<const int8_t*>(limbs),
               static_cast<Token*>(tokens),       static_cast<float*>(upper),    static_cast<float*>(lower),
               m,                                 n,                             k,
               stages};
  if (m <= kGroupTokens) return int(launch_coarse<1>(p, grid, warps, s));
  if (m <= 2 * kGroupTokens) return int(launch_coarse<2>(p, grid, warps, s));
  return int(launch_coarse<4>(p, grid, warps, s));
}

// Rescores every row whose upper bound reaches the threshold (null: the tokens' own floor). winners[m]:
// argmax of the bf16 logits, lowest index first; counts[m]: rows rescored; logits [m][n] bf16 or null.
extern "C" int sk_lm_head_finish(const void* w, int64_t ld, const void* x, int64_t ldx, const void* upper, const void* threshold,
                                 void* tokens, void* list, int capacity, void* logits, void* winners, void* counts, int m, int n, int k,
                                 int grid, void* stream) {
  if (m < 1 || m > kMaxTokens || k % 8 || ld % 8 || ldx % 8) return int(cudaErrorInvalidValue);
  auto s = static_cast<cudaStream_t>(stream);
  cudaError_t error = launch(pick, dim3(grid, m), 256, 0, s, static_cast<const float*>(upper), static_cast<const float*>(threshold), n,
                             capacity, static_cast<Token*>(tokens), static_cast<int*>(list), static_cast<__nv_bfloat16*>(logits));
  if (error != cudaSuccess) return int(error);
  return int(launch(rescore, dim3(grid, m), 256, 0, s, static_cast<const __nv_bfloat16*>(w), ld, static_cast<const __nv_bfloat16*>(x), ldx,
                    n, k, capacity, static_cast<Token*>(tokens), static_cast<const int*>(list), static_cast<__nv_bfloat16*>(logits),
                    static_cast<int64_t*>(winners), static_cast<int*>(counts)));
}
