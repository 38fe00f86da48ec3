// As attention.cu, for heads of 128 numbers on compute capability 9.0: the products of a tile
// overlap the softmax of the next, and a third warpgroup, which gives up its registers, loads tiles
// in advance.
//
// A block computes 128 queries of one key head, in two warpgroups. Grid (ceil(tokens * group /
// 128), kv_heads, rows of the batch), 384 threads, and sizeof(Shared) bytes of dynamic shared
// memory.

#include "hopper.cuh"

constexpr int D = 128, TILE = 128, CONSUMERS = 256, THREADS = CONSUMERS + 128;
// 16-byte chunks of half a tile: TILE rows of 128 bytes.
constexpr int HALF_CHUNKS = TILE * 8;
constexpr int TILE_CHUNKS = 2 * HALF_CHUNKS, TILE_BYTES = TILE_CHUNKS * 16;
// Per launch.
constexpr int MAX_ROWS = 8;

// Keys and values (keys, kv_heads, D) of every row, in boxes of half a tile, and the number of
// keys.
struct Rows {
  TensorMap k[MAX_ROWS], v[MAX_ROWS];
  int length[MAX_ROWS];
};

// Queries, two tiles each of keys and values, and the barriers that say when each is full, and when
// it may be refilled.
struct Shared {
  uint4 q[TILE_CHUNKS], k[2][TILE_CHUNKS], v[2][TILE_CHUNKS];
  Barrier k_there[2], v_there[2], k_free[2], v_free[2];
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_hopper_d128(const bf16 *q, const __grid_constant__ Rows batch, bf16 *out, const int tokens,
                          const int heads, const int kv_heads, const float scale, const int causal) {
  const int group = heads / kv_heads, rows = tokens * group, head = blockIdx.y;
  const int first = blockIdx.x * TILE, keys = batch.length[blockIdx.z];
  q += size_t(blockIdx.z) * tokens * heads * D;
  out += size_t(blockIdx.z) * tokens * heads * D;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16, warpgroup = threadIdx.x / 128;
  const auto query = [=](int row) { return (size_t(row / group) * heads + head * group + row % group) * D; };
  const auto seen = [=](int row) { return causal ? min(keys, keys - tokens + 1 + row / group) : keys; };
  const int all_see = seen(first), any_sees = seen(min(first + TILE, rows) - 1);
  const int tiles = (any_sees + TILE - 1) / TILE;

  Shared &shared = *reinterpret_cast<Shared *>(dynamic_shared());
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      start_barrier(&shared.k_there[i], 1), start_barrier(&shared.v_there[i], 1);
      start_barrier(&shared.k_free[i], CONSUMERS / 32), start_barrier(&shared.v_free[i], CONSUMERS / 32);
    }
    publish_barriers();
  }
  __syncthreads();

  if (threadIdx.x >= CONSUMERS) {
    leave_registers<24>();
    if (threadIdx.x == CONSUMERS) {
      const auto load = [&](uint4 *tile, const TensorMap &map, int i, Barrier *there) {
        arrive_and_expect(there, TILE_BYTES);
        copy_box(tile, map, 0, head, i * TILE, there);
        copy_box(tile + HALF_CHUNKS, map, D / 2, head, i * TILE, there);
      };
      for (int i = 0; i < tiles; i++) {
        const int at = i % 2, turn = i / 2;
        if (turn > 0) wait(&shared.k_free[at], turn - 1);
        load(shared.k[at], batch.k[blockIdx.z], i, &shared.k_there[at]);
        if (turn > 0) wait(&shared.v_free[at], turn - 1);
        load(shared.v[at], batch.v[blockIdx.z], i, &shared.v_there[at]);
      }
    }
  } else {
    take_registers<240>();

    // The queries of this warpgroup.
    for (int i = threadIdx.x % 128; i < TILE_CHUNKS / 2; i += 128) {
      const int row = warpgroup * 64 + i / 16, chunk = i % 16;
      const bool exists = first + row < rows;
      uint4 *const to = shared.q + chunk / 8 * HALF_CHUNKS + row * 8 + (chunk % 8 ^ row % 8);
      copy_async(to, q + (exists ? query(first + row) + chunk * 8 : 0), exists);
    }
    wait_for_copies();
    publish_to_products();
    meet(1 + warpgroup, 128);

    // As in attention.cu: a thread holds columns 2(lane % 4) and the next of each eight, of two
    // rows.
    const int row[2] = {first + warp_row + lane / 4, first + warp_row + lane / 4 + 8};
    const int limit[2] = {seen(row[0]), seen(row[1])};
    const float to_base_2 = scale * 1.4426950408889634f;
    float sums[16][4] = {}, weights[16][4], total[2] = {}, top[2] = {-INFINITY, -INFINITY};
    unsigned p[8][4];

    const auto score = [&](int tile) {
      const uint4 *const a = shared.q + warpgroup * 64 * 8, *const b = shared.k[tile % 2];
#pragma unroll
      for (int i = 0; i < D / 16; i++) {
        const int at = i / 4 * HALF_CHUNKS + i % 4 * 2;
        multiply_shared(weights, descriptor(a + at), descriptor(b + at), i == 0);
      }
      end_products();
    };
    const auto add_values = [&](int tile) {
#pragma unroll
      for (int j = 0; j < TILE / 16; j++) {
        multiply_registers(sums, p[j], descriptor(shared.v[tile % 2] + j * 16 * 8, HALF_CHUNKS * 16));
      }
      end_products();
    };
    // Turns scores into weights; `fade` rescales the earlier sums.
    const auto weigh = [&](int start, float (&fade)[2]) {
      if (start + TILE > all_see) {
#pragma unroll
        for (int n = 0; n < 16; n++) {
#pragma unroll
          for (int c = 0; c < 4; c++) {
            if (start + 8 * n + lane % 4 * 2 + c % 2 >= limit[c / 2]) weights[n][c] = -INFINITY;
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float best = top[half];
#pragma unroll
        for (int n = 0; n < 16; n++) best = fmaxf(best, fmaxf(weights[n][2 * half], weights[n][2 * half + 1]));
        best = fmaxf(best, __shfl_xor_sync(ALL_LANES, best, 1));
        best = fmaxf(best, __shfl_xor_sync(ALL_LANES, best, 2));
        // Every row sees key 0, so that `best` is finite from the first tile on.
        fade[half] = fast_exp2((top[half] - best) * to_base_2);
        const float shift = best * to_base_2;
        top[half] = best;
        total[half] *= fade[half];
#pragma unroll
        for (int n = 0; n < 16; n++) {
#pragma unroll
          for (int c = 2 * half; c < 2 * half + 2; c++) {
            weights[n][c] = fast_exp2(weights[n][c] * to_base_2 - shift);
            total[half] += weights[n][c];
          }
        }
      }
    };
    const auto round_weights = [&] {
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const float(&low)[4] = weights[2 * j], (&high)[4] = weights[2 * j + 1];
        p[j][0] = pack(low[0], low[1]), p[j][1] = pack(low[2], low[3]);
        p[j][2] = pack(high[0], high[1]), p[j][3] = pack(high[2], high[3]);
      }
    };
    // Every warp has to arrive when it is done with a tile.
    const auto release = [=](Barrier *free) {
      if (lane == 0) arrive(free);
    };

    float fade[2];
    wait(&shared.k_there[0], 0);
    begin_products();
    score(0);
    wait_for_products<0>();
    pin(weights);
    release(&shared.k_free[0]);
    weigh(0, fade);
    round_weights();
    for (int i = 1; i < tiles; i++) {
      wait(&shared.k_there[i % 2], i / 2);
      wait(&shared.v_there[(i - 1) % 2], (i - 1) / 2);
      pin(sums);
      pin(p);
      begin_products();
      score(i);
      add_values(i - 1);
      wait_for_products<1>();
      pin(weights);
      release(&shared.k_free[i % 2]);
      weigh(i * TILE, fade);
      finish_before_here(total[0] + total[1]);
      wait_for_products<0>();
      pin(sums);
      pin(p);
      release(&shared.v_free[(i - 1) % 2]);
#pragma unroll
      for (int n = 0; n < 16; n++) {
#pragma unroll
        for (int c = 0; c < 4; c++) sums[n][c] *= fade[c / 2];
      }
      round_weights();
    }
    wait(&shared.v_there[(tiles - 1) % 2], (tiles - 1) / 2);
    pin(sums);
    pin(p);
    begin_products();
    add_values(tiles - 1);
    wait_for_products<0>();
    pin(sums);

#pragma unroll
    for (int half = 0; half < 2; half++) {
      total[half] += __shfl_xor_sync(ALL_LANES, total[half], 1);
      total[half] += __shfl_xor_sync(ALL_LANES, total[half], 2);
      if (row[half] >= rows) continue;
      const float scaled = 1.0f / total[half];
      unsigned *const to = reinterpret_cast<unsigned *>(out + query(row[half])) + lane % 4;
#pragma unroll
      for (int n = 0; n < 16; n++) to[4 * n] = pack(sums[n][2 * half] * scaled, sums[n][2 * half + 1] * scaled);
    }
  }
}
