// Sums over the threads of a warp and of a block.

#ifndef BLOCK_CUH
#define BLOCK_CUH

#include "ptx.cuh"

constexpr int THREADS = 256;

// The sum over the lanes of a warp, in every lane.
__device__ inline float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}

// The sum over the threads of a block, in every thread.
__device__ inline float block_sum(float x) {
  __shared__ float warps[THREADS / 32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < THREADS / 32; warp++) sum += warps[warp];
  // Before the next sum overwrites them.
  __syncthreads();
  return sum;
}

#endif
