// Residual add + RMSNorm with a float32 weight (w or 1 + w) + NVFP4 quantisation in one pass. Arithmetic, step by step:
// reference.py. Every operation is a correctly rounded IEEE one in a fixed order, so the result is reproducible to the bit.
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../device.cuh"
#include "../e2m1.h"

namespace {

using namespace spark_kernels;

constexpr int kGroup = 16;         // elements of one block scale: one thread's share
constexpr int kMaxThreads = 1024;  // hidden sizes up to 16384

struct Args {
  const uint4* x;
  const uint4* residual;
  const void* weight;
  const float* global_scale;
  uint4* residual_out;
  uint64_t* codes;
  uint8_t* scales;
  float eps, weight_offset;
  int rows, groups, swizzled, weight_bf16;
};

// Two floats to two E2M1 codes, the first in the low nibble.
__device__ __forceinline__ uint32_t e2m1x2(float lo, float hi) {
#if SK_E2M1_HARDWARE
  uint32_t codes;
  asm("{\n .reg .b8 pair;\n cvt.rn.satfinite.e2m1x2.f32 pair, %2, %1;\n cvt.u32.u8 %0, pair;\n}" : "=r"(codes) : "f"(lo), "f"(hi));
  return codes;
#else
  return e2m1_from_bits(__float_as_uint(lo)) | e2m1_from_bits(__float_as_uint(hi)) << 4;
#endif
}

__device__ __forceinline__ void widen(uint32_t pair, float& lo, float& hi) {
  lo = __uint_as_float(pair << 16);
  hi = __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ uint32_t narrow(float lo, float hi) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Plain loads: under programmatic dependent launch the previous kernel may have written x (see nvfp4/kernel.cu).
__device__ __forceinline__ uint4 load(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// Offset of a block scale in the 128 x 4 tiles that tensor cores read (PTX ISA, tcgen05 scale factor layout 4X).
__device__ __forceinline__ int64_t swizzle(int row, int group, int groups) {
  const int64_t tile = int64_t(row / 128) * ((groups + 3) / 4) + group / 4;
  return tile * 512 + row % 32 * 16 + row % 128 / 32 * 4 + group % 4;
}

template <bool kResidual>
__global__ void __launch_bounds__(kMaxThreads) add_rmsnorm_nvfp4(const Args args) {
  __shared__ float warp_sums[2][kMaxThreads / 32];
  const int group = threadIdx.x, warps = blockDim.x / 32;
  const bool live = group < args.groups;
  const float count = float(args.groups * kGroup);

  float w[kGroup] = {};
  if (live) {
    if (args.weight_bf16) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 v = __ldg(static_cast<const uint4*>(args.weight) + group * 2 + half);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) widen(words[i], w[half * 8 + 2 * i], w[half * 8 + 2 * i + 1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; i += 4) {
        const float4 v = __ldg(static_cast<const float4*>(args.weight) + (group * kGroup + i) / 4);
        w[i] = v.x, w[i + 1] = v.y, w[i + 2] = v.z, w[i + 3] = v.w;
      }
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) w[i] = __fadd_rn(w[i], args.weight_offset);
  }
  let_next_kernel_start();
  wait_for_previous_kernel();
  const float global_scale = *args.global_scale;

  const int padded_groups = (args.groups + 3) / 4 * 4, padded_rows = args.swizzled ? (args.rows + 127) / 128 * 128 : args.rows;
  int parity = 0;
  for (int row = blockIdx.x; row < padded_rows; row += gridDim.x, parity ^= 1) {
    if (row >= args.rows) {  // padding of the swizzled layout: zero, as the GEMM may read it
      for (int g = threadIdx.x; g < padded_groups; g += blockDim.x) args.scales[swizzle(row, g, args.groups)] = 0;
      continue;
    }
    float v[kGroup] = {};
    float sum = 0.0f;
    if (live) {
      const int64_t at = (int64_t(row) * args.groups + group) * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 in = load(args.x + at + half);
        const uint32_t words[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) widen(words[i], v[half * 8 + 2 * i], v[half * 8 + 2 * i + 1]);
        if constexpr (kResidual) {
          const uint4 add = load(args.residual + at + half);
          const uint32_t adds[4] = {add.x, add.y, add.z, add.w};
          uint32_t out[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float lo, hi;
            widen(adds[i], lo, hi);
            v[half * 8 + 2 * i] = __fadd_rn(v[half * 8 + 2 * i], lo);
            v[half * 8 + 2 * i + 1] = __fadd_rn(v[half * 8 + 2 * i + 1], hi);
            out[i] = narrow(v[half * 8 + 2 * i], v[half * 8 + 2 * i + 1]);
          }
          args.residual_out[at + half] = make_uint4(out[0], out[1], out[2], out[3]);
        }
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) sum = __fadd_rn(sum, __fmul_rn(v[i], v[i]));
    }
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, lane));
    if (threadIdx.x % 32 == 0) warp_sums[parity][threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < warps; ++i) total = __fadd_rn(total, warp_sums[parity][i]);
    const float inverse = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(total, count), args.eps)));

    if (live) {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kGroup; i += 2) {
        // The norm's result is bfloat16 before it is quantised, as in the two separate operations.
        widen(narrow(__fmul_rn(__fmul_rn(v[i], inverse), w[i]), __fmul_rn(__fmul_rn(v[i + 1], inverse), w[i + 1])), v[i], v[i + 1]);
        largest = fmaxf(largest, fmaxf(fabsf(v[i]), fabsf(v[i + 1])));
      }
      constexpr float kSixth = 1.0f / 6.0f;
      const __nv_fp8_storage_t scale = __nv_cvt_float_to_fp8(__fmul_rn(global_scale, __fmul_rn(largest, kSixth)), __NV_SATFINITE, __NV_E4M3);
      const float scale_value = __half2float(__half(__nv_cvt_fp8_to_halfraw(scale, __NV_E4M3)));
      const float multiplier = scale_value == 0.0f ? 0.0f : __fdiv_rn(global_scale, scale_value);
      uint32_t words[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < kGroup; i += 2)
        words[i / 8] |= e2m1x2(__fmul_rn(v[i], multiplier), __fmul_rn(v[i + 1], multiplier)) << (i % 8 * 4);
      args.codes[int64_t(row) * args.groups + group] = uint64_t(words[1]) << 32 | words[0];
      args.scales[args.swizzled ? swizzle(row, group, args.groups) : int64_t(row) * args.groups + group] = scale;
    } else if (args.swizzled && group < padded_groups) {
      args.scales[swizzle(row, group, args.groups)] = 0;
    }
  }
}

}  // namespace

