// GGML's blocks to bf16. One thread for each of the `vectors` of 8 numbers.

#include <cuda_fp16.h>

#include "../ptx.cuh"

constexpr int THREADS = 256;

__device__ inline float half_at(const unsigned char *from) {
  return __half2float(*reinterpret_cast<const __half *>(from));
}

// Q8_0: blocks of a scale and 32 signed bytes.
extern "C" __global__ void __launch_bounds__(THREADS)
    q8_0_to_bf16(const unsigned char *blocks, bf16 *out, long long vectors) {
  const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (i >= vectors) return;
  const unsigned char *const block = blocks + i / 4 * 34;
  // Blocks are aligned to two bytes only.
  const unsigned short *const pairs = reinterpret_cast<const unsigned short *>(block + 2 + i % 4 * WIDTH);
  const float scale = half_at(block);
  float x[WIDTH];
#pragma unroll
  for (int j = 0; j < WIDTH / 2; j++) {
    const unsigned short pair = pairs[j];
    x[2 * j] = scale * static_cast<signed char>(pair & 255);
    x[2 * j + 1] = scale * static_cast<signed char>(pair >> 8);
  }
  write(out + i * WIDTH, x);
}

// Q4_0: blocks of a scale and 16 bytes, which hold 16 numbers in their lower and the next 16 in their upper halves. They
// stand for -8 to 7.
extern "C" __global__ void __launch_bounds__(THREADS)
    q4_0_to_bf16(const unsigned char *blocks, bf16 *out, long long vectors) {
  const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (i >= vectors) return;
  const unsigned char *const block = blocks + i / 4 * 18;
  const int part = i % 4, shift = part / 2 * 4;
  // Blocks are aligned to two bytes only.
  const unsigned short *const pairs = reinterpret_cast<const unsigned short *>(block + 2 + part % 2 * WIDTH);
  const float scale = half_at(block);
  float x[WIDTH];
#pragma unroll
  for (int j = 0; j < WIDTH / 2; j++) {
    const int pair = pairs[j] >> shift;
    x[2 * j] = scale * ((pair & 15) - 8);
    x[2 * j + 1] = scale * ((pair >> 8 & 15) - 8);
  }
  write(out + i * WIDTH, x);
}

// Q4_K: blocks of a scale of the scales, a scale of the minima, eight scales and eight minima of 6
// bits, and 256 numbers of 4 bits: each 32 bytes hold 32 numbers in their lower and the next 32 in
// their upper halves.
extern "C" __global__ void __launch_bounds__(THREADS)
    q4_k_to_bf16(const unsigned char *blocks, bf16 *out, long long vectors) {
  const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (i >= vectors) return;
  const unsigned char *const block = blocks + i / 32 * 144, *const six = block + 4;
  const int part = i % 32 / 4, from = i % 4 * WIDTH;
  // The upper two bits of the last four are stored with the first four.
  const int scale = part < 4 ? six[part] & 63 : six[part + 4] & 15 | six[part - 4] >> 6 << 4;
  const int least = part < 4 ? six[part + 4] & 63 : six[part + 4] >> 4 | six[part] >> 6 << 4;
  const float step = half_at(block) * scale, low = half_at(block + 2) * least;
  const uint2 bytes = *reinterpret_cast<const uint2 *>(block + 16 + part / 2 * 32 + from);
  const unsigned words[2] = {bytes.x, bytes.y};
  float x[WIDTH];
#pragma unroll
  for (int j = 0; j < WIDTH; j++) {
    const unsigned both = words[j / 4] >> j % 4 * 8 & 255;
    x[j] = step * (part % 2 ? both >> 4 : both & 15) - low;
  }
  write(out + i * WIDTH, x);
}
