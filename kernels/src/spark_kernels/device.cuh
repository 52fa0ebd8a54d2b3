// What the kernels share: bulk copies into a ring of shared memory, and programmatic dependent launch.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace spark_kernels {

constexpr unsigned kFull = 0xffffffffu;

__device__ __forceinline__ uint32_t smem_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Barriers for the stages of one warp's ring; one lane calls this, then the warp synchronises.
__device__ __forceinline__ void init_barriers(uint64_t* bars, int count) {
  for (int s = 0; s < count; ++s) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(smem_address(bars + s)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Starts copying `bytes` (a multiple of 16) and arms the barrier for them; one lane calls this.
__device__ __forceinline__ void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
  uint64_t policy;  // weights are read once a step: they must not evict what is read again
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(smem_address(bar)), "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          smem_address(dst)),
      "l"(src), "r"(bytes), "r"(smem_address(bar)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nL: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@p bra D;\nbra L;\nD:\n}" ::"r"(
          smem_address(bar)),
      "r"(parity)
      : "memory");
}

// Programmatic dependent launch: everything before the wait may overlap the previous kernel's end, so it
// touches constants (weights) alone.
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Launches with as much dynamic shared memory as asked for; `early` allows programmatic dependent launch.
template <typename... Params, typename... Args>
cudaError_t launch_with(bool early, void (*kernel)(Params...), dim3 grid, int threads, int bytes, cudaStream_t stream, Args... args) {
  if (bytes > 48 * 1024) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = bytes, config.stream = stream;
  config.attrs = &overlap, config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int bytes, cudaStream_t stream, Args... args) {
  return launch_with(true, kernel, grid, threads, bytes, stream, args...);
}

}  // namespace spark_kernels
