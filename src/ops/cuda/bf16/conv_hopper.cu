// As conv.cu, for channels in multiples of 64 on compute capability 9.0: one warpgroup loads tiles
// in advance, two multiply.
//
// A block computes 8 rows of 16 pixels of 256 output channels. Grid (batch * ceil(height / 8) *
// ceil(width / 16), ceil(outputs / 256)), 384 threads, and sizeof(Shared) bytes of dynamic shared
// memory.

#include "hopper.cuh"
#include "results.cuh"

constexpr int CONSUMERS = WRITERS, THREADS = CONSUMERS + 128;
constexpr int OUTPUTS = 256, ACROSS = 16, DOWN = PIXELS / ACROSS;
constexpr int STAGES = 4;
// 16-byte chunks per row of a tile: 64 channels.
constexpr int CHUNKS = 8;

// Patches and filters of a step, and the barriers that say when they are full, and when they may be
// refilled.
struct Shared {
  uint4 x[STAGES][PIXELS * CHUNKS], w[STAGES][OUTPUTS * CHUNKS];
  Barrier there[STAGES], free[STAGES];
};

// x (batch, height, width, channels) in boxes of 64 channels of 16 x 8 pixels, zeros outside; w
// (outputs, side * side * channels) in boxes of 64 of 256 kernels.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    conv_hopper(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, const bf16 *bias,
                const bf16 *residual, bf16 *out, const int height, const int width, const int channels,
                const int outputs, const int side) {
  const int tiles_across = (width + ACROSS - 1) / ACROSS, tiles_down = (height + DOWN - 1) / DOWN;
  const int image = blockIdx.x / (tiles_across * tiles_down);
  const int top = blockIdx.x / tiles_across % tiles_down * DOWN, left = blockIdx.x % tiles_across * ACROSS;
  const int first_output = blockIdx.y * OUTPUTS;
  const int parts = channels / 64, steps = side * side * parts;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  Shared &shared = *reinterpret_cast<Shared *>(dynamic_shared());
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      start_barrier(&shared.there[i], 1);
      start_barrier(&shared.free[i], CONSUMERS / 32);
    }
    publish_barriers();
  }
  __syncthreads();

  if (threadIdx.x >= CONSUMERS) {
    leave_registers<24>();
    if (threadIdx.x == CONSUMERS) {
      for (int step = 0; step < steps; step++) {
        const int at = step % STAGES, turn = step / STAGES;
        const int tap = step / parts, channel = step % parts * 64;
        if (turn > 0) wait(&shared.free[at], turn - 1);
        arrive_and_expect(&shared.there[at], (PIXELS + OUTPUTS) * CHUNKS * 16);
        copy_box(shared.x[at], x, channel, left + tap % side - side / 2, top + tap / side - side / 2, image,
                 &shared.there[at]);
        copy_box(shared.w[at], w, tap * channels + channel, first_output, &shared.there[at]);
      }
    }
  } else {
    take_registers<240>();
    float sums[32][4] = {};
    for (int step = 0; step < steps; step++) {
      const int at = step % STAGES;
      wait(&shared.there[at], step / STAGES);
      const uint4 *const a = shared.x[at] + warp / 4 * 64 * CHUNKS, *const b = shared.w[at];
      pin(sums);
      begin_products();
#pragma unroll
      for (int i = 0; i < 4; i++) multiply_shared(sums, descriptor(a + 2 * i), descriptor(b + 2 * i));
      end_products();
      // The products of the previous step are done, so its stage may be refilled.
      wait_for_products<1>();
      if (step > 0 && lane == 0) arrive(&shared.free[(step - 1) % STAGES]);
    }
    wait_for_products<0>();
    pin(sums);

    // In both warpgroups: nothing reads the tiles any more.
    meet(1, CONSUMERS);
    bf16 *const results = reinterpret_cast<bf16 *>(&shared);
    const auto row_of = [=](int) { return warp * 16 + lane / 4; };
    const auto column_of = [=](int n) { return 8 * n + lane % 4 * 2; };
    keep<OUTPUTS>(results, sums, bias, first_output, outputs, row_of, column_of);
    meet(1, CONSUMERS);
    const auto pixel_of = [=](int row) {
      const int y = top + row / ACROSS, x = left + row % ACROSS;
      return y < height && x < width ? (image * height + y) * width + x : -1;
    };
    write_results<OUTPUTS>(results, residual, out, first_output, outputs, pixel_of);
  }
}
