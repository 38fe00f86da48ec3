// Writes the accumulators of a block of pixels and output channels to a channels-last image.

#ifndef RESULTS_CUH
#define RESULTS_CUH

#include "../ptx.cuh"

constexpr int PIXELS = 128, WRITERS = 256;
// Numbers per row of results in shared memory, padded by eight so that rows begin in different
// banks.
template <int OUTPUTS> constexpr int RESULT = OUTPUTS + 8;

// To shared memory, with the bias: sums[n] are two numbers from `column_of(n)` on, of `row_of(n)`
// and of the eighth row after it.
template <int OUTPUTS, int N, class RowOf, class ColumnOf>
__device__ inline void keep(bf16 *results, const float (&sums)[N][4], const bf16 *bias, int first_output, int outputs,
                            RowOf row_of, ColumnOf column_of) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    const int o = first_output + column_of(n);
    const float low = o < outputs ? __bfloat162float(bias[o]) : 0.0f;
    const float high = o + 1 < outputs ? __bfloat162float(bias[o + 1]) : 0.0f;
    unsigned *const to = reinterpret_cast<unsigned *>(results + row_of(n) * RESULT<OUTPUTS> + column_of(n));
    to[0] = pack(sums[n][0] + low, sums[n][1] + high);
    to[8 * RESULT<OUTPUTS> / 2] = pack(sums[n][2] + low, sums[n][3] + high);
  }
}

// From there to the image, plus `residual`, if any. Row i is pixel `pixel_of(i)`, none if negative.
// By 256 threads, after a barrier.
template <int OUTPUTS, class PixelOf>
__device__ inline void write_results(const bf16 *results, const bf16 *residual, bf16 *out, int first_output, int outputs,
                                     PixelOf pixel_of) {
  if (outputs % WIDTH == 0) {
    constexpr int VECTORS = OUTPUTS / WIDTH;
#pragma unroll 4
    for (int i = threadIdx.x; i < PIXELS * VECTORS; i += WRITERS) {
      const int row = i / VECTORS, o = i % VECTORS * WIDTH, pixel = pixel_of(row);
      if (pixel < 0 || first_output + o >= outputs) continue;
      const size_t at = size_t(pixel) * outputs + first_output + o;
      float sum[WIDTH], more[WIDTH];
      read(sum, results + row * RESULT<OUTPUTS> + o);
      if (residual) {
        read(more, residual + at);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) sum[j] += more[j];
      }
      write(out + at, sum);
    }
  } else {
    const int columns = min(outputs - first_output, OUTPUTS);
    for (int i = threadIdx.x; i < PIXELS * columns; i += WRITERS) {
      const int row = i / columns, o = i % columns, pixel = pixel_of(row);
      if (pixel < 0) continue;
      const size_t at = size_t(pixel) * outputs + first_output + o;
      const float more = residual ? __bfloat162float(residual[at]) : 0.0f;
      out[at] = __float2bfloat16(__bfloat162float(results[row * RESULT<OUTPUTS> + o]) + more);
    }
  }
}

#endif
