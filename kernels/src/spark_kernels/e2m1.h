// E2M1 (OCP MX v1.0: sign, two exponent bits, one mantissa bit; 0, 0.5, 1, 1.5, 2, 3, 4, 6). Plain C++ outside nvcc, so that
// tests can compare the rounding with NVIDIA's cuda_fp4.hpp on every float without a GPU.
#pragma once
#include <cstdint>

// The conversion instructions exist where the target carries an architecture- or family-specific suffix (100a, 120f, 121a...).
// A plain 12.0 or 12.1 build would not fail in NVIDIA's own header: it would quietly run 150 instructions instead of one.
#if defined(__CUDA_ARCH_FAMILY_SPECIFIC__) || defined(__CUDA_ARCH_SPECIFIC__)
#define SK_E2M1_HARDWARE (__CUDA_ARCH__ >= 1000)
#else
#define SK_E2M1_HARDWARE 0
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#error "plain SM 10.x and 12.x targets have no E2M1 conversion: build for 120f (GB10, RTX 50, RTX PRO 6000) or 121a"
#endif
#endif

#if defined(__CUDACC__)
#define SK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SK_HOST_DEVICE inline
#endif

namespace spark_kernels {

// Nearest, ties to the even code, saturating; NaN of either sign becomes +6, as in cuda_fp4.hpp. Takes the bits of a float:
// for magnitudes, integers compare as floats do. A tie goes up where the code below it is odd (>=), else down (>).
SK_HOST_DEVICE uint32_t e2m1_from_bits(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t code = uint32_t(magnitude > 0x3e800000u)     // 0.25: between 0 and 0.5
                        + uint32_t(magnitude >= 0x3f400000u)  // 0.75
                        + uint32_t(magnitude > 0x3fa00000u)   // 1.25
                        + uint32_t(magnitude >= 0x3fe00000u)  // 1.75
                        + uint32_t(magnitude > 0x40200000u)   // 2.5
                        + uint32_t(magnitude >= 0x40600000u)  // 3.5
                        + uint32_t(magnitude > 0x40a00000u);  // 5
  const uint32_t sign = magnitude > 0x7f800000u ? 0u : bits >> 28 & 8u;
  return sign | code;
}

}  // namespace spark_kernels
