// The machine below hopper.cuh on a GPU: PTX of sm_90a.
#pragma once
#include <cuda.h>

#define TC_MAP const __grid_constant__ tc::TensorMap

namespace tc {

using TensorMap = CUtensorMap;

TC_DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Barriers of shared memory: a phase is complete when `count` arrivals and all expected bytes have come. A wait names the parity of the phase that it wants to be over.
TC_DEVICE void barrier_init(uint64_t* barrier, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory"); }
TC_DEVICE void barriers_visible() { asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory"); }
TC_DEVICE void barrier_arrive(uint64_t* barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory"); }
TC_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
TC_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t over;
  do asm volatile("{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(over) : "r"(shared_address(barrier)), "r"(parity) : "memory");
  while (!over);
}

// The map's box at this column (a word) and row, to shared memory; its bytes count on the barrier.
TC_DEVICE void copy_tile(void* to, const TensorMap& map, int column, int row, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(to)), "l"(&map), "r"(column), "r"(row),
               "r"(shared_address(barrier))
               : "memory");
}

// Bytes that lie one after the other, multiples of 16 at such addresses, to shared memory; they count on the barrier.
TC_DEVICE void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes),
               "r"(shared_address(barrier))
               : "memory");
}

// The map's box at this column (a word) of [batch][outer][inner].
TC_DEVICE void copy_head(void* to, const TensorMap& map, int column, int inner, int outer, int batch, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(to)), "l"(&map), "r"(column),
               "r"(inner), "r"(outer), "r"(batch), "r"(shared_address(barrier))
               : "memory");
}

// As many pixels as the map says, a window's base each, from (w, h, n) on in the order of the output: their words from `channel` on, of the pixel (dw, dh) further.
TC_DEVICE void copy_window(void* to, const TensorMap& map, int channel, int w, int h, int n, int dw, int dh, uint64_t* barrier) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6], {%7, %8};" ::"r"(shared_address(to)), "l"(&map),
               "r"(channel), "r"(w), "r"(h), "r"(n), "r"(shared_address(barrier)), "h"((uint16_t)dw), "h"((uint16_t)dh)
               : "memory");
}

// A barrier of two warp groups, by number (0 is that of __syncthreads): one comes and goes on, the other waits for it.
TC_DEVICE void turn_give(int number) { asm volatile("bar.arrive %0, 256;" ::"r"(number) : "memory"); }
TC_DEVICE void turn_wait(int number) { asm volatile("bar.sync %0, 256;" ::"r"(number) : "memory"); }

