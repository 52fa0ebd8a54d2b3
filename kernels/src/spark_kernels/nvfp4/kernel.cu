// NVFP4 W4A16 skinny GEMM, M = 1..32: out[M,N] = x[M,K] @ dequant(W[N,K])^T. Byte count, layout and method: README.md.
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../device.cuh"
#include "../e2m1.h"

namespace {

using namespace spark_kernels;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kBlockK = 64;                  // K of one packed block: four quantisation groups of 16
constexpr int kBlockBytes = 16 * 36;         // 16 rows x (32 B of codes + 4 B of scales)
constexpr int kCodeBytes = 512;

struct Args {
  const void* x;
  const uint8_t* w;
  void* out;
  float* partial;
  int* arrivals;
  float alpha;
  int m, n, k, ldx, tiles, kblocks;
};

__device__ __forceinline__ int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void add_release(int* p) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(p) : "memory"); }

// Plain loads on purpose: x may be written by the grid this one overlaps with, and the read-only path (.nc) is not
// ordered by griddepcontrol.wait.
__device__ __forceinline__ uint4 load_x(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// ---- E2M1 -> 16-bit float, block scale folded in ----------------------------------------------------------
// The product of an E2M1 code (2 significant bits) and an E4M3 scale (4) has 6 significant bits, so it is exact in
// both formats; only the fp32 accumulation and the final rounding lose anything.

struct Bf16 {
  using Type = __nv_bfloat16;
  static constexpr float kUnscale = 128.0f;  // decode() leaves weight * 2^-7
  // E5M3 byte -> bf16 pair of scale * 2^119: exponent field 224 + E5.
  static __device__ __forceinline__ uint32_t scale(uint32_t byte2) { return byte2 * 16u + 0x70007000u; }
  // Every code as a bf16 with its exponent field at the bottom (weight * 2^-126, subnormals included). The offline
  // packer puts the four pairs at rotations 0, 3, 6 of this mask; the last pair gathers what is left by one multiply.
  static __device__ __forceinline__ void decode(uint32_t w, uint32_t (&a)[4]) {
    constexpr uint32_t kMask = 0x81C081C0u;
    a[0] = w & kMask;
    a[1] = __funnelshift_r(w, w, 3) & kMask;
    a[2] = __funnelshift_r(w, w, 6) & kMask;
    a[3] = ((w & 0x001B001Bu) * 0x4108u) & kMask;
  }
  static __device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ Type store(float v) { return __float2bfloat16_rn(v); }
};

struct Fp16 {
  using Type = __half;
  static constexpr float kUnscale = 1.0f;
  // E5M3 byte -> half pair of the scale itself: exponent field E5 - 7.
  static __device__ __forceinline__ uint32_t scale(uint32_t byte2) { return byte2 * 128u - 0x1C001C00u; }
  static __device__ __forceinline__ void decode(uint32_t w, uint32_t (&a)[4]) {
#if SK_E2M1_HARDWARE
    asm("{\n .reg .b8 p, q, r, s;\n mov.b32 {p, q, r, s}, %4;\n cvt.rn.f16x2.e2m1x2 %0, p;\n cvt.rn.f16x2.e2m1x2 %1, q;\n"
        " cvt.rn.f16x2.e2m1x2 %2, r;\n cvt.rn.f16x2.e2m1x2 %3, s;\n}"
        : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(w));
#else
    // Not the fast path of any target we build for: the same bytes, decoded so that other GPUs can run the tests.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t byte = w >> (8 * i);
      uint32_t pair = (byte & 0xFu) | ((byte & 0xF0u) << 12);
      uint32_t bits = ((pair & 0x00080008u) << 12) | ((pair & 0x00070007u) << 9);
      a[i] = mul(bits, 0x74007400u);  // 2^14: undoes the exponent bias
    }
#endif
  }
  static __device__ __forceinline__ uint32_t mul(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  static __device__ __forceinline__ Type store(float v) { return __float2half_rn(v); }
};

// ---- kernel -----------------------------------------------------------------------------------------------

template <int MTiles, int Rows>
struct Shape {
  // 36 KiB in flight: several times what a multiprocessor's share of the bandwidth needs, and little enough that the next
  // kernel's blocks fit beside these (99 KiB on SM 12.x). Deeper rings were slower on an H100.
  static constexpr int kStages = 8 / Rows;
  static constexpr int kStageBytes = Rows * kBlockBytes;
  static constexpr int kRing = kWarps * kStages * kStageBytes;
  static constexpr int kPitch = Rows * 16 + 4;  // 2 * pitch = 8 mod 32: fragment stores hit 32 banks
  static constexpr int kReduceTiles = MTiles < 2 ? MTiles : 2;  // at a time: 99 KiB have to do
  static constexpr int kReduceM = kReduceTiles * 8;
  static constexpr int kReduce = kWarps * kReduceM * kPitch * 4;
  static constexpr int kSmem = kRing + kReduce + kWarps * kStages * 8;
};

template <class Num, int MTiles, int Rows>
__global__ void __launch_bounds__(kThreads, 1) nvfp4_gemm(const Args args) {
  using S = Shape<MTiles, Rows>;
  extern __shared__ __align__(128) uint8_t smem[];
  float* reduce = reinterpret_cast<float*>(smem + S::kRing);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  uint8_t* ring = smem + warp * S::kStages * S::kStageBytes;
  uint64_t* bars = reinterpret_cast<uint64_t*>(smem + S::kRing + S::kReduce) + warp * S::kStages;

  // Units are (row tile, 64-wide K block) pairs in memory order; every thread block takes one contiguous, equal share and
  // its warps take turns, so the order of every sum depends on (N, K, grid) alone, never on M or on timing.
  const int64_t units = int64_t(args.tiles) * args.kblocks;
  const int begin = int(units * blockIdx.x / gridDim.x), end = int(units * (blockIdx.x + 1) / gridDim.x);

  const uint8_t* src = args.w + int64_t(begin + warp) * S::kStageBytes;  // of the next unit to fetch
  constexpr int kStride = kWarps * S::kStageBytes;
  if (lane == 0) {
    init_barriers(bars, S::kStages);
    for (int s = 0; s < S::kStages; ++s)
      if (begin + warp + s * kWarps < end) bulk_load(ring + s * S::kStageBytes, src + s * kStride, S::kStageBytes, bars + s);
  }
  src += S::kStages * kStride;
  __syncwarp();
  let_next_kernel_start();
  wait_for_previous_kernel();

  const char* xrow[MTiles];
  bool xlive[MTiles];
#pragma unroll
  for (int t = 0; t < MTiles; ++t) {
    xlive[t] = t * 8 + group < args.m;
    xrow[t] = static_cast<const char*>(args.x) + (int64_t(t * 8 + group) * args.ldx + quad * 16) * 2;
  }
  uint4 xn[MTiles][2];
  auto fetch_x = [&](int unit, int kb) {
    // K is a multiple of 16, so a lane's group is in or out.
    const bool inside = unit < end && kb * kBlockK + quad * 16 < args.k;
#pragma unroll
    for (int t = 0; t < MTiles; ++t) {
      xn[t][0] = xn[t][1] = make_uint4(0, 0, 0, 0);
      if (xlive[t] && inside) {
        xn[t][0] = load_x(xrow[t] + kb * (kBlockK * 2));
        xn[t][1] = load_x(xrow[t] + kb * (kBlockK * 2) + 16);
      }
    }
  };

  int stage = 0, unit = begin + warp;
  uint32_t parity = 0;
  int kb = unit % args.kblocks;
  const int kb_step = kWarps % args.kblocks;
  fetch_x(unit, kb);

  for (int tile = begin / args.kblocks; tile * args.kblocks < end; ++tile) {
    const int tile_end = min(end, (tile + 1) * args.kblocks);
    float acc[Rows][MTiles][4] = {};
    while (unit < tile_end) {
      uint4 x[MTiles][2];
#pragma unroll
      for (int t = 0; t < MTiles; ++t) x[t][0] = xn[t][0], x[t][1] = xn[t][1];
      const int next = unit + kWarps;
      kb += kb_step;
      if (kb >= args.kblocks) kb -= args.kblocks;
      fetch_x(next, kb);

      barrier_wait(bars + stage, parity);
      const uint8_t* block = ring + stage * S::kStageBytes;
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        const uint4 w4 = *reinterpret_cast<const uint4*>(block + r * kBlockBytes + lane * 16);
        const uint32_t s2 = *reinterpret_cast<const uint16_t*>(block + r * kBlockBytes + kCodeBytes + lane * 2);
        const uint32_t s_lo = Num::scale(__byte_perm(s2, 0, 0x4040)), s_hi = Num::scale(__byte_perm(s2, 0, 0x4141));
        const uint32_t w[4] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          uint32_t a[4];
          Num::decode(w[q], a);
          a[0] = Num::mul(a[0], s_lo), a[1] = Num::mul(a[1], s_hi);
          a[2] = Num::mul(a[2], s_lo), a[3] = Num::mul(a[3], s_hi);
#pragma unroll
          for (int t = 0; t < MTiles; ++t) {
            const uint4& v = x[t][q / 2];
            Num::mma(acc[r][t], a, q % 2 ? v.z : v.x, q % 2 ? v.w : v.y);
          }
        }
      }
      __syncwarp();
      if (lane == 0 && unit + S::kStages * kWarps < end)
        bulk_load(ring + stage * S::kStageBytes, src, S::kStageBytes, bars + stage);
      src += kStride;
      if (++stage == S::kStages) stage = 0, parity ^= 1;
      unit = next;
    }

    // A tile that several thread blocks share is finished by the one with its first K blocks. That one comes to the tile
    // last of all its work and the others begin theirs with it, so their sums are there before it looks.
    const int first_unit = tile * args.kblocks, last_unit = first_unit + args.kblocks - 1;
    const int first = int(((first_unit + 1) * int64_t(gridDim.x) - 1) / units);  // inverse of begin(c) = units * c / grid
    const int last = int(((last_unit + 1) * int64_t(gridDim.x) - 1) / units);
    const bool finishes = int(blockIdx.x) == first;
    if (finishes && first != last && threadIdx.x == 0) {
      while (load_acquire(args.arrivals + tile) != last - first) __nanosleep(20);
      args.arrivals[tile] = 0;  // ready for the next launch
    }

    constexpr int kTileRows = Rows * 16, kSlot = kTileRows * MTiles * 8;
    typename Num::Type* out = static_cast<typename Num::Type*>(args.out);
    float* mine = reduce + warp * S::kReduceM * S::kPitch;
#pragma unroll
    for (int pass = 0; pass < MTiles / S::kReduceTiles; ++pass) {
#pragma unroll
      for (int r = 0; r < Rows; ++r)
#pragma unroll
        for (int t = 0; t < S::kReduceTiles; ++t)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            mine[(t * 8 + quad * 2 + i % 2) * S::kPitch + r * 16 + group + (i / 2) * 8] = acc[r][pass * S::kReduceTiles + t][i];
      __syncthreads();
      const int from = pass * S::kReduceM * kTileRows, to = min(from + S::kReduceM * kTileRows, args.m * kTileRows);
      for (int i = from + threadIdx.x; i < to; i += kThreads) {
        const int m = i / kTileRows, row = i % kTileRows, n = tile * kTileRows + row;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += reduce[(w * S::kReduceM + m - pass * S::kReduceM) * S::kPitch + row];
        if (finishes) {
          for (int c = first + 1; c <= last; ++c) sum += __ldcg(args.partial + int64_t(c) * kSlot + i);
          if (n < args.n) out[int64_t(m) * args.n + n] = Num::store(sum * args.alpha);
        } else {
          __stcg(args.partial + int64_t(blockIdx.x) * kSlot + i, sum);
        }
      }
      __syncthreads();
    }
    if (!finishes && threadIdx.x == 0) {
      __threadfence();
      add_release(args.arrivals + tile);
    }
  }
}

