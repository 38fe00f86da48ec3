// FlashAttention of every row of a batch: tiles of keys with a running softmax, so that no logits
// are stored.
//
// A block computes 64 queries of one key head, where query = token * group + the query head within
// the group: the query heads that share keys read them once. Grid (ceil(tokens * group / 64),
// kv_heads, rows of the batch), 128 threads, SHARED_BYTES<D> of dynamic shared memory. The scale is
// positive, and with `causal` there are at least as many keys as tokens.
//
// q and out (rows, tokens, heads, D). With `causal` the queries are the last positions, and none
// sees keys after its own.

#include "rows.cuh"

constexpr int TILE = 64;
constexpr int THREADS = 128;

// Queries, and two tiles each of keys and values: one in use, one being loaded.
template <int D> constexpr int SHARED_BYTES = 5 * TILE * D * int(sizeof(bf16));

// 64 rows of D numbers in shared memory. The 16-byte chunks of a row are swizzled: chunks of the
// same index of eight rows are in different banks.
template <int D> struct Tile {
  static constexpr int CHUNKS = D / 8;
  static constexpr int SPAN = CHUNKS < 8 ? CHUNKS : 8;
  uint4 *start;

  __device__ uint4 *at(int row, int chunk) const { return start + row * CHUNKS + (chunk ^ row * SPAN / 8 % SPAN); }

  // Starts to load 64 rows, `stride` numbers apart; rows from `count` on become zeros.
  __device__ void load(const bf16 *from, int count, size_t stride) const {
    constexpr int EVERY = THREADS / CHUNKS;
    static_assert(EVERY % SPAN == 0 && TILE % EVERY == 0, "the chunks of a thread trade places alike");
    const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    uint4 *const to = at(row, chunk);
    from += row * stride + chunk * 8;
    if (count >= TILE) {
#pragma unroll
      for (int i = 0; i < TILE; i += EVERY) copy_async(to + i * CHUNKS, from + i * stride, true);
    } else {
#pragma unroll
      for (int i = 0; i < TILE; i += EVERY) {
        const bool exists = row + i < count;
        copy_async(to + i * CHUNKS, exists ? from + i * stride : from - row * stride, exists);
      }
    }
  }
};

