// Instructions without an intrinsic, or with a long one. All assembly is here and in hopper.cuh.

#ifndef PTX_CUH
#define PTX_CUH

#include <cuda_bf16.h>

using bf16 = __nv_bfloat16;

constexpr unsigned ALL_LANES = 0xffffffff;

// The dynamic shared memory.
__device__ inline uint4 *dynamic_shared() {
  extern __shared__ __align__(1024) uint4 reserved[];
  return reserved;
}

// Two numbers rounded to bf16, the first in the lower half.
__device__ inline unsigned pack(float low, float high) {
  unsigned both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// 2^x within 2^-22, relative; zero where that is subnormal.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Starts to copy 16 bytes into shared memory; without `exist` it writes zeros and reads nothing.
__device__ inline void copy_async(uint4 *to, const void *from, bool exist) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = exist ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

// Closes a group of copies.
__device__ inline void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most so many groups of copies of this thread are in flight; a barrier has to
// follow for those of others.
template <int GROUPS> __device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Waits for the copies that this thread started.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8x8 matrices: lanes 8i .. 8i + 7 point to the rows of the i-th, 16 bytes each, and of every
// matrix lane l gets elements 2(l % 4) and 2(l % 4) + 1 of row l / 4.
__device__ inline void load_matrices(unsigned (&m)[4], const uint4 *row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// The same, transposed.
__device__ inline void load_transposed(unsigned (&m)[4], const uint4 *row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// c += a b of 16x16 and 16x8 matrices, over a warp.
__device__ inline void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

constexpr int WIDTH = 8;

// What a thread moves at a time: 16 bytes.
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

#endif
