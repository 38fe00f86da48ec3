// Asynchronous matrix products of a warpgroup (four warps), and bulk copies of boxes into shared
// memory: compute capability 9.0 only.
//
// Operands are in shared memory in rows of 128 bytes, whose 16-byte chunks are swizzled: chunk c of
// row r is at c ^ r % 8.

#ifndef HOPPER_CUH
#define HOPPER_CUH

#include "../ptx.cuh"

__device__ inline unsigned address_of(const void *shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Descriptor of a matrix in shared memory: rows of 128 bytes, aligned to 1024 bytes. `far` is the
// distance in bytes between blocks of 64 columns of a transposed operand; others have one block.
__device__ inline unsigned long long descriptor(const uint4 *start, unsigned far = 16) {
  const unsigned address = address_of(start);
  // Eight rows are 1024 bytes; layout 1 swaps chunks within 128 bytes.
  return (address & 0x3ffff) >> 4 | (unsigned long long)(far >> 4) << 16 | 1024ull >> 4 << 32 | 1ull << 62;
}

// A barrier in shared memory between producers and consumers, turn by turn.
using Barrier = unsigned long long;

// By one thread, before any use; `publish_barriers` makes it visible.
__device__ inline void start_barrier(Barrier *barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(barrier)), "r"(arrivals) : "memory");
}
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(Barrier *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(barrier)) : "memory");
}

// Arrives, and expects so many bytes.
__device__ inline void arrive_and_expect(Barrier *barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)), "r"(bytes)
               : "memory");
}

// Waits until turn `turn`, from 0, is over.
__device__ inline void wait(Barrier *barrier, int turn) {
  int over = 0;
  while (!over) {
    asm volatile("{\n"
                 ".reg .pred over;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
                 "selp.s32 %0, 1, 0, over;\n"
                 "}\n"
                 : "=r"(over)
                 : "r"(address_of(barrier)), "r"(turn & 1)
                 : "memory");
  }
}

// Waits until `threads` threads, whole warps, have arrived at the barrier of this number, above 0.
__device__ inline void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Called by every thread of a warpgroup: gives up registers, or takes those that others have given
// up.
template <int COUNT> __device__ inline void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Layout of a tensor in global memory, and of its boxes in shared memory, made by the driver.
struct alignas(128) TensorMap {
  unsigned char opaque[128];
};

// Starts to copy a box from these coordinates on, of two, three or four dimensions; its bytes
// arrive at the barrier.
#define COPY(DIMENSIONS, COORDINATES)                                                                                  \
  "cp.async.bulk.tensor." DIMENSIONS ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" COORDINATES  \
  "}], [%2];"
__device__ inline void copy_box(uint4 *to, const TensorMap &map, int x, int y, Barrier *barrier) {
  asm volatile(COPY("2d", "%3, %4")::"r"(address_of(to)), "l"(&map), "r"(address_of(barrier)), "r"(x), "r"(y)
               : "memory");
}
__device__ inline void copy_box(uint4 *to, const TensorMap &map, int x, int y, int z, Barrier *barrier) {
  asm volatile(COPY("3d", "%3, %4, %5")::"r"(address_of(to)), "l"(&map), "r"(address_of(barrier)), "r"(x), "r"(y), "r"(z)
               : "memory");
}
__device__ inline void copy_box(uint4 *to, const TensorMap &map, int x, int y, int z, int u, Barrier *barrier) {
  asm volatile(COPY("4d", "%3, %4, %5, %6")::"r"(address_of(to)), "l"(&map), "r"(address_of(barrier)), "r"(x), "r"(y),
               "r"(z), "r"(u)
               : "memory");
}

// Makes this thread's copies and stores to shared memory visible to the products after the next
// barrier.
__device__ inline void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first of some products: hands them the registers that were written.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of products.
__device__ inline void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most so many groups are in flight.
template <int GROUPS> __device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// Keeps reads of these registers after this point.
template <int N> __device__ inline void pin(float (&x)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
}
template <int N> __device__ inline void pin(unsigned (&x)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(x[i][0]), "+r"(x[i][1]), "+r"(x[i][2]), "+r"(x[i][3])::"memory");
}

// Keeps the instructions that this positive number depends on before this point: the assembler
// would move them behind the wait for the products, which they are meant to overlap.
__device__ inline void finish_before_here(float x) {
  asm volatile("{\n"
               ".reg .pred never;\n"
               "setp.lt.f32 never, %0, 0f00000000;\n"
               "@never st.shared.f32 [%1], %0;\n"
               "}\n" ::"f"(x),
               "r"(0)
               : "memory");
}

#define FOUR(c, i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define SIXTEEN(c, i) FOUR(c, i), FOUR(c, i + 1), FOUR(c, i + 2), FOUR(c, i + 3)
#define REGISTERS_64                                                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "    \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "     \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// c = a bT, or c += a bT unless `first`, of 64x16 and 128x16 matrices in shared memory.
__device__ inline void multiply_shared(float (&c)[16][4], unsigned long long a, unsigned long long b, bool first) {
  asm volatile("{\n"
               ".reg .pred add;\n"
               "setp.eq.s32 add, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " REGISTERS_64 ", %64, %65, add, 1, 1, 0, 0;\n"
               "}\n"
               : SIXTEEN(c, 0), SIXTEEN(c, 4), SIXTEEN(c, 8), SIXTEEN(c, 12)
               : "l"(a), "l"(b), "r"(int(first)));
}

#define REGISTERS_128                                                                                                  \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "    \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "     \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, "     \
  "%68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, "     \
  "%90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

// c += a bT of 64x16 and 256x16 matrices in shared memory.
__device__ inline void multiply_shared(float (&c)[32][4], unsigned long long a, unsigned long long b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " REGISTERS_128 ", %128, %129, 1, 1, 1, 0, 0;\n"
               : SIXTEEN(c, 0), SIXTEEN(c, 4), SIXTEEN(c, 8), SIXTEEN(c, 12), SIXTEEN(c, 16), SIXTEEN(c, 20),
                 SIXTEEN(c, 24), SIXTEEN(c, 28)
               : "l"(a), "l"(b));
}

// c += a b of a 64x16 matrix in registers and a 16x128 one in shared memory.
__device__ inline void multiply_registers(float (&c)[16][4], const unsigned (&a)[4], unsigned long long b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " REGISTERS_64
               ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
               : SIXTEEN(c, 0), SIXTEEN(c, 4), SIXTEEN(c, 8), SIXTEEN(c, 12)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#endif
