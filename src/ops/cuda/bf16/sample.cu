// Samples codes as `generate::sampler` does: guidance, temperature, top-k, top-p, and a draw by a
// given number of (0, 1). One block per row.

#include "../ptx.cuh"

constexpr int THREADS = 256;
// The most candidates, far more than top-k: ties with the k-th are kept.
constexpr int MOST = 2048;
constexpr int ITEMS = MOST / THREADS;

using Key = unsigned long long;

// An unsigned number of the same order, and back.
__device__ inline unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ inline float unordered(unsigned x) { return __uint_as_float(x >> 31 ? x & ~(1u << 31) : ~x); }

// The most probable candidate has the largest key, and among equals the one with the lowest index.
__device__ inline Key key(float logit, int index) { return Key(ordered(logit)) << 32 | ~unsigned(index); }
__device__ inline float logit_of(Key key) { return unordered(unsigned(key >> 32)); }
__device__ inline unsigned index_of(Key key) { return ~unsigned(key); }

// The sum over the threads before this one; `total` is the sum over all.
template <class T> __device__ T sum_before(T value, T &total) {
  __shared__ T warps[THREADS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T upto = value;
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(ALL_LANES, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == 31) warps[warp] = upto;
  __syncthreads();
  T before = __shfl_up_sync(ALL_LANES, upto, 1), earlier = 0;
  if (lane == 0) before = 0;
  total = 0;
  for (int i = 0; i < THREADS / 32; i++) {
    if (i == warp) earlier = total;
    total += warps[i];
  }
  __syncthreads();
  return earlier + before;
}

// The largest key of all threads, for all of them; once per launch.
__device__ inline Key largest(Key mine) {
  __shared__ Key warps[THREADS / 32];
  for (int step = 16; step > 0; step /= 2) mine = max(mine, __shfl_xor_sync(ALL_LANES, mine, step));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  for (int i = 0; i < THREADS / 32; i++) mine = max(mine, warps[i]);
  return mine;
}

// A row of logits with guidance and temperature applied, rounded after every operation, as on the
// CPU.
struct Row {
  const bf16 *conditional, *unconditional;
  int columns;
  float guidance, temperature;

  // Calls f(index, logit) for this thread's share of the columns `from` to `to`, multiples of 8, in
  // ascending order.
  template <class F> __device__ void each(int from, int to, int step, F f) const {
    for (int i = from; i < to; i += step) {
      float c[WIDTH], u[WIDTH];
      read(c, conditional + i);
      if (guidance != 0.0f) {
        read(u, unconditional + i);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) c[j] = __fsub_rn(__fmul_rn(1.0f + guidance, c[j]), __fmul_rn(guidance, u[j]));
      }
#pragma unroll
      for (int j = 0; j < WIDTH; j++) f(i + j, temperature == 1.0f ? c[j] : c[j] / temperature);
    }
  }

  // All columns, neighbours by neighbouring threads.
  template <class F> __device__ void all(F f) const { each(threadIdx.x * WIDTH, columns, THREADS * WIDTH, f); }
};

// The k-th largest logit, k from 1, by radix: 11 bits, then 11, then 10, from the highest.
__device__ inline float select(const Row &row, int k) {
  constexpr int BITS = 11, BINS = 1 << BITS, SHARE = BINS / THREADS;
  __shared__ int counts[BINS], bin, rank;
  unsigned found = 0;
  for (int shift = 32 - BITS; shift > -BITS; shift -= BITS) {
    const int low = max(shift, 0), bits = BITS + min(shift, 0);
    for (int i = threadIdx.x; i < BINS; i += THREADS) counts[i] = 0;
    __syncthreads();
    row.all([&](int, float logit) {
      const unsigned number = ordered(logit);
      if (Key(number ^ found) >> (low + bits) == 0) atomicAdd(&counts[number >> low & (1 << bits) - 1], 1);
    });
    __syncthreads();
    // Every thread sums consecutive bins, the first thread the highest ones.
    int mine = 0, all;
#pragma unroll
    for (int i = 0; i < SHARE; i++) mine += counts[BINS - 1 - threadIdx.x * SHARE - i];
    int before = sum_before(mine, all);
#pragma unroll
    for (int i = 0; i < SHARE; i++) {
      const int at = BINS - 1 - threadIdx.x * SHARE - i, count = counts[at];
      if (before < k && k <= before + count) bin = at, rank = k - before;
      before += count;
    }
    __syncthreads();
    found |= unsigned(bin) << low;
    k = rank;
    __syncthreads();
  }
  return unordered(found);
}

