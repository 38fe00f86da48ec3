// What lies between matrix products. Bound by memory: every thread moves 16 bytes at a time, so
// rows are whole multiples of 8 numbers. Where the plain composition rounds to bf16 between its steps, so do these.

#include "ptx.cuh"

constexpr int THREADS = 256;
// Of group_norm_bf16, where a block has more to read.
constexpr int GROUP_THREADS = 1024;
constexpr int WIDTH = 8;

__device__ inline void read(float (&x)[WIDTH], const bf16 *from) {
  const uint4 bits = *reinterpret_cast<const uint4 *>(from);
  const unsigned pairs[WIDTH / 2] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < WIDTH / 2; i++) {
    // The upper half of an f32 is its bf16.
    x[2 * i] = __uint_as_float(pairs[i] << 16);
    x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000);
  }
}

__device__ inline void write(bf16 *to, const float (&x)[WIDTH]) {
  *reinterpret_cast<uint4 *>(to) = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

__device__ inline float rounded(float x) { return __uint_as_float(pack(x, 0.0f) << 16); }

// The sum over all threads of a block, for all of them.
template <int COUNT> __device__ float block_sum(float x) {
  __shared__ float warps[COUNT / 32];
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < COUNT / 32; warp++) sum += warps[warp];
  // Before the next sum takes their place.
  __syncthreads();
  return sum;
}

// out = x / sqrt(mean(x^2) + eps) * weight: one block per row.
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_bf16(const bf16 *x, const bf16 *weight, bf16 *out, int hidden, float eps) {
  x += size_t(blockIdx.x) * hidden;
  out += size_t(blockIdx.x) * hidden;
  float squares = 0.0f;
  for (int i = threadIdx.x * WIDTH; i < hidden; i += THREADS * WIDTH) {
    float a[WIDTH];
    read(a, x + i);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) squares += a[j] * a[j];
  }
  const float rms = sqrtf(block_sum<THREADS>(squares) / hidden + eps);
  for (int i = threadIdx.x * WIDTH; i < hidden; i += THREADS * WIDTH) {
    float a[WIDTH], w[WIDTH];
    read(a, x + i);
    read(w, weight + i);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) a[j] = rounded(a[j] / rms) * w[j];
    write(out + i, a);
  }
}

// Rotates the halves of each head of x (rows, heads, head_dim) by the angles (positions, head_dim / 2) of its row, that
// begin again after the last. One block per row; head_dim is a multiple of 8, so that a half is one of 4.
extern "C" __global__ void __launch_bounds__(THREADS)
    rope_bf16(const bf16 *x, const float *cosines, const float *sines, bf16 *out, int positions, int heads,
              int head_dim) {
  const int half = head_dim / 2, per_half = half / 4;
  const size_t row = size_t(blockIdx.x) * heads * head_dim, angles = size_t(blockIdx.x % positions) * half;
  for (int i = threadIdx.x; i < heads * per_half; i += THREADS) {
    const int at = i % per_half * 4;
    const size_t first = row + i / per_half * head_dim + at, second = first + half;
    const uint2 a = *reinterpret_cast<const uint2 *>(x + first), b = *reinterpret_cast<const uint2 *>(x + second);
    const float4 c = *reinterpret_cast<const float4 *>(cosines + angles + at);
    const float4 s = *reinterpret_cast<const float4 *>(sines + angles + at);
    const auto low = [](unsigned pair) { return __uint_as_float(pair << 16); };
    const auto high = [](unsigned pair) { return __uint_as_float(pair & 0xffff0000); };
    *reinterpret_cast<uint2 *>(out + first) =
        make_uint2(pack(low(a.x) * c.x - low(b.x) * s.x, high(a.x) * c.y - high(b.x) * s.y),
                   pack(low(a.y) * c.z - low(b.y) * s.z, high(a.y) * c.w - high(b.y) * s.w));
    *reinterpret_cast<uint2 *>(out + second) =
        make_uint2(pack(low(b.x) * c.x + low(a.x) * s.x, high(b.x) * c.y + high(a.x) * s.y),
                   pack(low(b.y) * c.z + low(a.y) * s.z, high(b.y) * c.w + high(a.y) * s.w));
  }
}

// gate * sigmoid(gate) * up: a thread per vector of 8 numbers.
extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_bf16(const bf16 *gates, const bf16 *ups, bf16 *out, long long vectors) {
  const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (i >= vectors) return;
  float gate[WIDTH], up[WIDTH];
  read(gate, gates + i * WIDTH);
  read(up, ups + i * WIDTH);
#pragma unroll
  for (int j = 0; j < WIDTH; j++) up[j] *= rounded(gate[j] / (1.0f + __expf(-gate[j])));
  write(out + i * WIDTH, up);
}

// Normalises each group of `channels` channels of x (batch, groups * channels, area), scales and shifts every channel,
// and with `silu` takes y * sigmoid(y). Grid (groups, batch), 1024 threads; area is a multiple of 8. Mean and variance
// take a pass each, for the difference of two large sums would have few digits left.
extern "C" __global__ void __launch_bounds__(GROUP_THREADS)
    group_norm_bf16(const bf16 *x, const bf16 *weight, const bf16 *bias, bf16 *out, int channels, long long area,
                    float eps, int silu) {
  const size_t start = (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * channels * area;
  const unsigned per_channel = area / WIDTH, vectors = channels * per_channel;
  const float count = float(channels) * area;
  x += start;
  out += start;
  float a[WIDTH], sum = 0.0f, squares = 0.0f;
  for (unsigned i = threadIdx.x; i < vectors; i += GROUP_THREADS) {
    read(a, x + size_t(i) * WIDTH);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) sum += a[j];
  }
  const float mean = block_sum<GROUP_THREADS>(sum) / count;
  for (unsigned i = threadIdx.x; i < vectors; i += GROUP_THREADS) {
    read(a, x + size_t(i) * WIDTH);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) squares += (a[j] - mean) * (a[j] - mean);
  }
  const float deviation = sqrtf(block_sum<GROUP_THREADS>(squares) / count + eps);
  for (unsigned i = threadIdx.x; i < vectors; i += GROUP_THREADS) {
    const int channel = blockIdx.x * channels + i / per_channel;
    const float w = __bfloat162float(weight[channel]), b = __bfloat162float(bias[channel]);
    read(a, x + size_t(i) * WIDTH);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
      a[j] = rounded(rounded((a[j] - mean) / deviation) * w) + b;
      if (silu) a[j] = rounded(a[j]), a[j] /= 1.0f + __expf(-a[j]);
    }
    write(out + size_t(i) * WIDTH, a);
  }
}
