// Compares e2m1.h with NVIDIA's host conversion (cuda_fp4.hpp) on every float.
//   e2m1_exhaustive sweep     all 2^32 bit patterns, on all cores; prints "patterns mismatches [first]"
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

struct Result {
  uint64_t patterns = 0, mismatches = 0, first = ~0ull;
};

void sweep(uint64_t begin, uint64_t end, Result* out) {
  Result result;
  for (uint64_t bits = begin; bits < end; ++bits) {
    ++result.patterns;
    if (spark_kernels::e2m1_from_bits(uint32_t(bits)) == nvidia(uint32_t(bits))) continue;
    ++result.mismatches;
    result.first = std::min(result.first, bits);
  }
  *out = result;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && !std::strcmp(argv[1], "bfloat16")) {
    for (uint32_t bits = 0; bits < 65536; ++bits) std::putchar(int(nvidia(bits << 16)));
    return 0;
  }
  if (argc != 2 || std::strcmp(argv[1], "sweep")) return 2;
  const uint64_t workers = std::max(1u, std::thread::hardware_concurrency());
  std::vector<Result> results(workers);
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < workers; ++i)
    threads.emplace_back(sweep, (i << 32) / workers, ((i + 1) << 32) / workers, &results[i]);
  Result total;
  for (uint64_t i = 0; i < workers; ++i) {
    threads[i].join();
    total.patterns += results[i].patterns;
    total.mismatches += results[i].mismatches;
    total.first = std::min(total.first, results[i].first);
  }
  std::printf("%llu %llu", (unsigned long long)total.patterns, (unsigned long long)total.mismatches);
  if (total.mismatches) std::printf(" 0x%08llx", (unsigned long long)total.first);
  std::printf("\n");
  return 0;
}
