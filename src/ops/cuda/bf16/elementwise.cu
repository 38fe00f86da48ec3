// Operations between the matrix products. Bound by memory: every thread moves 16 bytes at a time,
// so rows are multiples of 8 numbers. They round to bf16 where the composition of candle's
// operations does.

#include "../block.cuh"
#include "rows.cuh"

__device__ inline float rounded(float x) { return __uint_as_float(pack(x, 0.0f) << 16); }

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
  const float rms = sqrtf(block_sum(squares) / hidden + eps);
  for (int i = threadIdx.x * WIDTH; i < hidden; i += THREADS * WIDTH) {
    float a[WIDTH], w[WIDTH];
    read(a, x + i);
    read(w, weight + i);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) a[j] = rounded(a[j] / rms) * w[j];
    write(out + i, a);
  }
}

// Four numbers of the first half and four of the second, rotated by four angles.
__device__ inline void rotate(float (&a)[4], float (&b)[4], float4 c, float4 s) {
  const float cosines[4] = {c.x, c.y, c.z, c.w}, sines[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const float first = a[j] * cosines[j] - b[j] * sines[j];
    b[j] = b[j] * cosines[j] + a[j] * sines[j];
    a[j] = first;
  }
}

__device__ inline void read(float (&x)[4], const bf16 *from) {
  const uint2 bits = *reinterpret_cast<const uint2 *>(from);
  x[0] = __uint_as_float(bits.x << 16), x[1] = __uint_as_float(bits.x & 0xffff0000);
  x[2] = __uint_as_float(bits.y << 16), x[3] = __uint_as_float(bits.y & 0xffff0000);
}

__device__ inline void write(bf16 *to, const float (&x)[4]) {
  *reinterpret_cast<uint2 *>(to) = make_uint2(pack(x[0], x[1]), pack(x[2], x[3]));
}

// Rotates the halves of each head of x (rows, heads, head_dim) by the angles
// (positions, head_dim / 2) of its row, modulo the number of positions. One block per row; head_dim
// is a multiple of 8, half of it one of 4.
extern "C" __global__ void __launch_bounds__(THREADS)
    rope_bf16(const bf16 *x, const float *cosines, const float *sines, bf16 *out, int positions, int heads,
              int head_dim) {
  const int half = head_dim / 2, per_half = half / 4;
  const size_t row = size_t(blockIdx.x) * heads * head_dim, angles = size_t(blockIdx.x % positions) * half;
  for (int i = threadIdx.x; i < heads * per_half; i += THREADS) {
    const int at = i % per_half * 4;
    const size_t first = row + i / per_half * head_dim + at, second = first + half;
    float a[4], b[4];
    read(a, x + first);
    read(b, x + second);
    rotate(a, b, *reinterpret_cast<const float4 *>(cosines + angles + at),
           *reinterpret_cast<const float4 *>(sines + angles + at));
    write(out + first, a);
    write(out + second, b);
  }
}

// Splits a projection x (rows, tokens, heads + 2 kv_heads, head_dim), plus its bias, into rotated
// queries (rows, tokens, heads, head_dim), and rotated keys and values, which are appended to the
// caches of the rows. Angles (rows, tokens, head_dim / 2). Grid (tokens, rows).
extern "C" __global__ void __launch_bounds__(THREADS)
    heads_bf16(const bf16 *x, const bf16 *bias, const float *cosines, const float *sines, bf16 *queries,
               const __grid_constant__ Rows batch, int heads, int kv_heads, int head_dim) {
  const int half = head_dim / 2, per_half = half / 4, all = heads + 2 * kv_heads;
  const size_t token = size_t(blockIdx.y) * gridDim.x + blockIdx.x, angles = token * half;
  const size_t behind = size_t(batch.length[blockIdx.y] + blockIdx.x) * kv_heads * head_dim;
  x += token * all * head_dim;
  queries += token * heads * head_dim;
  bf16 *const keys = batch.k[blockIdx.y] + behind, *const values = batch.v[blockIdx.y] + behind;
  for (int i = threadIdx.x; i < all * per_half; i += THREADS) {
    const int head = i / per_half, at = i % per_half * 4;
    float a[4], b[4], more[4];
    read(a, x + head * head_dim + at);
    read(b, x + head * head_dim + half + at);
    if (bias) {
      read(more, bias + head * head_dim + at);
#pragma unroll
      for (int j = 0; j < 4; j++) a[j] = rounded(a[j] + more[j]);
      read(more, bias + head * head_dim + half + at);
#pragma unroll
      for (int j = 0; j < 4; j++) b[j] = rounded(b[j] + more[j]);
    }
    if (head < heads + kv_heads) {
      rotate(a, b, *reinterpret_cast<const float4 *>(cosines + angles + at),
             *reinterpret_cast<const float4 *>(sines + angles + at));
    }
    bf16 *const to = head < heads              ? queries + head * head_dim
                     : head < heads + kv_heads ? keys + (head - heads) * head_dim
                                               : values + (head - heads - kv_heads) * head_dim;
    write(to + at, a);
    write(to + half + at, b);
  }
}