// Returns a cudaError_t. x, residual, residual_out: bfloat16 [rows, hidden]; residual and residual_out may be NULL together.
// weight: float32 [hidden], or bfloat16 if weight_bf16; global_scale: float32 [1] on the device; codes: [rows, hidden / 2]; scales: E4M3 [rows, hidden / 16],
// or whole 128 x 4 tiles if swizzled. All 16-byte aligned and contiguous; `grid` thread blocks.
extern "C" int sk_rmsnorm_fp4(const void* x, const void* residual, const void* weight, const void* global_scale,
                              void* residual_out, void* codes, void* scales, float eps, float weight_offset, int rows,
                              int hidden, int swizzled, int weight_bf16, int grid, int pdl, void* stream) {
  const int groups = hidden / kGroup, padded_groups = (groups + 3) / 4 * 4;
  if (rows < 1 || hidden < kGroup || hidden % kGroup || padded_groups > kMaxThreads || grid < 1) return cudaErrorInvalidValue;
  const Args args{static_cast<const uint4*>(x), static_cast<const uint4*>(residual), weight,
                  static_cast<const float*>(global_scale), static_cast<uint4*>(residual_out), static_cast<uint64_t*>(codes),
                  static_cast<uint8_t*>(scales), eps, weight_offset, rows, groups, swizzled, weight_bf16};
  auto kernel = residual ? add_rmsnorm_nvfp4<true> : add_rmsnorm_nvfp4<false>;
  return launch_with(pdl, kernel, dim3(grid), (padded_groups + 31) / 32 * 32, 0, static_cast<cudaStream_t>(stream), args);
}