template <class Num, int MTiles, int Rows>
cudaError_t launch_shape(Args args, int grid, bool pdl, cudaStream_t stream) {
  using S = Shape<MTiles, Rows>;
  args.alpha *= Num::kUnscale;
  return launch_with(pdl, nvfp4_gemm<Num, MTiles, Rows>, dim3(grid), kThreads, S::kSmem, stream, args);
}

template <class Num, int MTiles>
cudaError_t dispatch_rows(const Args& args, int rows, int grid, bool pdl, cudaStream_t stream) {
  switch (rows) {
    case 1: return launch_shape<Num, MTiles, 1>(args, grid, pdl, stream);
    case 2: return launch_shape<Num, MTiles, 2>(args, grid, pdl, stream);
    case 4: return launch_shape<Num, MTiles, 4>(args, grid, pdl, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <class Num>
cudaError_t dispatch(const Args& args, int rows, int grid, bool pdl, cudaStream_t stream) {
  if (args.m <= 8) return dispatch_rows<Num, 1>(args, rows, grid, pdl, stream);
  if (args.m <= 16) return dispatch_rows<Num, 2>(args, rows, grid, pdl, stream);
  return dispatch_rows<Num, 4>(args, rows, grid, pdl, stream);
}

// One warp a packed 16 x 64 block: a lane's 32 codes are two runs of 16 columns. Prefill only; see README.md.
template <class Num>
__global__ void nvfp4_unpack(const uint8_t* packed, uint32_t* out, int rows, int n, int k, int kblocks, int blocks) {
  const int block = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (block >= blocks) return;
  const int row_tile = block / (kblocks * rows), kb = block / rows % kblocks, sub = block % rows;
  const int row = (row_tile * rows + sub) * 16 + lane / 4, col = kb * kBlockK + lane % 4 * 16;
  if (col >= k) return;
  const uint8_t* base = packed + int64_t(block) * kBlockBytes;
  const uint4 w4 = *reinterpret_cast<const uint4*>(base + lane * 16);
  const uint32_t s2 = *reinterpret_cast<const uint16_t*>(base + kCodeBytes + lane * 2);
  const uint32_t s_lo = Num::scale(__byte_perm(s2, 0, 0x4040)), s_hi = Num::scale(__byte_perm(s2, 0, 0x4141));
  const uint32_t w[4] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t v[8];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      uint32_t a[4];
      Num::decode(w[q], a);
      v[2 * q] = Num::mul(a[half], half ? s_hi : s_lo);
      v[2 * q + 1] = Num::mul(a[2 + half], half ? s_hi : s_lo);
    }
    if (row + 8 * half < n) {
      uint4* dst = reinterpret_cast<uint4*>(out + (int64_t(row + 8 * half) * k + col) / 2);
      dst[0] = make_uint4(v[0], v[1], v[2], v[3]);
      dst[1] = make_uint4(v[4], v[5], v[6], v[7]);
    }
  }
}

}  // namespace