// Sorts `count` keys in descending order, in an array padded to a power of two.
__device__ inline void sort(Key *keys, int count) {
  int size = 2;
  while (size < count) size *= 2;
  for (int i = count + threadIdx.x; i < size; i += THREADS) keys[i] = 0;
  __syncthreads();
  for (int width = 2; width <= size; width *= 2) {
    for (int step = width / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += THREADS) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const Key a = keys[low], b = keys[high];
        if ((a < b) == ((low & width) == 0)) keys[low] = b, keys[high] = a;
      }
      __syncthreads();
    }
  }
}

// Logits (positions, columns); columns are a multiple of 8. Unless guidance is 0, they become (1 +
// guidance) conditional
// - guidance unconditional. top_k is at most 1536. The code of a row with a NaN or without a finite
// logit is the largest unsigned number.
extern "C" __global__ void __launch_bounds__(THREADS)
    sample_bf16(const bf16 *conditional, const bf16 *unconditional, const double *uniforms, unsigned *codes,
                int columns, float guidance, float temperature, int top_k, float top_p) {
  __shared__ Key keys[MOST];
  __shared__ int cut, drawn, taken;
  const int position = blockIdx.x;
  const size_t offset = size_t(position) * columns;
  const Row guided{conditional + offset, unconditional + offset, columns, guidance, 1.0f};

  const bool greedy = temperature == 0.0f || top_k == 1;
  bool nan = false, finite = false;
  Key best = 0;
  guided.all([&](int i, float logit) {
    nan |= isnan(logit) || logit == INFINITY;
    finite |= isfinite(logit);
    // The sum makes zeros of either sign equal.
    best = max(best, key(logit + 0.0f, i));
  });
  nan = __syncthreads_or(nan);
  finite = __syncthreads_or(finite);
  if (nan || !finite) {
    if (threadIdx.x == 0) codes[position] = ~0u;
    return;
  }
  if (greedy) {
    best = largest(best);
    if (threadIdx.x == 0) codes[position] = index_of(best);
    return;
  }

  const Row row{guided.conditional, guided.unconditional, columns, guidance, temperature};
  const float threshold = select(row, min(top_k, columns));
  if (threadIdx.x == 0) taken = 0;
  __syncthreads();
  row.all([&](int i, float logit) {
    if (logit < threshold) return;
    const int at = atomicAdd(&taken, 1);
    if (at < MOST) keys[at] = key(logit, i);
  });
  __syncthreads();
  if (taken > MOST) {
    // Of the candidates that equal the last one, only the first fit. Every thread reads consecutive
    // columns.
    const int span = (columns / WIDTH + THREADS - 1) / THREADS * WIDTH;
    const int from = min(int(threadIdx.x) * span, columns), to = min(from + span, columns);
    int above = 0, equal = 0, all_above, all_equal;
    row.each(from, to, WIDTH, [&](int, float logit) { above += logit > threshold, equal += logit == threshold; });
    above = sum_before(above, all_above);
    equal = sum_before(equal, all_equal) + all_above;
    row.each(from, to, WIDTH, [&](int i, float logit) {
      if (logit > threshold) keys[above++] = key(logit, i);
      if (logit == threshold && equal < MOST) keys[equal++] = key(logit, i);
    });
  }
  int count = min(taken, MOST);
  if (threadIdx.x == 0) cut = drawn = count;
  sort(keys, count);

  // Unnormalised probabilities, a few consecutive ones per thread.
  const int share = (count + THREADS - 1) / THREADS, start = threadIdx.x * share;
  double p[ITEMS], mine = 0.0, total;
#pragma unroll
  for (int j = 0; j < ITEMS; j++) {
    p[j] = j < share && start + j < count ? exp(double(logit_of(keys[start + j]) - logit_of(keys[0]))) : 0.0;
    mine += p[j];
  }
  double before = sum_before(mine, total);
  if (top_p < 1.0f) {
    const double limit = double(top_p) * total;
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
      if (j < share && start + j < count && !(before <= limit)) atomicMin(&cut, start + j);
      before += p[j];
    }
    __syncthreads();
    count = max(cut, 1);
    mine = 0.0;
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
      if (start + j >= count) p[j] = 0.0;
      mine += p[j];
    }
    before = sum_before(mine, total);
  }
  const double mark = uniforms[position] * total;
#pragma unroll
  for (int j = 0; j < ITEMS; j++) {
    before += p[j];
    if (j < share && start + j < count && before >= mark) atomicMin(&drawn, start + j);
  }
  __syncthreads();
  // Rounding can leave a remainder after the last one.
  if (threadIdx.x == 0) codes[position] = index_of(keys[min(drawn, count - 1)]);
}
