// Compares e2m1.h with NVIDIA's host conversion (cuda_fp4.hpp) on every float.
//   e2m1_exhaustive sweep     all 2^32 bit patterns, on all cores; prints "patterns mismatches [first run of 65536]"
//   e2m1_exhaustive published the same sweep of two converters that were published for GB10, against e2m1.h: for each
//                             "name mismatches-of-numbers mismatches-of-NaNs"
//   e2m1_exhaustive bfloat16  NVIDIA's code of each of the 65536 bfloat16 patterns, one byte each
#include <cuda_fp4.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "e2m1.h"

namespace {

uint32_t nvidia(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return __nv_cvt_float_to_fp4(value, __NV_E2M1, cudaRoundNearest) & 0xfu;
}

// dgx-vllm's patch_nvfp4_utils_sw_e2m1.py, from its description: the right thresholds, and the sign bit as it is.
uint32_t dgx_software_e2m1(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  return (spark_kernels::e2m1_from_bits(std::min(magnitude, 0x7f800000u)) & 7u) | (bits >> 28 & 8u);
}

// dgx-vllm's nv_fp4_dummy.h: every threshold rounds up, two are misplaced, and the sign is "less than zero".
uint32_t dgx_dummy_header(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t code = uint32_t(magnitude >= 0x3e000000u)     // 0.125
                        + uint32_t(magnitude >= 0x3f400000u)   // 0.75
                        + uint32_t(magnitude >= 0x3fa00000u)   // 1.25
                        + uint32_t(magnitude >= 0x3fe00000u)   // 1.75
                        + uint32_t(magnitude >= 0x40200000u)   // 2.5
                        + uint32_t(magnitude >= 0x40600000u)   // 3.5
                        + uint32_t(magnitude >= 0x40900000u);  // 4.5
  // Every comparison with a NaN is false, and -0 is not below 0.
  const uint32_t counts = magnitude <= 0x7f800000u && magnitude != 0;
  return (code | (bits >> 28 & 8u)) * counts;
}

using Convert = uint32_t (*)(uint32_t);

struct Result {
  uint64_t patterns = 0, numbers = 0, nans = 0, first = ~0ull;
};

// By runs of 65536 patterns, without branches, so that it vectorises.
template <Convert kLeft, Convert kRight>
void sweep_range(uint64_t begin, uint64_t end, Result* out) {
  Result result;
  for (uint64_t run = begin; run < end; run += 65536) {
    uint32_t numbers = 0, nans = 0;
    for (uint32_t i = 0; i < 65536; ++i) {
      const uint32_t bits = uint32_t(run) + i, differ = kLeft(bits) != kRight(bits);
      const uint32_t nan = (bits & 0x7fffffffu) > 0x7f800000u;
      nans += differ & nan;
      numbers += differ & (nan ^ 1u);
    }
    result.patterns += 65536;
    result.numbers += numbers;
    result.nans += nans;
    if (numbers + nans) result.first = std::min(result.first, run);
  }
  *out = result;
}

template <Convert kLeft, Convert kRight>
Result sweep() {
  const uint64_t workers = std::max(1u, std::thread::hardware_concurrency());
  std::vector<Result> results(workers);
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < workers; ++i)
    threads.emplace_back(sweep_range<kLeft, kRight>, (i * 65536 / workers) << 16, ((i + 1) * 65536 / workers) << 16, &results[i]);
  Result total;
  for (uint64_t i = 0; i < workers; ++i) {
    threads[i].join();
    total.patterns += results[i].patterns;
    total.numbers += results[i].numbers;
    total.nans += results[i].nans;
    total.first = std::min(total.first, results[i].first);
  }
  return total;
}

void print_published(const char* name, const Result& result) {
  std::printf("%s %llu %llu\n", name, (unsigned long long)result.numbers, (unsigned long long)result.nans);
}

}  // namespace

int main(int argc, char** argv) {
  const char* mode = argc == 2 ? argv[1] : "";
  if (!std::strcmp(mode, "bfloat16")) {
    for (uint32_t bits = 0; bits < 65536; ++bits) std::putchar(int(nvidia(bits << 16)));
    return 0;
  }
  if (!std::strcmp(mode, "published")) {
    print_published("software_e2m1", sweep<dgx_software_e2m1, spark_kernels::e2m1_from_bits>());
    print_published("nv_fp4_dummy", sweep<dgx_dummy_header, spark_kernels::e2m1_from_bits>());
    return 0;
  }
  if (std::strcmp(mode, "sweep")) return 2;
  const Result total = sweep<spark_kernels::e2m1_from_bits, nvidia>();
  const uint64_t mismatches = total.numbers + total.nans;
  std::printf("%llu %llu", (unsigned long long)total.patterns, (unsigned long long)mismatches);
  if (mismatches) std::printf(" 0x%08llx", (unsigned long long)total.first);
  std::printf("\n");
  return 0;
}
