// Convolution of channels-last images as an implicit GEMM: the patches are never stored.
//
// A block computes 128 pixels of OUTPUTS output channels, 64 input channels of one tap at a time.
// Grid (ceil(pixels / 128), ceil(outputs / OUTPUTS)), 256 threads, STAGES stages of dynamic shared
// memory.

#include "results.cuh"

constexpr int THREADS = WRITERS;
// 16-byte chunks per row of a tile: 64 numbers.
constexpr int CHUNKS = 8;
constexpr int STAGES = 2;

// x (batch, height >> up, width >> up, channels) enlarged twofold by repeating pixels with `up`, w
// (outputs, side, side, channels), bias (outputs), residual and out
// (batch, height, width, outputs). Zero padding; a null `residual` is none. Channels are a multiple
// of 8. A warp computes ROWS x COLUMNS.
template <int OUTPUTS, int ROWS, int COLUMNS>
__device__ void conv(const bf16 *x, const bf16 *w, const bf16 *bias, const bf16 *residual, bf16 *out, int pixels,
                     int height, int width, int channels, int outputs, int side, int up) {
  static_assert(PIXELS / ROWS * (OUTPUTS / COLUMNS) == THREADS / 32, "all warps have a part");
  constexpr int STAGE = (PIXELS + OUTPUTS) * CHUNKS, ACROSS = COLUMNS / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = blockIdx.x * PIXELS, first_output = blockIdx.y * OUTPUTS;
  const int parts = (channels + 63) / 64, steps = side * side * parts;
  uint4 *const shared = dynamic_shared();

  // A thread loads one chunk of every 32nd row.
  const int chunk = threadIdx.x % CHUNKS, load_row = threadIdx.x / CHUNKS;
  int image[PIXELS / 32], y[PIXELS / 32], column[PIXELS / 32];
#pragma unroll
  for (int i = 0; i < PIXELS / 32; i++) {
    const int pixel = first + load_row + 32 * i;
    image[i] = pixel / (height * width);
    // Pixels that do not exist are outside of all images.
    y[i] = pixel < pixels ? pixel / width % height : -2 * side;
    column[i] = pixel % width;
  }
  const auto load = [&](int step) {
    const int tap = step / parts, channel = step % parts * 64 + chunk * 8;
    const int down = tap / side - side / 2, right = tap % side - side / 2;
    uint4 *const stage = shared + step % STAGES * STAGE;
    const int place = chunk ^ load_row % 8;
#pragma unroll
    for (int i = 0; i < PIXELS / 32; i++) {
      const int yy = y[i] + down, xx = column[i] + right;
      const bool exists = unsigned(yy) < unsigned(height) && unsigned(xx) < unsigned(width) && channel < channels;
      const size_t from = (size_t(image[i] * (height >> up) + (yy >> up)) * (width >> up) + (xx >> up)) * channels;
      copy_async(stage + (load_row + 32 * i) * CHUNKS + place, x + (exists ? from + channel : 0), exists);
    }
#pragma unroll
    for (int i = 0; i < OUTPUTS / 32; i++) {
      const int output = first_output + load_row + 32 * i;
      const bool exists = output < outputs && channel < channels;
      const size_t from = (size_t(output) * side * side + tap) * channels + channel;
      copy_async(stage + (PIXELS + load_row + 32 * i) * CHUNKS + place, w + (exists ? from : 0), exists);
    }
  };

  float sums[ROWS / 16 * ACROSS][4] = {};
  const int warp_row = warp / (OUTPUTS / COLUMNS) * ROWS, warp_column = warp % (OUTPUTS / COLUMNS) * COLUMNS;
  const auto row_of = [=](int n) { return warp_row + n / ACROSS * 16 + lane / 4; };
  const auto column_of = [=](int n) { return warp_column + n % ACROSS * 8 + lane % 4 * 2; };
  load(0);
  for (int step = 0; step < steps; step++) {
    wait_for_copies();
    __syncthreads();
    if (step + 1 < steps) load(step + 1);
    const uint4 *const stage = shared + step % STAGES * STAGE;
    const auto at = [=](int row, int chunk) { return stage + row * CHUNKS + (chunk ^ row % 8); };
#pragma unroll
    for (int k = 0; k < 4; k++) {
      unsigned a[ROWS / 16][4];
#pragma unroll
      for (int i = 0; i < ROWS / 16; i++) load_matrices(a[i], at(warp_row + 16 * i + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int j = 0; j < COLUMNS / 16; j++) {
        unsigned b[4];
        load_matrices(b, at(PIXELS + warp_column + 16 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < ROWS / 16; i++) {
          multiply_add(sums[ACROSS * i + 2 * j], a[i], b[0], b[1]);
          multiply_add(sums[ACROSS * i + 2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // Through shared memory, so that a thread reads and writes 16 bytes of a pixel.
  __syncthreads();
  bf16 *const results = reinterpret_cast<bf16 *>(shared);
  keep<OUTPUTS>(results, sums, bias, first_output, outputs, row_of, column_of);
  __syncthreads();
  const auto pixel_of = [=](int row) { return first + row < pixels ? first + row : -1; };
  write_results<OUTPUTS>(results, residual, out, first_output, outputs, pixel_of);
}

#define CONV(OUTPUTS, ROWS, COLUMNS)                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS) conv_bf16_##OUTPUTS(                                           \
      const bf16 *x, const bf16 *w, const bf16 *bias, const bf16 *residual, bf16 *out, const int pixels,               \
      const int height, const int width, const int channels, const int outputs, const int side, const int up) {        \
    conv<OUTPUTS, ROWS, COLUMNS>(x, w, bias, residual, out, pixels, height, width, channels, outputs, side, up);       \
  }

CONV(256, 64, 64)
CONV(32, 16, 32)
