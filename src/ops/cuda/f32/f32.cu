// Operations in f32, and their gradients by the gradient dy of the result. Sums are taken in a
// fixed order, except those of table rows that were selected more than once.

#include "../block.cuh"

#include <cstdint>

constexpr int WARPS = THREADS / 32;

__device__ inline int64_t thread() { return int64_t(blockIdx.x) * THREADS + threadIdx.x; }

// The row of a warp.
__device__ inline int64_t warp_row() { return int64_t(blockIdx.x) * WARPS + threadIdx.x / 32; }

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// silu(gate) * up.
extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_f32(const float *gate, const float *up, float *y, int64_t count) {
  const int64_t i = thread();
  if (i < count) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu_back_f32(const float *gate, const float *up, const float *dy, float *dgate, float *dup, int64_t count) {
  const int64_t i = thread();
  if (i >= count) return;
  const float g = gate[i], s = sigmoid(g);
  dup[i] = dy[i] * g * s;
  dgate[i] = dy[i] * up[i] * s * (1.0f + g * (1.0f - s));
}

// The kinds of GELU: the factor of x, and the slope of the product.
struct Gated {
  float gate, slope;
};

__device__ inline Gated gelu(float x, int kind) {
  if (kind == 0) {
    // The tanh approximation: (1 + tanh(u)) / 2 = sigmoid(2 u).
    const float twice = 2.0f * 0.7978845608f, s = sigmoid(twice * (x + 0.044715f * x * x * x));
    return {s, s + x * s * (1.0f - s) * twice * (1.0f + 3.0f * 0.044715f * x * x)};
  }
  if (kind == 1) {
    const float below = 0.5f * (1.0f + erff(x * 0.7071067812f));
    return {below, below + x * 0.3989422804f * expf(-0.5f * x * x)};
  }
  const float s = sigmoid(1.702f * x);
  return {s, s + x * 1.702f * s * (1.0f - s)};
}

extern "C" __global__ void __launch_bounds__(THREADS) gelu_f32(const float *x, float *y, int64_t count, int kind) {
  const int64_t i = thread();
  if (i < count) y[i] = x[i] * gelu(x[i], kind).gate;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gelu_back_f32(const float *x, const float *dy, float *dx, int64_t count, int kind) {
  const int64_t i = thread();
  if (i < count) dx[i] = dy[i] * gelu(x[i], kind).slope;
}

// y (..., width) += bias (width).
extern "C" __global__ void __launch_bounds__(THREADS)
    add_bias_f32(float *y, const float *bias, int64_t count, int width) {
  const int64_t i = thread();
  if (i < count) y[i] += bias[i % width];
}

// The sums of the columns of x (rows, width), in parts of `part` rows: (parts, width). A block sums
// 32 columns of a part.
extern "C" __global__ void __launch_bounds__(THREADS)
    column_sums_f32(const float *x, float *sums, int64_t rows, int width, int part) {
  __shared__ float lines[WARPS][32];
  const int lane = threadIdx.x % 32, line = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  const int64_t first = int64_t(blockIdx.y) * part, end = first + part < rows ? first + part : rows;
  float sum = 0.0f;
  if (column < width)
    for (int64_t row = first + line; row < end; row += WARPS) sum += x[row * width + column];
  lines[line][lane] = sum;
  __syncthreads();
  if (line > 0 || column >= width) return;
  for (int other = 1; other < WARPS; other++) sum += lines[other][lane];
  sums[int64_t(blockIdx.y) * width + column] = sum;
}

// The mean of a row, zero unless `centred`, and the inverse deviation from it.
template <bool CENTRED> __device__ inline float2 moments(const float *x, int width, float eps) {
  const int lane = threadIdx.x % 32;
  float mean = 0.0f, squares = 0.0f;
  if (CENTRED) {
    for (int i = lane; i < width; i += 32) mean += x[i];
    mean = warp_sum(mean) / width;
  }
  for (int i = lane; i < width; i += 32) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, 1.0f / sqrtf(warp_sum(squares) / width + eps)};
}

// One warp per row of x (rows, width); without centring there is no bias.
template <bool CENTRED>
__device__ inline void norm(const float *x, const float *weight, const float *bias, float *y, int64_t rows, int width,
                            float eps) {
  const int64_t row = warp_row();
  if (row >= rows) return;
  x += row * width, y += row * width;
  const float2 m = moments<CENTRED>(x, width, eps);
  for (int i = threadIdx.x % 32; i < width; i += 32)
    y[i] = (x[i] - m.x) * m.y * weight[i] + (CENTRED ? bias[i] : 0.0f);
}

// The columns of `along` sum to the gradient of the weights.
template <bool CENTRED>
__device__ inline void norm_back(const float *x, const float *weight, const float *dy, float *dx, float *along,
                                 int64_t rows, int width, float eps) {
  const int64_t row = warp_row();
  if (row >= rows) return;
  x += row * width, dy += row * width, dx += row * width, along += row * width;
  const float2 m = moments<CENTRED>(x, width, eps);
  float shift = 0.0f, slope = 0.0f;
  for (int i = threadIdx.x % 32; i < width; i += 32) {
    const float normed = (x[i] - m.x) * m.y;
    along[i] = dy[i] * normed;
    shift += dy[i] * weight[i];
    slope += along[i] * weight[i];
  }
  shift = CENTRED ? warp_sum(shift) / width : 0.0f;
  slope = warp_sum(slope) / width;
  for (int i = threadIdx.x % 32; i < width; i += 32)
    dx[i] = m.y * (dy[i] * weight[i] - shift - (x[i] - m.x) * m.y * slope);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_f32(const float *x, const float *weight, float *y, int64_t rows, int width, float eps) {
  norm<false>(x, weight, nullptr, y, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm_f32(const float *x, const float *weight, const float *bias, float *y, int64_t rows, int width, float eps) {
  norm<true>(x, weight, bias, y, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_back_f32(const float *x, const float *weight, const float *dy, float *dx, float *along, int64_t rows,
                      int width, float eps) {
  norm_back<false>(x, weight, dy, dx, along, rows, width, eps);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm_back_f32(const float *x, const float *weight, const float *dy, float *dx, float *along, int64_t rows,
                        int width, float eps) {
  norm_back<true>(x, weight, dy, dx, along, rows, width, eps);
}

// Rotates the halves of each head of x (rows, heads, head_dim) by the angles
// (positions, head_dim / 2) of its row, modulo the number of positions; back if sign is -1.
extern "C" __global__ void __launch_bounds__(THREADS)
    rope_f32(const float *x, const float *cosines, const float *sines, float *y, int64_t count, int positions, int heads,
             int head_dim, float sign) {
  const int64_t i = thread();
  if (i >= count) return;
  const int half = head_dim / 2, at = i % half;
  const int64_t head = i / half, angle = head / heads % positions * half + at, first = head * head_dim + at;
  const float a = x[first], b = x[first + half], c = cosines[angle], s = sines[angle] * sign;
  y[first] = a * c - b * s;
  y[first + half] = b * c + a * s;
}

// Softmax, in place, of the rows of x (rows, keys), times `scale`, over the keys that the mask
// keeps, if any. Rows are (batch, head, query); the mask is (queries, keys), or one for every
// `batch` rows. One warp per row.
extern "C" __global__ void __launch_bounds__(THREADS)
    softmax_f32(float *x, const uint8_t *mask, int64_t rows, int keys, int queries, int batch, float scale) {
  const int64_t row = warp_row();
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  x += row * keys;
  if (mask) mask += ((batch ? row / batch : 0) * queries + row % queries) * keys;
  float most = -INFINITY;
  for (int i = lane; i < keys; i += 32)
    if (!mask || mask[i]) most = fmaxf(most, x[i] * scale);
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, step));
  float sum = 0.0f;
  for (int i = lane; i < keys; i += 32) {
    const bool kept = !mask || mask[i];
    x[i] = kept ? expf(x[i] * scale - most) : 0.0f;
    sum += x[i];
  }
  sum = warp_sum(sum);
  for (int i = lane; i < keys; i += 32) x[i] = sum == 0.0f ? 0.0f : x[i] / sum;
}

// Turns the gradients of the softmax into those of x, in place.
extern "C" __global__ void __launch_bounds__(THREADS)
    softmax_back_f32(const float *weights, float *dx, int64_t rows, int keys, float scale) {
  const int64_t row = warp_row();
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  weights += row * keys, dx += row * keys;
  float mean = 0.0f;
  for (int i = lane; i < keys; i += 32) mean += weights[i] * dx[i];
  mean = warp_sum(mean);
  for (int i = lane; i < keys; i += 32) dx[i] = scale * weights[i] * (dx[i] - mean);
}

// The logarithm of the sum of the exponentials of a row.
__device__ inline float log_sum_exp(const float *x, int width) {
  float most = -INFINITY, sum = 0.0f;
  for (int i = threadIdx.x % 32; i < width; i += 32) most = fmaxf(most, x[i]);
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, step));
  for (int i = threadIdx.x % 32; i < width; i += 32) sum += expf(x[i] - most);
  return most + logf(warp_sum(sum));
}

// -log softmax(x)[target] of every row (rows, width).
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_f32(const float *x, const unsigned *targets, float *losses, int64_t rows, int width) {
  const int64_t row = warp_row();
  if (row >= rows) return;
  x += row * width;
  const float all = log_sum_exp(x, width);
  if (threadIdx.x % 32 == 0) losses[row] = all - x[targets[row]];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_back_f32(const float *x, const unsigned *targets, const float *dlosses, float *dx, int64_t rows,
                           int width) {
  const int64_t row = warp_row();
  if (row >= rows) return;
  x += row * width, dx += row * width;
  const float all = log_sum_exp(x, width), dloss = dlosses[row];
  for (int i = threadIdx.x % 32; i < width; i += 32) {
    const float target = i == targets[row] ? 1.0f : 0.0f;
    dx[i] = (expf(x[i] - all) - target) * dloss;
  }
}

// Adds the rows of dy (rows, width) to the rows of dx that they were selected from. One block per
// row.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_rows_f32(const float *dy, const unsigned *ids, float *dx, int width) {
  dy += int64_t(blockIdx.x) * width, dx += int64_t(ids[blockIdx.x]) * width;
  for (int i = threadIdx.x; i < width; i += THREADS) atomicAdd(dx + i, dy[i]);
}

// Sizes of a convolution.
struct Geometry {
  int channels, height, width, out_height, out_width, side, stride, top, left;
};

// Patches (batch, channels * side * side, out_height * out_width) of images
// (batch, channels, height, width).
extern "C" __global__ void __launch_bounds__(THREADS)
    unfold_f32(const float *x, float *patches, int64_t count, const Geometry g) {
  const int64_t i = thread();
  if (i >= count) return;
  const int area = g.out_height * g.out_width, place = i % area, taps = g.side * g.side;
  const int64_t line = i / area, channel = line / taps;
  const int tap = line % taps;
  const int row = place / g.out_width * g.stride + tap / g.side - g.top;
  const int column = place % g.out_width * g.stride + tap % g.side - g.left;
  const bool inside = row >= 0 && row < g.height && column >= 0 && column < g.width;
  patches[i] = inside ? x[(channel * g.height + row) * g.width + column] : 0.0f;
}

// The gradients of the images from those of their patches: the sum over all patches that hold a
// pixel.
extern "C" __global__ void __launch_bounds__(THREADS)
    fold_f32(const float *patches, float *dx, int64_t count, const Geometry g) {
  const int64_t i = thread();
  if (i >= count) return;
  const int column = i % g.width, row = i / g.width % g.height, taps = g.side * g.side;
  const int64_t channel = i / (int64_t(g.width) * g.height), area = int64_t(g.out_height) * g.out_width;
  float sum = 0.0f;
  for (int tap = 0; tap < taps; tap++) {
    const int y = row + g.top - tap / g.side, x = column + g.left - tap % g.side;
    if (y < 0 || x < 0 || y % g.stride || x % g.stride) continue;
    if (y / g.stride >= g.out_height || x / g.stride >= g.out_width) continue;
    sum += patches[(channel * taps + tap) * area + y / g.stride * g.out_width + x / g.stride];
  }
  dx[i] = sum;
}

// y (batch, channels, area) += bias (channels).
extern "C" __global__ void __launch_bounds__(THREADS)
    add_channels_f32(float *y, const float *bias, int64_t count, int channels, int area) {
  const int64_t i = thread();
  if (i < count) y[i] += bias[i / area % channels];
}

// The mean of the numbers of a block's group, and their inverse deviation.
__device__ inline float2 block_moments(const float *x, int count, float eps) {
  float sum = 0.0f, squares = 0.0f;
  for (int i = threadIdx.x; i < count; i += THREADS) sum += x[i];
  const float mean = block_sum(sum) / count;
  for (int i = threadIdx.x; i < count; i += THREADS) squares += (x[i] - mean) * (x[i] - mean);
  return {mean, 1.0f / sqrtf(block_sum(squares) / count + eps)};
}

// Images (batch, channels, area), normalised over `size` channels each: one block per group of an
// image.
extern "C" __global__ void __launch_bounds__(THREADS)
    group_norm_f32(const float *x, const float *weight, const float *bias, float *y, int channels, int size, int area,
                   float eps, int silu) {
  const int first = blockIdx.x % (channels / size) * size, count = size * area;
  x += int64_t(blockIdx.x) * count, y += int64_t(blockIdx.x) * count;
  const float2 m = block_moments(x, count, eps);
  for (int i = threadIdx.x; i < count; i += THREADS) {
    const int channel = first + i / area;
    const float z = (x[i] - m.x) * m.y * weight[channel] + bias[channel];
    y[i] = silu ? z * sigmoid(z) : z;
  }
}

// The gradients of the weights and biases are the sums of dweight and dbias (batch, channels) over
// the batch.
extern "C" __global__ void __launch_bounds__(THREADS)
    group_norm_back_f32(const float *x, const float *weight, const float *bias, const float *dy, float *dx, float *dweight,
                        float *dbias, int channels, int size, int area, float eps, int silu) {
  const int first = blockIdx.x % (channels / size) * size, count = size * area;
  const int64_t begin = int64_t(blockIdx.x) * count, channel_of = int64_t(blockIdx.x) * size;
  x += begin, dy += begin, dx += begin;
  const float2 m = block_moments(x, count, eps);
  float slope = 0.0f, shift = 0.0f;
  for (int k = 0; k < size; k++) {
    const float w = weight[first + k], b = bias[first + k];
    float along = 0.0f, total = 0.0f;
    for (int i = k * area + threadIdx.x; i < (k + 1) * area; i += THREADS) {
      const float normed = (x[i] - m.x) * m.y, z = normed * w + b, s = sigmoid(z);
      const float dz = silu ? dy[i] * s * (1.0f + z * (1.0f - s)) : dy[i];
      dx[i] = dz * w;
      along += dz * normed;
      total += dz;
    }
    along = block_sum(along), total = block_sum(total);
    if (threadIdx.x == 0) dweight[channel_of + k] = along, dbias[channel_of + k] = total;
    slope += along * w, shift += total * w;
  }
  slope /= count, shift /= count;
  for (int k = 0; k < size; k++)
    for (int i = k * area + threadIdx.x; i < (k + 1) * area; i += THREADS)
      dx[i] = m.y * (dx[i] - shift - (x[i] - m.x) * m.y * slope);
}