// 2^x, 2 ulp; 0 for less than 2^-126.
TC_DEVICE float power_of_two(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Registers per thread of this warp group from here on.
template <int COUNT> TC_DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> TC_DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// Words that products asked for behind the next products_begin read from registers: they are computed before it.
TC_DEVICE void products_read(uint32_t (&a)[4]) { asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory"); }
TC_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
TC_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> TC_DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// Sums that products had in their hands until the wait before this.
template <int COUNT> TC_DEVICE void products_end(float (&c)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(c[i])::"memory");
}
template <int COUNT> TC_DEVICE void products_end(int (&c)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(c[i])::"memory");
}
// c += A B of a warp group (c = A B without `add`): 64 rows of A, N of B, 8 words of k each, in shared memory by descriptors. Lane l of warp w has, as g = l / 4, t = l % 4, in c[4 j ..]
// the columns 8 j + 2 t and the next of row 16 w + g, then those of row 16 w + g + 8.
template <class P, int N> struct Wgmma;
// c += A B (c = A B without `add`) where A is in registers, four words of two numbers a lane: row 16 w + g | g + 8 | g | g + 8, k = 2 t | 2 t | 2 t + 8 | 2 t + 8 and the next.
// ROWS_OF_K: rows of B are k (descriptor with `apart`), otherwise they are columns of the product, as those of Wgmma.
template <class P, int N, bool ROWS_OF_K = true> struct WgmmaRows;
#define TC_Q0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define TC_Q1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define TC_Q2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define TC_Q3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define TC_Q4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define TC_Q5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define TC_Q6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define TC_Q7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define TC_R0 TC_Q0 TC_Q1 TC_Q2 TC_Q3
#define TC_R1 TC_Q4 TC_Q5 TC_Q6 TC_Q7
#define TC_R2 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define TC_R3 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TC_C8(kind, i) kind(c[i]), kind(c[i + 1]), kind(c[i + 2]), kind(c[i + 3]), kind(c[i + 4]), kind(c[i + 5]), kind(c[i + 6]), kind(c[i + 7])
#define TC_C32(kind, i) TC_C8(kind, i), TC_C8(kind, i + 8), TC_C8(kind, i + 16), TC_C8(kind, i + 24)
#define TC_WGMMA(P, SIZE, types, scales, names, a_name, b_name, add_name, ...)                                                                                              \
  template <> struct Wgmma<P, SIZE> {                                                                                                                                       \
    static TC_DEVICE void multiply(P::Sum (&c)[SIZE / 2], uint64_t a, uint64_t b, bool add = true) {                                                                        \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " add_name ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #SIZE types " {" names "}, " a_name ", " b_name ", p" scales ";\n\t}" \
                   : __VA_ARGS__                                                                                                                                            \
                   : "l"(a), "l"(b), "r"((int)add));                                                                                                                        \
    }                                                                                                                                                                       \
  }
#define TC_WGMMAS(P, types, scales, kind)                                                                                                                  \
  TC_WGMMA(P, 64, types, scales, TC_R0, "%32", "%33", "%34", TC_C32(kind, 0));                                                                             \
  TC_WGMMA(P, 128, types, scales, TC_R0 TC_R1, "%64", "%65", "%66", TC_C32(kind, 0), TC_C32(kind, 32));                                                    \
  TC_WGMMA(P, 192, types, scales, TC_R0 TC_R1 TC_R2, "%96", "%97", "%98", TC_C32(kind, 0), TC_C32(kind, 32), TC_C32(kind, 64));                            \
  TC_WGMMA(P, 256, types, scales, TC_R0 TC_R1 TC_R2 TC_R3, "%128", "%129", "%130", TC_C32(kind, 0), TC_C32(kind, 32), TC_C32(kind, 64), TC_C32(kind, 96))
TC_WGMMAS(Bf16x2, "k16.f32.bf16.bf16", ", 1, 1, 0, 0", "+f");
TC_WGMMAS(Fp16x2, "k16.f32.f16.f16", ", 1, 1, 0, 0", "+f");
TC_WGMMAS(U8S8, "k32.s32.u8.s8", "", "+r");
TC_WGMMAS(E4m3x4, "k32.f32.e4m3.e4m3", ", 1, 1", "+f");
#define TC_WGMMA_ROWS(P, SIZE, types, names, a_names, b_name, add_name, turned_name, ...)                                                                                   \
  template <bool ROWS_OF_K> struct WgmmaRows<P, SIZE, ROWS_OF_K> {                                                                                                          \
    static TC_DEVICE void multiply(float (&c)[SIZE / 2], const uint32_t (&a)[4], uint64_t b, bool add = true) {                                                             \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, " add_name ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #SIZE types " {" names "}, {" a_names "}, " b_name ", p, 1, 1, " turned_name ";\n\t}"\
                   : __VA_ARGS__                                                                                                                                            \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)ROWS_OF_K));                                                               \
    }                                                                                                                                                                       \
  }
#define TC_F8(i) TC_C8("+f", i)
#define TC_F32(i) TC_C32("+f", i)
#define TC_WGMMAS_ROWS(P, types)                                                                                                                \
  TC_WGMMA_ROWS(P, 16, types, TC_Q0, "%8, %9, %10, %11", "%12", "%13", "%14", TC_F8(0));                                                        \
  TC_WGMMA_ROWS(P, 32, types, TC_Q0 TC_Q1, "%16, %17, %18, %19", "%20", "%21", "%22", TC_F8(0), TC_F8(8));                                      \
  TC_WGMMA_ROWS(P, 48, types, TC_Q0 TC_Q1 TC_Q2, "%24, %25, %26, %27", "%28", "%29", "%30", TC_F8(0), TC_F8(8), TC_F8(16));                     \
  TC_WGMMA_ROWS(P, 64, types, TC_R0, "%32, %33, %34, %35", "%36", "%37", "%38", TC_F32(0));                                                     \
  TC_WGMMA_ROWS(P, 80, types, TC_R0 TC_Q4, "%40, %41, %42, %43", "%44", "%45", "%46", TC_F32(0), TC_F8(32));                                    \
  TC_WGMMA_ROWS(P, 96, types, TC_R0 TC_Q4 TC_Q5, "%48, %49, %50, %51", "%52", "%53", "%54", TC_F32(0), TC_F8(32), TC_F8(40));                   \
  TC_WGMMA_ROWS(P, 112, types, TC_R0 TC_Q4 TC_Q5 TC_Q6, "%56, %57, %58, %59", "%60", "%61", "%62", TC_F32(0), TC_F8(32), TC_F8(40), TC_F8(48)); \
  TC_WGMMA_ROWS(P, 128, types, TC_R0 TC_R1, "%64, %65, %66, %67", "%68", "%69", "%70", TC_F32(0), TC_F32(32))
TC_WGMMAS_ROWS(Bf16x2, "k16.f32.bf16.bf16");
TC_WGMMAS_ROWS(Fp16x2, "k16.f32.f16.f16");

}  // namespace tc