// Writes weight * 2^-7 (bf16) or weight (fp16), row-major [n, k], without the global scale. Returns a cudaError_t.
extern "C" int sk_nvfp4_unpack(const void* w, void* out, int n, int k, int rows, int fp16, void* stream) {
  if (n < 1 || k < 16 || k % 16) return cudaErrorInvalidValue;
  const int kblocks = (k + kBlockK - 1) / kBlockK, blocks = (n + 16 * rows - 1) / (16 * rows) * rows * kblocks;
  const int grid = (blocks + kWarps - 1) / kWarps;
  auto kernel = fp16 ? nvfp4_unpack<Fp16> : nvfp4_unpack<Bf16>;
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const uint8_t*>(w), static_cast<uint32_t*>(out),
                                                                   rows, n, k, kblocks, blocks);
  return cudaGetLastError();
}

// Returns a cudaError_t. `rows` is the row tile in units of 16; `partial` holds grid * rows * 16 floats
// for m rounded up to 8, 16 or 32; `arrivals` holds one zero a row tile and is zero again afterwards.
extern "C" int sk_nvfp4_gemm(const void* x, int ldx, const void* w, void* out, float alpha, void* partial, void* arrivals,
                                int m, int n, int k, int rows, int fp16, int grid, int pdl, void* stream) {
  if (m < 1 || m > 32 || n < 1 || k < 16 || k % 16 || grid < 1) return cudaErrorInvalidValue;
  Args args{x, static_cast<const uint8_t*>(w), out, static_cast<float*>(partial), static_cast<int*>(arrivals), alpha, m, n, k, ldx,
            (n + 16 * rows - 1) / (16 * rows), (k + kBlockK - 1) / kBlockK};
  auto s = static_cast<cudaStream_t>(stream);
  return fp16 ? dispatch<Fp16>(args, rows, grid, pdl, s) : dispatch<Bf16>(args, rows, grid, pdl, s);
}