// gate * sigmoid(gate) * up of rows of `columns` numbers, `gate_stride` and `up_stride` apart. One
// thread for each of the `vectors` of 8 numbers.
extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_bf16(const bf16 *gates, const bf16 *ups, bf16 *out, long long vectors, int columns, long long gate_stride,
                long long up_stride) {
  const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
  if (i >= vectors) return;
  const long long row = i / (columns / WIDTH);
  const int column = i % (columns / WIDTH) * WIDTH;
  float gate[WIDTH], up[WIDTH];
  read(gate, gates + row * gate_stride + column);
  read(up, ups + row * up_stride + column);
#pragma unroll
  for (int j = 0; j < WIDTH; j++) up[j] *= rounded(gate[j] / (1.0f + __expf(-gate[j])));
  write(out + i * WIDTH, up);
}

// Adds the sums of every group of `size` channels, a multiple of 8, of images x
// (batch, area, channels), and those of their squares, to sums (batch, groups, 2). A block reads
// `pixels` pixels: grid (ceil(area / pixels), batch). A thread sums a few hundred numbers in f32,
// the rest is f64: the mean square minus the squared mean cancels most digits.
extern "C" __global__ void __launch_bounds__(THREADS)
    group_sums_bf16(const bf16 *x, double *sums, int area, int channels, int size, int pixels) {
  // One thread for each of at most 256 groups.
  __shared__ float all[THREADS], squares[THREADS];
  const int chunks = channels / WIDTH, at_once = THREADS / chunks, groups = channels / size;
  all[threadIdx.x] = squares[threadIdx.x] = 0.0f;
  __syncthreads();
  const int chunk = threadIdx.x % chunks, first = blockIdx.x * pixels, end = min(first + pixels, area);
  x += size_t(blockIdx.y) * area * channels + chunk * WIDTH;
  if (threadIdx.x < at_once * chunks) {
    float sum = 0.0f, square = 0.0f;
#pragma unroll 4
    for (int pixel = first + threadIdx.x / chunks; pixel < end; pixel += at_once) {
      float a[WIDTH];
      read(a, x + size_t(pixel) * channels);
#pragma unroll
      for (int j = 0; j < WIDTH; j++) sum += a[j], square += a[j] * a[j];
    }
    atomicAdd(&all[chunk * WIDTH / size], sum);
    atomicAdd(&squares[chunk * WIDTH / size], square);
  }
  __syncthreads();
  if (threadIdx.x < groups) {
    double *const to = sums + (size_t(blockIdx.y) * groups + threadIdx.x) * 2;
    atomicAdd(to, double(all[threadIdx.x]));
    atomicAdd(to + 1, double(squares[threadIdx.x]));
  }
}

// Normalises every group by its sums, scales and shifts every channel and, with `silu`, applies y *
// sigmoid(y).
extern "C" __global__ void __launch_bounds__(THREADS)
    group_norm_bf16(const bf16 *x, const double *sums, const bf16 *weight, const bf16 *bias, bf16 *out, int area,
                    int channels, int size, int pixels, float eps, int silu) {
  const int chunks = channels / WIDTH, at_once = THREADS / chunks, groups = channels / size;
  if (threadIdx.x >= at_once * chunks) return;
  const int chunk = threadIdx.x % chunks, first = blockIdx.x * pixels, end = min(first + pixels, area);
  const size_t start = size_t(blockIdx.y) * area * channels + chunk * WIDTH;
  const double *const mine = sums + (size_t(blockIdx.y) * groups + chunk * WIDTH / size) * 2;
  const double count = double(area) * size, mean = mine[0] / count;
  const float shift = mean, scale = rsqrt(max(mine[1] / count - mean * mean, 0.0) + eps);
  float w[WIDTH], b[WIDTH];
  read(w, weight + chunk * WIDTH);
  read(b, bias + chunk * WIDTH);
#pragma unroll 4
  for (int pixel = first + threadIdx.x / chunks; pixel < end; pixel += at_once) {
    const size_t at = start + size_t(pixel) * channels;
    float a[WIDTH];
    read(a, x + at);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) {
      a[j] = rounded(rounded((a[j] - shift) * scale) * w[j]) + b[j];
      if (silu) a[j] = rounded(a[j]), a[j] /= 1.0f + __expf(-a[j]);
    }
    write(out + at, a);
  }
}