template <int D>
__device__ void attention(const bf16 *q, const Rows &batch, bf16 *out, int tokens, int heads, int kv_heads, float scale,
                          bool causal) {
  const int group = heads / kv_heads, rows = tokens * group, head = blockIdx.y;
  const int first = blockIdx.x * TILE, keys = batch.length[blockIdx.z];
  const bf16 *const k = batch.k[blockIdx.z] + head * D, *const v = batch.v[blockIdx.z] + head * D;
  q += size_t(blockIdx.z) * tokens * heads * D;
  out += size_t(blockIdx.z) * tokens * heads * D;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const auto query = [=](int row) { return (size_t(row / group) * heads + head * group + row % group) * D; };
  const size_t stride = size_t(kv_heads) * D;
  const auto seen = [=](int row) { return causal ? min(keys, keys - tokens + 1 + row / group) : keys; };

  uint4 *const shared = dynamic_shared();
  const auto tile = [=](int i) { return Tile<D>{shared + i * TILE * Tile<D>::CHUNKS}; };
  for (int i = threadIdx.x; i < TILE * Tile<D>::CHUNKS; i += THREADS) {
    const int row = i / Tile<D>::CHUNKS, chunk = i % Tile<D>::CHUNKS;
    const bool exists = first + row < rows;
    copy_async(tile(0).at(row, chunk), q + (exists ? query(first + row) + chunk * 8 : 0), exists);
  }
  tile(1).load(k, keys, stride);
  tile(3).load(v, keys, stride);
  wait_for_copies();
  __syncthreads();

  unsigned queries[D / 16][4];
#pragma unroll
  for (int i = 0; i < D / 16; i++) load_matrices(queries[i], tile(0).at(warp_row + lane % 16, 2 * i + lane / 16));

  // From here on a thread holds columns 2(lane % 4) and 2(lane % 4) + 1 of each eight: those of row
  // lane / 4 of the warp's 16 in elements 0 and 1, and those of the eighth row after it in 2 and 3.
  const int row[2] = {first + warp_row + lane / 4, first + warp_row + lane / 4 + 8};
  const int limit[2] = {seen(row[0]), seen(row[1])};
  const int all_see = seen(first), any_sees = seen(min(first + TILE, rows) - 1);
  const float to_base_2 = scale * 1.4426950408889634f;
  float sums[D / 8][4] = {}, total[2] = {}, top[2] = {-INFINITY, -INFINITY};

  for (int start = 0, turn = 0; start < any_sees; start += TILE, turn ^= 1) {
    // After the barrier all threads see this tile, and none reads the previous one any more.
    wait_for_copies();
    __syncthreads();
    if (start + TILE < any_sees) {
      const size_t next = (start + TILE) * stride;
      tile(2 - turn).load(k + next, keys - start - TILE, stride);
      tile(4 - turn).load(v + next, keys - start - TILE, stride);
    }
    if (first + warp_row >= rows) continue;

    float weights[TILE / 8][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
#pragma unroll
      for (int j = 0; j < TILE / 16; j++) {
        unsigned b[4];
        load_matrices(b, tile(1 + turn).at(16 * j + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
        multiply_add(weights[2 * j], queries[i], b[0], b[1]);
        multiply_add(weights[2 * j + 1], queries[i], b[2], b[3]);
      }
    }
    if (start + TILE > all_see) {
#pragma unroll
      for (int n = 0; n < TILE / 8; n++) {
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
      for (int n = 0; n < TILE / 8; n++) best = fmaxf(best, fmaxf(weights[n][2 * half], weights[n][2 * half + 1]));
      best = fmaxf(best, __shfl_xor_sync(ALL_LANES, best, 1));
      best = fmaxf(best, __shfl_xor_sync(ALL_LANES, best, 2));
      // Every row sees key 0, so that `best` is finite from the first tile on.
      const float fade = fast_exp2((top[half] - best) * to_base_2), shift = best * to_base_2;
      top[half] = best;
      total[half] *= fade;
#pragma unroll
      for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; c++) {
          weights[n][c] = fast_exp2(weights[n][c] * to_base_2 - shift);
          total[half] += weights[n][c];
        }
      }
#pragma unroll
      for (int n = 0; n < D / 8; n++) sums[n][2 * half] *= fade, sums[n][2 * half + 1] *= fade;
    }

#pragma unroll
    for (int j = 0; j < TILE / 16; j++) {
      const float(&low)[4] = weights[2 * j], (&high)[4] = weights[2 * j + 1];
      const unsigned a[4] = {pack(low[0], low[1]), pack(low[2], low[3]),
                             pack(high[0], high[1]), pack(high[2], high[3])};
#pragma unroll
      for (int i = 0; i < D / 16; i++) {
        unsigned b[4];
        load_transposed(b, tile(3 + turn).at(16 * j + lane % 16, 2 * i + lane / 16));
        multiply_add(sums[2 * i], a, b[0], b[1]);
        multiply_add(sums[2 * i + 1], a, b[2], b[3]);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    total[half] += __shfl_xor_sync(ALL_LANES, total[half], 1);
    total[half] += __shfl_xor_sync(ALL_LANES, total[half], 2);
    if (row[half] >= rows) continue;
    const float scaled = 1.0f / total[half];
    unsigned *const to = reinterpret_cast<unsigned *>(out + query(row[half])) + lane % 4;
#pragma unroll
    for (int n = 0; n < D / 8; n++) to[4 * n] = pack(sums[n][2 * half] * scaled, sums[n][2 * half + 1] * scaled);
  }
}

#define ATTENTION(D)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS) attention_bf16_d##D(                                           \
      const bf16 *q, const __grid_constant__ Rows batch, bf16 *out, const int tokens, const int heads,                 \
      const int kv_heads, const float scale, const int causal) {                                                       \
    static_assert(SHARED_BYTES<D> < 100 << 10, "more than every GPU of compute capability 8 has for a block");         \
    attention<D>(q, batch, out, tokens, heads, kv_heads, scale, causal != 0);                                          \
  }

ATTENTION(32)
ATTENTION(64)
ATTENTION(128)
